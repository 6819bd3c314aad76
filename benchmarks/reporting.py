"""The report in Markdown, part by part: promises, tables, conditions. A run replaces the parts that it has measured."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import Case
from machine import machine
from measuring import GB, MIB, Sample, median_sample

COST_HEADER = ["wall s", "CPU s", "peak RSS MiB", "read GB", "from disk GB", "written GB"]
INTRO = """\
# Benchmark results

Written by `benchmarks/bench.py`. Weights are random, files and shapes those of the models named: 1B is Llama-3.2-1B,
8B is Llama-3.1-8B. Adapters: float32 where nothing else is said, on all seven projections."""
PROMISES = "Promises"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one part of the benchmark has to say: a line per promise, and blocks of Markdown."""

    title: str
    promises: Sequence[str]
    blocks: Sequence[str]


def report(parts: Sequence[Part], old: str) -> str:
    """Return the whole report: these parts in place of those of the same title in the old one, new ones at the end."""
    sections = {title: text for title, text in split(old, "## ").items() if title}
    promises = {title: text for title, text in split(sections.pop(PROMISES, ""), "### ").items() if title}
    for part in parts:
        sections[part.title] = "\n\n".join(part.blocks)
        if part.promises:
            promises[part.title] = "\n".join(part.promises)
    first = "\n\n".join(f"### {title}\n\n{text}" for title, text in promises.items())
    texts = [f"## {title}\n\n{text}" for title, text in {PROMISES: first, **sections}.items()]
    return "\n\n".join([INTRO, *texts]) + "\n"


def split(text: str, mark: str) -> dict[str, str]:
    """Return the text under each heading that begins with this mark."""
    found = re.split(f"^{mark}", text, flags=re.MULTILINE)
    return {title: body.strip() for title, _, body in (section.partition("\n") for section in found[1:])}


def printed(parts: Sequence[Part]) -> str:
    """Return the parts alone, for a terminal."""
    texts = (text for part in parts for text in (f"## {part.title}", "\n".join(part.promises), *part.blocks))
    return "\n\n".join(filter(None, texts))


def promise(text: str, values: Sequence[float], unit: str, holds: Callable[[float], bool]) -> str:
    """Return whether a promise holds for all values, and their range."""
    if not values:
        return f"- not measured: {text}"
    verdict = "holds" if all(map(holds, values)) else "falls short"
    digits = 0 if unit == "MiB" else 2
    return f"- {verdict}: {text} (measured {min(values):.{digits}f} to {max(values):.{digits}f} {unit})"


def conditions(text: str, work: Path) -> list[str]:
    """Return the blocks that say how a part was measured and on what."""
    return ["### Conditions", text, machine(work)]


def peaks(cases: Iterable[Case], tools: Sequence[str]) -> list[float]:
    """Return the peak memory of every run of these tools in MiB."""
    return [s.peak_rss_bytes / MIB for case in cases for tool in tools for s in case.samples[tool]]


def medians_table(cases: Sequence[Case], more: Mapping[str, Callable[[Case, Sample], str]] | None = None) -> str:
    """Return the medians of every tool, with more columns if some are given."""
    more = more or {}
    rows = []
    for case in cases:
        for tool, samples in case.samples.items():
            median = median_sample(samples)
            cells = [*cost_cells(median), *(cell(case, median) for cell in more.values())]
            rows.append([f"{case.name} {tool}", str(len(samples)), *cells])
    return table(["median of", "runs", *COST_HEADER, *more], rows)


def ratio_cells(ratios: Sequence[float]) -> list[str]:
    """Return median, least and largest of the ratios of neighbouring runs."""
    return [show(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def runs_table(cases: Sequence[Case]) -> str:
    """Return every single run."""
    rows = [
        [f"{case.name} {tool} {number}", *cost_cells(sample)]
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


def failure_notes(cases: Sequence[Case]) -> list[str]:
    """Return what went wrong with a tool, if anything did."""
    failed = [f"{tool} on {case.name} ({why})" for case in cases for tool, why in case.failures.items()]
    return [f"Failed: {', '.join(failed)}."] if failed else []


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
