"""A merge whose steps are timed: by processor time of the threads, and by what they wait.

    python benchmarks/profiled.py ARGUMENTS OF LORAWELD …

Prints a line of JSON: for each step its calls, processor seconds and wall seconds, added up over all threads.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import loraweld.compute.editor as editor
import loraweld.execute.run as run
from loraweld import cli
from loraweld.checkpoint.reader import Reader
from loraweld.compute.editor import EditSession
from loraweld.compute.kernels import LowRankSpan
from loraweld.execute.checksums import ItemChecksums
from loraweld.sinks import system

# Where each step is, and what it is called.
STEPS: tuple[tuple[Any, str, str], ...] = (
    (Reader, "read_into", "read from the page cache"),
    (LowRankSpan, "term", "rows of the left factor"),
    (editor, "add_rounded", "widen to float32, matrix products, round, find what is in doubt"),
    (EditSession, "repairs", "repair in float64"),
    (ItemChecksums, "add", "CRC-32"),
    (system, "write_at", "write to the disk"),
    (system, "make_durable", "make durable"),
    (run._Run, "_ready_filler", "import torch"),
)
calls: Counter[str] = Counter()
cpu: Counter[str] = Counter()
wall: Counter[str] = Counter()
lock = threading.Lock()


def timed(function: Callable[..., Any], step: str) -> Callable[..., Any]:
    """Return a function that does the same and adds up its time."""

    @functools.wraps(function)
    def measured(*arguments: Any, **options: Any) -> Any:
        started, used = time.perf_counter(), time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            with lock:
                calls[step] += 1
                wall[step] += time.perf_counter() - started
                cpu[step] += time.thread_time() - used

    return measured


def main() -> None:
    """Run the command line."""
    for owner, name, step in STEPS:
        setattr(owner, name, timed(getattr(owner, name), step))
    started = time.perf_counter()
    with contextlib.suppress(SystemExit):
        cli.main(sys.argv[1:])
    wall["all"], cpu["all"] = time.perf_counter() - started, time.process_time()
    print(json.dumps({step: [calls[step], cpu[step], wall[step]] for step in wall}))


if __name__ == "__main__":
    main()
