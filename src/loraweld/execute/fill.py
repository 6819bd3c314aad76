"""Fill a buffer with the bytes of one work item."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from loraweld.checkpoint.reader import Reader
from loraweld.compute.editor import EditSession, Outcome, Scratch, TensorEditor
from loraweld.compute.kernels import Ints
from loraweld.compute.tensors import item_size
from loraweld.errors import NumericsError
from loraweld.execute.items import Item
from loraweld.planning.merge_plan import PlacedRecipe, Recipe


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring output bytes that lie side by side in one source file."""

    path: Path
    offset: int
    start: int
    end: int


class Filler:
    """Makes the bytes of items; serves all threads. Editors of the last few tensors are kept."""

    def __init__(self, reader: Reader, *, num_editors: int) -> None:
        self._reader = reader
        self._num_editors = num_editors
        self._editors: OrderedDict[str, TensorEditor] = OrderedDict()
        self._lock = Lock()
        self._outcome = Outcome()

    def fill(self, item: Item, buffer: memoryview, scratch: Scratch) -> None:
        """Write the bytes of `item` to the start of `buffer`.

        First what lies in the source files, in as few reads as possible, then the computed rows on top.
        """
        header = item.file.header[item.start : item.end]
        buffer[: len(header)] = header
        placed = _overlapping(item)
        for run in _runs(placed, item):
            self._reader.read_into(run.path, run.offset, buffer[run.start - item.start : run.end - item.start])
        for piece in placed:
            if not piece.recipe.keeps_bytes:
                _PieceWriter(self._editor(piece.recipe), piece, item, buffer, self._reader).write(scratch)

    def check_any_change(self) -> None:
        """Refuse a result in which nothing is left of what was trained.

        Raises:
            NumericsError: deltas were not zero, yet no tensor differs from its base after rounding.
        """
        if self._outcome.had_delta and not self._outcome.any_change:
            raise NumericsError(
                "every change of the adapter is smaller than the output dtype can hold: the result would be "
                "the base. Give --dtype float32"
            )

    def _editor(self, recipe: Recipe) -> TensorEditor:
        with self._lock:
            editor = self._editors.pop(recipe.name, None) or TensorEditor(recipe, self._reader, self._outcome)
            self._editors[recipe.name] = editor
            while len(self._editors) > self._num_editors:
                self._editors.popitem(last=False)
            return editor


class _PieceWriter:
    """Computes the part of one tensor that lies in one item."""

    def __init__(
        self, editor: TensorEditor, placed: PlacedRecipe, item: Item, buffer: memoryview, reader: Reader
    ) -> None:
        self._editor = editor
        self._placed = placed
        self._item = item
        self._buffer = buffer
        self._reader = reader
        self._in_place = _reads_in_place(placed, item)

    def write(self, scratch: Scratch) -> None:
        """Compute the tiles and copy what falls into the item to the buffer."""
        editor, offset = self._editor, self._placed.offset
        low = max(self._item.start, offset)
        high = min(self._item.end, self._placed.end)
        if low >= high:
            return
        first = (low - offset) // editor.row_bytes
        last = -(-(high - offset) // editor.row_bytes)
        session = editor.session(first, last, scratch)
        for top, bottom in editor.grid.tiles(first, last):
            self._write_tile(session, top, bottom, low, high)
        self._patch(*session.repairs())

    def _write_tile(self, session: EditSession, top: int, bottom: int, low: int, high: int) -> None:
        start = self._placed.offset + top * self._editor.row_bytes
        end = self._placed.offset + bottom * self._editor.row_bytes
        made = session.compute(self._stored(top, bottom, start, end), top, bottom)
        start_kept, end_kept = max(start, low), min(end, high)
        base = self._item.start
        self._buffer[start_kept - base : end_kept - base] = made[start_kept - start : end_kept - start]

    def _patch(self, flat: Ints, elements: npt.NDArray[np.uint8]) -> None:
        """Overwrite single elements; byte by byte, since an item's border may cut one."""
        if len(flat):
            item = np.frombuffer(self._buffer, dtype=np.uint8)[: self._item.end - self._item.start]
            size = elements.shape[1]
            for byte in range(size):
                places = self._placed.offset - self._item.start + flat * size + byte
                here = (places >= 0) & (places < len(item))
                item[places[here]] = elements[here, byte]

    def _stored(self, top: int, bottom: int, start: int, end: int) -> bytearray | memoryview:
        """The source bytes of rows [top, bottom): from the buffer where they were read to, else from the file."""
        if self._in_place and self._item.start <= start and end <= self._item.end:
            return self._buffer[start - self._item.start : end - self._item.start]
        source, width = self._placed.recipe.source, self._editor.source_row_bytes
        stop = max(top, min(bottom, source.rows))
        return self._reader.read(source, top * width, (stop - top) * width)


def _overlapping(item: Item) -> list[PlacedRecipe]:
    placed = item.file.placed
    first = max(0, bisect_right(placed, item.start, key=lambda p: p.offset) - 1)
    last = bisect_right(placed, item.end - 1, key=lambda p: p.offset)
    return [piece for piece in placed[first:last] if piece.end > item.start]


def _reads_in_place(placed: PlacedRecipe, item: Item) -> bool:
    """True if the source's rows have the output's size and alignment, so that they can be edited in the buffer."""
    recipe = placed.recipe
    same = recipe.dtype == recipe.source.dtype and recipe.shape == recipe.source.shape
    return same and (placed.offset - item.start) % item_size(recipe.dtype) == 0


def _runs(placed: list[PlacedRecipe], item: Item) -> Iterator[_Run]:
    run: _Run | None = None
    for piece in placed:
        if not (piece.recipe.keeps_bytes or _reads_in_place(piece, item)):
            continue
        start, end = max(item.start, piece.offset), min(item.end, piece.end)
        source = piece.recipe.source
        offset = source.offset + start - piece.offset
        if run and (run.path, run.end, run.offset + run.end - run.start) == (source.path, start, offset):
            run = _Run(run.path, run.offset, run.start, end)
            continue
        if run:
            yield run
        run = _Run(source.path, offset, start, end)
    if run:
        yield run
