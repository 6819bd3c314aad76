"""Positioned reads from the weight files, shared by all threads."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraweld.checkpoint.mounted import mounted
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import CheckpointError

MAX_OPEN = 16  # files that nobody reads at the moment, kept open for the next read


@dataclass(slots=True)
class _Open:
    """A descriptor and the number of threads that read from it now."""

    descriptor: int
    readers: int = 0


class Reader:
    """Keeps a few descriptors, those used last; every read fills its buffer or raises."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset` of `path`.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        memory = mounted(path)
        if memory is not None:
            memory.read_into(offset, buffer)
            return
        try:
            with self._borrowed(path) as descriptor:
                self._fill(descriptor, path, offset, buffer)
        except OSError as error:
            raise CheckpointError(f"cannot be read at byte {offset}: {error.strerror}", path=path) from None

    def read(self, tensor: StoredTensor, start: int, count: int) -> bytearray:
        """Return `count` bytes of `tensor` from byte `start` of its data."""
        data = bytearray(count)
        self.read_into(tensor.path, tensor.offset + start, memoryview(data))
        return data

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            for one in self._open.values():
                os.close(one.descriptor)
            self._open.clear()

    @contextmanager
    def _borrowed(self, path: Path) -> Iterator[int]:
        """Yield a descriptor that stays open within the block."""
        with self._lock:
            one = self._open.get(path) or self._opened(path)
            self._open.move_to_end(path)
            one.readers += 1
        try:
            yield one.descriptor
        finally:
            with self._lock:
                one.readers -= 1

    def _opened(self, path: Path) -> _Open:
        self._close_idle(MAX_OPEN - 1)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            if error.errno != errno.EMFILE or not self._close_idle(0):
                raise
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._open[path] = _Open(descriptor)
        return self._open[path]

    def _close_idle(self, kept: int) -> bool:
        """Close the files that were not used for longest, down to `kept`; return whether there was any to close."""
        idle = [path for path, one in self._open.items() if not one.readers]
        closing = idle[: max(0, len(self._open) - kept)]
        for path in closing:
            os.close(self._open.pop(path).descriptor)
        return bool(closing)

    def _fill(self, descriptor: int, path: Path, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._read(descriptor, offset + done, buffer[done:])
            if count == 0:
                raise CheckpointError(
                    f"ended at byte {offset + done}, expected {len(buffer) - done} more; did it change?", path=path
                )
            done += count

    def _read(self, descriptor: int, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [buffer], offset)
        with self._lock:  # Windows has no positioned read
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(buffer))
        buffer[: len(data)] = data
        return len(data)
