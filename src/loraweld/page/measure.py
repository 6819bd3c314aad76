"""Base and output → the size of the change of every tensor; reads both once, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing

from loraweld.checkpoint.base import Base
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.naming.places import Place, places
from loraweld.naming.tied import find_ties
from loraweld.page.changes import TensorChange
from loraweld.torch_settings import plain_arithmetic
from loraweld.verification.compare import CHANGED, Sums, TensorDifference, difference

Progress = Callable[[int], None]


def measure(
    base: Base, output: Base, progress: Progress, *, known: Mapping[str, TensorChange] | None = None
) -> tuple[TensorChange, ...]:
    """Return the change of each tensor of `output`, in its order; of those in `known` it is known already.

    Raises:
        CheckpointError: a file cannot be read.
    """
    old, known = with_ties(base), known or {}
    where = places(list(output.tensors))
    with closing(Reader()) as reader, plain_arithmetic():
        found = []
        for name, source in output.tensors.items():
            found.append(known.get(name) or _measured(name, where[name], old.get(name), source, reader))
            progress(source.stored_bytes)
        return tuple(found)


def with_ties(base: Base) -> Mapping[str, Source]:
    """Return the weights of a base by all the names they have: a tied one is that of its source."""
    ties = find_ties(base.tensors, base.config)
    return {**base.tensors, **{tie.target: base.tensors[tie.source] for tie in ties if tie.source in base.tensors}}


def _measured(name: str, place: Place, old: Source | None, new: Source, reader: Reader) -> TensorChange:
    if old is None:
        return told(name, place, new, TensorDifference(tensor=name, what="not in the base"))
    return told(name, place, new, difference(name, old, new, reader, Sums()))


def told(name: str, place: Place, new: Source, found: TensorDifference | None) -> TensorChange:
    """Return how a tensor differs as the page shows it; None: it does not."""
    return TensorChange(
        tensor=name,
        layer=place.layer,
        module=place.module,
        shape=new.shape,
        relative_change=found.relative if found else 0.0,
        note=found.what if found and found.what != CHANGED else "",
    )
