"""The arithmetic of tuners other than LoRA, row by row.

Shape letters: N = rows of the tensor, n = rows at hand, C = columns, R = rank, K = elements in doubt.
Each kernel serves all threads; see `kernels` for the protocol.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch

from loraweld.adapter.edits import Hadamard, Kronecker, Scale, SingularValues
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.factors import Factors, Left, largest_norm
from loraweld.compute.tensors import read_rows, read_vector

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
FLOAT32_ERROR = 2.0**-23


class SingularValuesKernel:
    """W += scaling · L·diag(e)·R: AdaLoRA."""

    def __init__(self, edit: SingularValues, reader: Reader) -> None:
        self._factors = Factors.stored(edit.delta, reader)
        self._values_R = read_vector(reader, edit.values)
        self._scaling = edit.delta.scaling

    def span(self, start: int, stop: int) -> SingularValuesSpan:
        return SingularValuesSpan(self._factors, self._factors.left(stop), self._values_R, self._scaling)


class SingularValuesSpan:
    def __init__(self, factors: Factors, left: Left, values_R: torch.Tensor, scaling: float) -> None:
        self._factors = factors
        self._left = left
        self._values_R = values_R
        self._scaling = scaling

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        left_nR = self._left.rows(top, len(tile_nC)) * self._values_R
        tile_nC.addmm_(left_nR, self._factors.right_RC, alpha=self._scaling)
        terms = abs(self._scaling) * largest_norm(left_nR) * self._factors.largest_norm
        return error + terms * math.sqrt(max(1, len(self._values_R))) * 2 * FLOAT32_ERROR

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        left_KR = self._left.pick(rows_K) * self._values_R.double().numpy()
        delta_K: Floats = np.einsum("kr,kr->k", left_KR, self._factors.columns(cols_K))
        return values_K + self._scaling * delta_K


class HadamardKernel:
    """W += scaling · (L₁·R₁) ∘ (L₂·R₂): LoHa."""

    def __init__(self, edit: Hadamard, reader: Reader) -> None:
        self._factors = [_stored(left, right, reader) for left, right in edit.pairs]
        self._scaling = edit.scaling

    def span(self, start: int, stop: int) -> HadamardSpan:
        return HadamardSpan([(factors, factors.left(stop)) for factors in self._factors], self._scaling)


def _stored(left: StoredTensor, right: StoredTensor, reader: Reader) -> Factors:
    return Factors(read_rows(reader, right, 0, right.rows), lambda start, stop: read_rows(reader, left, start, stop))


class HadamardSpan:
    def __init__(self, pairs: list[tuple[Factors, Left]], scaling: float) -> None:
        self._pairs = pairs
        self._scaling = scaling

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        pairs = [(left.rows(top, len(tile_nC)), factors) for factors, left in self._pairs]
        first_nC, second_nC = (left_nR @ factors.right_RC for left_nR, factors in pairs)
        tile_nC.addcmul_(first_nC, second_nC, value=self._scaling)
        terms, ranks = abs(self._scaling), 1.0
        for left_nR, factors in pairs:
            terms *= largest_norm(left_nR) * factors.largest_norm
            ranks += math.sqrt(factors.rank)
        return error + terms * ranks * FLOAT32_ERROR

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        products = [
            np.einsum("kr,kr->k", left.pick(rows_K).astype(np.float64), factors.columns(cols_K))
            for factors, left in self._pairs
        ]
        exact_K: Floats = values_K + self._scaling * products[0] * products[1]
        return exact_K


class KroneckerKernel:
    """W += scaling · F₁ ⊗ F₂: LoKr. Both factors are small and held whole, in float64."""

    def __init__(self, edit: Kronecker, reader: Reader) -> None:
        self._first, self._second = (_product(factor, reader) for factor in (edit.first, edit.second))
        self._scaling = edit.scaling
        self._largest = abs(edit.scaling) * float(self._first.abs().max()) * float(self._second.abs().max())

    def span(self, start: int, stop: int) -> KroneckerKernel:
        return self

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        rows_n = torch.arange(top, top + len(tile_nC))
        height = len(self._second)
        first = self._first[rows_n // height].float()[:, :, None]
        second = self._second[rows_n % height].float()[:, None, :]
        tile_nC.view(len(tile_nC), *first.shape[1:2], -1).addcmul_(first, second, value=self._scaling)
        return error + self._largest * 2 * FLOAT32_ERROR

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        height, width = self._second.shape
        first_K = self._first.numpy()[rows_K // height, cols_K // width]
        exact_K: Floats = values_K + self._scaling * first_K * self._second.numpy()[rows_K % height, cols_K % width]
        return exact_K


def _product(factor: tuple[StoredTensor, ...], reader: Reader) -> torch.Tensor:
    """Return a factor, or the product of the two it is stored as, in float64."""
    return reduce(torch.matmul, [read_rows(reader, tensor, 0, tensor.rows).double() for tensor in factor])


class ScaleKernel:
    """W ← W times a factor for each row or column: (IA)³."""

    def __init__(self, edit: Scale, source: Source, reader: Reader) -> None:
        self._by_column = edit.by_column
        factors = read_vector(reader, edit.factors)
        # Each input channel of a convolution has as many columns as its kernel has places.
        self._factors = factors.repeat_interleave(source.cols // len(factors)) if edit.by_column else factors
        self._largest = float(factors.abs().max())

    def span(self, start: int, stop: int) -> ScaleKernel:
        return self

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        tile_nC.mul_(self._factors if self._by_column else self._factors[top : top + len(tile_nC), None])
        return error * self._largest

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        exact_K: Floats = values_K * self._factors.numpy()[cols_K if self._by_column else rows_K].astype(np.float64)
        return exact_K
