"""Peak memory from 1B to 30B, and what hashes cost: merges of hollow bases whose output is thrown away."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cases import BENCHMARKS, inputs_of
from measuring import GB, MIB, Sample, measure, say
from reporting import Part, conditions, promise, show, table

SHAPES = ("1B", "8B", "30B")
HASHES = ("none", "crc32", "blake2b", "sha256")
CONDITIONS = """\
The weights of the bases are holes in their files, which the kernel reads as zeros, and what is made is thrown
away: no disk is measured. Adapters of rank 16 on all seven projections. Hashes are of the pieces that a sink is
given, by the thread that made them: crc32 is zlib's, the others hashlib's. One run each."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure every shape, and every hash on the second of them."""
    rows, samples = [], {}
    for shape in SHAPES:
        with inputs_of(work, shape, args.rank[:1], form="hollow", keep=args.keep) as (case,):
            for name in HASHES if shape == SHAPES[1] else HASHES[:1]:
                say(f"scale: {shape}, hash {name}")
                command = [sys.executable, str(BENCHMARKS / "discard.py"), str(case.base), str(case.adapter), name]
                samples[shape, name] = sample = measure(command, work / "log.txt")
                size = case.base_bytes / GB
                rows.append([case.name, name, show(size), *_cells(sample)])
    peaks = [samples[shape, "none"].peak_rss_bytes for shape in SHAPES]
    ratios = [peak / peaks[0] for peak in peaks]
    text = table(["merge", "hash", "GB", "wall s", "CPU s", "peak RSS MiB"], rows)
    held = promise("same peak memory from 1B to 30B, ± 10 %", ratios, "×", lambda value: 0.9 <= value <= 1.1)
    return Part(title="Peak memory and hashes", promises=[held], blocks=[text, *conditions(CONDITIONS, work)])


def _cells(sample: Sample) -> list[str]:
    return [show(sample.wall_s, 2), show(sample.cpu_s, 2), show(sample.peak_rss_bytes, 0, MIB)]
