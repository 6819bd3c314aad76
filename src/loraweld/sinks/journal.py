"""The journal of a merge: which items are finished and durable, so that the same command continues.

One line of JSON first: the merge's identity and the inode of the folder that holds its output. Whatever name that
folder has by now, the journal speaks of it and of no other. Then one item per line, with what was measured while it
was made. Lines are appended only after
the bytes of their items are durable, so a line is never ahead of the data; a torn last line is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

Measured = Mapping[str, Sequence[float]]


class Journal:
    """Appends finished items; knows those of an earlier run of the same merge."""

    def __init__(self, file: BinaryIO, done: Measured) -> None:
        self.done = done
        self._file = file

    @classmethod
    def begin(cls, path: Path, identity: str, model: Path) -> Journal:
        """Start the journal of a merge into the empty folder `model`."""
        file: BinaryIO = path.open("wb")
        head = {"merge": identity, "folder": folder_number(model)}
        with _closed_if_failed(file):
            file.write(json.dumps(head).encode() + b"\n")
            _sync(file)
        return cls(file, {})

    @classmethod
    def resume(cls, path: Path, identity: str, model: Path) -> Journal | None:
        """Continue the journal of the same merge into the same folder, None if there is none."""
        head, done, size = read_journal(path)
        if head != {"merge": identity, "folder": folder_number(model)}:
            return None
        file: BinaryIO = path.open("r+b")
        with _closed_if_failed(file):
            file.truncate(size)
            file.seek(size)
        return cls(file, done)

    def append(self, items: Measured) -> None:
        """Note items whose bytes are durable; returns when the note is."""
        self._file.write(b"".join(json.dumps(item).encode() + b"\n" for item in items.items()))
        _sync(self._file)

    def close(self) -> None:
        self._file.close()


def folder_number(folder: Path) -> int:
    """The inode of a folder, which renaming does not change; 0 if it does not exist."""
    return folder.stat().st_ino if folder.is_dir() else 0


def read_journal(path: Path) -> tuple[object, Measured, int]:
    """Return (first line, finished items, bytes of whole lines); the first line is None without a journal."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, {}, 0
    whole = data[: data.rfind(b"\n") + 1]
    try:
        head, *items = [json.loads(line) for line in whole.splitlines()]
        done = {str(key): [float(value) for value in values] for key, values in items}
    except (ValueError, TypeError):
        return None, {}, 0
    return head, done, len(whole)


@contextmanager
def _closed_if_failed(file: BinaryIO) -> Iterator[None]:
    """Close `file` without another word if the block fails: what it has buffered may fail again."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            file.close()
        raise


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class NoJournal:
    """The journal of a run that writes nothing."""

    def __init__(self) -> None:
        self.done: Measured = {}

    def append(self, items: Measured) -> None:
        """Note nothing."""
