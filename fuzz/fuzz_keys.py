"""Coverage-guided: text → the keys of adapters, the expressions of their configs and paths to match. See `run.py`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import run

with run.watched():
    from loraweld.adapter.keys import parse_key
    from loraweld.adapter.patterns import Budget, LayerNumber, Names, PatternTable
    from loraweld.adapter.tuners import TUNERS
    from loraweld.errors import LoraweldError


def one(data: bytes) -> None:
    """One line is an expression and a key, the next the path that it is matched with."""
    text, _, module = data.decode("utf-8", "replace").partition("\n")
    for tuner in TUNERS.values():
        parse_key(text, tuner)
    budget = Budget(Path("adapter_config.json"))
    with contextlib.suppress(LoraweldError):
        PatternTable([text], budget).first(module)
        LayerNumber([text], budget).of(module)
        assert isinstance(module in Names(text, budget), bool)


run.fuzz(one, kind="keys")
