"""Finished items are noted beside other work: threads do not wait for the one that notes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import loraweld
from fakes import llama_shapes, random_factors, random_tensors, write_adapter, write_base
from loraweld.execute.items import Item
from loraweld.execute.run import _Checkpoint
from loraweld.sinks.journal import Journal, Noted

SHAPES = llama_shapes(hidden=128, intermediate=256, layers=2, vocab=500)


@pytest.mark.usefixtures("small_items")
def test_others_go_on_while_one_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first note waits for a hash of the adapters: here for as long as others have not finished ten items more."""
    base = write_base(tmp_path / "base", random_tensors(SHAPES, torch.bfloat16))
    adapter = write_adapter(tmp_path / "adapter", random_factors({k: v for k, v in SHAPES.items() if "proj" in k}))
    begun, enough = threading.Event(), threading.Event()
    left = iter(range(10))
    append, add = Journal.append, _Checkpoint.add

    def waiting(self: Journal, items: Noted) -> None:
        begun.set()
        assert enough.wait(60), "nobody went on"
        append(self, items)

    def counted(self: _Checkpoint, item: Item, noted: list[float]) -> None:
        add(self, item, noted)
        if begun.is_set() and next(left, None) is None:
            enough.set()

    monkeypatch.setattr(Journal, "append", waiting)
    monkeypatch.setattr(_Checkpoint, "add", counted)
    loraweld.merge(adapter, base=base, output=tmp_path / "out", workers=2)
    assert loraweld.verify(tmp_path / "out", adapter=adapter, base=base).holds
