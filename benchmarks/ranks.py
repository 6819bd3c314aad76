"""What a higher rank costs: merges of an 8B model with adapters of several ranks, in float32 and in bfloat16."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from cases import Case, check_space, cpu, inputs_of, peak_rss, run_case, wall
from measuring import Sample
from reporting import Part, conditions, medians_table, promise, ratio_cells, runs_table, table

SHAPE = "8B"
RANKS = [16, 64, 256]
FACTORS = ["F32", "BF16"]
LIMITS = {64: 1.3, 256: 2.5}
CONDITIONS = """\
All adapters in turn, then again; a ratio is that of two runs of one round, the other at rank 16 with factors of the
same dtype. Base and output are in bfloat16. Each run is a fresh process followed by `sync -f` on the output, which
counts into its time; before it the base is read once and all dirty pages are written. Factors in float32 are multiplied
in float32; those in bfloat16 as they are, where the processor has instructions for it (AVX512-BF16, AMX)."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure every rank and dtype, round by round."""
    with inputs_of(work, SHAPE, RANKS, form="bf16", keep=args.keep, factors=FACTORS) as cases:
        check_space(cases[0])
        for case in cases:
            case.commands = {"loraweld": case.merge()}
        for _ in range(args.runs):
            for case in cases:
                run_case(case, work, ["loraweld"])
    blocks = [
        ratios_table(cases),
        medians_table(cases),
        *conditions(CONDITIONS, work),
        "### Every run",
        runs_table(cases),
    ]
    return Part(title="Ranks", promises=promises(cases), blocks=blocks)


def promises(cases: Sequence[Case]) -> list[str]:
    """Return a line for each rank above the first and each dtype, and one for the memory of all."""
    memory = [statistics.median(ratios(cases, case, peak_rss)) for case in cases if case.rank in LIMITS]
    times = [
        promise(
            f"{SHAPE} r {case.rank}, {case.factors} factors: wall time ≤ {LIMITS[case.rank]} × that of r {RANKS[0]}",
            [statistics.median(ratios(cases, case, wall))],
            "×",
            lambda value, limit=LIMITS[case.rank]: value <= limit,
        )
        for case in cases
        if case.rank in LIMITS
    ]
    return [*times, promise(f"peak memory ≤ 1.1 × that of r {RANKS[0]}", memory, "×", lambda value: value <= 1.1)]


def ratios(cases: Sequence[Case], case: Case, what: Callable[[Sample], float]) -> list[float]:
    """Return a figure of each run over that of the run with the lowest rank in the same round."""
    lowest = next(one for one in cases if (one.factors, one.rank) == (case.factors, RANKS[0]))
    pairs = zip(case.samples["loraweld"], lowest.samples["loraweld"], strict=True)
    return [what(mine) / what(theirs) for mine, theirs in pairs]


def ratios_table(cases: Sequence[Case]) -> str:
    """Return how the times compare."""
    rows = [
        [case.name, *ratio_cells(ratios(cases, case, wall)), *ratio_cells(ratios(cases, case, cpu))]
        for case in cases
        if case.rank in LIMITS
    ]
    return table([f"over r {RANKS[0]}", "wall, median", "min", "max", "CPU, median", "min", "max"], rows)
