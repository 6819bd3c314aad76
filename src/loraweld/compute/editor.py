"""One output tensor, computed tile by tile: decode → edit in float32 → round once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from loraweld.checkpoint.reader import Reader
from loraweld.compute.kernels import Kernel, Span, make_kernel
from loraweld.compute.rounding import Rounder
from loraweld.compute.tensors import as_tensor, item_size, torch_dtype
from loraweld.compute.tiles import TileGrid
from loraweld.errors import NumericsError
from loraweld.planning.merge_plan import Recipe


class TensorEditor:
    """Computes rows of one recipe; serves all threads. Its kernels are made once, by the first that needs them."""

    def __init__(self, recipe: Recipe, reader: Reader) -> None:
        self.recipe = recipe
        self.grid = TileGrid(recipe.rows, recipe.source.cols)
        self.row_bytes = recipe.source.cols * item_size(recipe.dtype)
        self.source_row_bytes = recipe.source.cols * item_size(recipe.source.dtype)
        self._reader = reader
        self._lock = threading.Lock()
        self._kernels: list[Kernel] | None = None
        self.changed = False
        self.has_delta = False

    def session(self, start: int, stop: int) -> EditSession:
        """Return what one thread needs to compute the tiles that overlap rows [start, stop)."""
        tiles = list(self.grid.tiles(start, stop))
        spans = [kernel.span(tiles[0][0], tiles[-1][1]) for kernel in self._made_kernels()]
        return EditSession(self, spans)

    def _made_kernels(self) -> list[Kernel]:
        with self._lock:
            if self._kernels is None:
                source = self.recipe.source
                self._kernels = [make_kernel(edit, source, self._reader) for edit in self.recipe.edits]
            return self._kernels


class EditSession:
    """Computes tiles of one tensor within one thread."""

    def __init__(self, editor: TensorEditor, spans: Sequence[Span]) -> None:
        self._editor = editor
        self._recipe = recipe = editor.recipe
        self._spans = spans
        self._rounder = Rounder(torch_dtype(recipe.dtype))
        self._error_scale = sum(span.error_scale for span in spans)
        editor.has_delta |= self._error_scale > 0

    def compute(self, stored: bytearray | memoryview, top: int, bottom: int) -> memoryview:
        """Return the output bytes of rows [top, bottom), from the bytes of the stored ones among them.

        Raises:
            NumericsError: a result does not exist in the output dtype; names the tensor.
        """
        recipe = self._recipe
        num_stored = max(0, min(bottom, recipe.source.rows) - top)
        base_nC = as_tensor(stored, recipe.source.dtype, (num_stored, recipe.source.cols))
        tile_nC = torch.zeros(bottom - top, recipe.source.cols)
        tile_nC[:num_stored].copy_(base_nC)
        for span in self._spans:
            span.apply(tile_nC, base_nC, top)
        out_nC = torch.empty(tile_nC.shape, dtype=self._rounder.dtype)
        try:
            self._rounder.round(
                tile_nC, out_nC, self._error_scale, lambda rows, cols: self._exact(base_nC, rows, cols, top)
            )
        except NumericsError as error:
            raise NumericsError(f"tensor {recipe.name!r}, rows {top} to {bottom - 1}: {error}") from None
        if not self._editor.changed:
            self._editor.changed = not (out_nC.shape == base_nC.shape and torch.equal(out_nC, base_nC.to(out_nC.dtype)))
        return memoryview(out_nC.view(torch.uint8).numpy().reshape(-1).data)

    def _exact(self, base_nC: torch.Tensor, rows_K: torch.Tensor, cols_K: torch.Tensor, top: int) -> torch.Tensor:
        values_K = torch.zeros(len(rows_K), dtype=torch.float64)
        stored = rows_K < len(base_nC)
        values_K[stored] = base_nC[rows_K[stored], cols_K[stored]].double()
        for span in self._spans:
            values_K = span.exact(values_K, rows_K + top, cols_K)
        return values_K
