"""Files of a temporary folder that stand for others: each counts as the one that it was taken from.

The folder has another name in each process; what it stands for has the same.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# What identifies the content of each file there at the moment, by its name.
Look = Callable[[], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file is taken from: a name that is the same in every process, what identified its content then, and
    what asks for that again, of all files of the same place.
    """

    name: str
    identity: str
    look: Look


_origins: dict[Path, Origin] = {}
_lock = threading.Lock()


def stand_for(owner: object, path: Path, origin: Origin) -> None:
    """Let `path` stand for `origin` for as long as `owner` lives."""
    with _lock:
        assert path not in _origins
        _origins[path] = origin
    weakref.finalize(owner, _remove, path)


def origin_of(path: Path) -> Origin | None:
    """Return what `path` stands for, None if for itself."""
    return _origins.get(path)


def place_of(path: Path) -> str:
    """Return where `path` lies as a user knows it."""
    origin = origin_of(path)
    return origin.name if origin is not None else str(path)


def _remove(path: Path) -> None:
    with _lock:
        del _origins[path]
