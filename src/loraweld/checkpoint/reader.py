"""Positioned reads from the weight files, shared by all threads."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from loraweld.checkpoint.mounted import mounted
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import CheckpointError


class Reader:
    """Keeps one descriptor per file; every read fills its buffer or raises."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
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
            descriptor = self._descriptor(path)
            done = 0
            while done < len(buffer):
                count = self._read(descriptor, offset + done, buffer[done:])
                if count == 0:
                    raise CheckpointError(
                        f"ended at byte {offset + done}, expected {len(buffer) - done} more; did it change?",
                        path=path,
                    )
                done += count
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
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return self._descriptors[path]

    def _read(self, descriptor: int, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [buffer], offset)
        with self._lock:  # Windows has no positioned read
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(buffer))
        buffer[: len(data)] = data
        return len(data)
