"""Compare `loraweld merge` with a plain copy of the base and with PEFT, on checkpoints of random weights.

Every run is a fresh process, followed by a sync of the output's file system, so that data on disk is compared
with data on disk. Linux only. This process stays small on purpose (no torch, no numpy): the kernel counts the
memory of a launcher into the peak of what it launches.

    python benchmarks/bench.py --shape 1B 8B --rank 16 64
    python benchmarks/bench.py --startup
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import LORAWELD, PEFT_IMPORTS, Case, check_space, remove_inputs, run_case, work_folder, write_inputs
from measuring import MIB, REPO, BenchError, measure, median_sample, say
from reporting import report, show, table

STARTUP_RUNS = 10


def startup_rows(cases: Sequence[Case], args: argparse.Namespace, work: Path) -> list[list[str]]:
    """Return the median wall time and memory of the commands that should be instant, and of bare imports."""
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "loraweld --help": [*LORAWELD, "--help"]}
    for case in cases:
        command = [*LORAWELD, "plan", str(case.adapter), "--base", str(case.base), "-o", str(work / "planned")]
        commands[f"loraweld plan, {case.shape} r {case.rank}"] = command
    commands["import torch"] = [sys.executable, "-c", "import torch"]
    if args.peft:
        commands["import PEFT and transformers"] = [sys.executable, "-c", PEFT_IMPORTS]
    rows = []
    for name, command in commands.items():
        say(f"start-up: {name}")
        sample = median_sample([measure(command, work / "log.txt") for _ in range(STARTUP_RUNS)])
        rows.append([name, show(sample.wall_s, 3), show(sample.peak_rss_bytes, 0, MIB)])
    return rows


def run_startup(args: argparse.Namespace, work: Path) -> str:
    """Measure start-up on bases without weights, and return the times as a table."""
    cases = [write_inputs(work, shape, args.rank[0], hollow=True) for shape in args.shape]
    rows = startup_rows(cases, args, work)
    for shape in args.shape:
        remove_inputs(work, shape + "-hollow")
    return table([f"median of {STARTUP_RUNS}", "wall s", "peak RSS MiB"], rows)


def run_all(args: argparse.Namespace, work: Path) -> str:
    """Measure every shape and rank, write the report and return it."""
    startup = run_startup(args, work)
    cases: list[Case] = []
    for shape in args.shape:
        of_shape = [write_inputs(work, shape, rank) for rank in args.rank]
        for case in of_shape:
            check_space(case)
            run_case(case, work, runs=args.runs, peft_runs=args.peft_runs if args.peft else 0)
        cases += of_shape
        if not args.keep:
            remove_inputs(work, shape)
    text = report(cases, startup, work)
    args.markdown.write_text(text, encoding="utf-8")
    return text


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compare loraweld with cp and PEFT.")
    add = parser.add_argument
    add("--shape", nargs="+", default=["1B", "8B"], help="default 1B 8B; 8B takes 35 GB of disk")
    add("--rank", nargs="+", type=int, default=[16, 64], help="ranks of the adapters (default 16 64)")
    add("--runs", type=int, default=3, help="runs of cp and of loraweld per shape and rank (default 3)")
    add("--peft", action=argparse.BooleanOptionalAction, default=True, help="also run PEFT (default yes)")
    add("--peft-runs", type=int, default=1, help="runs of PEFT per shape and rank (default 1)")
    add("--startup", action="store_true", help="only measure how fast commands start; writes no report")
    add("--workdir", type=Path, default=REPO / ".cache", help="where files are written (default .cache)")
    add("--keep", action="store_true", help="keep bases and adapters for the next time")
    add("--markdown", type=Path, default=REPO / "benchmarks" / "RESULTS.md", help="the report")
    return parser.parse_args()


def volunteer_for_oom() -> None:
    """Let the kernel end a run of ours first, should memory run out: PEFT holds the whole model."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def main() -> int:
    """Run the command line."""
    args = parse_args()
    volunteer_for_oom()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the files are removed
    try:
        with work_folder(args.workdir, keep=args.keep) as work:
            print(run_startup(args, work) if args.startup else run_all(args, work))
    except BenchError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
