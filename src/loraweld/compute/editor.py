"""One output tensor, computed tile by tile: decode → edit in float32 → round once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.decoder import Decoder, Rows, open_decoder
from loraweld.compute.codecs.requantised import Difference, RequantisedDecoder
from loraweld.compute.kernels import Ints, Kernel, LowRankSpan, Span, make_kernel
from loraweld.compute.low_rank import PieceRoom, add_rounded
from loraweld.compute.magnitudes import NONE
from loraweld.compute.stochastic import make_rounder
from loraweld.compute.tensors import as_tensor, item_size, torch_dtype
from loraweld.compute.tiles import TileGrid
from loraweld.errors import NumericsError
from loraweld.planning.merge_plan import Recipe

# Computed exactly at a time: each takes two rows of factors in float64, which stay near the core. Not a power of two,
# at whose strides they would drive each other out of it.
_EXACT_ELEMENTS = 250


@dataclass(slots=True)
class Findings:
    """What a whole run came to: whether any delta was there, whether any output differs from its base.

    `differences`: how far the weights that were taken to their 4-bit form are from the given ones. `allow_nonfinite`:
    whether weights may hold values that are not finite; `nonfinite` are the names of those that do.
    """

    allow_nonfinite: bool = False
    nonfinite: set[str] = field(default_factory=set)
    had_delta: bool = False
    any_change: bool = False
    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Tile:
    """Edited rows in float32, the stored rows they come from, and a bound of the error float32 has left."""

    values_nC: torch.Tensor
    base_nC: torch.Tensor
    error: float


class Scratch:
    """Memory for one tile, reused by one thread: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._values = torch.empty(0)
        self.piece = PieceRoom()
        self._out = bytearray()

    def values(self, rows: int, cols: int) -> torch.Tensor:
        """Return a float32 tile (rows, cols) of undefined content."""
        if self._values.numel() < rows * cols:
            self._values = torch.empty(rows * cols)
        return self._values[: rows * cols].view(rows, cols)

    def out(self, count: int) -> memoryview:
        """Return room for the output bytes of a tile that has no place of its own in the item's buffer."""
        if len(self._out) < count:
            self._out = bytearray(count)
        return memoryview(self._out)[:count]


class TensorEditor:
    """Computes rows of one recipe; serves all threads. The first that needs its kernels makes them, with `device`."""

    def __init__(
        self, recipe: Recipe, reader: Reader, findings: Findings, *, device: torch.device, unit_rows: int = 1
    ) -> None:
        self.recipe = recipe
        self._reader = reader
        self._device = device
        self.findings = findings
        self.grid = TileGrid(recipe.rows, recipe.source.cols, unit_rows)
        self.item_bytes = item_size(recipe.dtype)
        self.row_bytes = recipe.source.cols * self.item_bytes
        self._lock = threading.Lock()
        self._parts: tuple[Decoder, list[Kernel]] | None = None

    def session(self, start: int, stop: int, scratch: Scratch) -> EditSession:
        """Return what one thread needs to compute the tiles that overlap rows [start, stop).

        Each is computed from all of its rows, whatever is wanted of it: what is done to one may hang on the others.
        """
        tiles = list(self.grid.tiles(start, stop))
        first, last = tiles[0][0], tiles[-1][1]
        decoder, kernels = self._made()
        base = decoder.rows(min(first, self.recipe.source.rows), min(last, self.recipe.source.rows))
        spans = [span for kernel in kernels if (span := kernel.span(first, last)) is not None]
        return EditSession(self, tiles, base, spans, scratch)

    def _made(self) -> tuple[Decoder, list[Kernel]]:
        with self._lock:
            if self._parts is None:
                source = self.recipe.source
                kernels = [make_kernel(edit, source, self._reader, self._device) for edit in self.recipe.edits]
                decoder = open_decoder(source, self._reader)
                if isinstance(decoder, RequantisedDecoder):
                    self.findings.differences.append(decoder.difference)
                self._parts = decoder, kernels
            return self._parts


class EditSession:
    """Computes tiles of one tensor within one thread, then repairs the elements that float32 has left in doubt."""

    def __init__(
        self,
        editor: TensorEditor,
        tiles: Sequence[tuple[int, int]],
        base: Rows,
        spans: Sequence[Span],
        scratch: Scratch,
    ) -> None:
        self.tiles = tiles
        self._recipe = editor.recipe
        self._base = base
        self._source_rows = editor.recipe.source.rows
        self._findings = editor.findings
        self._spans = spans
        self._scratch = scratch
        allows = self._findings.allow_nonfinite and not editor.recipe.is_encoded  # codes have none
        self._rounder = make_rounder(torch_dtype(editor.recipe.dtype), editor.recipe.draw, allow_nonfinite=allows)
        self._terms = _only_terms(spans) if self._rounder.to_nearest_bfloat16 else []
        self._cols = editor.recipe.source.cols
        self._positions: list[Ints] = []
        self._bases: list[torch.Tensor] = []

    def edited(self, top: int, bottom: int) -> Tile:
        """Return rows [top, bottom), one of `tiles`, before any rounding; valid until the next call.

        Raises:
            CheckpointError: the source cannot be read.
        """
        base_nC = self._base.read(top, max(top, min(bottom, self._source_rows)))
        tile_nC = self._scratch.values(bottom - top, self._cols)
        if len(base_nC) < len(tile_nC):
            tile_nC[len(base_nC) :] = 0
            tile_nC[: len(base_nC)] = base_nC
        else:
            tile_nC.copy_(base_nC)
        error = 0.0
        for span in self._spans:
            error = span.apply(tile_nC, base_nC, top, error)
        return Tile(tile_nC, base_nC, error)

    def check(self, tile: Tile, top: int, bottom: int) -> None:
        """Make sure that an edited tile exists in the recipe's dtype.

        Raises:
            NumericsError: it does not; names the tensor.
        """
        with self.named(f"rows {top} to {bottom - 1}"):
            self._rounder.round(tile.values_nC, torch.empty(tile.values_nC.shape, dtype=self._rounder.dtype), 0.0)

    def compute(self, top: int, bottom: int, out: memoryview) -> None:
        """Write the output bytes of rows [top, bottom), one of `tiles`, to `out`.

        Raises:
            NumericsError: a result does not exist in the output dtype; names the tensor.
            CheckpointError: the source cannot be read.
        """
        out_nC = as_tensor(out, self._recipe.dtype, (bottom - top, self._cols))
        if not (self._terms and bottom <= self._source_rows and self._add(top, out_nC)):
            self._edit(top, out_nC)

    def _add(self, top: int, out_nC: torch.Tensor) -> bool:
        """Write stored rows from `top` on plus deltas; return whether all results are finite."""
        base_nC = self._base.read(top, top + len(out_nC))
        narrow = len(self._terms) == 1 and base_nC.dtype == torch.bfloat16
        terms = [span.term(top, len(out_nC), narrow=narrow) for span in self._terms]
        made = add_rounded(base_nC, terms, out_nC, self._scratch.piece)
        if made.finite:
            if len(made.doubtful):
                self._remember(made.doubtful, made.stored, top)
            self.note(out_nC, base_nC, sum(term.error for term in terms))
        return made.finite

    def _edit(self, top: int, out_nC: torch.Tensor) -> None:
        """Write edited rows from `top` on."""
        bottom = top + len(out_nC)
        tile = self.edited(top, bottom)
        with self.named(f"rows {top} to {bottom - 1}"):
            doubtful = self._rounder.round(tile.values_nC, out_nC, tile.error, top * self._cols)
        if self._rounder.saw_nonfinite:
            self._findings.nonfinite.add(self._recipe.name)
        if len(doubtful):
            self._remember(doubtful, _stored(tile.base_nC, doubtful), top)
        self.note(out_nC, tile.base_nC, tile.error)

    def repairs(self) -> tuple[Ints, npt.NDArray[np.uint8]]:
        """Return the elements in doubt since the last call: places in the whole tensor, and their bytes, one row each.

        Of many tiles at once: a handful of elements in each would not be worth the calls.
        """
        if not self._positions:
            return NONE, np.empty((0, 0), np.uint8)
        flat, stored = np.concatenate(self._positions), torch.cat(self._bases)
        self._positions, self._bases = [], []
        values = stored.double().numpy()
        pieces = [slice(start, start + _EXACT_ELEMENTS) for start in range(0, len(flat), _EXACT_ELEMENTS)]
        exact = np.concatenate([self._exact(flat[piece], values[piece]) for piece in pieces])
        with self.named("elements in doubt"):
            rounded = self._rounder.exact(exact, flat)
        if not self._findings.any_change:
            self._findings.any_change = not torch.equal(rounded, stored.to(rounded.dtype))
        return flat, rounded.view(torch.uint8).numpy().reshape(len(flat), -1)

    def _exact(self, flat: Ints, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return what all edits make of some values."""
        rows, cols = np.divmod(flat, self._cols)
        for span in self._spans:
            values = span.exact(values, rows, cols)
        return values

    def _remember(self, flat: Ints, stored: torch.Tensor, top: int) -> None:
        """Keep the places, in the tile from `top` on, and the stored values of elements in doubt."""
        self._positions.append(flat + top * self._cols)
        self._bases.append(stored)

    @contextmanager
    def named(self, where: str) -> Iterator[None]:
        try:
            yield
        except NumericsError as problem:
            raise NumericsError(f"tensor {self._recipe.name!r}, {where}: {problem}") from None

    def note(self, out_nC: torch.Tensor, base_nC: torch.Tensor, error: float) -> None:
        """Note for the whole run whether there was a delta, and whether the output differs from the base."""
        findings = self._findings
        findings.had_delta |= error > 0
        if self._spans and not findings.any_change:
            same = out_nC.shape == base_nC.shape and torch.equal(out_nC, base_nC.to(out_nC.dtype))
            findings.any_change |= not same


def _only_terms(spans: Sequence[Span]) -> list[LowRankSpan]:
    """Return the low-rank deltas if rows are changed by nothing else."""
    terms = [span for span in spans if isinstance(span, LowRankSpan)]
    return terms if len(terms) == len(spans) else []


def _stored(base_nC: torch.Tensor, flat: Ints) -> torch.Tensor:
    """Return the stored values, of any dtype, at flat positions; new rows are stored as nothing, 0."""
    base = base_nC.view(-1)
    if flat[-1] >= len(base):
        base = torch.cat([base, base.new_zeros(int(flat[-1]) + 1 - len(base))])
    return base.index_select(0, torch.from_numpy(flat))  # take() knows no float8
