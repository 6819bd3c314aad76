"""Peak memory from 1B to 30B, merges of hollow bases whose output is thrown away; and what hashes of it would cost."""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from zlib_ng import zlib_ng

from cases import BENCHMARKS, inputs_of
from measuring import GB, MIB, Sample, measure, say
from reporting import Part, conditions, promise, show, table

SHAPES = ("1B", "8B", "30B")
PIECE_BYTES = 32 << 20
BYTES_OF_8B = 16.06 * GB
HASHES: dict[str, Callable[[bytes], object]] = {
    "crc32, zlib-ng": zlib_ng.crc32,
    "crc32, zlib": zlib.crc32,
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}
CONDITIONS = """\
The weights of the bases are holes in their files, which the kernel reads as zeros, and what is made is thrown
away: no disk is measured. Adapters of rank 16 on all seven projections. One run each. Hashes: pieces of 32 MiB of
random bytes, on one core; a merge takes the first, of what it makes (`tensors_crc32` in loraweld.json)."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure every shape and every hash."""
    rows, samples = [], []
    for shape in SHAPES:
        with inputs_of(work, shape, args.rank[:1], form="hollow", keep=args.keep) as (case,):
            say(f"scale: {shape}")
            command = [sys.executable, str(BENCHMARKS / "discard.py"), str(case.base), str(case.adapter)]
            samples.append(measure(command, work / "log.txt"))
            rows.append([case.name, show(case.base_bytes / GB), *_cells(samples[-1])])
    ratios = [sample.peak_rss_bytes / samples[0].peak_rss_bytes for sample in samples]
    merges = table(["merge", "GB", "wall s", "CPU s", "peak RSS MiB"], rows)
    held = promise("same peak memory from 1B to 30B, ± 10 %", ratios, "×", lambda value: 0.9 <= value <= 1.1)
    blocks = [merges, _hashes_table(args.rounds), *conditions(CONDITIONS, work)]
    return Part(title="Peak memory and hashes", promises=[held], blocks=blocks)


def _cells(sample: Sample) -> list[str]:
    return [show(sample.wall_s, 2), show(sample.cpu_s, 2), show(sample.peak_rss_bytes, 0, MIB)]


def _hashes_table(rounds: int) -> str:
    data = os.urandom(PIECE_BYTES)
    rows = []
    for name, hashed in HASHES.items():
        rate = PIECE_BYTES / statistics.median(_seconds(hashed, data) for _ in range(rounds))
        rows.append([name, show(rate / GB), show(BYTES_OF_8B / rate)])
    return table([f"hash, median of {rounds}", "GB/s", "s for the 16.1 GB of 8B"], rows)


def _seconds(hashed: Callable[[bytes], object], data: bytes) -> float:
    start = time.perf_counter()
    hashed(data)
    return time.perf_counter() - start
