"""One table of dtypes: the codes of the safetensors format, their sizes and their names elsewhere.

Source: the format's specification, https://huggingface.co/docs/safetensors/en/index#format, and the
`Dtype` enumeration of safetensors 0.8.0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type: `code` in a safetensors header, `torch_name` an attribute of torch ("" if it has none)."""

    code: str
    bits: int
    torch_name: str

    @property
    def is_plain_float(self) -> bool:
        """True for types whose stored value is the weight itself, without a scale kept elsewhere."""
        return self.code in ("F64", "F32", "F16", "BF16")


DTYPES: dict[str, DType] = {
    dtype.code: dtype
    for dtype in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4, ""),
        DType("F6_E2M3", 6, ""),
        DType("F6_E3M2", 6, ""),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8, "float8_e5m2"),
        DType("F8_E4M3", 8, "float8_e4m3fn"),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16"),
        DType("BF16", 16, "bfloat16"),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32"),
        DType("C64", 64, "complex64"),
        DType("F64", 64, "float64"),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
    )
}

CODE_BY_TORCH_NAME = {dtype.torch_name: dtype.code for dtype in DTYPES.values() if dtype.torch_name}
FLOAT_CODE_BY_NAME = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
NAME_BY_FLOAT_CODE = {code: name for name, code in FLOAT_CODE_BY_NAME.items()}


def is_plain_float(code: str) -> bool:
    """Return whether tensors of this code are weights as they stand (no scale, no packing)."""
    return DTYPES[code].is_plain_float


def num_bytes(code: str, num_elements: int) -> int:
    """Return the payload size of `num_elements` elements; sub-byte types are packed without gaps."""
    return (DTYPES[code].bits * num_elements + 7) // 8
