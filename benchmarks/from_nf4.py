"""NF4 → 16 bit: a merge into a quantised base, against the time to write as many bytes as it writes."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import BENCHMARKS, Case, check_space, inputs_of, run_case
from reporting import Part, conditions, medians_table, peaks, promise, ratio_cells, runs_table, table

CONDITIONS = """\
The base is in NF4 with double quantisation and blocks of 64 (random codes), its embeddings and head in
bfloat16, as the output is. `write` is a process that writes the output's byte count from a buffer of 16 MiB
through the page cache. Each run is a fresh process followed by `sync -f` on the output, which counts into
its time. Runs alternate (loraweld, write, …), and each ratio is of two neighbours. Before a run the base is
read once and all dirty pages are written."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure every shape with the first rank."""
    cases: list[Case] = []
    for shape in args.shape:
        with inputs_of(work, shape, args.rank[:1], form="nf4", keep=args.keep) as of_shape:
            for case in of_shape:
                check_space(case, growth=4)
                case.commands = {
                    "loraweld": case.merge(),
                    "write": [sys.executable, str(BENCHMARKS / "writer.py"), "{out}", "{bytes}"],
                }
                run_case(case, work, ["loraweld", "write"] * args.runs)
            cases += of_shape
    rows = [[case.name, *ratio_cells(case.pair_ratios("loraweld", "write"))] for case in cases]
    blocks = [
        table(["wall time", "loraweld / write, median", "min", "max"], rows), medians_table(cases),
        *conditions(CONDITIONS, work), "### Every run", runs_table(cases),
    ]  # fmt: skip
    return Part(title="NF4 to 16 bit", promises=promises(cases), blocks=blocks)


def promises(cases: Sequence[Case]) -> list[str]:
    """Return a line per promise."""
    ratios = [statistics.median(case.pair_ratios("loraweld", "write")) for case in cases]
    return [
        promise("wall time ≤ 1.5 × writing the output", ratios, "×", lambda value: value <= 1.5),
        promise("peak memory ≤ 700 MiB", peaks(cases, ["loraweld"]), "MiB", lambda value: value <= 700),
    ]
