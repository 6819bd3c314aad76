"""A folder as the output of a merge whose parts are made by several processes, on one machine or on many that share it.

    parent/.NAME.loraweld/merge          which merge is prepared, and the inode of the folder that holds its output
    parent/.NAME.loraweld/part-3-of-64   the journal of a part
    parent/.NAME.loraweld/model/         the output while it grows (see `folder`)

The parts hold the lock of the place together; to prepare, to publish and to discard takes it alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loraweld.checkpoint.mounted import mounted
from loraweld.errors import OutputError
from loraweld.sinks.folder import (
    TAKEN,
    Complete,
    FolderSink,
    locked_place,
    remove_staging,
    restore_interrupted_replace,
    staging_folder,
)
from loraweld.sinks.journal import PartJournal, PartRecord, folder_number, read_part

_HEAD_NAME = "merge"


class SharedFolder:
    """Prepares, fills and publishes an output folder, for the merge `identity`."""

    def __init__(self, target: Path, *, identity: str, overwrite: bool) -> None:
        self._target = target.absolute()
        self._staging = staging_folder(target)
        self._identity = identity
        self._overwrite = overwrite

    def copies(self, source: Path) -> bool:
        """Whether a whole file is best copied as one."""
        return mounted(source) is None

    def starts_from(self, name: str, source: Path) -> bool:
        """A clone would have to be made before the parts begin."""
        return False

    def least_bytes(self, size: int) -> int:
        """Any number of bytes can be written."""
        return 0

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Make the place ready for the parts; what an earlier run of the same merge has made stays.

        Raises:
            OutputError: another merge is running there, or the output exists.
        """
        if self._target.is_dir() and any(self._target.iterdir()) and not self._overwrite:
            raise OutputError(TAKEN, path=self._target)
        with locked_place(self._target, self._staging):
            restore_interrupted_replace(self._target, self._staging)
            if self.is_prepared():
                return
            for path in self._staging.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            (self._staging / "model").mkdir()
            _write(self._staging / _HEAD_NAME, json.dumps(self._head()).encode())

    @contextmanager
    def part(self, name: str) -> Iterator[FolderSink]:
        """Yield the sink of a part, which only this process may make now.

        Raises:
            OutputError: nothing is prepared, or another process makes the same part.
        """
        with locked_place(self._target, self._staging, shared=True):
            self._check_prepared()
            path = self._staging / name
            with locked_place(self._target, self._staging / f"{name}.lock"):
                journal = PartJournal(self._identity, self._record(path), lambda data: _write(path, data))
                sink = FolderSink(self._target, self._staging, journal, overwrite=self._overwrite)
                journal.done = {key: values for key, values in journal.done.items() if sink.has(key)}
                try:
                    yield sink
                finally:
                    sink.close()

    def records(self) -> dict[str, PartRecord]:
        """Return what the parts have noted, by their names."""
        found = sorted(self._staging.glob("part-*-of-*"))
        return {path.name: self._record(path) for path in found if path.is_file() and path.suffix != ".new"}

    def was_published(self) -> bool:
        """Whether the output is there, and a killed run has left what lies beside it; that is removed."""
        if self._is_of(self._target) and not (self._staging / "model").exists():
            with locked_place(self._target, self._staging):
                remove_staging(self._staging)
            return True
        return False

    @contextmanager
    def publisher(self, complete: Complete | None) -> Iterator[FolderSink]:
        """Yield the sink that completes and publishes what the parts have made.

        Raises:
            OutputError: nothing is prepared, or a part is being made.
        """
        with locked_place(self._target, self._staging):
            self._check_prepared()
            journal = PartJournal(self._identity, PartRecord(), lambda data: None)
            sink = FolderSink(self._target, self._staging, journal, overwrite=self._overwrite, complete=complete)
            try:
                yield sink
            finally:
                sink.close()

    def discard(self) -> None:
        """Remove what was made and is not published."""
        if self._staging.exists():
            with locked_place(self._target, self._staging):
                remove_staging(self._staging)

    def _head(self) -> Mapping[str, object]:
        return {"merge": self._identity, "folder": folder_number(self._staging / "model")}

    def is_prepared(self) -> bool:
        """Whether the place is ready for parts of this very merge."""
        return self._is_of(self._staging / "model")

    def _is_of(self, folder: Path) -> bool:
        """Whether `folder` is the one that was prepared for this merge, whatever its name is by now."""
        wanted = {"merge": self._identity, "folder": folder_number(folder)}
        try:
            return bool(json.loads((self._staging / _HEAD_NAME).read_bytes()) == wanted)
        except (OSError, ValueError):
            return False

    def _check_prepared(self) -> None:
        if not self.is_prepared():
            raise OutputError("is not prepared for this plan; make the plan again with --save", path=self._target)

    def _record(self, path: Path) -> PartRecord:
        return read_part(path.read_bytes() if path.is_file() else None, self._identity)


def _write(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all, durably."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
