"""What the user asks for: every option parsed and checked once, at the edge."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path

from loraweld.errors import OutputError, RequestError
from loraweld.gguf_types import parse_quantization

SAVE_METHODS = ("merged_16bit", "lora", "gguf")
DTYPES = ("auto", "bfloat16", "float16", "float32")
MIN_MEMORY_BYTES = 64 * 10**6
MAX_SIZE_BYTES = 2**62
MAX_WORKERS = 256
DEFAULT_WORKERS = 4
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """A merge as asked for. Sizes in bytes; `base` None means the one the adapter's config names."""

    adapters: tuple[Path, ...]
    output: Path
    base: str | None
    save_method: str
    dtype: str
    max_shard_bytes: int | None
    max_memory_bytes: int
    workers: int
    overwrite: bool
    resume: bool
    tokenizer: Path | None
    gguf_types: tuple[str, ...]
    keep_merged: bool


def make_request(
    adapter: PathLike | Sequence[PathLike],
    *,
    output: PathLike,
    base: PathLike | None = None,
    save_method: str = "merged_16bit",
    dtype: str = "auto",
    max_shard_size: int | str | None = None,
    max_memory: int | str = "512MB",
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    tokenizer: PathLike | None = None,
    gguf_type: str | Sequence[str] | None = None,
    keep_merged: bool = False,
) -> MergeRequest:
    """Check the options and return them as one value.

    Raises:
        RequestError: an unknown name, a size that cannot be read or is too small, no adapter.
        OutputError: the output's name is none that the file system takes.
    """
    adapters = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    if not adapters:
        raise RequestError("no adapter was given; expected one or more PEFT folders")
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise RequestError(f"workers is {workers}, expected 1 to {MAX_WORKERS}")
    method = _choice("save_method", save_method, SAVE_METHODS)
    return MergeRequest(
        adapters=tuple(Path(path) for path in adapters),
        output=_output(Path(output)),
        base=None if base is None else os.fspath(base),
        save_method=method,
        dtype=_choice("dtype", dtype, DTYPES),
        max_shard_bytes=None if max_shard_size is None else parse_size("max_shard_size", max_shard_size),
        max_memory_bytes=_memory(max_memory),
        workers=workers or DEFAULT_WORKERS,
        overwrite=overwrite,
        resume=resume,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        gguf_types=_gguf_types(method, gguf_type, keep_merged),
        keep_merged=keep_merged,
    )


def parse_size(option: str, value: int | str) -> int:
    """Return `value` in bytes: an int, or a string as "5GB" (decimal) or "5GiB" (binary).

    Raises:
        RequestError: not a size, or not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(str(value))
        if match is None or match[2].upper() not in _UNITS:
            raise RequestError(f"{option} is {value!r}, expected a size such as 500MB, 5GB or 5GiB")
        size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if not 1 <= size <= MAX_SIZE_BYTES:
        raise RequestError(f"{option} is {value!r}, expected more than zero bytes and at most 4 EiB")
    return size


def _output(path: Path) -> Path:
    """A link stands for the folder it points to: that is where the model appears."""
    try:
        return path.resolve() if path.is_symlink() else path
    except OSError as error:
        raise OutputError(f"output {str(path)[:200]}: {error.strerror}") from None


def _memory(value: int | str) -> int:
    size = parse_size("max_memory", value)
    if size < MIN_MEMORY_BYTES:
        raise RequestError(f"max_memory is {value!r}, the least that works is {MIN_MEMORY_BYTES // 10**6}MB")
    return size


def _gguf_types(method: str, gguf_type: str | Sequence[str] | None, keep_merged: bool) -> tuple[str, ...]:
    if method == "gguf":
        return parse_quantization("q8_0" if gguf_type is None else gguf_type)
    given = {"gguf_type": gguf_type is not None, "keep_merged": keep_merged}
    for name in (name for name, is_given in given.items() if is_given):
        raise RequestError(f"{name} has no effect with save_method {method}, only with gguf; leave it out")
    return ()


def _choice(option: str, value: str, valid: Sequence[str]) -> str:
    normal = re.sub(r"[\s-]+", "_", str(value).strip().lower())
    if normal in valid:
        return normal
    close = get_close_matches(normal, valid, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RequestError(f"{option} is {value!r}, expected one of {', '.join(valid)}{hint}")
