"""16 bit → 16 bit: loraweld against a copy of the base, against PEFT, and against other tools that are installed."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import Case, check_space, inputs_of, run_case, wall
from peers import add_peers
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
counts into its time; `cp` is `cp -r` of the base folder. Runs alternate (cp, loraweld and, for the first rank,
PEFT and what `make bench-peers` has installed; then again), and each ratio loraweld / cp
is of two neighbours. Before a run the base is read once and all dirty pages are written. No cache is
dropped: a base that does not fit into free memory beside the output is partly cold, for all alike, and
"from disk" says how much was fetched. Times include the start of Python and the imports. "read" counts
read calls, not what is read through mmap. Peak RSS is the kernel's figure for the process, mapped file
pages included; that of `cp` is the launcher's own, the least it can show. PEFT is `from_pretrained` in
bfloat16, `merge_and_unload`, `save_pretrained`. mergekit is `mergekit-yaml` on base+adapter; axolotl
the function behind its memory-efficient `merge-lora`."""

PAIR = ["cp", "loraweld"]


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure every shape and rank."""
    cases: list[Case] = []
    for shape in args.shape:
        with inputs_of(work, shape, args.rank, form="bf16", keep=args.keep) as of_shape:
            for case in of_shape:
                check_space(case)
                base, adapter = str(case.base), str(case.adapter)
                case.commands = {
                    "cp": ["cp", "-r", base, "{out}"],
                    "loraweld": case.merge(),
                }
                if case.rank == args.rank[0]:
                    case.commands["PEFT"] = [
                        sys.executable, "-c", PEFT_IMPORTS + PEFT_MERGE, base, adapter, "{out}",
                    ]  # fmt: skip
                    add_peers(case, work)
                others = [tool for tool in case.commands if tool not in PAIR]
                run_case(case, work, rounds(others, args.runs, args.other_runs), may_fail=others)
            cases += of_shape
    blocks = [
        ratios_table(cases), medians_table(cases), *conditions(CONDITIONS, work), *failure_notes(cases),
        "### Every run", runs_table(cases),
    ]  # fmt: skip
    return Part(title="16 bit to 16 bit", promises=promises(cases), blocks=blocks)


def rounds(others: Sequence[str], runs: int, other_runs: int) -> list[str]:
    """Return the order of the tools: in turn, the pair `runs` times, the others `other_runs` times."""
    order: list[str] = []
    for number in range(max(runs, other_runs)):
        order += PAIR if number < runs else []
        order += others if number < other_runs else []
    return order


def promises(cases: Sequence[Case]) -> list[str]:
    """Return a line per promise: holds, falls short, or not measured."""
    first = [case for case in cases if (case.shape, case.rank) == ("8B", 16)]
    copies = [statistics.median(case.pair_ratios("loraweld", "cp")) for case in first]
    pefts = [ratio for case in first if (ratio := peft_ratio(case)) is not None]
    return [
        promise("8B r 16: wall time ≤ 1.0 × cp", copies, "×", lambda value: value <= 1),
        promise("8B r 16: at least 6 × as fast as PEFT", pefts, "×", lambda value: value >= 6),
        promise("peak memory ≤ 450 MiB", peaks(cases, ["loraweld"]), "MiB", lambda value: value <= 450),
    ]


def peft_ratio(case: Case) -> float | None:
    """Return median wall time of PEFT / loraweld."""
    peft, loraweld = case.median("PEFT", wall), case.median("loraweld", wall)
    return None if peft is None or loraweld is None else peft / loraweld


def ratios_table(cases: Sequence[Case]) -> str:
    """Return how the wall times compare."""
    rows = [[c.name, *ratio_cells(c.pair_ratios("loraweld", "cp")), show(peft_ratio(c), 2)] for c in cases]
    return table(["wall time", "loraweld / cp, median", "min", "max", "PEFT / loraweld"], rows)
