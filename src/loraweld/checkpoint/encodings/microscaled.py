"""4-bit floats (E2M1) with a scale for each small block along the inputs: MXFP4 and NVFP4.

- MXFP4: blocks of 32, scales are powers of two stored as a biased exponent (E8M0). Source: OCP Microscaling
  Formats 1.0. gpt-oss stores experts as (experts, outputs, inputs / 32, 16) and a model has them as
  (experts, inputs, outputs): decoded weights are transposed. Source: `convert_moe_packed_tensors` of transformers 5.23.
- NVFP4: blocks of 16, scales in FP8 E4M3, and one float32 scale for the weight: divided by
  (compressed-tensors, `weight_global_scale`) or multiplied with (ModelOpt, `weight_scale_2`).
The first of two codes is in the low four bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, PartLayout, encoded
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import CheckpointError

MX_BLOCK, NV_BLOCK = 32, 16


@dataclass(frozen=True, slots=True)
class MxFp4:
    """gpt-oss experts; decoded (experts, inputs, outputs)."""

    kind: str = "MXFP4"
    streams: bool = True

    def unit_rows(self, shape: tuple[int, ...]) -> int:
        """Rows are inputs, codes lie by outputs: an expert at a time."""
        return shape[1]

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        experts, inputs, outputs = shape
        blocks = inputs // MX_BLOCK
        return {
            CODES: PartLayout(name=f"{name}_blocks", dtypes=("U8",), shape=(experts, outputs, blocks, MX_BLOCK // 2)),
            "scale": PartLayout(name=f"{name}_scales", dtypes=("U8", "F8_E8M0"), shape=(experts, outputs, blocks)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class NvFp4:
    """`divides`: the weight's own scale divides the blocks' scales (compressed-tensors) or multiplies them."""

    codes_name: str
    global_name: str
    global_shape: tuple[int, ...]
    divides: bool
    kind: str = "NVFP4"
    streams: bool = True

    def unit_rows(self, shape: tuple[int, ...]) -> int:
        return 1

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem, (rows, cols) = name.removesuffix("weight"), shape
        return {
            CODES: PartLayout(name=stem + self.codes_name, dtypes=("U8",), shape=(rows, cols // 2)),
            "scale": PartLayout(name=f"{stem}weight_scale", dtypes=("F8_E4M3",), shape=(rows, -(-cols // NV_BLOCK))),
            "global_scale": PartLayout(name=stem + self.global_name, dtypes=("F32",), shape=self.global_shape),
        }


def find_mxfp4(tensors: Mapping[str, StoredTensor], *, dtype: str) -> Iterator[EncodedTensor]:
    """Yield the MXFP4 weights, decoded to `dtype`.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    for name, codes in tensors.items():
        if name.endswith("_blocks") and codes.dtype == "U8":
            if len(codes.shape) != 4 or codes.shape[3] != MX_BLOCK // 2:
                raise CheckpointError(
                    f"tensor {name!r} is {codes.shape}, expected (experts, outputs, inputs / 32, 16)", path=codes.path
                )
            experts, outputs, blocks, _ = codes.shape
            shape = experts, blocks * MX_BLOCK, outputs
            yield encoded(name.removesuffix("_blocks"), dtype, shape, MxFp4(), tensors)


def find_nvfp4(tensors: Mapping[str, StoredTensor], *, dtype: str) -> Iterator[EncodedTensor]:
    """Yield the NVFP4 weights, decoded to `dtype`.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    for codes_name, global_name in (("weight_packed", "weight_global_scale"), ("weight", "weight_scale_2")):
        for name, codes in tensors.items():
            stem, _, last = name.rpartition(".")
            stem += "."
            scale = tensors.get(f"{stem}weight_scale")
            if last != codes_name or codes.dtype != "U8" or len(codes.shape) != 2 or scale is None:
                continue
            whole = tensors.get(stem + global_name)
            encoding = NvFp4(
                codes_name=codes_name,
                global_name=global_name,
                global_shape=whole.shape if whole is not None and whole.rows * whole.cols == 1 else (1,),
                divides=codes_name == "weight_packed",
            )
            yield encoded(f"{stem}weight", dtype, (codes.shape[0], codes.shape[1] * 2), encoding, tensors)
