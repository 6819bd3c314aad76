"""Loops run as TorchScript, or as they are where torch has none: with the same bits."""

from __future__ import annotations

import importlib.util
from inspect import isfunction
from types import ModuleType

import pytest
import torch

from loraweld.compute import scripted as module
from loraweld.compute.codecs import bnb4_encode, scale_search


def without_script(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module again, made where torch has no TorchScript."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_again", str(module.__file__))
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.delattr(torch.jit, "script")
        spec.loader.exec_module(again)
    return again


def test_without_torchscript_the_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.jit, "script")

    def double(values: torch.Tensor) -> torch.Tensor:
        return values * 2

    assert module.scripted(double) is double


def test_a_function_torchscript_does_not_know_stays() -> None:
    def lookup(values: torch.Tensor) -> object:
        return {key: eval(key) for key in "1"}

    assert module.scripted(lookup) is lookup


@pytest.mark.parametrize("blocks", [1, 7, 300])
def test_script_and_python_make_the_same_bits(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of several sizes, the last one cut."""
    values = torch.randn(blocks, 64, generator=torch.Generator().manual_seed(blocks))
    factor = torch.rand(blocks, 1)
    table, complexes = torch.arange(65536).to(torch.uint8), [torch.randn(4097, dtype=torch.complex64) for _ in range(3)]
    encode, search = without_script(bnb4_encode, monkeypatch), without_script(scale_search, monkeypatch)
    assert isfunction(encode._look_up) and isfunction(search._sum_up) and not isfunction(bnb4_encode._look_up)
    look_up, absmax = (bnb4_encode._look_up, encode._look_up), (bnb4_encode._write_absmax, encode._write_absmax)
    sum_up = scale_search._sum_up, search._sum_up
    for piece in (1, 5, 64, 1024):
        made = []
        for number in range(2):
            codes, largest = torch.empty(blocks, 64, dtype=torch.uint8), torch.empty(blocks)
            sums = torch.empty(3, blocks, dtype=torch.complex64)
            look_up[number](values, factor, table, codes, piece, True)
            absmax[number](values, largest, piece)
            sum_up[number](values.clamp(-1, 1), torch.full((blocks, 1), 2048.0), complexes, sums, piece)
            made.append((codes, largest, torch.view_as_real(sums)))
        assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
