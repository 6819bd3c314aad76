"""The journal of a merge: which items are finished and durable, so that the same command continues.

One line of JSON first: the merge's identity and the inode of the folder that holds its output. Whatever name that
folder has by now, the journal speaks of it and of no other. Then one item per line, with the numbers that were noted
of it. Lines are appended only after the bytes of their items are durable, so a line is never ahead of the data; a torn
last line is ignored. The identity takes a hash of the adapters: the first note waits for it, or the
comparison with an earlier journal, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

Noted = Mapping[str, Sequence[float]]


class Journal:
    """Appends finished items; knows those of an earlier run of the same merge."""

    def __init__(self, file: BinaryIO, done: Noted, head: Callable[[], bytes] | None = None) -> None:
        self.done = done
        self._file = file
        self._head = head  # which is not written yet

    @classmethod
    def begin(cls, path: Path, identity: Callable[[], str], model: Path) -> Journal:
        """Start the journal of a merge into the empty folder `model`."""
        return cls(path.open("wb"), {}, lambda: _line(_head(identity, model)))

    @classmethod
    def resume(cls, path: Path, identity: Callable[[], str], model: Path) -> Journal | None:
        """Continue the journal of the same merge into the same folder, None if there is none."""
        head, done, size = read_journal(path)
        if not is_head(head, identity, model):
            return None
        file: BinaryIO = path.open("r+b")
        with _closed_if_failed(file):
            file.truncate(size)
            file.seek(size)
        return cls(file, done)

    def append(self, items: Noted) -> None:
        """Note items whose bytes are durable; returns when the note is."""
        lines = [_line(item) for item in items.items()]
        if self._head is not None:
            lines.insert(0, self._head())
            self._head = None
        self._file.write(b"".join(lines))
        _sync(self._file)

    def close(self) -> None:
        self._file.close()


def is_head(head: object, identity: Callable[[], str], model: Path) -> bool:
    """Whether this is the first line of the journal of this merge into this folder; None is that of no journal."""
    return head is not None and head == _head(identity, model)


def _head(identity: Callable[[], str], model: Path) -> object:
    return {"merge": identity(), "folder": folder_number(model)}


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def folder_number(folder: Path) -> int:
    """The inode of a folder, which renaming does not change; 0 if it does not exist."""
    return folder.stat().st_ino if folder.is_dir() else 0


def read_journal(path: Path) -> tuple[object, Noted, int]:
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


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What a part of a merge has noted.

    `outcome` is what it has found out, None until it is done, and for good if several runs have made it: then nobody
    knows all of it.
    """

    done: Noted = field(default_factory=dict)
    outcome: Mapping[str, Any] | None = None


class PartJournal:
    """The journal of one part: a document that is written anew as a whole, so that an object can hold it.

    `save` makes it durable.
    """

    def __init__(self, identity: str, record: PartRecord, save: Callable[[bytes], None]) -> None:
        self.done = record.done
        self.outcome = record.outcome
        self._identity = identity
        self._save = save

    def append(self, items: Noted) -> None:
        """Note items whose bytes are durable; returns when the note is."""
        self.done = {**self.done, **items}
        self._write()

    def conclude(self, outcome: Mapping[str, Any] | None) -> None:
        """Note that the part is done."""
        self.outcome = outcome
        self._write()

    def forget(self) -> None:
        """Take back all that was noted."""
        self.done = {}
        self.conclude(None)

    def close(self) -> None:
        """Nothing is open."""

    def _write(self) -> None:
        self._save(json.dumps({"merge": self._identity, "done": self.done, "outcome": self.outcome}).encode())


def read_part(data: bytes | None, identity: str) -> PartRecord:
    """Return what a part of the merge `identity` has noted; nothing if `data` is of another merge or damaged."""
    try:
        found = json.loads(data or b"{}")
        if found["merge"] == identity:
            done = {str(key): [float(value) for value in values] for key, values in found["done"].items()}
            return PartRecord(done, found["outcome"])
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return PartRecord()


class NoJournal:
    """The journal of a run that writes nothing."""

    def __init__(self) -> None:
        self.done: Noted = {}

    def append(self, items: Noted) -> None:
        """Note nothing."""
