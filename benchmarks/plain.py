"""16 bit → 16 bit: loraweld against a copy of the base, and against PEFT."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import Case, check_space, inputs_of, peak_rss, run_case, wall
from reporting import (
    Part,
    conditions,
    failure_notes,
    medians_table,
    peaks,
    promise,
    ratio_cells,
    runs_table,
    show,
    table,
)

PEFT_IMPORTS = """\
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
"""
PEFT_MERGE = """\
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
CONDITIONS = """\
Base and output are in bfloat16. Each run is a fresh process followed by `sync -f` on the output, which
counts into its time; `cp` is `cp -r` of the base folder. Runs alternate (cp, loraweld, cp, loraweld, …,
then PEFT), and each ratio loraweld / cp is of two neighbours. Before a run the base is read once and all
dirty pages are written. No cache is dropped: a base that does not fit into free memory beside the output
is partly cold, for all alike, and "from disk" says how much was fetched. Times include the start of
Python and the imports. "read" counts read calls, not what is read through mmap. Peak RSS is the kernel's
figure for the process, mapped file pages included; that of `cp` is the launcher's own, the least it can
show. PEFT is `from_pretrained` in bfloat16, `merge_and_unload`, `save_pretrained`."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure every shape and rank."""
    cases: list[Case] = []
    order = ["cp", "loraweld"] * args.runs + ["PEFT"] * (args.peft_runs if args.peft else 0)
    for shape in args.shape:
        with inputs_of(work, shape, args.rank, form="bf16", keep=args.keep) as of_shape:
            for case in of_shape:
                check_space(case)
                base, adapter = str(case.base), str(case.adapter)
                case.commands = {
                    "cp": ["cp", "-r", base, "{out}"],
                    "loraweld": case.merge(),
                    "PEFT": [sys.executable, "-c", PEFT_IMPORTS + PEFT_MERGE, base, adapter, "{out}"],
                }
                run_case(case, work, order, may_fail=["PEFT"])
            cases += of_shape
    blocks = [
        ratios_table(cases), medians_table(cases), *conditions(CONDITIONS, work), *failure_notes(cases),
        "### Every run", runs_table(cases),
    ]  # fmt: skip
    return Part(title="16 bit to 16 bit", promises=promises(cases), blocks=blocks)


def promises(cases: Sequence[Case]) -> list[str]:
    """Return a line per promise: holds, falls short, or not measured."""
    copies = [statistics.median(case.pair_ratios("loraweld", "cp")) for case in cases]
    pefts = [ratio for case in cases if (ratio := peft_ratio(case)) is not None]
    growths = growth_ratios(cases)
    return [
        promise("peak memory ≤ 600 MiB", peaks(cases, ["loraweld"]), "MiB", lambda value: value <= 600),
        promise("same peak memory for every shape and rank, ± 10 %", growths, "×", lambda v: 0.9 <= v <= 1.1),
        promise("wall time ≤ 1.5 × cp", copies, "×", lambda value: value <= 1.5),
        promise("at least 4 × as fast as PEFT", pefts, "×", lambda value: value >= 4),
    ]


def peft_ratio(case: Case) -> float | None:
    """Return median wall time of PEFT / loraweld."""
    peft, loraweld = case.median("PEFT", wall), case.median("loraweld", wall)
    return None if peft is None or loraweld is None else peft / loraweld


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


def ratios_table(cases: Sequence[Case]) -> str:
    """Return how the wall times compare."""
    rows = [[c.name, *ratio_cells(c.pair_ratios("loraweld", "cp")), show(peft_ratio(c), 2)] for c in cases]
    return table(["wall time", "loraweld / cp, median", "min", "max", "PEFT / loraweld"], rows)
