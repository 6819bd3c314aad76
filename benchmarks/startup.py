"""How fast commands start that should be instant, beside bare imports."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import LORAWELD, Case, inputs_of, write_folder
from measuring import MIB, Sample, measure, median_sample, say, seconds_to_first_byte
from plain import PEFT_IMPORTS
from reporting import Part, conditions, promise, show, table

RUNS = 10
MANY = "loraweld plan, 100,000 tensors in 200 shards"
CONDITIONS = "The bases planned have headers and configs only; their weights are holes in the files."


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure start-up on bases without weights."""
    rows = [*rows_of(plain_commands(args), work)]
    firsts: list[float] = []
    for shape in args.shape:
        with inputs_of(work, shape, args.rank[:1], form="hollow", keep=False) as cases:
            rows += rows_of(plans(cases, work), work)
            first = {case.name: first_byte(case, work) for case in cases}
            rows += [
                [f"loraweld merge, {name}, to the first MiB written", show(s, 3), "–"] for name, s in first.items()
            ]
            firsts += first.values()
    many = plan_of_experts(work)
    rows.append([MANY, show(many.wall_s, 3), show(many.peak_rss_bytes, 0, MIB)])
    text = table([f"median of {RUNS}", "wall s", "peak RSS MiB"], rows)
    promises = [
        promise("first byte written: ≤ 1.5 s", firsts, "s", lambda value: value <= 1.5),
        promise(f"{MANY}: ≤ 5 s", [many.wall_s], "s", lambda value: value <= 5),
        promise(f"{MANY}: ≤ 300 MiB", [many.peak_rss_bytes / MIB], "MiB", lambda value: value <= 300),
    ]
    return Part(title="Start-up", promises=promises, blocks=[text, *conditions(CONDITIONS, work)])


def first_byte(case: Case, work: Path) -> float:
    """Return the median of the seconds from the command to the first MiB of the output."""
    out = work / "out"
    command = [part.format(out=out) for part in case.merge()]
    seconds = []
    for _ in range(RUNS):
        seconds.append(seconds_to_first_byte(command, work / "log.txt"))
        for path in work.glob(".out*"):
            shutil.rmtree(path, ignore_errors=True)
    return statistics.median(seconds)


def plan_of_experts(work: Path) -> Sample:
    """Return what it costs to plan a mixture of experts, all of them with a LoRA."""
    folder = work / "experts"
    write_folder(folder, "synthetic_experts.py", "{}", "130", "200")
    say(f"start-up: {MANY}")
    command = [*LORAWELD, "plan", str(folder / "adapter"), "--base", str(folder / "base"), "-o", str(work / "new")]
    return median_sample([measure(command, work / "log.txt") for _ in range(RUNS)])


def plain_commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands that need no base."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "loraweld --help": [*LORAWELD, "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    if args.other_runs:
        commands["import PEFT and transformers"] = [sys.executable, "-c", PEFT_IMPORTS]
    return commands


def plans(cases: Sequence[Case], work: Path) -> dict[str, list[str]]:
    """Return a `loraweld plan` of each case."""
    return {
        f"loraweld plan, {c.name}": [*LORAWELD, "plan", str(c.adapter), "--base", str(c.base), "-o", str(work / "new")]
        for c in cases
    }


def rows_of(commands: dict[str, list[str]], work: Path) -> list[list[str]]:
    """Return the median wall time and memory of each command."""
    rows = []
    for name, command in commands.items():
        say(f"start-up: {name}")
        sample = median_sample([measure(command, work / "log.txt") for _ in range(RUNS)])
        rows.append([name, show(sample.wall_s, 3), show(sample.peak_rss_bytes, 0, MIB)])
    return rows
