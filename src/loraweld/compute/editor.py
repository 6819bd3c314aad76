"""One output tensor, computed tile by tile: decode → edit in float32 → round once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraweld.checkpoint.reader import Reader
from loraweld.compute.kernels import Floats, Ints, Kernel, Span, make_kernel
from loraweld.compute.rounding import NONE, Rounder, round_exact
from loraweld.compute.tensors import as_tensor, item_size, torch_dtype
from loraweld.compute.tiles import TileGrid
from loraweld.errors import NumericsError
from loraweld.planning.merge_plan import Recipe

# A tensor has tiles of one shape, and a last one of another; an item may touch a few tensors.
_KEPT_TILES = 4


@dataclass(slots=True)
class Outcome:
    """What a whole run came to: whether any delta was there, and whether any output differs from its base."""

    had_delta: bool = False
    any_change: bool = False


class Scratch:
    """Memory for one tile and its rounding, reused by one thread: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[int, int, torch.dtype], Tile] = {}

    def tile(self, rows: int, cols: int, dtype: torch.dtype) -> Tile:
        """Return a tile of this shape and output dtype, of undefined content; the last few shapes are kept."""
        key = (rows, cols, dtype)
        if key not in self._tiles:
            while len(self._tiles) >= _KEPT_TILES:
                self._tiles.pop(next(iter(self._tiles)))
            self._tiles[key] = Tile(rows, cols, dtype)
        return self._tiles[key]


class Tile:
    """Float32 values (n, C), their rounded form, and the bytes of the latter."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype) -> None:
        self.values_nC = torch.empty(rows, cols)
        self.out_nC = torch.empty(rows, cols, dtype=dtype)
        self.out_bytes = memoryview(self.out_nC.view(torch.uint8).numpy().reshape(-1).data)


class TensorEditor:
    """Computes rows of one recipe; serves all threads. The first that needs its kernels makes them."""

    def __init__(self, recipe: Recipe, reader: Reader, outcome: Outcome) -> None:
        self.recipe = recipe
        self.outcome = outcome
        self.grid = TileGrid(recipe.rows, recipe.source.cols)
        self.row_bytes = recipe.source.cols * item_size(recipe.dtype)
        self.source_row_bytes = recipe.source.cols * item_size(recipe.source.dtype)
        self._reader = reader
        self._lock = threading.Lock()
        self._kernels: list[Kernel] | None = None

    def session(self, start: int, stop: int, scratch: Scratch) -> EditSession:
        """Return what one thread needs to compute the tiles that overlap rows [start, stop)."""
        tiles = list(self.grid.tiles(start, stop))
        spans = [kernel.span(tiles[0][0], tiles[-1][1]) for kernel in self._made_kernels()]
        return EditSession(self, spans, scratch)

    def _made_kernels(self) -> list[Kernel]:
        with self._lock:
            if self._kernels is None:
                source = self.recipe.source
                self._kernels = [make_kernel(edit, source, self._reader) for edit in self.recipe.edits]
            return self._kernels


class EditSession:
    """Computes tiles of one tensor within one thread, then repairs the elements that float32 has left in doubt."""

    def __init__(self, editor: TensorEditor, spans: Sequence[Span], scratch: Scratch) -> None:
        self._recipe = editor.recipe
        self._outcome = editor.outcome
        self._spans = spans
        self._scratch = scratch
        self._rounder = Rounder(torch_dtype(editor.recipe.dtype))
        self._source_code = editor.recipe.source.dtype
        self._source_rows = editor.recipe.source.rows
        self._cols = editor.recipe.source.cols
        self._positions: list[Ints] = []
        self._bases: list[Floats] = []

    def compute(self, stored: bytearray | memoryview, top: int, bottom: int) -> memoryview:
        """Return the output bytes of rows [top, bottom), from the bytes of the stored ones among them.

        The bytes are valid until the next call.

        Raises:
            NumericsError: a result does not exist in the output dtype; names the tensor.
        """
        num_stored = max(0, min(bottom, self._source_rows) - top)
        base_nC = as_tensor(stored, self._source_code, (num_stored, self._cols))
        tile = self._scratch.tile(bottom - top, self._cols, self._rounder.dtype)
        tile_nC = tile.values_nC
        if num_stored < len(tile_nC):
            tile_nC[num_stored:] = 0
            tile_nC[:num_stored] = base_nC
        else:
            tile_nC.copy_(base_nC)
        error = 0.0
        for span in self._spans:
            error = span.apply(tile_nC, base_nC, top, error)
        with self._named(f"rows {top} to {bottom - 1}"):
            doubtful = self._rounder.round(tile_nC, tile.out_nC, error)
        if len(doubtful):
            self._remember(doubtful, base_nC, top)
        self._note(tile.out_nC, base_nC, error)
        return tile.out_bytes

    def repairs(self) -> tuple[Ints, npt.NDArray[np.uint8]]:
        """Return the elements in doubt: positions in the whole tensor, and the bytes they should have, one row each.

        All tiles of the session at once: a handful of elements in each would not be worth the calls.
        """
        if not self._positions:
            return NONE, np.empty((0, 0), np.uint8)
        flat, values = np.concatenate(self._positions), np.concatenate(self._bases)
        rows, cols = np.divmod(flat, self._cols)
        for span in self._spans:
            values = span.exact(values, rows, cols)
        with self._named("elements in doubt"):
            rounded = round_exact(values, self._rounder.dtype)
        return flat, rounded.view(torch.uint8).numpy().reshape(len(flat), -1)

    def _remember(self, flat: Ints, base_nC: torch.Tensor, top: int) -> None:
        """Keep the place and the stored value of elements in doubt; new rows are stored as nothing, 0."""
        values = np.zeros(len(flat))
        stored = flat < base_nC.numel()
        values[stored] = base_nC.view(-1)[torch.from_numpy(flat[stored])].double().numpy()
        self._positions.append(flat + top * self._cols)
        self._bases.append(values)

    @contextmanager
    def _named(self, where: str) -> Iterator[None]:
        try:
            yield
        except NumericsError as problem:
            raise NumericsError(f"tensor {self._recipe.name!r}, {where}: {problem}") from None

    def _note(self, out_nC: torch.Tensor, base_nC: torch.Tensor, error: float) -> None:
        outcome = self._outcome
        outcome.had_delta |= error > 0
        if self._spans and not outcome.any_change:
            same = out_nC.shape == base_nC.shape and torch.equal(out_nC, base_nC.to(out_nC.dtype))
            outcome.any_change |= not same
