"""What changed in each tensor, as values: whoever measures it, the page shows these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The first number that is a part of a name by itself counts layers; numbers after it count experts and the like.
_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)??(?P<layer>\d+)\.(?P<rest>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """One weight of the output beside the base's.

    `layer` is None outside the layers; `module` is the rest of the name, the path of the layers before it where a model
    has several. `relative_change` is ‖out − base‖ / ‖base‖, None where there is no such number, and `note` says why.
    `kept` and `error` are what an encoding left of the adapter's change and added to the weight, where that was
    measured.
    """

    tensor: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    relative_change: float | None = None
    kept: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in a model."""

    layer: int | None
    module: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A layer's tensors of one kind; `largest` is the largest of their changes, `tensor` the one that has it."""

    layer: int
    kind: str
    tensor: str
    largest: float
    num_tensors: int


def places(names: Sequence[str]) -> dict[str, Place]:
    """Return the place of each tensor by its name."""
    matches = {name: _LAYER.fullmatch(name) for name in names}
    several = len({match["stack"] for match in matches.values() if match}) > 1
    return {
        name: Place(int(match["layer"]), f"{match['stack'] or ''}: {match['rest']}" if several else match["rest"])
        if match
        else Place(None, name)
        for name, match in matches.items()
    }


def in_order(changes: Iterable[TensorChange]) -> list[TensorChange]:
    """Return the changes by layer, what is outside the layers first, else as they come."""
    return sorted(changes, key=lambda change: -1 if change.layer is None else change.layer)


def percent(ratio: float) -> str:
    """Return a ratio as people read it, to six digits."""
    return f"{100 * ratio:.6g} %"


def kind_of(module: str) -> str:
    """Return what a column of the map is called: the module without the numbers of experts, and without "weight"."""
    return _NUMBER.sub("*", module).removesuffix(".weight")


def cells(changes: Sequence[TensorChange]) -> list[Cell]:
    """Return the map: of each layer and kind of tensor the largest change, for those that were measured."""
    groups: dict[tuple[int, str], list[TensorChange]] = {}
    for change in changes:
        if change.layer is not None and change.relative_change is not None:
            groups.setdefault((change.layer, kind_of(change.module)), []).append(change)
    found = []
    for (layer, kind), members in groups.items():
        top = max(members, key=lambda member: member.relative_change or 0.0)
        found.append(
            Cell(
                layer=layer,
                kind=kind,
                tensor=top.tensor,
                largest=top.relative_change or 0.0,
                num_tensors=len(members),
            )
        )
    return found
