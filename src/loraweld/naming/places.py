"""Where a tensor is in a model, by its name: the layer it belongs to, and what kind of module it is of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# The first number that is a part of a name by itself counts layers; numbers after it count experts and the like.
_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)??(?P<layer>\d+)\.(?P<rest>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Place:
    """`layer` is None outside the layers; `module` is the rest of the name, with the path before the layers where a
    model has several stacks of them."""

    layer: int | None
    module: str


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


def kind_of(module: str) -> str:
    """Return what modules of one kind are called together: without the numbers of experts, and without "weight"."""
    return _NUMBER.sub("*", module).removesuffix(".weight")
