"""The report in Markdown: promises, tables, conditions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cases import Case, peak_rss
from machine import machine
from measuring import GB, MIB, Sample, median_sample

COST_HEADER = ["wall s", "CPU s", "peak RSS MiB", "read GB", "from disk GB", "written GB"]
CONDITIONS = """\
Each run is a fresh process followed by `sync -f` on the output, which counts into its time; `cp` is `cp
-r` of the base folder. Runs alternate (cp, loraweld, cp, loraweld, …, then PEFT), and each ratio
loraweld / cp is of two neighbours. Before a run the base is read once and all dirty pages are written.
No cache is dropped: a base that does not fit into free memory beside the output is partly cold, for all
alike, and "from disk" says how much was fetched. Times include the start of Python and the imports.
"read" counts read calls, not what is read through mmap. Peak RSS is the kernel's figure for the
process, mapped file pages included; that of `cp` is the launcher's own, the least it can show. PEFT is
`from_pretrained` in bfloat16, `merge_and_unload`, `save_pretrained`."""


def report(cases: Sequence[Case], startup: str, work: Path) -> str:
    """Return the whole report as Markdown."""
    parts = [
        "# Benchmark results",
        "Written by `benchmarks/bench.py`. Weights are random, files and shapes those of the models named: "
        "1B is Llama-3.2-1B, 8B is Llama-3.1-8B, in bfloat16. Adapters: float32, on all seven projections.",
        "## Promises",
        "\n".join(promises(cases)),
        "## Wall time compared",
        ratios_table(cases),
        "## Medians",
        medians_table(cases),
        "## Start-up",
        startup,
        "## Conditions",
        CONDITIONS,
        *peft_notes(cases),
        machine(work),
        "## Every run",
        runs_table(cases),
    ]
    return "\n\n".join(parts) + "\n"


def promises(cases: Sequence[Case]) -> list[str]:
    """Return a line per promise: holds, falls short, or not measured."""
    peaks = [s.peak_rss_bytes / MIB for case in cases for s in case.samples["loraweld"]]
    copies = [statistics.median(case.pair_ratios()) for case in cases]
    pefts = [ratio for case in cases if (ratio := case.peft_ratio()) is not None]
    growths = growth_ratios(cases)
    return [
        promise("peak memory ≤ 600 MiB", peaks, "MiB", lambda value: value <= 600),
        promise("same peak memory for every shape and rank, ± 10 %", growths, "×", lambda v: 0.9 <= v <= 1.1),
        promise("wall time ≤ 1.5 × cp", copies, "×", lambda value: value <= 1.5),
        promise("at least 4 × as fast as PEFT", pefts, "×", lambda value: value >= 4),
    ]


def growth_ratios(cases: Sequence[Case]) -> list[float]:
    """Return the peak memory of loraweld per case, over that of the first of its shape or rank."""
    ratios = []
    for number, case in enumerate(cases):
        for same in ("shape", "rank"):
            first = next(c for c in cases[: number + 1] if getattr(c, same) == getattr(case, same))
            here, there = case.median("loraweld", peak_rss), first.median("loraweld", peak_rss)
            if first is not case and here is not None and there is not None:
                ratios.append(here / there)
    return ratios


def promise(text: str, values: Sequence[float], unit: str, holds: Callable[[float], bool]) -> str:
    """Return whether a promise holds for all values, and their range."""
    if not values:
        return f"- not measured: {text}"
    verdict = "holds" if all(map(holds, values)) else "falls short"
    digits = 0 if unit == "MiB" else 2
    return f"- {verdict}: {text} (measured {min(values):.{digits}f} to {max(values):.{digits}f} {unit})"


def ratios_table(cases: Sequence[Case]) -> str:
    """Return how the wall times compare."""
    rows = []
    for case in cases:
        ratios = case.pair_ratios()
        cells = [statistics.median(ratios), min(ratios), max(ratios), case.peft_ratio()]
        rows.append([f"{case.shape} r {case.rank}", *(show(cell, 2) for cell in cells)])
    return table(["wall time", "loraweld / cp, median", "min", "max", "PEFT / loraweld"], rows)


def medians_table(cases: Sequence[Case]) -> str:
    """Return the medians of every tool."""
    rows = [
        [f"{case.shape} r {case.rank} {tool}", str(len(samples)), *cost_cells(median_sample(samples))]
        for case in cases
        for tool, samples in case.samples.items()
    ]
    return table(["median of", "runs", *COST_HEADER], rows)


def runs_table(cases: Sequence[Case]) -> str:
    """Return every single run."""
    rows = [
        [f"{case.shape} r {case.rank} {tool} {number}", *cost_cells(sample)]
        for case in cases
        for tool, samples in case.samples.items()
        for number, sample in enumerate(samples, start=1)
    ]
    return table(["run", *COST_HEADER], rows)


def cost_cells(sample: Sample) -> list[str]:
    """Return the cells that describe one run, or a median one."""
    return [
        show(sample.wall_s, 2),
        show(sample.cpu_s, 2),
        show(sample.peak_rss_bytes, 0, MIB),
        show(sample.read_bytes, 2, GB),
        show(sample.disk_read_bytes, 2, GB),
        show(sample.written_bytes, 2, GB),
    ]


def peft_notes(cases: Sequence[Case]) -> list[str]:
    """Return what went wrong with PEFT, if anything did."""
    failed = [f"{case.shape} r {case.rank} ({case.peft_failure})" for case in cases if case.peft_failure]
    return [f"PEFT failed on {', '.join(failed)}."] if failed else []


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up: first column left, the others right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join("| " + " | ".join(pad(row, widths)) + " |" for row in lines)


def pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return the cells of a row at full width."""
    return [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]


def show(value: float | None, digits: int = 1, unit: float = 1) -> str:
    """Return a number as text, or a dash if it is unknown."""
    return "–" if value is None else f"{value / unit:.{digits}f}"
