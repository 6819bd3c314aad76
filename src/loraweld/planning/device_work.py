"""Which work of a plan another device than the CPU can take over: what waits for arithmetic, not for the disk.

Rows in 16 bit stay on the CPU, which keeps up with the disk: to move them would take as long as to compute them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from loraweld.adapter.edits import Edit, OnRows, Residual, Weighted
from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.scaled import Scaled
from loraweld.planning.merge_plan import Recipe
from loraweld.request import CPU

# What plain weights are put into. Into the others goes only what was decoded from them, on the CPU; and their encoders
# share the decoders' tables, and leave some steps to numpy.
_ENCODINGS = (Bnb4, Scaled)


def is_encoded_on_device(recipe: Recipe) -> bool:
    """Whether a weight is quantised on the device."""
    return recipe.is_encoded and isinstance(recipe.encoding, _ENCODINGS)


def is_decomposed_on_device(recipe: Recipe) -> bool:
    """Whether factors of a whole weight are derived on the device."""
    return any(isinstance(edit, Residual) for edit in _leaves(recipe.edits))


def device_notes(device: str, recipes: Sequence[Recipe]) -> list[str]:
    """Say what is done on a device that was asked for."""
    if device == CPU:
        return []
    encoded, decomposed = (sum(map(is_one, recipes)) for is_one in (is_encoded_on_device, is_decomposed_on_device))
    if not encoded and not decomposed:
        return [f"device {device} has nothing to do: this merge quantises and decomposes nothing that is done there"]
    return [f"on device {device}: {encoded} weights quantised, {decomposed} decomposed; all else on the CPU"]


def _leaves(edits: Iterable[Edit]) -> Iterator[Edit]:
    """The edits themselves, without what says where and how strongly they act."""
    for edit in edits:
        match edit:
            case OnRows():
                yield from _leaves([edit.edit])
            case Weighted():
                yield from _leaves(edit.edits)
            case _:
                yield edit
