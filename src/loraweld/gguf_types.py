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
_KNOWN = (NOT_QUANTIZED, *CONVERTER_TYPES, *QUANTISER_TYPES)


def parse_quantization(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the GGUF types that `names` mean, each once; `not_quantized` stays until the folder is known.

    Raises:
        RequestError: no name, an unknown one, or a type that needs an importance matrix.
    """
    types = tuple(dict.fromkeys(_type(name) for name in ([names] if isinstance(names, str) else names)))
    if not types:
        raise RequestError("no quantization type was given; expected for example q8_0")
    return types


def _type(name: object) -> str:
    normal = re.sub(r"[\s-]+", "_", str(name).strip().lower())
    normal = ALIASES.get(normal, normal)
    if normal in _KNOWN:
        return normal
    if normal in NEED_IMPORTANCE:
        raise RequestError(f"quantization {name!r} is known but not offered: it needs an importance matrix (imatrix)")
    valid = (NOT_QUANTIZED, "fast_quantized", "quantized", *CONVERTER_TYPES, *QUANTISER_TYPES)
    close = get_close_matches(normal, (*valid, *ALIASES), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RequestError(f"quantization is {name!r}, expected one of {', '.join(valid)}{hint}")
