"""Paths whose bytes are not in a file: an object in memory serves them for as long as it is mounted."""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from loraweld.checkpoint.opening import open_regular


class MountedFile(Protocol):
    """What reading needs of a file: its size, and its bytes at any place, from any thread."""

    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""


_mounted: dict[Path, MountedFile] = {}
_lock = threading.Lock()


@contextmanager
def mount(path: Path, file: MountedFile) -> Iterator[None]:
    """Serve the bytes of `path`, a name that no other mount has, from `file` within the block."""
    _add(path, file)
    try:
        yield
    finally:
        _remove(path)


def mount_for(owner: object, path: Path, file: MountedFile) -> None:
    """Serve the bytes of `path` from `file` for as long as `owner` lives."""
    _add(path, file)
    weakref.finalize(owner, _remove, path)


def _add(path: Path, file: MountedFile) -> None:
    with _lock:
        assert path not in _mounted
        _mounted[path] = file


def _remove(path: Path) -> None:
    with _lock:
        del _mounted[path]


def exists(path: Path) -> bool:
    """Whether there is something to read at `path`, in a file or mounted."""
    return path in _mounted or path.exists()


def mounted_in(folder: Path) -> list[Path]:
    """Return the paths in `folder` whose bytes are not in files."""
    return [path for path in list(_mounted) if path.parent == folder]


def mounted(path: Path) -> MountedFile | None:
    """Return what serves the bytes of `path`, None if they are in a file."""
    return _mounted.get(path)


def open_stored(path: Path) -> BinaryIO:
    """Open `path` for reading, wherever its bytes are.

    Raises:
        OSError: as `open` does.
        CheckpointError: not a regular file, or a link that leads out of its folder.
    """
    file = mounted(path)
    return open_regular(path) if file is None else cast(BinaryIO, _Stream(file))


class _Stream(io.RawIOBase):
    """A mounted file as a stream."""

    def __init__(self, file: MountedFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._at = offset
        return offset

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        count = max(0, min(len(view), self._file.size - self._at))
        self._file.read_into(self._at, view[:count])
        self._at += count
        return count
