"""torch's settings of the whole process, while something is computed whose bits must not hang on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """One thread per product, so that its bits do not hang on the number of cores, of float32 numbers as they are.

    A program that trains may have let torch shorten them to bfloat16 or TF32 in products, which it then does where the
    processor has instructions for it: `torch.set_float32_matmul_precision`, from torch 2.9 on `fp32_precision`.
    Of those who compute at the same time the first changes the settings, and the last takes that back.
    """
    _shared.begin()
    try:
        yield
    finally:
        _shared.end()


class _Shared:
    """The changed settings, and how many need them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._change = ExitStack()

    def begin(self) -> None:
        with self._lock:
            if not self._users:
                self._change.enter_context(_changed())
            self._users += 1

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._change.close()


_shared = _Shared()


@contextmanager
def _changed() -> Iterator[None]:
    threads = torch.get_num_threads()
    precisions = _precisions()
    torch.set_num_threads(1)
    try:
        for backend in precisions:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in precisions.items():
            backend.fp32_precision = precision
        torch.set_num_threads(threads)


class _Legacy:
    """The one setting of torch before 2.9."""

    @property
    def fp32_precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)


def _precisions() -> dict[Any, str]:
    """Return what torch is told of products, by who makes them."""
    made_by: list[Any] = [getattr(backend, "matmul", None) for backend in (torch.backends.mkldnn, torch.backends.cuda)]
    if not all(hasattr(one, "fp32_precision") for one in made_by):
        made_by = [_Legacy()]
    return {one: one.fp32_precision for one in made_by}
