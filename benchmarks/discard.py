"""Merge as the command does, but throw the output away, hashed or not: what a merge takes besides its disk.

python benchmarks/discard.py BASE ADAPTER [none|crc32|blake2b|sha256]
"""

from __future__ import annotations

import hashlib
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from loraweld.execute.run import run_plan
from loraweld.execute.sizing import Anywhere
from loraweld.preparation import plan_request
from loraweld.request import make_request
from loraweld.sinks.journal import NoJournal
from loraweld.sinks.system import keep_freed_memory

HASHES: dict[str, Callable[[memoryview], object]] = {
    "none": lambda data: None,
    "crc32": zlib.crc32,
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}


class Discard(Anywhere):
    """Has the verbs of a sink; hashes what it is given, piece by piece, and forgets it."""

    files_at_once: int | None = None

    def __init__(self, hashed: Callable[[memoryview], object]) -> None:
        self.journal = NoJournal()
        self._hashed = hashed
        self._lock = threading.Lock()
        self.num_bytes = 0

    def create(self, name: str, size: int, *, aligned: bool) -> None:
        pass

    def write_at(self, name: str, offset: int, buffer: memoryview, count: int) -> None:
        self._hashed(buffer[:count])
        with self._lock:
            self.num_bytes += count

    def end_stretch(self, name: str) -> None:
        pass

    def copy(self, name: str, source: Path) -> None:
        pass

    def write_text(self, name: str, text: str) -> None:
        pass

    def make_durable(self, names: Iterable[str]) -> None:
        pass

    def finish(self, name: str, size: int) -> None:
        pass

    def publish(self) -> None:
        pass


def main() -> None:
    """Run the command line."""
    base, adapter, *hashed = sys.argv[1:]
    keep_freed_memory()
    made, _ = plan_request(make_request(adapter, base=base, output="discarded"))
    sink = Discard(HASHES[hashed[0] if hashed else "none"])
    run_plan(made, sink, closing=lambda result: {}, progress=lambda count: None)
    print(sink.num_bytes)


if __name__ == "__main__":
    main()
