"""The names of GGUF types: llama.cpp's, and those that other tools have for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from loraweld.errors import RequestError

NOT_QUANTIZED = "not_quantized"  # the dtype that the folder stores
CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")
QUANTISER_TYPES = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m"),
    *("q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs"),
)
NEED_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")
# Unsloth's names, llama.cpp's short names, and the names of the float dtypes elsewhere.
ALIASES = {
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "fp32": "f32",
    "float32": "f32",
    "fp16": "f16",
    "float16": "f16",
    "bfloat16": "bf16",
}
# Source: llama.cpp's tools/quantize/README.md, for Llama 3.1 8B; what is missing there, by the types' blocks.
BITS_PER_WEIGHT = {
    **dict(f32=32.0, f16=16.0, bf16=16.0, q8_0=8.5, q6_k=6.57, q5_k_m=5.71, q5_k_s=5.58, q5_1=6.1, q5_0=5.6),
    **dict(q4_k_m=4.9, q4_k_s=4.67, q4_1=5.1, q4_0=4.65, iq4_nl=4.69, iq4_xs=4.46, iq3_m=3.77, iq3_s=3.67),
    **dict(q3_k_l=4.3, q3_k_m=4.0, q3_k_s=3.65, q2_k=3.16),
}
_TYPE_OF_DTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_KNOWN = (NOT_QUANTIZED, *CONVERTER_TYPES, *QUANTISER_TYPES)


def parse_quantization(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the GGUF types that `names` (a list, or a text with commas) mean, each once.

    `not_quantized` stays until the folder is known, see `known_types`.

    Raises:
        RequestError: no name, an unknown one, or a type that needs an importance matrix.
    """
    types = tuple(dict.fromkeys(_type(name) for name in (names.split(",") if isinstance(names, str) else names)))
    if not types:
        raise RequestError("no GGUF type was given; expected for example q8_0")
    return types


def stored_type(dtype: str) -> str:
    """Return the type that keeps weights as they are, whose dtype in a safetensors header is this."""
    return _TYPE_OF_DTYPE.get(dtype, "f32")


def known_types(names: Sequence[str], stored: str) -> tuple[str, ...]:
    """Return parsed names with the type that a folder stores in the place of `not_quantized`."""
    return tuple(dict.fromkeys(stored if name == NOT_QUANTIZED else name for name in names))


def _type(name: object) -> str:
    normal = re.sub(r"[\s-]+", "_", str(name).strip().lower())
    normal = ALIASES.get(normal, normal)
    if normal in _KNOWN:
        return normal
    if normal in NEED_IMPORTANCE:
        raise RequestError(f"GGUF type {name!r} is known but not offered: it needs an importance matrix (imatrix)")
    valid = (NOT_QUANTIZED, "fast_quantized", "quantized", *CONVERTER_TYPES, *QUANTISER_TYPES)
    close = get_close_matches(normal, (*valid, *ALIASES), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RequestError(f"GGUF type is {name!r}, expected one of {', '.join(valid)}{hint}")
