"""Every call that a merge makes to the system, numbered; one of them fails, comes up short, or is slow."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraweld.sinks import system

CALLS = ("preadv", "pwrite", "copy_file_range", "fsync", "fdatasync", "ftruncate", "open")
PATH_CALLS = ("replace", "mkdir", "unlink", "write_text")
SLOW_SECONDS = 0.002


class Disturbed:
    """The system with call number `at` disturbed in a `way`: an error's number, "short" or "slow"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: int | None, way: int | str = 0) -> None:
        self.made: list[str] = []
        self._at = at
        self._way = way
        for name in CALLS:
            if hasattr(os, name):
                monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))
        for name in PATH_CALLS:
            monkeypatch.setattr(Path, name, self._counted(name, getattr(Path, name)))
        monkeypatch.setattr(system, "exchange", self._counted("exchange", system.exchange))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            number = len(self.made)
            self.made.append(name)
            return self._disturb(name, call, args, options) if number == self._at else call(*args, **options)

        return counted

    def _disturb(self, name: str, call: Callable[..., Any], args: Any, options: Any) -> Any:
        if isinstance(self._way, int):
            raise OSError(self._way, os.strerror(self._way))
        if self._way == "slow":
            time.sleep(SLOW_SECONDS)
        elif name == "preadv":
            return call(args[0], [args[1][0][: max(1, len(args[1][0]) // 2)]], args[2])
        elif name == "copy_file_range":
            return call(args[0], args[1], max(1, args[2] // 2), *args[3:])
        elif name == "pwrite":
            return call(args[0], args[1][: max(1, len(args[1]) // 8192 * 4096)], args[2])
        return call(*args, **options)


WAYS: dict[str, int | str] = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "short": "short", "slow": "slow"}
