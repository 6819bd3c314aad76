"""Copy a file of 4 GiB in two ways, in turn, until it is durable; prints wall and processor seconds of each as JSON.

By the kernel: `copy_file_range`. As items: read into aligned buffers and written past the page cache, by four threads.

    python benchmarks/copies.py FOLDER --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cases import read_through
from loraweld.checkpoint.reader import Reader
from loraweld.planning.memory import BUFFER_BYTES
from loraweld.sinks import system

FILE_BYTES = 4 << 30
PIECE_BYTES = 64 << 20
THREADS = 4


def as_items(source: Path, target: Path) -> None:
    """Copy as a merge writes ranges that do not change."""
    reader, descriptor = Reader(), system.open_for_writing(target, FILE_BYTES)

    def work(thread: int) -> None:
        buffer = memoryview(system.aligned_buffer(BUFFER_BYTES))
        for start in range(thread * BUFFER_BYTES, FILE_BYTES, THREADS * BUFFER_BYTES):
            reader.read_into(source, start, buffer)
            system.write_at(descriptor, buffer, start, len(buffer))

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS)))
        system.finish(descriptor, FILE_BYTES)
    finally:
        os.close(descriptor)
        reader.close()


WAYS: dict[str, Callable[[Path, Path], None]] = {"by the kernel": system.copy_file, "as items": as_items}


def one_round(folder: Path) -> dict[str, tuple[float, float]]:
    """Measure each way once."""
    found = {}
    for name, copy in WAYS.items():
        read_through(folder)
        os.sync()
        wall, used = time.perf_counter(), time.process_time()
        copy(folder / "source", folder / "target")
        found[name] = time.perf_counter() - wall, time.process_time() - used
        (folder / "target").unlink()
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Copies of a file, by the kernel and as items.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    piece = os.urandom(PIECE_BYTES)
    with (args.folder / "source").open("wb") as file:
        for _ in range(FILE_BYTES // len(piece)):
            file.write(piece)
    print(json.dumps([one_round(args.folder) for _ in range(args.rounds)]))


if __name__ == "__main__":
    main()
