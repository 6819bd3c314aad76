"""Codes of 8 bit, each times the scale of its block: FP8 in blocks, rows or as a whole, and int8 with a scale a row.

Sources: DeepSeek-V3's `weight_dequant` (`weight_scale_inv`, blocks of 128 x 128); compressed-tensors
0.20 `float-quantized` and `int-quantized`; fbgemm_fp8 of transformers 5.23; ModelOpt FP8; LLM.int8 (`SCB`) of
bitsandbytes 0.50.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, PartLayout, encoded
from loraweld.checkpoint.stored import StoredTensor, read_bytes
from loraweld.errors import CheckpointError

MAX_UNIT_ROWS = 256
FP8 = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("F32", "BF16", "F16", "F8_E8M0")
# Where the scales lie beside "….weight".
_SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Value = (code - zero) · scale of its block of `block` (rows, columns) · `factor`; scales stored as `scale_shape`.

    Only integers may have zeros, and `symmetric` ones need none.
    """

    kind: str
    code_dtypes: tuple[str, ...]
    block: tuple[int, int]
    scale_name: str
    scale_dtypes: tuple[str, ...]
    scale_shape: tuple[int, ...]
    factor: float = 1.0
    symmetric: bool = True
    has_format: bool = False
    streams: bool = True

    def unit_rows(self, shape: tuple[int, ...]) -> int:
        return 1 if self.is_of_all_rows(shape) else self.block[0]

    def is_of_all_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether a scale is that of all rows, and they are many: it is known before the first of them is encoded."""
        return self.block[0] >= shape[0] > MAX_UNIT_ROWS

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem = name.removesuffix("weight")
        zero = PartLayout(
            name=f"{stem}weight_zero_point", dtypes=("I8",), shape=self.scale_shape, required=not self.symmetric
        )
        return {
            CODES: PartLayout(name=name, dtypes=self.code_dtypes, shape=shape),
            "scale": PartLayout(name=stem + self.scale_name, dtypes=self.scale_dtypes, shape=self.scale_shape),
            **({"zero": zero} if self.kind == "int8" else {}),
            **(
                {"format": PartLayout(name=f"{stem}weight_format", dtypes=("U8",), shape=())} if self.has_format else {}
            ),
        }


def llm_int8(shape: tuple[int, int], *, has_format: bool = True) -> Scaled:
    """Return the encoding of LLM.int8; newer files say in a tensor of its own how the codes lie."""
    return Scaled(
        kind="LLM.int8",
        code_dtypes=("I8",),
        block=(1, max(1, shape[1])),
        scale_name="SCB",
        scale_dtypes=("F32",),
        scale_shape=shape[:1],
        factor=0.007874015718698502,  # float32(1/127)
        has_format=has_format,
    )


def fp8_rows(shape: tuple[int, int]) -> Scaled:
    """Return the encoding of compressed-tensors `float-quantized` with a scale a row."""
    return Scaled(
        kind="FP8",
        code_dtypes=("F8_E4M3",),
        block=(1, shape[1]),
        scale_name="weight_scale",
        scale_dtypes=("BF16", "F32", "F16", "F8_E8M0"),
        scale_shape=(shape[0], 1),
    )


def find(
    tensors: Mapping[str, StoredTensor],
    *,
    codes: Sequence[str],
    blocks: Sequence[tuple[int, int]],
    dtype: str,
    symmetric: bool = True,
) -> Iterator[EncodedTensor]:
    """Yield the weights with scales among `tensors` whose codes are of the dtypes `codes`.

    `blocks` are the block sizes that the config names, `dtype` the code of the decoded values.

    Raises:
        CheckpointError: codes without a scale, or one that does not fit.
    """
    for name, tensor in tensors.items():
        if not name.endswith("weight") or tensor.dtype not in codes:
            continue
        stem = name.removesuffix("weight")
        if len(tensor.shape) != 2:
            raise CheckpointError(
                f"tensor {name!r} holds {tensor.dtype} codes of shape {tensor.shape}, expected a matrix",
                path=tensor.path,
            )
        if stem + "SCB" in tensors:
            rows, cols = tensor.shape
            encoding = llm_int8((rows, cols), has_format=f"{stem}weight_format" in tensors)
        else:
            encoding = _by_scale(tensor, _scale(stem, tensor, tensors), blocks, symmetric)
        weight = encoded(name, dtype, tensor.shape, encoding, tensors)
        _check_format(weight.part("format"))
        yield weight


def _check_format(stored: StoredTensor | None) -> None:
    """Old bitsandbytes also stored codes in the order of its kernels; 0 means row by row."""
    if stored is not None and read_bytes(stored) != b"\0":
        raise CheckpointError(f"tensor {stored.name!r} says that the codes do not lie row by row", path=stored.path)


def _scale(stem: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    for suffix in _SCALES:
        if stem + suffix in tensors:
            return tensors[stem + suffix]
    raise CheckpointError(
        f"tensor {codes.name!r} holds {codes.dtype} codes, but no scale ({', '.join(_SCALES)}"
        f"{', SCB' if codes.dtype == 'I8' else ''}) lies beside it",
        path=codes.path,
    )


def _by_scale(codes: StoredTensor, scale: StoredTensor, blocks: Sequence[tuple[int, int]], symmetric: bool) -> Scaled:
    return Scaled(
        kind="FP8" if codes.dtype in FP8 else "int8",
        code_dtypes=(codes.dtype,),
        block=_block(codes, scale, blocks),
        scale_name=scale.name.rpartition(".")[2],
        scale_dtypes=_FLOATS,
        scale_shape=scale.shape,
        symmetric=symmetric,
    )


def _block(codes: StoredTensor, scale: StoredTensor, blocks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the rows and columns that share a scale: all, a row, or the one block that gives as many scales."""
    rows, cols = codes.shape
    if math.prod(scale.shape) == 1:
        return max(1, rows), max(1, cols)
    if scale.shape in ((rows,), (rows, 1)):
        return 1, max(1, cols)
    fitting = [size for size in blocks if scale.shape == (-(-rows // size[0]), -(-cols // size[1]))]
    if len(fitting) == 1:
        return fitting[0]
    raise CheckpointError(
        f"tensor {scale.name!r} is {scale.shape}: neither one scale, nor one a row of {codes.shape}, nor one for each "
        f"block of a size that quantization_config names ({', '.join(map(str, blocks)) or 'none'})",
        path=scale.path,
    )
