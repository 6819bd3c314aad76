"""16 bit → NF4: a merge into a bfloat16 base that is stored in 4 bit."""

from __future__ import annotations

import argparse
from pathlib import Path

from cases import Case, check_space, inputs_of, run_case
from measuring import Sample
from reporting import Part, conditions, medians_table, runs_table, show

CONDITIONS = """\
`loraweld merge --save-method merged_4bit --quantizer absmax` or `mse` on a bfloat16 base: the seven projections
go into NF4 with double quantisation and blocks of 64. Each run is a fresh process followed by `sync -f` on the
output, which counts into its time. Runs alternate (absmax, mse, …). Before a run the base is read once and all
dirty pages are written."""
QUANTIZERS = ("absmax", "mse")


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure every shape with the first rank."""
    cases: list[Case] = []
    for shape in args.shape:
        with inputs_of(work, shape, args.rank[:1], form="bf16", keep=args.keep) as of_shape:
            for case in of_shape:
                check_space(case, growth=0.5)
                case.commands = {q: case.merge("--save-method", "merged_4bit", "--quantizer", q) for q in QUANTIZERS}
                run_case(case, work, QUANTIZERS * args.runs)
            cases += of_shape
    blocks = [
        medians_table(cases, {"M elements/s": elements_per_s}), *conditions(CONDITIONS, work),
        "### Every run", runs_table(cases),
    ]  # fmt: skip
    return Part(title="16 bit to NF4", promises=[], blocks=blocks)


def elements_per_s(case: Case, sample: Sample) -> str:
    """Return how many elements of the base a run did in a second, those that stay in 16 bit among them."""
    return show(case.base_bytes / 2 / sample.wall_s, 0, 1e6)
