"""A file of prompts, one a line, within bounds."""

from __future__ import annotations

from pathlib import Path

from loraweld.errors import RequestError

MAX_FILE_BYTES = 1_000_000
MAX_PROMPTS = 1_000


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, without blank ones and without white space at their ends.

    Raises:
        RequestError: no such file, not text, nothing in it, or more than its bounds.
    """
    if not path.is_file():
        raise RequestError("is not a file; --behaviour takes a text file with one prompt a line", path=path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(f"cannot be read: {error.strerror}", path=path) from None
    if len(data) > MAX_FILE_BYTES:
        raise RequestError(
            f"holds {path.stat().st_size} bytes, limit for prompts is {MAX_FILE_BYTES}; a few dozen prompts are enough",
            path=path,
        )
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"is not text in UTF-8 (byte {error.start})", path=path) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RequestError("holds no prompt, expected one a line", path=path)
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"holds {len(prompts)} prompts, limit is {MAX_PROMPTS}", path=path)
    return prompts
