"""Fill a buffer with the bytes of one work item."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from loraweld.checkpoint.reader import Reader
from loraweld.compute.editor import Findings, Scratch, TensorEditor
from loraweld.compute.encoding import WeightEncoding
from loraweld.compute.kernels import Ints
from loraweld.errors import OutputError
from loraweld.execute.buffer import Buffer
from loraweld.execute.checksums import made_parts
from loraweld.execute.items import Item
from loraweld.execute.kept import Piece, fill_kept
from loraweld.execute.outcome import Outcome
from loraweld.planning.merge_plan import Recipe
from loraweld.sinks.system import BLOCK_BYTES

_HEADS = 64  # of a few items at once, each one; more only if nobody comes for them


class Filler:
    """Makes the bytes of items; serves all threads. Editors live while a thread uses them, the last two longer.

    The next item goes on with a tensor of the last ones, which nobody may be using at this moment.
    """

    def __init__(self, reader: Reader, *, device: torch.device, allow_nonfinite: bool = False) -> None:
        self._reader = reader
        self._device = device
        self._editors: WeakValueDictionary[str, TensorEditor] = WeakValueDictionary()
        self._latest: deque[TensorEditor] = deque(maxlen=2)
        self._lock = Lock()
        self._heads = _Heads()
        self._findings = Findings(allow_nonfinite=allow_nonfinite)
        self._measured: dict[str, Sequence[float]] = {}

    def pieces(self, item: Item, buffer: Buffer, scratch: Scratch) -> Iterator[Piece]:
        """Yield the bytes of `item` in order, each time in the start of the body of `buffer`."""
        try:
            if item.encoded is not None:
                yield from self._encode(item, item.encoded, buffer.body, scratch)
            else:
                yield from self._fill(item, buffer, scratch)
        except torch.cuda.OutOfMemoryError as error:  # of any kind of device
            raise OutputError(
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

    def _fill(self, item: Item, buffer: Buffer, scratch: Scratch) -> Iterator[Piece]:
        """Fill the buffer again and again: with what is kept first, then the computed rows."""
        unfinished: dict[str, _TensorWriter] = {}
        for window in item.windows(len(buffer.body)):
            count = window.end - window.start
            data = _Bytes(window.start, buffer.body[:count])
            around = _Bytes(window.start - BLOCK_BYTES, buffer.around(count))
            fill_kept(window, data.data, self._reader)
            for placed in made_parts(window):
                writer = unfinished.pop(placed.recipe.name, None)
                if writer is None:
                    writer = _TensorWriter(self._editor(placed.recipe), placed.offset, item, scratch, self._heads)
                writer.write(data, around)
                if placed.end > window.end:
                    unfinished[placed.recipe.name] = writer
            yield Piece(window.start, count)

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
            editor = self._editors.get(recipe.name)
            if editor is None:
                editor = TensorEditor(recipe, self._reader, self._findings, device=self._device)
                self._editors[recipe.name] = editor
            if editor not in self._latest:
                self._latest.append(editor)
            return editor


class _Heads:
    """The first bytes of tiles, less than a block, made by one item for the one before it; each is taken once.

    Items end in the first block of a tile. The one behind the border, with the rest, is begun before this one ends.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = Lock()

    def keep(self, name: str, top: int, data: memoryview) -> None:
        """Keep the head of the tile of tensor `name` that begins at row `top`."""
        with self._lock:
            self._kept[name, top] = bytes(data)
            if len(self._kept) > _HEADS:
                self._kept.popitem(last=False)

    def take(self, name: str, top: int) -> bytes | None:
        """Return the head of a tile if it is there."""
        with self._lock:
            return self._kept.pop((name, top), None)


class _TensorWriter:
    """Computes the part of one tensor that lies in one item, for one window of it after the other."""

    def __init__(self, editor: TensorEditor, offset: int, item: Item, scratch: Scratch, heads: _Heads) -> None:
        self._editor = editor  # lives as long as this does
        self._offset = offset  # of the tensor's first byte in the file
        self._row_bytes = editor.row_bytes
        self._unit_bytes = editor.item_bytes
        self._scratch = scratch
        self._item = item
        self._heads = heads
        first = max(0, item.start - offset) // editor.row_bytes
        last = min(editor.recipe.rows, -(-(item.end - offset) // editor.row_bytes))
        self._session = editor.session(first, last, scratch)
        self._tiles = deque(self._session.tiles)
        self._rest = _Bytes(0, memoryview(b""))  # of a tile that goes on in the next window

    def write(self, window: _Bytes, around: _Bytes) -> None:
        """Compute what lies in a window of the file, each tile to its place, which may lie `around` it in part."""
        window.take(self._rest)
        while self._tiles and self._place(self._tiles[0][0]) < window.end:
            self._write_tile(window, around, *self._tiles.popleft())
        self._repair(window)

    def _write_tile(self, window: _Bytes, around: _Bytes, top: int, bottom: int) -> None:
        start, end = self._place(top), self._place(bottom)
        head = self._heads.take(self._editor.recipe.name, top) if start + BLOCK_BYTES > self._item.end else None
        if head is not None:
            self._rest = _Bytes(start, memoryview(head))
            window.take(self._rest)
            return
        if around.start <= start and end <= around.end and (start - around.start) % self._unit_bytes == 0:
            tile = around.part(start, end)
            self._session.compute(top, bottom, tile.data)
            if window.start <= start and end <= window.end:
                return
            self._repair(around)
            self._rest = around.part(window.end, end).copy()
        else:
            tile = self._rest = _Bytes(start, self._scratch.out(end - start))
            self._session.compute(top, bottom, tile.data)
            self._repair(window, tile)
            window.take(tile)
        if 0 < self._item.start - start < BLOCK_BYTES:
            self._heads.keep(self._editor.recipe.name, top, tile.data[: self._item.start - start])

    def _repair(self, *places: _Bytes) -> None:
        flat, elements = self._session.repairs()
        for place in places if len(flat) else ():
            place.put(self._offset + flat * self._unit_bytes, elements)

    def _place(self, row: int) -> int:
        """Return where a row of the tensor begins in the file."""
        return self._offset + row * self._row_bytes


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Bytes of a file from `start` on, in memory."""

    start: int
    data: memoryview

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def part(self, start: int, end: int) -> _Bytes:
        """Return the bytes from `start` to `end`, none if that is before it."""
        return _Bytes(start, self.data[start - self.start : end - self.start])

    def copy(self) -> _Bytes:
        """Return the same in memory of its own."""
        return _Bytes(self.start, memoryview(bytes(self.data)))

    def take(self, other: _Bytes) -> None:
        """Copy what the other has of these bytes."""
        low, high = max(self.start, other.start), min(self.end, other.end)
        if low < high:
            # By numpy, which lets other threads run meanwhile.
            taken = np.frombuffer(other.data, dtype=np.uint8)[low - other.start : high - other.start]
            np.frombuffer(self.data, dtype=np.uint8)[low - self.start : high - self.start] = taken

    def put(self, places: Ints, elements: npt.NDArray[np.uint8]) -> None:
        """Overwrite elements at these places of the file; byte by byte, since a border may cut one."""
        data = np.frombuffer(self.data, dtype=np.uint8)
        for byte in range(elements.shape[1]):
            here = (places + byte >= self.start) & (places + byte < self.end)
            data[places[here] + byte - self.start] = elements[here, byte]
