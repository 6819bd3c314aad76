"""A plan's weight files → work items, done in any order by any thread.

Weights that are kept, converted or edited: page-aligned ranges of a file, whatever tensors they cut. A weight that is
encoded anew: one item, codes and scales, since scales may depend on all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from loraweld.planning.merge_plan import MergePlan, Recipe, WeightFile


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes [start, end) of output file `file`; a file that equals `whole`, one of the base's, may be one item.

    `encoded` is the recipe whose parts these bytes are, if the item is a weight to encode.
    """

    file: WeightFile
    start: int
    end: int
    encoded: Recipe | None = None
    whole: Path | None = None

    @property
    def key(self) -> str:
        """The item's name in the journal."""
        return f"{self.file.name}:{self.start}:{self.end}"


def work_items(plan: MergePlan, copies: Callable[[Path], bool]) -> Iterator[Item]:
    """Yield the items of all weight files in order; `copies` says whether a sink copies a file whole."""
    for file in plan.weights:
        if file.same_as is not None and copies(file.same_as):
            yield Item(file, 0, file.num_bytes, whole=file.same_as)
        else:
            yield from _items(file, plan.item_bytes)


def _items(file: WeightFile, step: int) -> Iterator[Item]:
    start = 0
    for recipe, group in groupby(file.placed, key=lambda placed: placed.recipe):
        if recipe.is_encoded:
            parts = list(group)
            yield from _ranges(file, start, parts[0].offset, step)
            yield Item(file, parts[0].offset, parts[-1].end, recipe)
            start = parts[-1].end
    yield from _ranges(file, start, file.num_bytes, step)


def _ranges(file: WeightFile, start: int, end: int, step: int) -> Iterator[Item]:
    for first in range(start, end, max(1, step)):
        yield Item(file, first, min(first + step, end))
