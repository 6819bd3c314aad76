"""What a command costs: time, memory and bytes, from the kernel's own counters. Linux only."""

from __future__ import annotations

import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

PYTHONPATH = os.pathsep.join(filter(None, [str(REPO / "src"), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"}
MIB, GB = 1 << 20, 10**9


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


def add(first: int | None, second: int | None) -> int | None:
    """Return the sum of two counts, unknown if one is."""
    return None if first is None or second is None else first + second


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


def seconds_to_first_byte(command: list[str], log: Path, least: int = 1 << 20) -> float:
    """Start a command, and return the seconds until it has written `least` bytes; then it is killed.

    Raises:
        BenchError: it ended before.
    """
    actions = [(os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)]
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, ENVIRONMENT, file_actions=actions)
    try:
        while io_counters(pid).get("wchar", 0) < least:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                raise BenchError(f"{shlex.join(command)} ended before it wrote {least} bytes")
            time.sleep(0.002)
        return time.perf_counter() - start
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


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


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)
