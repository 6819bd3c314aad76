"""Coverage-guided: bytes → the index, the config or the adapter's config of a merge that is planned. See `run.py`."""

from __future__ import annotations

import run

with run.watched():
    import hostile

KINDS = ("adapter_config", "config", "index", "tokenizer")


def one(data: bytes) -> None:
    """The first byte says in whose place the rest is put."""
    if data:
        hostile.survives(run.SCENE, KINDS[data[0] % len(KINDS)], data[1:])


run.fuzz(one, kind="json")
