"""Codes of 8 bit, each times the scale of its block: FP8 in blocks, rows or as a whole, and int8 with a scale a row.

Sources: DeepSeek-V3's `weight_dequant` (`weight_scale_inv`, blocks of 128 x 128); compressed-tensors
`float-quantized` and `int-quantized`; fbgemm_fp8 of transformers 5.23; ModelOpt FP8; LLM.int8 (`SCB`) of
bitsandbytes 0.50.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, PartLayout, encoded
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import CheckpointError

FP8 = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("F32", "BF16", "F16")
# Where the scales lie beside "….weight".
_SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Value = code · scale of its block of `block` (rows, columns) · `factor`; a scale stored as `scale_shape`."""

    kind: str
    code_dtypes: tuple[str, ...]
    block: tuple[int, int]
    scale_name: str
    scale_dtypes: tuple[str, ...]
    scale_shape: tuple[int, ...]
    factor: float = 1.0

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem = name.removesuffix("weight")
        return {
            CODES: PartLayout(name=name, dtypes=self.code_dtypes, shape=shape),
            "scale": PartLayout(name=stem + self.scale_name, dtypes=self.scale_dtypes, shape=self.scale_shape),
            "format": PartLayout(name=f"{stem}weight_format", dtypes=("U8",), shape=(), required=False),
        }


def find(tensors: Mapping[str, StoredTensor], *, block: Sequence[int] | None, dtype: str) -> Iterator[EncodedTensor]:
    """Yield the weights of 8-bit codes with scales among `tensors`.

    `block` is the block size that the config names, `dtype` the code of the decoded values.

    Raises:
        CheckpointError: codes without a scale, or one that does not fit.
    """
    for name, codes in tensors.items():
        if not name.endswith("weight") or codes.dtype not in (*FP8, "I8"):
            continue
        stem = name.removesuffix("weight")
        if stem + "SCB" in tensors:
            encoding = _int8(codes)
        else:
            encoding = _by_scale(codes, _scale(stem, codes, tensors), block)
        yield encoded(name, dtype, codes.shape, encoding, tensors)


def _int8(codes: StoredTensor) -> Scaled:
    return Scaled(
        kind="LLM.int8",
        code_dtypes=("I8",),
        block=(1, max(1, codes.cols)),
        scale_name="SCB",
        scale_dtypes=("F32",),
        scale_shape=codes.shape[:1],
        factor=0.007874015718698502,  # float32(1/127)
    )


def _scale(stem: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    for suffix in _SCALES:
        if stem + suffix in tensors:
            return tensors[stem + suffix]
    raise CheckpointError(
        f"tensor {codes.name!r} holds {codes.dtype} codes, but no scale ({', '.join(_SCALES)}) lies beside it",
        path=codes.path,
    )


def _by_scale(codes: StoredTensor, scale: StoredTensor, block: Sequence[int] | None) -> Scaled:
    rows, cols = (*codes.shape, 1)[:2] if len(codes.shape) == 2 else (codes.rows, codes.cols)
    if scale.rows * scale.cols == 1:
        size = (max(1, rows), max(1, cols))
    elif scale.shape in ((rows,), (rows, 1)):
        size = (1, max(1, cols))
    elif block is not None and len(codes.shape) == 2:
        size = (int(block[0]), int(block[1]))
        if scale.shape != (-(-rows // size[0]), -(-cols // size[1])):
            raise CheckpointError(
                f"tensor {scale.name!r} is {scale.shape}, expected one scale for each block of {size} of {codes.shape}",
                path=scale.path,
            )
    else:
        raise CheckpointError(
            f"tensor {scale.name!r} is {scale.shape}: neither one scale, nor one a row of {codes.shape}, and the "
            "config names no block size",
            path=scale.path,
        )
    return Scaled(
        kind="FP8" if codes.dtype in FP8 else "int8",
        code_dtypes=(codes.dtype,),
        block=size,
        scale_name=scale.name.rpartition(".")[2],
        scale_dtypes=_FLOATS,
        scale_shape=scale.shape,
    )
