"""Merge as the command does, but throw the output away: what a merge takes besides its disk.

python benchmarks/discard.py BASE ADAPTER
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from loraweld.execute.run import run_plan
from loraweld.execute.sizing import Anywhere
from loraweld.preparation import plan_request
from loraweld.request import make_request
from loraweld.sinks.journal import NoJournal
from loraweld.sinks.system import keep_freed_memory


class Discard(Anywhere):
    """Has the verbs of a sink; forgets what it is given."""

    files_at_once: int | None = None

    def __init__(self) -> None:
        self.journal = NoJournal()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def create(self, name: str, size: int, *, aligned: bool) -> None:
        pass

    def write_at(self, name: str, offset: int, buffer: memoryview, count: int) -> None:
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
    base, adapter = sys.argv[1:]
    keep_freed_memory()
    made, _ = plan_request(make_request(adapter, base=base, output="discarded"))
    sink = Discard()
    run_plan(made, sink, closing=lambda result: {}, progress=lambda count: None)
    print(sink.num_bytes)


if __name__ == "__main__":
    main()
