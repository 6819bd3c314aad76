"""The journal of a merge: which items are finished and durable, so that the same command continues.

One line of JSON first: the merge's identity. Then one item per line. Lines are appended only after the bytes of
their items are durable, so a line is never ahead of the data; a torn last line is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


class Journal:
    """Appends finished items; knows those of an earlier run of the same merge."""

    def __init__(self, file: BinaryIO, done: frozenset[str], *, is_new: bool) -> None:
        self.done = done
        self.is_new = is_new
        self._file = file

    @classmethod
    def open(cls, path: Path, identity: str, *, fresh: bool) -> Journal:
        """Continue the journal at `path` if it is of the merge `identity`, else begin a new one."""
        known = None if fresh else _read(path, identity)
        if known is None:
            file: BinaryIO = path.open("wb")
            file.write(json.dumps({"merge": identity}).encode() + b"\n")
            _sync(file)
            return cls(file, frozenset(), is_new=True)
        done, size = known
        file = path.open("r+b")
        file.truncate(size)
        file.seek(size)
        return cls(file, done, is_new=False)

    def append(self, keys: Iterable[str]) -> None:
        """Note items whose bytes are durable; returns when the note is."""
        self._file.write(b"".join(json.dumps(key).encode() + b"\n" for key in keys))
        _sync(self._file)

    def close(self) -> None:
        self._file.close()


def _read(path: Path, identity: str) -> tuple[frozenset[str], int] | None:
    """Return (finished items, bytes of whole lines), None if there is no journal of this merge."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    try:
        if not lines or json.loads(lines[0]) != {"merge": identity}:
            return None
        return frozenset(str(json.loads(line)) for line in lines[1:]), len(whole)
    except ValueError:
        return None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class NoJournal:
    """The journal of a run that writes nothing."""

    done: frozenset[str] = frozenset()

    def append(self, keys: Iterable[str]) -> None:
        """Note nothing."""
