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
import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SYNTHETIC = REPO / "benchmarks" / "synthetic.py"
PYTHONPATH = os.pathsep.join(filter(None, [str(REPO / "src"), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"}
LORAWELD = [sys.executable, "-m", "loraweld"]
STARTUP_RUNS = 10
READ_BYTES = 8 << 20
MIB, GB = 1 << 20, 10**9

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


class BenchError(Exception):
    """A command failed, or there is no room for its output."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        """Keep the exit code of the command, negative for a signal."""
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one run cost; the byte counts are None where the kernel does not tell."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    read_bytes: int | None  # by read calls, so without what was read through mmap
    disk_read_bytes: int | None
    written_bytes: int | None

    def then(self, other: Sample) -> Sample:
        """Return the cost of this run followed by another."""
        return Sample(
            wall_s=self.wall_s + other.wall_s,
            cpu_s=self.cpu_s + other.cpu_s,
            peak_rss_bytes=max(self.peak_rss_bytes, other.peak_rss_bytes),
            read_bytes=add(self.read_bytes, other.read_bytes),
            disk_read_bytes=add(self.disk_read_bytes, other.disk_read_bytes),
            written_bytes=add(self.written_bytes, other.written_bytes),
        )


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


def add(first: int | None, second: int | None) -> int | None:
    """Return the sum of two counts, unknown if one is."""
    return None if first is None or second is None else first + second


# Measuring


def measure(command: list[str], log: Path) -> Sample:
    """Run a command to its end and return its cost.

    Args:
        command: program and arguments.
        log: file that receives its output.

    Raises:
        BenchError: the command failed.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [(os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o666), (os.POSIX_SPAWN_DUP2, 1, 2)]
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, ENVIRONMENT, file_actions=actions)
    await_exit(pid)
    wall_s = time.perf_counter() - start
    io = io_counters(pid)  # complete now, and readable until the process is reaped
    _, status, usage = os.wait4(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise BenchError(f"{shlex.join(command)}: exit code {code}\n{tail}", exit_code=code)
    return Sample(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * 1024,
        read_bytes=io.get("rchar"),
        disk_read_bytes=io.get("read_bytes"),
        written_bytes=io.get("write_bytes"),
    )


def await_exit(pid: int) -> None:
    """Wait until a child has ended, without reaping it; kill it if we are to end ourselves."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def io_counters(pid: int) -> dict[str, int]:
    """Return the byte counters of a process; empty where they cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


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


def run_case(case: Case, args: argparse.Namespace, work: Path) -> None:
    """Collect the samples of a case: cp and loraweld in turn, then PEFT, whose failure is only noted."""
    order = ["cp", "loraweld"] * args.runs + ["PEFT"] * (args.peft_runs if args.peft else 0)
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


# Files


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


# Reporting


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


COST_HEADER = ["wall s", "CPU s", "peak RSS MiB", "read GB", "from disk GB", "written GB"]


def median_sample(samples: Sequence[Sample]) -> Sample:
    """Return the median of each figure."""

    def bytes_of(name: str) -> int | None:
        """Return the median of a byte count, unknown if one is."""
        values = [getattr(s, name) for s in samples]
        return None if None in values else int(statistics.median(values))

    return Sample(
        wall_s=statistics.median(s.wall_s for s in samples),
        cpu_s=statistics.median(s.cpu_s for s in samples),
        peak_rss_bytes=int(statistics.median(s.peak_rss_bytes for s in samples)),
        read_bytes=bytes_of("read_bytes"),
        disk_read_bytes=bytes_of("disk_read_bytes"),
        written_bytes=bytes_of("written_bytes"),
    )


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


def ratios_table(cases: Sequence[Case]) -> str:
    """Return how the wall times compare."""
    rows = []
    for case in cases:
        ratios = case.pair_ratios()
        cells = [statistics.median(ratios), min(ratios), max(ratios), case.peft_ratio()]
        rows.append([f"{case.shape} r {case.rank}", *(show(cell, 2) for cell in cells)])
    return table(["wall time", "loraweld / cp, median", "min", "max", "PEFT / loraweld"], rows)


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


def machine(work: Path) -> str:
    """Return what the numbers depend on: hardware, kernel, file system, versions, date and command."""
    rows = {
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": output_of("df", "--output=fstype", str(work))[-1],
        "cp": output_of("cp", "--version")[0],
        "Python": platform.python_version(),
        **{name: version(name) for name in ("loraweld", "torch", "transformers", "peft", "safetensors")},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "command": f"`{command_line()}`",
    }
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def output_of(*command: str) -> list[str]:
    """Return the lines that a command prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.splitlines() or ["unknown"]


def version(package: str) -> str:
    """Return the version of an installed package, of ours from the checkout."""
    if package == "loraweld":
        lines = (REPO / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        return next(line.split('"')[1] for line in lines if line.startswith("version"))
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def processor() -> str:
    """Return the model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def command_line() -> str:
    """Return the command as given, absolute paths shortened to their last part."""
    arguments = [Path(a).name if a.startswith("/") else a for a in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/bench.py", *arguments])


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


def peft_notes(cases: Sequence[Case]) -> list[str]:
    """Return what went wrong with PEFT, if anything did."""
    failed = [f"{case.shape} r {case.rank} ({case.peft_failure})" for case in cases if case.peft_failure]
    return [f"PEFT failed on {', '.join(failed)}."] if failed else []


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


# Running


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
            run_case(case, args, work)
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
