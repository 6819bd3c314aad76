"""Base and output → the size of the change of every tensor; reads both once, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing

import torch

from loraweld.checkpoint.base import Base
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor, same_bytes
from loraweld.compute.difference import squared_norms
from loraweld.dtypes import is_plain_float
from loraweld.naming.tied import find_ties
from loraweld.page.changes import Place, TensorChange, places

Progress = Callable[[int], None]


def measure(base: Base, output: Base, progress: Progress) -> tuple[TensorChange, ...]:
    """Return the change of each tensor of `output`, in its order.

    Raises:
        CheckpointError: a file cannot be read.
    """
    old = with_ties(base)
    where = places(list(output.tensors))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits on any machine
    try:
        with closing(Reader()) as reader:
            found = []
            for name, source in output.tensors.items():
                found.append(_measured(name, where[name], old.get(name), source, reader))
                progress(source.stored_bytes)
            return tuple(found)
    finally:
        torch.set_num_threads(threads)


def with_ties(base: Base) -> Mapping[str, Source]:
    """Return the weights of a base by all the names they have: a tied one is that of its source."""
    ties = find_ties(base.tensors, base.config)
    return {**base.tensors, **{tie.target: base.tensors[tie.source] for tie in ties if tie.source in base.tensors}}


def _measured(name: str, place: Place, old: Source | None, new: Source, reader: Reader) -> TensorChange:
    change, note = _relative_change(old, new, reader)
    return TensorChange(
        tensor=name, layer=place.layer, module=place.module, shape=new.shape, relative_change=change, note=note
    )


def _relative_change(old: Source | None, new: Source, reader: Reader) -> tuple[float | None, str]:
    if old is None:
        return None, "not in the base"
    if old.shape != new.shape:
        return None, f"{' × '.join(map(str, old.shape))} in the base"
    if isinstance(old, StoredTensor) and isinstance(new, StoredTensor) and same_bytes(old, new):
        return 0.0, "same bytes"
    if not all(new.shape):
        return 0.0, "empty"
    if not (is_plain_float(old.dtype) and is_plain_float(new.dtype)):
        return None, "not floating point, and not the same"
    squared_change, squared_base = squared_norms(old, new, reader)
    if squared_base == 0:
        return (0.0, "") if squared_change == 0 else (None, "zero in the base")
    ratio = math.sqrt(squared_change / squared_base)
    return (ratio, "") if math.isfinite(ratio) else (None, "not finite")
