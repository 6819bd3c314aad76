"""An output that is already there: instead of writing, compare. The same merge again proves it or refuses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loraweld.checkpoint.mounted import mounted
from loraweld.errors import OutputError
from loraweld.sinks.folder import FolderSink
from loraweld.sinks.journal import NoJournal

_PIECE_BYTES = 1 << 20


class ExistingSink:
    """Has the verbs of a folder sink; every byte must be there already."""

    files_at_once: int | None = None

    def __init__(self, target: Path) -> None:
        self.journal = NoJournal()
        self._target = target
        self._expected: set[str] = set()

    def create(self, name: str, size: int, *, aligned: bool = True) -> None:
        """Check that file `name` is there with `size` bytes."""
        self._expected.add(name)
        path = self._target / name
        if not path.is_file() or path.stat().st_size != size:
            raise self._differs(name)

    def write_at(self, name: str, offset: int, buffer: memoryview, count: int) -> None:
        """Check that the file holds these bytes there."""
        with (self._target / name).open("rb") as file:
            file.seek(offset)
            if file.read(count) != buffer[:count]:
                raise self._differs(name)

    def least_bytes(self, size: int) -> int:
        """Any number of bytes can be compared."""
        return 0

    def end_stretch(self, name: str) -> None:
        """What was written is compared already."""

    def copies(self, source: Path) -> bool:
        """Whether a whole file is compared as one."""
        return mounted(source) is None

    def starts_from(self, name: str, source: Path) -> bool:
        """All of it is compared."""
        return False

    def copy(self, name: str, source: Path) -> None:
        """Check that `name` equals `source`."""
        self.create(name, source.stat().st_size)
        with source.open("rb") as one, (self._target / name).open("rb") as other:
            while piece := one.read(_PIECE_BYTES):
                if other.read(len(piece)) != piece:
                    raise self._differs(name)

    def write_text(self, name: str, text: str) -> None:
        """Check that `name` holds this text."""
        self._expected.add(name)
        path = self._target / name
        if not path.is_file() or path.read_bytes() != text.encode():
            raise self._differs(name)

    def make_durable(self, names: Iterable[str]) -> None:
        """Nothing was written."""

    def finish(self, name: str, size: int) -> None:
        """Nothing was opened."""

    def publish(self) -> None:
        """Check that there is nothing else."""
        found = {
            path.relative_to(self._target).as_posix()
            for folder, _, names in os.walk(self._target)
            for path in (Path(folder) / name for name in names)
        }
        for name in sorted(found - self._expected):
            raise self._differs(name)

    def _differs(self, name: str) -> OutputError:
        return OutputError(
            f"exists and is not the result of this merge (first difference: {name}); "
            "give --overwrite to replace it, or choose another output",
            path=self._target,
        )


class RepeatedSink(FolderSink):
    """Makes the output again beside the one that is there and compares, where it cannot be done piece by piece."""

    def publish(self) -> None:
        """Check that the output holds the same files, to the byte, and nothing else; remove what was made for it."""
        self.complete()
        try:
            existing = ExistingSink(self._target)
            for path in sorted(path for path in self._output.rglob("*") if path.is_file()):
                existing.copy(path.relative_to(self._output).as_posix(), path)
            existing.publish()
        finally:
            self.clean_up()
