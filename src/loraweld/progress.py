"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from loraweld.report import human_bytes


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


class Work(Protocol):
    """The plan of a merge or of an extraction: as much as a bar has to know of it."""

    @property
    def weights(self) -> Sequence[_Sized]: ...


class Shown(Protocol):
    """What a merge tells its observer: the plan, then bytes as they become ready, from any thread, then other steps."""

    def begin(self, plan: Work) -> None: ...

    def advance(self, count: int) -> None: ...

    def say(self, text: str) -> None: ...


@contextmanager
def show_progress(*, quiet: bool) -> Iterator[Shown]:
    """Yield the observer that fits the place stderr goes to."""
    if quiet:
        yield _Nothing()
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bar(bar)
    else:
        yield _Lines()


class _Nothing:
    def begin(self, plan: Work) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class _Bar:
    def __init__(self, bar: object) -> None:
        from rich.progress import Progress

        assert isinstance(bar, Progress)
        self._bar = bar
        self._task = bar.add_task("work", total=None)

    def begin(self, plan: Work) -> None:
        self._bar.update(self._task, total=sum(file.num_bytes for file in plan.weights))

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def say(self, text: str) -> None:
        self._bar.console.print(f"loraweld: {text}", markup=False, highlight=False)


class _Lines:
    """A line each time another tenth is done."""

    def __init__(self) -> None:
        self._total = 0
        self._done = 0
        self._lock = threading.Lock()

    def begin(self, plan: Work) -> None:
        self._total = sum(file.num_bytes for file in plan.weights)

    def advance(self, count: int) -> None:
        with self._lock:
            before, self._done = self._done, self._done + count
            if self._total and before * 10 // self._total < self._done * 10 // self._total:
                share = f"{self._done * 100 // self._total:3d} %"
                sys.stderr.write(f"loraweld: {share} of {human_bytes(self._total)}\n")

    def say(self, text: str) -> None:
        sys.stderr.write(f"loraweld: {text}\n")
