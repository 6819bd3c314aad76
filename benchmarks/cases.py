"""The cases: their files, what each tool runs on them, and the samples that gives."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measuring import GB, MIB, REPO, BenchError, Sample, measure, say

BENCHMARKS = REPO / "benchmarks"
LORAWELD = [sys.executable, "-m", "loraweld"]
READ_BYTES = 8 << 20


@dataclass(slots=True, kw_only=True)
class Case:
    """A base and an adapter: where they are, and the samples of each tool in the order they ran.

    `factors`: the dtype of the adapter. `commands`: what each tool runs, "{out}" and "{bytes}" standing for its output
    and for the bytes that the last tool has written.
    """

    shape: str
    rank: int
    base: Path
    adapter: Path
    base_bytes: int
    factors: str = "F32"
    commands: dict[str, list[str]] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    output_bytes: int = 0

    @property
    def name(self) -> str:
        """Return how tables call it."""
        return f"{self.shape} r {self.rank}{'' if self.factors == 'F32' else f' {self.factors}'}"

    def merge(self, *options: str) -> list[str]:
        """Return the command line of a merge."""
        return [*LORAWELD, "merge", str(self.adapter), "--base", str(self.base), "-o", "{out}", "--quiet", *options]

    def median(self, tool: str, what: Callable[[Sample], float]) -> float | None:
        """Return the median of a figure over the runs of a tool, or None without runs."""
        samples = self.samples.get(tool)
        return statistics.median(map(what, samples)) if samples else None

    def pair_ratios(self, tool: str, other: str) -> list[float]:
        """Return wall time of a tool / that of another for each pair of neighbouring runs."""
        pairs = zip(self.samples[tool], self.samples[other], strict=True)
        return [mine.wall_s / theirs.wall_s for mine, theirs in pairs]


def wall(sample: Sample) -> float:
    """Return the wall time."""
    return sample.wall_s


def cpu(sample: Sample) -> float:
    """Return the time on all cores."""
    return sample.cpu_s


def peak_rss(sample: Sample) -> float:
    """Return the peak of resident memory."""
    return sample.peak_rss_bytes


def run_case(case: Case, work: Path, order: Sequence[str], *, may_fail: Collection[str] = ()) -> None:
    """Collect the samples of a case in this order of tools; the failure of some is only noted."""
    for tool in order:
        if tool in case.failures:
            continue
        try:
            sample = run_tool(case, tool, work)
        except BenchError as error:
            if tool not in may_fail:
                raise
            say(f"{tool} failed: {error}")
            case.failures[tool] = f"exit code {error.exit_code}"
            continue
        case.samples.setdefault(tool, []).append(sample)


def run_tool(case: Case, tool: str, work: Path) -> Sample:
    """Run a tool once under comparable conditions until its output is on disk, remove that and return the cost.

    Raises:
        BenchError: the tool failed.
    """
    out, log = work / "out", work / "log.txt"
    command = [part.format(out=out, bytes=case.output_bytes) for part in case.commands[tool]]
    read_through(case.base)
    os.sync()  # dirty pages of whatever came before are not this run's to write
    try:
        sample = functools.reduce(Sample.then, (measure(c, log) for c in (command, ["sync", "-f", str(out)])))
        case.output_bytes = sum(path.stat().st_size for path in out.iterdir())
    finally:
        for path in [out, *work.glob(".out*")]:  # also what a failed merge leaves to be resumed
            shutil.rmtree(path, ignore_errors=True)
    say(f"{case.name} {tool}: {sample.wall_s:.2f} s, {sample.peak_rss_bytes / MIB:.0f} MiB")
    return sample


def read_through(folder: Path) -> None:
    """Read every file of a folder once, so that each run finds the page cache in the same state."""
    buffer = bytearray(READ_BYTES)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write_inputs(work: Path, shape: str, rank: int, *, form: str = "bf16", factors: str = "F32") -> Case:
    """Write base and adapter unless an earlier run kept them, in a process of its own; `form`: a key of `BASES`."""
    base = work / f"base-{shape}-{form}"
    adapter = work / f"adapter-{shape}-{form}-r{rank}{'' if factors == 'F32' else f'-{factors}'}"
    write_folder(base, *(part.format(shape=shape, folder="{}") for part in BASES[form]))
    write_folder(adapter, "synthetic.py", "adapter", "{}", str(base), shape, str(rank), "--dtype", factors)
    base_bytes = sum(path.stat().st_size for path in base.iterdir())
    return Case(shape=shape, rank=rank, base=base, adapter=adapter, base_bytes=base_bytes, factors=factors)


# The script and its arguments that write a base.
BASES = {
    "bf16": ["synthetic.py", "base", "{folder}", "{shape}"],
    "hollow": ["synthetic.py", "base", "{folder}", "{shape}", "--hollow"],
    "nf4": ["synthetic_nf4.py", "{folder}", "{shape}"],
    "fp8": ["synthetic_fp8.py", "{folder}", "{shape}"],
}


def write_folder(folder: Path, script: str, *arguments: str) -> None:
    """Let one of our scripts write a folder, given as `{}` in the arguments, unless it is there.

    Raises:
        BenchError: it failed.
    """
    if folder.exists():
        return
    say(f"writing {folder.name}")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, str(BENCHMARKS / script), *(a.format(part) for a in arguments)]
    if subprocess.run(command, check=False).returncode:
        raise BenchError(f"{shlex.join(command)} failed")
    part.rename(folder)


def check_space(case: Case, *, growth: float = 1.1) -> None:
    """Refuse to start if the disk cannot take an output `growth` times as large as the base.

    Raises:
        BenchError: too little space.
    """
    needed = case.base_bytes * growth
    if (free := free_bytes(case.base)) < needed:
        raise BenchError(f"an output of {case.shape} needs {needed / GB:.1f} GB, {free / GB:.1f} GB are free")


def free_bytes(path: Path) -> int:
    """Return how much room is left where `path` is."""
    return shutil.disk_usage(path).free


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


@contextlib.contextmanager
def inputs_of(
    work: Path, shape: str, ranks: Sequence[int], *, form: str, keep: bool, factors: Sequence[str] = ("F32",)
) -> Iterator[list[Case]]:
    """Yield a case for each dtype and rank, and remove their files after the block unless told to keep them."""
    try:
        yield [write_inputs(work, shape, rank, form=form, factors=dtype) for dtype in factors for rank in ranks]
    finally:
        if not keep:
            for path in [work / f"base-{shape}-{form}", *work.glob(f"adapter-{shape}-{form}-r*")]:
                shutil.rmtree(path, ignore_errors=True)
