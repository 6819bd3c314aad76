"""Where the time of a merge goes: 8B, rank 16, step by step."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from cases import BENCHMARKS, check_space, inputs_of, read_through
from measuring import measure, say
from reporting import Part, conditions, show, table

SHAPE = "8B"
CONDITIONS = """\
One merge with four threads, of which two compute at a time, one for each core. Processor and wall time are
added up over the threads, so wall time less processor time is waiting: for the disk, for another thread's turn
with Python's lock, or for a core. What the profile led to: nothing waits for the import of torch, a tile has twice the
rows (14.7 s → 12.6), and all that is done to it is one function without Python's lock, in pieces that stay in a core's
cache from widening to the search (12.3 s → 11.0, medians of four in turn); it is written
in portions of 16 MiB between tiles, and nobody waits while another thread journals (10.4 s → 9.1)."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Profile one merge."""
    with inputs_of(work, SHAPE, args.rank[:1], form="bf16", keep=args.keep) as (case,):
        check_space(case)
        read_through(case.base)
        say(f"profile: {case.name}")
        out, log = work / "out", work / "log.txt"
        merge = ["merge", str(case.adapter), "--base", str(case.base), "-o", str(out), "--quiet"]
        measure([sys.executable, str(BENCHMARKS / "profiled.py"), *merge], log)
        shutil.rmtree(out)
    steps = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    whole = steps.pop("all")
    ordered = sorted(steps.items(), key=lambda step: -step[1][1])
    rows = [[step, str(count), show(cpu, 2), show(wall, 2)] for step, (count, cpu, wall) in ordered]
    rows.append(["the whole process", "1", show(whole[1], 2), show(whole[2], 2)])
    text = table([f"{case.name}: step", "calls", "CPU s", "wall s"], rows)
    return Part(title="Where the time goes", promises=[], blocks=[text, *conditions(CONDITIONS, work)])
