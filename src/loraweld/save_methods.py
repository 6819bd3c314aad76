"""The forms in which a result is saved: their names, other names for them, and the options that each has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from loraweld.errors import RequestError

SAVE_METHODS = ("merged_16bit", "merged_4bit", "merged_8bit", "merged_fp8", "preserve", "lora", "gguf")
# Other names: the method, and an option with the value that the name implies.
_ALIASES: dict[str, tuple[str, str, str]] = {
    "16bit": ("merged_16bit", "", ""),
    **{name: ("merged_16bit", "dtype", "float16") for name in ("fp16", "float16", "f16", "merged_fp16")},
    **{name: ("merged_16bit", "dtype", "bfloat16") for name in ("bf16", "bfloat16", "merged_bf16")},
    **{name: ("merged_4bit", "", "") for name in ("4bit", "merged_4bit_forced", "forced_merged_4bit", "bnb_4bit")},
    "nf4": ("merged_4bit", "quant_type", "nf4"),
    "fp4": ("merged_4bit", "quant_type", "fp4"),
    **{name: ("merged_8bit", "", "") for name in ("8bit", "int8", "llm_int8", "bnb_8bit")},
    **{name: ("merged_fp8", "", "") for name in ("fp8", "fp8_dynamic")},
}
# Exports that other tools have under these names.
_NOT_OFFERED = ("w4a16", "w8a16", "w8a8", "nvfp4", "mxfp4", "mxfp8", "gptq", "awq", "torchao", "torchao_int8", "ggml")
# The options that only some save methods have.
ONLY_FOR = {
    "quant_type": ("merged_4bit",),
    "double_quant": ("merged_4bit",),
    "blocksize": ("merged_4bit",),
    "quantizer": ("merged_4bit", "preserve"),
    "skip_modules": ("merged_4bit", "merged_8bit", "merged_fp8"),
    "gguf_type": ("gguf",),
    "keep_merged": ("gguf",),
    "rounding": ("merged_16bit",),
}


def parse_save_method(value: str) -> tuple[str, dict[str, str]]:
    """Return the method that a name means, and the option that the name implies.

    Raises:
        RequestError: unknown, or known from elsewhere but not offered.
    """
    if normal_name(value) in map(normal_name, _NOT_OFFERED):
        raise RequestError(f"save_method {value!r} is known but not offered; offered are {', '.join(SAVE_METHODS)}")
    names = {normal_name(name): (name, "", "") for name in SAVE_METHODS}
    names |= {normal_name(name): meant for name, meant in _ALIASES.items()}
    method, option, implied = names[nearest_name("save_method", value, names, shown=SAVE_METHODS)]
    return method, {option: implied} if option else {}


def normal_name(value: object) -> str:
    """Return a name without what people spell differently: case, blanks, hyphens, underscores."""
    return re.sub(r"[\s_-]+", "", str(value).lower())


def nearest_name(option: str, value: object, valid: Iterable[str], *, shown: Iterable[str] | None = None) -> str:
    """Return the normal name of `value`, one of `valid`.

    Raises:
        RequestError: it is none of them; names the nearest.
    """
    valid = list(valid)
    normal = normal_name(value)
    if normal in valid:
        return normal
    names = list(shown or valid)
    by_normal = {normal_name(name): name for name in names}
    close = get_close_matches(normal, valid, n=1)
    hint = f"; did you mean {by_normal.get(close[0], close[0])}?" if close else ""
    raise RequestError(f"{option} is {value!r}, expected one of {', '.join(names)}{hint}")
