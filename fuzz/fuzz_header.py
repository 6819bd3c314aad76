"""Coverage-guided: bytes → the header of a safetensors file and the keys of an adapter. See `run.py`."""

from __future__ import annotations

import run

with run.watched():
    import hostile

run.fuzz(lambda data: hostile.survives(run.SCENE, "header", data), kind="header")
