"""The command in a process of its own: run, stopped halfway, looked into."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 120  # what a test waits before it calls a process stuck; no test depends on its value
Argument = str | Path


def run_command(
    *arguments: Argument, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m loraweld` with these arguments."""
    return run_python("-m", "loraweld", *arguments, cwd=cwd, env=env)


def run_python(
    *arguments: Argument, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """Tests that run in the background ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_halfway(arguments: Sequence[Argument], *, output: Path) -> None:
    """Start a merge into `output` and kill it, without mercy, when part of the weights are written."""
    with stalled_merge(arguments, output) as (process, _):
        process.kill()


def interrupt_halfway(arguments: Sequence[Argument], *, output: Path) -> tuple[int, str]:
    """Start a merge, press Ctrl-C when part of the weights are written; return (exit code, stderr)."""
    with stalled_merge(arguments, output) as (process, stderr):
        process.send_signal(signal.SIGINT)
        shown = read_all(stderr)
        return process.wait(PATIENCE_S), shown.strip("\n")


@contextmanager
def stalled_merge(arguments: Sequence[Argument], output: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Yield a merge of several files that cannot finish, and its stderr: a full pipe that blocks its first message."""
    reading, writing = full_pipe()
    command = [sys.executable, "-m", "loraweld", "merge", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writing, preexec_fn=heed_interrupts) as process:
        os.close(writing)
        try:
            wait_for_weights(process, output)
            yield process, reading
        finally:
            process.kill()
            os.close(reading)


def full_pipe() -> tuple[int, int]:
    """Return both ends of a pipe in which a writer blocks until somebody reads."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(writing, b"\n" * size)
        except BlockingIOError:
            pass
    os.set_blocking(writing, True)
    return reading, writing


def read_all(descriptor: int) -> str:
    """Return what is written until the last writer is gone."""
    pieces = []
    while piece := os.read(descriptor, 1 << 16):
        pieces.append(piece)
    return b"".join(pieces).decode()


def wait_for_weights(process: subprocess.Popen[bytes], output: Path) -> None:
    """Return when the merge has created a weight file, wherever it keeps it beside `output`."""
    deadline = time.monotonic() + PATIENCE_S
    before = set(output.parent.rglob("*.safetensors"))
    while not set(output.parent.rglob("*.safetensors")) - before:
        assert process.poll() is None, "the merge ended before it could be stopped"
        assert time.monotonic() < deadline, "the merge does not begin"
        time.sleep(0.02)
