"""Loops run as TorchScript, or as they are where torch has none: with the same bits."""

from __future__ import annotations

import importlib.util
import sys
from inspect import isfunction
from types import ModuleType

import pytest
import torch

from loraweld.compute import low_rank, magnitudes
from loraweld.compute import scripted as module
from loraweld.compute.codecs import bnb4_encode, scale_search


def without_script(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module again, made where torch has no TorchScript."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_again", str(module.__file__))
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.delattr(torch.jit, "script")
        patch.setitem(sys.modules, spec.name, again)  # where its dataclasses look for names
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("error", [0.0, 1e-4])
def test_script_and_python_find_the_same(dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search among 16-bit values."""
    python = without_script(magnitudes, monkeypatch)
    assert isfunction(python._search) and not isfunction(magnitudes._search)
    values = torch.randn(37, 640, generator=torch.Generator().manual_seed(1)).to(dtype)
    one, other = magnitudes.search(values, error), python.search(values, error)
    assert one[0] and other[0] and (one[1] == other[1]).all() and (len(one[1]) > 0) == (error > 0)


@pytest.mark.parametrize("piece", [(640, 1 << 18), (5000, 700), (1 << 19, 1 << 18)])
def test_script_and_python_add_to_the_same_bits(piece: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows plus two deltas, in pieces."""
    python, draw = without_script(low_rank, monkeypatch), torch.Generator().manual_seed(2)
    assert isfunction(python._add_rounded) and not isfunction(low_rank._add_rounded)
    base = torch.randn(37, 640, generator=draw).bfloat16()
    made = []
    for one in (low_rank, python):
        monkeypatch.setattr(one, "PIECE_ELEMENTS", piece[0])
        monkeypatch.setattr(one, "RIGHT_ELEMENTS", piece[1])
        terms = [
            one.Term(torch.ones(37, 3), base[:3].float(), 0.5, 1e-4),
            one.Term(base[:, :2].float(), base[:2].float(), 2.0, 0.0),
        ]
        out = torch.empty_like(base)
        found = one.add_rounded(base, terms, out, one.PieceRoom())
        made.append((out, found.finite, torch.from_numpy(found.doubtful), found.stored))
    assert len(made[0][2]) > 0
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in zip(*made, strict=True))
