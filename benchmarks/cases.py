"""The cases, a shape and a rank each: their files, what each tool runs on them, and the samples that gives."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from measuring import GB, MIB, REPO, BenchError, Sample, measure, say

SYNTHETIC = REPO / "benchmarks" / "synthetic.py"
LORAWELD = [sys.executable, "-m", "loraweld"]
READ_BYTES = 8 << 20
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


@dataclass(slots=True, kw_only=True)
class Case:
    """One shape and rank: where its files are, and the samples of each tool in the order they ran."""

    shape: str
    rank: int
    base: Path
    adapter: Path
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    peft_failure: str = ""

    def commands(self, tool: str, out: Path) -> list[list[str]]:
        """Return what a tool runs to leave its output on disk."""
        base, adapter = str(self.base), str(self.adapter)
        first = {
            "cp": ["cp", "-r", base, str(out)],
            "loraweld": [*LORAWELD, "merge", adapter, "--base", base, "-o", str(out), "--quiet"],
            "PEFT": [sys.executable, "-c", PEFT_IMPORTS + PEFT_MERGE, base, adapter, str(out)],
        }[tool]
        return [first, ["sync", "-f", str(out)]]

    def median(self, tool: str, what: Callable[[Sample], float]) -> float | None:
        """Return the median of a figure over the runs of a tool, or None without runs."""
        samples = self.samples.get(tool)
        return statistics.median(map(what, samples)) if samples else None

    def pair_ratios(self) -> list[float]:
        """Return wall time of loraweld / cp for each pair of neighbouring runs."""
        pairs = zip(self.samples["loraweld"], self.samples["cp"], strict=True)
        return [loraweld.wall_s / cp.wall_s for loraweld, cp in pairs]

    def peft_ratio(self) -> float | None:
        """Return median wall time of PEFT / loraweld."""
        peft, loraweld = self.median("PEFT", wall), self.median("loraweld", wall)
        return None if peft is None or loraweld is None else peft / loraweld


def wall(sample: Sample) -> float:
    """Return the wall time."""
    return sample.wall_s


def peak_rss(sample: Sample) -> float:
    """Return the peak of resident memory."""
    return sample.peak_rss_bytes


def run_case(case: Case, work: Path, *, runs: int, peft_runs: int) -> None:
    """Collect the samples of a case: cp and loraweld in turn, then PEFT, whose failure is only noted."""
    order = ["cp", "loraweld"] * runs + ["PEFT"] * peft_runs
    for tool in order:
        try:
            sample = run_tool(case, tool, work)
        except BenchError as error:
            if tool != "PEFT":
                raise
            say(f"PEFT failed: {error}")
            case.peft_failure = f"exit code {error.exit_code}"
            return
        case.samples.setdefault(tool, []).append(sample)


def run_tool(case: Case, tool: str, work: Path) -> Sample:
    """Run a tool once under comparable conditions, remove its output and return its cost.

    Raises:
        BenchError: the tool failed.
    """
    out, log = work / "out", work / "log.txt"
    read_through(case.base)
    os.sync()  # dirty pages of whatever came before are not this run's to write
    try:
        sample = functools.reduce(Sample.then, (measure(c, log) for c in case.commands(tool, out)))
    finally:
        for path in [out, *work.glob(".out*")]:  # also what a failed merge leaves to be resumed
            shutil.rmtree(path, ignore_errors=True)
    say(f"{case.shape} r {case.rank} {tool}: {sample.wall_s:.2f} s, {sample.peak_rss_bytes / MIB:.0f} MiB")
    return sample


def read_through(folder: Path) -> None:
    """Read every file of a folder once, so that each run finds the page cache in the same state."""
    buffer = bytearray(READ_BYTES)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write_inputs(work: Path, shape: str, rank: int, *, hollow: bool = False) -> Case:
    """Write base and adapter unless an earlier run kept them, in a process of its own."""
    base = work / (f"base-{shape}" + ("-hollow" if hollow else ""))
    adapter = work / f"adapter-{base.name.removeprefix('base-')}-r{rank}"
    write_folder(base, "base", "{}", shape, *(["--hollow"] if hollow else []))
    write_folder(adapter, "adapter", "{}", str(base), shape, str(rank))
    return Case(shape=shape, rank=rank, base=base, adapter=adapter)


def write_folder(folder: Path, *arguments: str) -> None:
    """Let `synthetic.py` write a folder, given as `{}` in the arguments, unless it is there.

    Raises:
        BenchError: it failed.
    """
    if folder.exists():
        return
    say(f"writing {folder.name}")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, str(SYNTHETIC), *(a.format(part) for a in arguments)]
    if subprocess.run(command, check=False).returncode:
        raise BenchError(f"{shlex.join(command)} failed")
    part.rename(folder)


def check_space(case: Case) -> None:
    """Refuse to start if the disk cannot take an output.

    Raises:
        BenchError: too little space.
    """
    needed = sum(path.stat().st_size for path in case.base.iterdir()) * 11 // 10
    free = shutil.disk_usage(case.base).free
    if free < needed:
        raise BenchError(f"an output of {case.shape} needs {needed / GB:.1f} GB, {free / GB:.1f} GB are free")


@contextlib.contextmanager
def work_folder(parent: Path, *, keep: bool) -> Iterator[Path]:
    """Yield our own folder inside a parent, and remove it after the block unless told to keep it."""
    work = parent.absolute() / "loraweld-bench"
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def remove_inputs(work: Path, shape: str) -> None:
    """Remove base and adapters of a shape."""
    for path in [work / f"base-{shape}", *work.glob(f"adapter-{shape}-r*")]:
        shutil.rmtree(path)
