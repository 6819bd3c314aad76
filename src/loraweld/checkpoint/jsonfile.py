"""JSON files of strangers: bounded in size and depth, an object at the top, errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraweld.errors import CheckpointError

MAX_JSON_BYTES = 200_000_000  # the largest tokenizer.json known is about 35 MB, an index of 100k tensors 10 MB


def read_json_object(path: Path, *, error: type[CheckpointError] | type[Exception] = CheckpointError) -> dict[str, Any]:
    """Return the object in `path`.

    Raises:
        CheckpointError: (or `error`) missing, unreadable, too large, not JSON or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path}: holds {path.stat().st_size} bytes, limit for JSON is {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as cause:
        raise error(f"{path}: is not valid JSON ({cause})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: is a JSON {type(value).__name__}, expected an object")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Return the object in `path`, {} if there is no such file.

    Raises:
        CheckpointError: it cannot be read as an object.
    """
    return read_json_object(path) if path.exists() else {}


def dump_json(value: object) -> str:
    """Return the text of a JSON file as transformers writes it: two spaces, one newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
