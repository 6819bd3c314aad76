"""JSON files of strangers: bounded in size and depth, an object at the top, errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraweld.checkpoint.opening import open_regular
from loraweld.checkpoint.parsing import parse_json
from loraweld.errors import CheckpointError, LoraweldError

MAX_JSON_BYTES = 64_000_000  # the largest tokenizer.json known is about 35 MB, an index of 100k tensors 10 MB


def read_json_object(
    path: Path, *, error: type[LoraweldError] = CheckpointError, unique_names: bool = True
) -> dict[str, Any]:
    """Return the object in `path`; `unique_names`: refuse one that has a name twice.

    Raises:
        LoraweldError: (as `error`) missing, unreadable, not a file, too large, not JSON or not an object.
    """
    try:
        with open_regular(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise error(f"holds {path.stat().st_size} bytes, limit for JSON is {MAX_JSON_BYTES}", path=path)
        value = parse_json(data, unique_names=unique_names)
    except OSError as cause:
        raise error(f"cannot be read: {cause.strerror}", path=path) from None
    except ValueError as cause:
        raise error(f"is not valid JSON ({cause}); file damaged?", path=path) from None
    except CheckpointError as cause:
        raise (cause if isinstance(cause, error) else error(str(cause))) from None
    if not isinstance(value, dict):
        raise error(f"is a JSON {type(value).__name__}, expected an object", path=path)
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
