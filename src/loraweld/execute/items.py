"""A plan's weight files → work items, done in any order by any thread.

Weights that are kept, converted or edited: page-aligned ranges of a file, which cut tensors, but between tiles if they
can. A weight that is encoded anew: one item, codes and scales, since scales may depend on all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from loraweld.compute.tiles import TileGrid
from loraweld.planning.merge_plan import MergePlan, PlacedPart, Recipe, WeightFile
from loraweld.sinks.system import BLOCK_BYTES


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

    @property
    def placed(self) -> Sequence[PlacedPart]:
        """What lies in these bytes, if only in part."""
        placed = self.file.placed
        first = max(0, bisect_right(placed, self.start, key=lambda p: p.offset) - 1)
        last = bisect_right(placed, self.end - 1, key=lambda p: p.offset)
        return [piece for piece in placed[first:last] if piece.end > self.start]

    def windows(self, num_bytes: int) -> Iterator[Item]:
        """Yield its bytes in order as items of at most `num_bytes`, which end in the last block of a tile if they can.

        What is left of the tile is then less than a block.
        """
        start = self.start
        while start < self.end:
            border = limit = min(start + num_bytes, self.end)
            top = _tile_top(self.file, limit + BLOCK_BYTES - 1)
            if limit < self.end and top is not None:
                border = top // BLOCK_BYTES * BLOCK_BYTES
            end = border if border > start else limit
            yield Item(self.file, start, end)
            start = end

    @property
    def is_kept(self) -> bool:
        """Whether nothing here is computed: all bytes are those of the base."""
        return self.encoded is None and all(piece.recipe.keeps_bytes for piece in self.placed)


# Neighbouring items of one file, which one thread makes in order.
Stretch = tuple[Item, ...]


class Copies(Protocol):
    """What a sink can do with a file of the base."""

    def copies(self, source: Path) -> bool:
        """Whether it copies such a file whole."""

    def starts_from(self, name: str, source: Path) -> bool:
        """Whether output file `name` begins as a clone of `source`, so that only what changes is written."""

    def least_bytes(self, size: int) -> int:
        """The least that is written in one go to a file of `size` bytes; its end may be shorter."""


def work_items(plan: MergePlan, sink: Copies) -> Iterator[Item]:
    """Yield the items of all weight files in order."""
    for file in plan.weights:
        if file.same_as is not None and sink.copies(file.same_as):
            yield Item(file, 0, file.num_bytes, whole=file.same_as)
        elif file.like is not None and not file.has_encoded and sink.starts_from(file.name, file.like):
            for start, end in _changed(file):
                yield from _ranges(file, start, end, plan.item_bytes)
        else:
            yield from _items(file, plan.item_bytes)


def stretches(plan: MergePlan, sink: Copies) -> list[Stretch]:
    """Return the items of all weight files in order, put together to what the sink takes in one go."""
    found: list[Stretch] = []
    for item in work_items(plan, sink):
        last = found[-1] if found else None
        if last and last[-1].file is item.file and _num_bytes(last) < sink.least_bytes(item.file.num_bytes):
            found[-1] = (*last, item)
        else:
            found.append((item,))
    return found


def _num_bytes(stretch: Stretch) -> int:
    return stretch[-1].end - stretch[0].start


def encoded_items(plan: MergePlan) -> Iterator[Item]:
    """Yield the items that are a weight to encode, wherever the output goes."""
    for file in plan.weights:
        if file.has_encoded:
            yield from (item for item in _items(file, plan.item_bytes) if item.encoded is not None)


def _changed(file: WeightFile) -> list[tuple[int, int]]:
    """The block-aligned ranges of a file in which something changes."""
    ranges: list[tuple[int, int]] = []
    for placed in file.placed:
        if placed.recipe.keeps_bytes:
            continue
        start = placed.offset // BLOCK_BYTES * BLOCK_BYTES
        end = min(_block_after(placed.end), file.num_bytes)
        if ranges and start <= ranges[-1][1]:
            start = ranges.pop()[0]
        ranges.append((start, end))
    return ranges


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
    while start < end:
        border = _border(file, start, start + step) if start + step < end else end
        yield Item(file, start, border)
        start = border


def _border(file: WeightFile, start: int, limit: int) -> int:
    """Return where an item from `start` to `limit` at most ends: in the first block of a tile if it can.

    What is left of the tile is then so little that the item behind the border can make it for this one too.
    """
    top = _tile_top(file, limit - BLOCK_BYTES)
    border = limit if top is None else _block_after(top)
    return border if border > start else limit


def _tile_top(file: WeightFile, place: int) -> int | None:
    """Return where the tile with the byte at `place` of a file begins, None if none is computed there."""
    index = bisect_right(file.placed, place, key=lambda one: one.offset) - 1
    if index < 0 or (placed := file.placed[index]).end <= place:
        return None
    recipe = placed.recipe
    if recipe.keeps_bytes or recipe.is_encoded:
        return None
    row_bytes = recipe.num_bytes // recipe.rows
    row = (place - placed.offset) // row_bytes
    top, _ = next(TileGrid(recipe.rows, recipe.source.cols).tiles(row, row + 1))
    return placed.offset + top * row_bytes


def _block_after(place: int) -> int:
    """Return the first block border from a place on."""
    return -(-place // BLOCK_BYTES) * BLOCK_BYTES
