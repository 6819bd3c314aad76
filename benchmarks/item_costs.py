"""What work costs by its kind: the processor time of whole merges on one thread, of which sizings are made.

A merge of one layer is taken from one of five, so that what Python and torch take to start is in neither.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import BASES, LORAWELD, write_folder
from measuring import GB, MIB, measure, say
from reporting import Part, conditions, show, table
from synthetic import LAYERS, PROJECTIONS, SHAPES, base_tensors

TITLE = "Work by its kind"
ROUNDS = 3
CONDITIONS = """\
Processor time, user and system, of whole merges with `--workers 1`: reading from the page cache, arithmetic, writing to
the disk. Layers of Llama-3.1-8B; five layers less one layer, medians of as many rounds as said. The adapter is on
`k_proj` alone (2 % of the elements) where weights are not edited, else on all seven projections. FP8 has blocks of
128 × 128, NF4 double quantisation and blocks of 64, with searched scales. What the adapter takes is in the times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of work: the form of the base, the rank on its weights (0: not edited), and how they are saved."""

    name: str
    form: str
    rank: int
    method: str = "merged_16bit"


KINDS = (
    Kind(name="kept", form="bf16", rank=0),
    Kind(name="16 bit, edited, r 16", form="bf16", rank=16),
    Kind(name="16 bit, edited, r 64", form="bf16", rank=64),
    Kind(name="FP8 → 16 bit", form="fp8", rank=0),
    Kind(name="FP8 → 16 bit, edited, r 16", form="fp8", rank=16),
    Kind(name="FP8 → FP8, edited, r 16", form="fp8", rank=16, method="preserve"),
    Kind(name="16 bit → FP8", form="bf16", rank=0, method="merged_fp8"),
    Kind(name="NF4 → 16 bit", form="nf4", rank=0),
    Kind(name="NF4 → 16 bit, edited, r 16", form="nf4", rank=16),
    Kind(name="NF4 → NF4, edited, r 16", form="nf4", rank=16, method="preserve"),
    Kind(name="16 bit → NF4", form="bf16", rank=0, method="merged_4bit"),
    Kind(name="16 bit → NF4, edited, r 16", form="bf16", rank=16, method="merged_4bit"),
)


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure every kind."""
    shapes = sorted(LAYERS, key=lambda shape: SHAPES[shape].layers)
    elements = [sum(stored.nbytes for stored in base_tensors(SHAPES[shape]).values()) // 2 for shape in shapes]
    seconds: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
    for kind in KINDS:
        for _ in range(ROUNDS):
            few, many = (cpu_seconds(kind, shape, work) for shape in shapes)
            seconds[kind.name].append(many - few)
        say(f"{kind.name}: {statistics.median(seconds[kind.name]):.2f} s")
    rows = rows_of(seconds, elements[1] - elements[0])
    header = [f"one core, median of {ROUNDS}", "ns an element", "min", "max", "GB/s of 16-bit values"]
    return Part(title=TITLE, promises=[], blocks=[table(header, rows), *conditions(CONDITIONS, work)])


def rows_of(seconds: Mapping[str, Sequence[float]], elements: int) -> list[list[str]]:
    """Return a row for each kind, of its seconds for so many elements."""
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        each = (show(value / elements, 3, 1e-9) for value in (median, min(values), max(values)))
        rows.append([name, *each, show(2 * elements / median, 2, GB)])
    return rows


def cpu_seconds(kind: Kind, shape: str, work: Path) -> float:
    """Return the processor time of a merge, and remove what it has written."""
    slug = shape.replace(" ", "-")
    base, adapter = work / f"base-{slug}-{kind.form}", work / f"adapter-{slug}-r{kind.rank}"
    write_folder(base, *(part.format(shape=shape, folder="{}") for part in BASES[kind.form]))
    only = PROJECTIONS if kind.rank else ["k_proj"]
    write_folder(adapter, "synthetic.py", "adapter", "{}", str(base), shape, str(kind.rank or 1), "--only", *only)
    out = work / "out"
    command = [*LORAWELD, "merge", str(adapter), "--base", str(base), "-o", str(out), "--quiet"]
    options = ["--workers", "1", "--max-memory", f"{1024 * MIB}B", "--save-method", kind.method]
    try:
        return measure([*command, *options], work / "log.txt").cpu_s
    finally:
        shutil.rmtree(out, ignore_errors=True)
