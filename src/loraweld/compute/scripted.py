"""Loops over pieces of a tensor that run without the interpreter's lock.

A piece should fit the cache of a core; then each of torch's operations on it takes a few microseconds, and between any
two the threads of a process would wait for each other's turn. As TorchScript a function takes the lock once. torch
calls that deprecated and names no successor without a compiler, so where it is missing the function runs as Python.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def scripted(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return `function` as TorchScript, or as it is where torch has none."""
    script = getattr(torch.jit, "script", None)
    if script is None:
        return function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return cast(Callable[Parameters, Result], script(function))
        except (RuntimeError, TypeError, NotImplementedError, OSError):  # a Python it does not know, no source at hand
            return function
