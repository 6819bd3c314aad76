"""Fill a buffer with the bytes of one work item."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch

from loraweld.checkpoint.reader import Reader
from loraweld.compute.editor import EditSession, Findings, Scratch, TensorEditor
from loraweld.compute.encoding import WeightEncoding
from loraweld.compute.kernels import Ints
from loraweld.errors import RequestError
from loraweld.execute.items import Item
from loraweld.execute.kept import Piece, fill_kept
from loraweld.execute.outcome import Outcome
from loraweld.planning.merge_plan import Recipe


class Filler:
    """Makes the bytes of items; serves all threads. Editors of the last few tensors are kept."""

    def __init__(
        self, reader: Reader, *, num_editors: int, device: torch.device, allow_nonfinite: bool = False
    ) -> None:
        self._reader = reader
        self._device = device
        self._num_editors = num_editors
        self._editors: OrderedDict[str, TensorEditor] = OrderedDict()
        self._lock = Lock()
        self._findings = Findings(allow_nonfinite=allow_nonfinite)
        self._measured: dict[str, Sequence[float]] = {}

    def pieces(self, item: Item, buffer: memoryview, scratch: Scratch) -> Iterator[Piece]:
        """Yield the bytes of `item` in order, each time in the start of `buffer`."""
        try:
            if item.encoded is not None:
                yield from self._encode(item, item.encoded, buffer, scratch)
            else:
                self._fill(item, buffer, scratch)
                yield Piece(item.start, item.end - item.start)
        except torch.cuda.OutOfMemoryError as error:  # of any kind of device
            raise RequestError(
                f"device {self._device} has no memory left: {error}. Free some, give fewer workers, or leave the "
                "device out for the CPU; what is finished is kept"
            ) from error

    def measured(self, item: Item) -> Sequence[float]:
        """Return the sums of the fidelity of a finished item, nothing if none was edited and encoded."""
        return self._measured.pop(item.key, ())

    def _encode(self, item: Item, recipe: Recipe, buffer: memoryview, scratch: Scratch) -> Iterator[Piece]:
        """Compute a weight, put it into its encoding and pack codes and scales one after the other."""
        work = WeightEncoding(recipe, self._reader, self._findings, scratch, self._device)
        start, used = item.start, 0
        for data in work.stream():
            done = 0
            while done < len(data):
                count = min(len(data) - done, len(buffer) - used)
                np.frombuffer(buffer, np.uint8)[used : used + count] = data[done : done + count]
                done, used = done + count, used + count
                if used == len(buffer):
                    yield Piece(start, used)
                    start, used = start + used, 0
        yield Piece(start, used)
        assert start + used == item.end, f"{recipe.name}: {start + used - item.start} bytes made"
        if recipe.edits:
            self._measured[item.key] = work.fidelity.sums

    def _fill(self, item: Item, buffer: memoryview, scratch: Scratch) -> None:
        """Write the bytes of a range of a file to the start of `buffer`: what is kept first, then the computed rows."""
        fill_kept(item, buffer, self._reader)
        for piece in item.placed:
            if not piece.recipe.keeps_bytes and piece.recipe.num_bytes:
                _PieceWriter(self._editor(piece.recipe), piece.offset, item, buffer, scratch).write()

    def outcome(self) -> Outcome:
        """Return what was found out so far."""
        found = self._findings
        return Outcome(
            had_delta=found.had_delta,
            any_change=found.any_change,
            squared_error=sum(one.squared_error for one in found.differences),
            squared_weight=sum(one.squared_weight for one in found.differences),
            nonfinite=tuple(sorted(found.nonfinite)),
        )

    def _editor(self, recipe: Recipe) -> TensorEditor:
        with self._lock:
            editor = self._editors.pop(recipe.name, None) or TensorEditor(
                recipe, self._reader, self._findings, device=self._device
            )
            self._editors[recipe.name] = editor
            while len(self._editors) > self._num_editors:
                self._editors.popitem(last=False)
            return editor


class _PieceWriter:
    """Computes the part of one tensor that lies in one item."""

    def __init__(self, editor: TensorEditor, offset: int, item: Item, buffer: memoryview, scratch: Scratch) -> None:
        self._editor = editor
        self._offset = offset - item.start  # of the tensor's first byte from the buffer's first
        self._buffer = buffer[: item.end - item.start]
        self._scratch = scratch

    def write(self) -> None:
        """Compute the tiles that overlap the item, each to its place in the buffer."""
        editor = self._editor
        first = max(0, -self._offset) // editor.row_bytes
        last = min(editor.recipe.rows, -(-(len(self._buffer) - self._offset) // editor.row_bytes))
        session = editor.session(first, last, self._scratch, only=True)
        for top, bottom in session.tiles:
            self._write_tile(session, top, bottom)
        self._patch(*session.repairs())

    def _write_tile(self, session: EditSession, top: int, bottom: int) -> None:
        start = self._offset + top * self._editor.row_bytes
        end = self._offset + bottom * self._editor.row_bytes
        if 0 <= start and end <= len(self._buffer) and start % self._editor.item_bytes == 0:
            session.compute(top, bottom, self._buffer[start:end])
            return
        made = self._scratch.out(end - start)
        session.compute(top, bottom, made)
        low, high = max(start, 0), min(end, len(self._buffer))
        self._buffer[low:high] = made[low - start : high - start]

    def _patch(self, flat: Ints, elements: npt.NDArray[np.uint8]) -> None:
        """Overwrite single elements; byte by byte, since an item's border may cut one."""
        if len(flat):
            item = np.frombuffer(self._buffer, dtype=np.uint8)
            size = elements.shape[1]
            for byte in range(size):
                places = self._offset + flat * size + byte
                here = (places >= 0) & (places < len(item))
                item[places[here]] = elements[here, byte]
