"""The arithmetic of edits: what each does to a tile of float32 rows.

Shape letters: N = rows of the tensor, n = rows at hand, C = columns, R = rank.
A kernel belongs to one tensor and serves all threads; a span is what one thread needs for the rows at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from loraweld.adapter.edits import (
    AddVector,
    Dora,
    Edit,
    GrowRows,
    Hadamard,
    Kronecker,
    LowRank,
    OnRows,
    PeftLayer,
    ReplaceAll,
    ReplaceRows,
    Residual,
    Scale,
    SingularValues,
    Weighted,
)
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.bfloat16 import LEAST_PRODUCTS, flushed
from loraweld.compute.codecs.decoder import Rows, open_decoder
from loraweld.compute.factors import Factors, Left, decompose, largest_norm
from loraweld.compute.low_rank import Term
from loraweld.compute.tensors import read_rows, read_vector, torch_dtype
from loraweld.compute.tiles import TileGrid
from loraweld.compute.tuner_kernels import HadamardKernel, KroneckerKernel, ScaleKernel, SingularValuesKernel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# A float32 sum of R products is off by less than this share of sqrt(R) times the norms of its two vectors.
FLOAT32_ERROR = 2.0**-23


class Span(Protocol):
    """One edit over a range of rows."""

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        """Edit the rows from `top` on, in place; `base_nC` holds them as stored.

        Takes and returns a bound of the absolute error that float32 has left in the tile where terms cancel.
        """

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        """Return what the edit makes of K float64 values of its input at (rows, columns), rows ascending.

        numpy, not torch: K is a handful, and numpy's cost of a call is a fraction of torch's.
        """


class Kernel(Protocol):
    """One edit of one tensor."""

    def span(self, start: int, stop: int) -> Span | None:
        """Return the edit of rows [start, stop), for one thread; None if it does nothing there."""


def make_kernel(edit: Edit, source: Source, reader: Reader, device: torch.device) -> Kernel:
    """Return the kernel of `edit` on `source`; reads what all rows share, and the whole tensor where it must.

    What decomposes the whole tensor does so on `device`. Kernels themselves work on the CPU.
    """
    match edit:
        case LowRank():
            return LowRankKernel(Factors.stored(edit, reader), edit.scaling)
        case Dora():
            return DoraKernel(edit, source, reader)
        case Residual():
            return ResidualKernel(edit, source, reader, device)
        case AddVector():
            return AddVectorKernel(edit, reader)
        case ReplaceRows():
            return ReplaceRowsKernel(edit, reader)
        case GrowRows():
            return GrowRowsKernel(source, reader)
        case OnRows():
            return OnRowsKernel(edit, source, reader, device)
        case ReplaceAll():
            return ReplaceAllKernel(edit, reader)
        case Weighted():
            return WeightedKernel(edit, source, reader, device)
        case SingularValues():
            return SingularValuesKernel(edit, reader)
        case Hadamard():
            return HadamardKernel(edit, reader)
        case Kronecker():
            return KroneckerKernel(edit, reader)
        case Scale():
            return ScaleKernel(edit, source, reader)
        case PeftLayer():
            from loraweld.compute.peft_layer import PeftLayerKernel  # PEFT takes seconds to import

            return PeftLayerKernel(edit, source, reader)


class LowRankKernel:
    """W += scaling · L·R with L (N, R) and R (R, C)."""

    def __init__(self, factors: Factors, scaling: float) -> None:
        self._factors = factors
        self._scaling = scaling

    def span(self, start: int, stop: int) -> LowRankSpan:
        return LowRankSpan(self._factors.left(stop), self._factors, self._scaling)


class LowRankSpan:
    def __init__(self, left: Left, factors: Factors, scaling: float) -> None:
        self._left = left
        self._factors = factors
        self._scaling = scaling

    def term(self, top: int, count: int, *, narrow: bool) -> Term:
        """Return the delta of `count` rows from `top` on; with `narrow` in bfloat16, if its factors are and many.

        Not if it is nothing: without an error no element would be in doubt, also none that was taken for 0.
        """
        factors = self._factors
        left_nR, norm, error = self._rows(top, count)
        narrow_RC = factors.narrow_RC if narrow and error else None
        if narrow_RC is None or count * narrow_RC.numel() < LEAST_PRODUCTS:
            return Term(left_nR, factors.right_RC, self._scaling, error)
        error += flushed(self._scaling, factors.rank, norm, factors.largest_norm)
        return Term(left_nR.bfloat16(), narrow_RC, self._scaling, error)

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        left_nR, _, added = self._rows(top, len(tile_nC))
        tile_nC.addmm_(left_nR, self._factors.right_RC, alpha=self._scaling)
        return error + added

    def _rows(self, top: int, count: int) -> tuple[torch.Tensor, float, float]:
        """Return rows of the left factor, the norm of the longest, and a bound of the error of their products."""
        left_nR, factors = self._left.rows(top, count), self._factors
        norm = largest_norm(left_nR)
        terms = abs(self._scaling) * norm * factors.largest_norm
        return left_nR, norm, terms * math.sqrt(factors.rank) * FLOAT32_ERROR

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        left_KR = self._left.pick(rows_K).astype(np.float64)
        delta_K: Floats = np.einsum("kr,kr->k", left_KR, self._factors.columns(cols_K))
        return values_K + self._scaling * delta_K


class DoraKernel:
    """W ← m / ‖W₀ + Δ‖ · (W + Δ); the norm runs along rows, or down the columns of a transposed tensor."""

    def __init__(self, edit: Dora, source: Source, reader: Reader) -> None:
        self._delta = LowRankKernel(Factors.stored(edit.delta, reader), edit.delta.scaling)
        self._magnitude = read_vector(reader, edit.magnitude).double()
        self._column_factor: torch.Tensor | None = None
        if edit.delta.transposed:
            self._column_factor = self._magnitude / _column_norms(source, self._delta, reader)

    def span(self, start: int, stop: int) -> DoraSpan:
        return DoraSpan(self._delta.span(start, stop), self._magnitude, self._column_factor, start, stop)


class DoraSpan:
    def __init__(
        self,
        delta: LowRankSpan,
        magnitude: torch.Tensor,
        column_factor: torch.Tensor | None,
        start: int,
        stop: int,
    ) -> None:
        self._delta = delta
        self._magnitude = magnitude
        self._column_factor = column_factor
        self._row_factors = np.zeros(stop - start)
        self._start = start

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        factor = self._column_factor
        if factor is None:
            changed_nC = base_nC.to(torch.float32, copy=True)
            self._delta.apply(changed_nC, base_nC, top, error)
            norms = torch.linalg.vector_norm(changed_nC, dim=1, dtype=torch.float64)
            factor = (self._magnitude[top : top + len(tile_nC)] / norms)[:, None]
            self._row_factors[top - self._start : top - self._start + len(factor)] = factor[:, 0].numpy()
        error = self._delta.apply(tile_nC, base_nC, top, error)
        tile_nC.mul_(factor.float())
        return error * float(factor.abs().max())

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        if self._column_factor is not None:
            factor_K = self._column_factor.numpy()[cols_K]
        else:
            factor_K = self._row_factors[rows_K - self._start]
        exact_K: Floats = self._delta.exact(values_K, rows_K, cols_K) * factor_K
        return exact_K


def _column_norms(source: Source, delta: LowRankKernel, reader: Reader) -> torch.Tensor:
    """Return ‖W₀ + Δ‖ of each column in float64, (C,): a pass over the whole tensor, tile by tile."""
    squares = torch.zeros(source.cols, dtype=torch.float64)
    base = open_decoder(source, reader).rows(0, source.rows)
    for top, bottom in TileGrid(source.rows, source.cols).tiles(0, source.rows):
        tile_nC = base.read(top, bottom).float()
        delta.span(top, bottom).apply(tile_nC, tile_nC, top, 0.0)
        squares += tile_nC.double().square_().sum(0)
    return squares.sqrt_()


class ResidualKernel:
    """W ← round(W - scaling · B₀·A₀): undoes what PiSSA and OLoRA moved into the initial factors."""

    def __init__(self, edit: Residual, source: Source, reader: Reader, device: torch.device) -> None:
        self._low_rank = LowRankKernel(decompose(edit, source, reader, device), -edit.scaling)
        self._dtype = torch_dtype(source.dtype)

    def span(self, start: int, stop: int) -> ResidualSpan:
        return ResidualSpan(self._low_rank.span(start, stop), self._dtype)


class ResidualSpan:
    def __init__(self, low_rank: LowRankSpan, dtype: torch.dtype) -> None:
        self._low_rank = low_rank
        self._dtype = dtype

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        error = self._low_rank.apply(tile_nC, base_nC, top, error)
        tile_nC.copy_(tile_nC.to(self._dtype))
        return error

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        residual_K = torch.from_numpy(self._low_rank.exact(values_K, rows_K, cols_K))
        rounded_K: Floats = residual_K.to(self._dtype).double().numpy()
        return rounded_K


class OnRowsKernel:
    """An edit of some rows. It is made for each range of rows anew: of many experts only those at hand take memory."""

    def __init__(self, edit: OnRows, source: Source, reader: Reader, device: torch.device) -> None:
        self._edit = edit
        self._source = source.part(edit.start, edit.stop) if isinstance(source, StoredTensor) else source
        self._reader = reader
        self._device = device

    def span(self, start: int, stop: int) -> Span | None:
        first, last = max(start, self._edit.start), min(stop, self._edit.stop)
        if first >= last:
            return None
        kernel = make_kernel(self._edit.edit, self._source, self._reader, self._device)
        inner = kernel.span(first - self._edit.start, last - self._edit.start)
        return None if inner is None else OnRowsSpan(inner, self._edit)


class OnRowsSpan:
    def __init__(self, inner: Span, edit: OnRows) -> None:
        self._inner = inner
        self._start = edit.start
        self._stop = edit.stop

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        first, last = max(top, self._start), min(top + len(tile_nC), self._stop)
        if first >= last:
            return error
        here = slice(first - top, last - top)
        return max(error, self._inner.apply(tile_nC[here], base_nC[here], first - self._start, error))

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        here = (rows_K >= self._start) & (rows_K < self._stop)
        if not here.any():
            return values_K
        values_K = values_K.copy()
        values_K[here] = self._inner.exact(values_K[here], rows_K[here] - self._start, cols_K[here])
        return values_K


class AddVectorKernel:
    """b += scaling · values, for a vector as a matrix of one column."""

    def __init__(self, edit: AddVector, reader: Reader) -> None:
        self._values = read_vector(reader, edit.values).double() * edit.scaling

    def span(self, start: int, stop: int) -> AddVectorKernel:
        return self

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        tile_nC.copy_(tile_nC.double().add_(self._values[top : top + len(tile_nC), None]))
        return error

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        added_K: Floats = self._values.numpy()[rows_K]
        return values_K + added_K


class ReplaceRowsKernel:
    """Rows of trained tokens take the trained values."""

    def __init__(self, edit: ReplaceRows, reader: Reader) -> None:
        self._rows_TC = read_rows(reader, edit.rows, 0, edit.rows.rows)
        self._indices_T = torch.tensor(edit.indices, dtype=torch.int64)

    def span(self, start: int, stop: int) -> ReplaceRowsKernel:
        return self

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        here = (self._indices_T >= top) & (self._indices_T < top + len(tile_nC))
        tile_nC[self._indices_T[here] - top] = self._rows_TC[here]
        return error

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        values_K = values_K.copy()
        rows_TC = self._rows_TC.numpy()
        for position, row in enumerate(self._indices_T.numpy()):
            here = rows_K == row
            values_K[here] = rows_TC[position, cols_K[here]]
        return values_K


class GrowRowsKernel:
    """Rows past the stored ones take the mean of the stored ones."""

    def __init__(self, source: Source, reader: Reader) -> None:
        total = torch.zeros(source.cols, dtype=torch.float64)
        base = open_decoder(source, reader).rows(0, source.rows)
        for top, bottom in TileGrid(source.rows, source.cols).tiles(0, source.rows):
            total += base.read(top, bottom).double().sum(0)
        self._mean = total / source.rows
        self._first = source.rows

    def span(self, start: int, stop: int) -> GrowRowsKernel:
        return self

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        tile_nC[max(0, self._first - top) :] = self._mean.float()
        return error

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        return np.where(rows_K >= self._first, self._mean.numpy()[cols_K], values_K)


class ReplaceAllKernel:
    """All rows take the values of another tensor."""

    def __init__(self, edit: ReplaceAll, reader: Reader) -> None:
        self._decoder = open_decoder(edit.values, reader)

    def span(self, start: int, stop: int) -> ReplaceAllSpan:
        return ReplaceAllSpan(self._decoder.rows(start, stop))


class ReplaceAllSpan:
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        tile_nC.copy_(self._rows.read(top, top + len(tile_nC)))
        return 0.0

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        values_K = values_K.copy()
        for row in np.unique(rows_K):
            here = rows_K == row
            values_K[here] = self._rows.read(int(row), int(row) + 1)[0].double().numpy()[cols_K[here]]
        return values_K


class WeightedKernel:
    """W += weight · (W′ − W), with W′ made by other kernels; what they leave alone stays as it is, to the bit."""

    def __init__(self, edit: Weighted, source: Source, reader: Reader, device: torch.device) -> None:
        self._kernels = [make_kernel(inner, source, reader, device) for inner in edit.edits]
        self._weight = edit.weight

    def span(self, start: int, stop: int) -> WeightedSpan | None:
        spans = [span for kernel in self._kernels if (span := kernel.span(start, stop)) is not None]
        return WeightedSpan(spans, self._weight) if spans else None


class WeightedSpan:
    def __init__(self, spans: Sequence[Span], weight: float) -> None:
        self._spans = spans
        self._weight = weight

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        changed_nC, inner_error = tile_nC.clone(), error
        for span in self._spans:
            inner_error = span.apply(changed_nC, base_nC, top, inner_error)
        # Of a difference float32 has lost what its terms were rounded by, however small it is itself.
        largest = float(changed_nC.abs().max()) if changed_nC.numel() else 0.0
        difference_nC = changed_nC.sub_(tile_nC)
        step = float(difference_nC.abs().max()) if difference_nC.numel() else 0.0
        tile_nC.add_(difference_nC, alpha=self._weight)
        terms = (largest + step) * 4 * FLOAT32_ERROR if step else 0.0
        return abs(1 - self._weight) * error + abs(self._weight) * (inner_error + terms)

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        changed_K = values_K
        for span in self._spans:
            changed_K = span.exact(changed_K, rows_K, cols_K)
        return values_K + self._weight * (changed_K - values_K)
