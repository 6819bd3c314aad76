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


@dataclass(slots=True)
class Outcome:
    """What a whole run came to: whether any delta was there, and whether any output differs from its base."""

    had_delta: bool = False
    any_change: bool = False


class Scratch:
    """Memory for one tile and its rounding, reused by one thread: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._tile = torch.empty(0)
        self._out = torch.empty(0, dtype=torch.uint8)
        self._rounders: dict[torch.dtype, Rounder] = {}

    def tile(self, rows: int, cols: int) -> torch.Tensor:
        """Return a float32 tile (rows, cols) of undefined content."""
        if self._tile.numel() < rows * cols:
            self._tile = torch.empty(rows * cols)
        return self._tile[: rows * cols].view(rows, cols)

    def rounder(self, dtype: torch.dtype) -> Rounder:
        """Return this thread's rounder to `dtype`."""
        return self._rounders.setdefault(dtype, Rounder(dtype))

    def out(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an output tile (rows, cols) of undefined content."""
        size = rows * cols * dtype.itemsize
        if self._out.numel() < size:
            self._out = torch.empty(size, dtype=torch.uint8)
        return self._out[:size].view(dtype).view(rows, cols)


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
        self._rounder = scratch.rounder(torch_dtype(editor.recipe.dtype))
        self._positions: list[Ints] = []
        self._bases: list[Floats] = []

    def compute(self, stored: bytearray | memoryview, top: int, bottom: int) -> memoryview:
        """Return the output bytes of rows [top, bottom), from the bytes of the stored ones among them.

        The bytes are valid until the next call.

        Raises:
            NumericsError: a result does not exist in the output dtype; names the tensor.
        """
        source = self._recipe.source
        num_stored = max(0, min(bottom, source.rows) - top)
        base_nC = as_tensor(stored, source.dtype, (num_stored, source.cols))
        tile_nC = self._scratch.tile(bottom - top, source.cols)
        tile_nC[num_stored:].zero_()
        tile_nC[:num_stored].copy_(base_nC)
        error = 0.0
        for span in self._spans:
            error = span.apply(tile_nC, base_nC, top, error)
        out_nC = self._scratch.out(bottom - top, source.cols, self._rounder.dtype)
        with self._named(f"rows {top} to {bottom - 1}"):
            self._remember(self._rounder.round(tile_nC, out_nC, error), base_nC, top)
        self._note(out_nC, base_nC, error)
        return memoryview(out_nC.view(torch.uint8).numpy().reshape(-1).data)

    def repairs(self) -> tuple[Ints, npt.NDArray[np.uint8]]:
        """Return the elements in doubt: positions in the whole tensor, and the bytes they should have, one row each.

        All tiles of the session at once: a handful of elements in each would not be worth the calls.
        """
        if not self._positions:
            return NONE, np.empty((0, 0), np.uint8)
        flat, values = np.concatenate(self._positions), np.concatenate(self._bases)
        rows, cols = np.divmod(flat, self._recipe.source.cols)
        for span in self._spans:
            values = span.exact(values, rows, cols)
        with self._named("elements in doubt"):
            rounded = round_exact(values, self._rounder.dtype)
        return flat, rounded.view(torch.uint8).numpy().reshape(len(flat), -1)

    def _remember(self, flat: Ints, base_nC: torch.Tensor, top: int) -> None:
        """Keep the place and the stored value of elements in doubt; new rows are stored as nothing, 0."""
        if len(flat):
            values = np.zeros(len(flat))
            stored = flat < base_nC.numel()
            values[stored] = base_nC.view(-1)[torch.from_numpy(flat[stored])].double().numpy()
            self._positions.append(flat + top * self._recipe.source.cols)
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
