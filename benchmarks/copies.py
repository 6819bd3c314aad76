"""How bytes that do not change are best copied: by the kernel, or as the items of a merge are written."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cases import read_through
from loraweld.checkpoint.reader import Reader
from loraweld.planning.memory import BUFFER_BYTES
from loraweld.sinks import system
from measuring import GB, say
from reporting import Part, conditions, ratio_cells, show, table

FILE_BYTES = 4 << 30
THREADS = 4
CONDITIONS = """\
A file of 4 GiB of random bytes, in the page cache, copied until it is durable, the two in turn. By the kernel:
`copy_file_range`, as whole files are that do not change. As items: read into aligned buffers of 8 MiB and written past
the page cache, by four threads, as ranges are that do not change."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure both ways."""
    folder = work / "copies"
    folder.mkdir(exist_ok=True)
    source, target = folder / "source", folder / "target"
    _write(source)
    ways: dict[str, Callable[[Path, Path], None]] = {"by the kernel": system.copy_file, "as items": _as_items}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    try:
        for _ in range(args.rounds):
            for name, copy in ways.items():
                read_through(folder)
                os.sync()
                found[name].append(_cost(copy, source, target))
                say(f"copies: {name}: {found[name][-1][0]:.2f} s")
                target.unlink()
    finally:
        source.unlink()
        folder.rmdir()
    rows = []
    for name, costs in found.items():
        wall, cpu = (statistics.median(values) for values in zip(*costs, strict=True))
        rows.append([name, show(wall, 2), show(cpu, 2), show(FILE_BYTES / GB / wall, 2)])
    ratios = [mine[0] / theirs[0] for mine, theirs in zip(found["as items"], found["by the kernel"], strict=True)]
    times = table([f"median of {args.rounds}", "wall s", "CPU s", "GB/s"], rows)
    pairs = table(["wall time", "median", "min", "max"], [["as items / by the kernel", *ratio_cells(ratios)]])
    return Part(title="Unchanged bytes", promises=[], blocks=[times, pairs, *conditions(CONDITIONS, work)])


def _write(path: Path) -> None:
    piece = os.urandom(64 << 20)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES // len(piece)):
            file.write(piece)


def _cost(copy: Callable[[Path, Path], None], source: Path, target: Path) -> tuple[float, float]:
    wall, used = time.perf_counter(), time.process_time()
    copy(source, target)
    return time.perf_counter() - wall, time.process_time() - used


def _as_items(source: Path, target: Path) -> None:
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
