"""Merges in processes that get killed. Starting one takes seconds for importing torch, forking one nothing.

`ForkServer` starts this file as a script: a process of one thread that has imported torch, and that forks for each
request, a line of JSON on stdin. The child merges; the server kills it if asked to, and answers with another line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a merge. `steps` counts its steps towards durability (see `_count_steps`)."""

    killed: bool
    seconds: float
    steps: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class ForkServer:
    """Runs `loraweld.merge` in a process of its own each time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
        )

    def merge(
        self,
        *,
        kill_after_s: float | None = None,
        kill_at_step: int | None = None,
        item_bytes: int = 64 << 10,
        checkpoint_bytes: int = 256 << 10,
        can_exchange: bool = True,
        counts_reads_and_writes: bool = False,
        **options: Any,
    ) -> Outcome:
        """Merge with these options of `loraweld.merge`; the process is killed if it has not ended before."""
        request = {
            "kill_after_s": kill_after_s,
            "kill_at_step": kill_at_step,
            "item_bytes": item_bytes,
            "checkpoint_bytes": checkpoint_bytes,
            "can_exchange": can_exchange,
            "counts_reads_and_writes": counts_reads_and_writes,
            "options": options,
        }
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request, default=str), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


def serve() -> None:
    """Answer requests until stdin ends."""
    import loraweld.api
    import loraweld.execute.fill  # noqa: F401  (imported by a merge on its way)

    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a process of several threads must not fork"
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_fork(json.loads(line))) + "\n")
        sys.stdout.flush()


def _fork(request: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_in_child(request, writing)
    os.close(writing)
    if request["kill_after_s"] is not None:
        time.sleep(request["kill_after_s"])
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        answer = json.loads(pipe.read() or "{}")
    _, status = os.waitpid(child, 0)
    return {"killed": os.WIFSIGNALED(status), "seconds": time.monotonic() - started, **answer}


def _run_in_child(request: dict[str, Any], writing: int) -> None:
    answer: dict[str, Any] = {"error": "ended by an unexpected exception"}
    try:
        answer = _merge(request)
    finally:
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)


def _merge(request: dict[str, Any]) -> dict[str, Any]:
    import loraweld
    from loraweld.execute import run
    from loraweld.planning import memory
    from loraweld.sinks import system

    run.CHECKPOINT_BYTES = request["checkpoint_bytes"]
    memory.ITEM_BYTES = request["item_bytes"]
    memory.BUFFER_BYTES = memory.MIN_BUFFER_BYTES = max(4096, request["item_bytes"] // 2)
    if not request["can_exchange"]:
        system.exchange = lambda one, other: False
    steps = _count_steps(request["kill_at_step"], all_calls=request["counts_reads_and_writes"])
    try:
        report = loraweld.merge(**request["options"]).to_json()
    except loraweld.LoraweldError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"report": report, "steps": len(steps)}


def _count_steps(kill_at: int | None, *, all_calls: bool) -> list[str]:
    """Note each call that makes something durable, moves it or removes it; die just before number `kill_at`.

    With `all_calls` those that read and write files count too.
    """
    steps: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            if len(steps) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            steps.append(name)
            return call(*args, **options)

        return step

    from loraweld.sinks import system

    places: list[tuple[Any, str]] = [(system, "exchange"), (Path, "replace"), (Path, "mkdir")]
    names = ("fsync", "fdatasync", "ftruncate", "unlink", "rmdir")
    names += ("preadv", "pwrite", "copy_file_range", "open") if all_calls else ()
    places += [(os, name) for name in names if hasattr(os, name)]
    places += [(shutil, "rmtree")]
    for place, name in places:
        setattr(place, name, counted(name, getattr(place, name)))
    return steps


if __name__ == "__main__":
    serve()
