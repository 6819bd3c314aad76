"""Rounding up or down by chance, so that the mean is the value itself.

Of the two neighbours of a value the one farther from zero is taken with the probability of the value's distance from
the other, as a share of their distance: where that is f and the element's 16 random bits are r (`random_bits`), if
f + (r + 1/2) / 2**16 ≥ 1. A value that the format holds has f = 0 and stays. The last bits of a float32 decide f to the
bit: 16 of them lie beyond bfloat16 and 13 beyond float16, where it is not subnormal.

A value is refused where rounding to nearest refuses it, and beyond the largest finite one, where the farther neighbour
would be infinity, it is that one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from loraweld.compute.magnitudes import MANTISSA_BITS, NONE, Ints, search
from loraweld.compute.random_bits import PIECE_ELEMENTS, Random, RandomBits
from loraweld.compute.rounding import Rounder, round_exact
from loraweld.planning.merge_plan import Draw

_MIN_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}
_FLOAT32_MANTISSA = 23
_MAGNITUDE = 0x7FFFFFFF


def make_rounder(dtype: torch.dtype, draw: Draw | None, *, allow_nonfinite: bool) -> Rounder:
    """Return the rounding of one tensor: by chance if it has a draw, else to nearest."""
    if draw is None:
        return Rounder(dtype, allow_nonfinite=allow_nonfinite)
    return StochasticRounder(dtype, draw, allow_nonfinite=allow_nonfinite)


class StochasticRounder(Rounder):
    """Rounds float32 tiles of one tensor to bfloat16 or float16, by the random bits of its draw."""

    def __init__(self, dtype: torch.dtype, draw: Draw, *, allow_nonfinite: bool = False) -> None:
        super().__init__(dtype, allow_nonfinite=allow_nonfinite)
        self._random = RandomBits(draw)
        self._lost_bits = _FLOAT32_MANTISSA - MANTISSA_BITS[dtype]
        self._largest = _float32_bits(torch.finfo(dtype).max)
        self._smallest_normal = _float32_bits(2.0 ** _MIN_EXPONENT[dtype])
        self._added = np.empty(PIECE_ELEMENTS, dtype=np.uint16)
        self._sums = np.empty(PIECE_ELEMENTS, dtype=np.int32)

    @property
    def to_nearest_bfloat16(self) -> bool:
        return False

    def round(self, tile_nC: torch.Tensor, out_nC: torch.Tensor, error: float, first: int = 0) -> Ints:
        values, out = tile_nC.view(-1), out_nC.view(-1)
        bits = values.view(torch.int32).numpy()
        for start in range(0, len(bits), PIECE_ELEMENTS):
            piece = slice(start, start + PIECE_ELEMENTS)
            self._round_piece(bits[piece], out[piece], first + start)
        if len(bits) and _largest_magnitude(bits) > self._largest and not self._mend_largest(values, out):
            return NONE
        return search(out_nC, error)[1]

    def exact(self, values: npt.NDArray[np.float64], flat: Ints) -> torch.Tensor:
        nearest = round_exact(values, self.dtype)
        chosen = _chosen(values, self._random.at(flat), self.dtype)
        return torch.where(chosen.isfinite(), chosen, nearest)

    def _round_piece(self, bits: npt.NDArray[np.int32], out: torch.Tensor, first: int) -> None:
        """Add as many random bits as the format loses, and cut these off: what carries is rounded away from zero."""
        random, sums = self._random.run(first, len(bits)), self._sums[: len(bits)]
        added = np.right_shift(random, np.uint16(16 - self._lost_bits), out=self._added[: len(bits)])
        np.add(bits, added, out=sums)
        np.bitwise_and(sums, np.int32(-1 << self._lost_bits), out=sums)
        out.copy_(torch.from_numpy(sums).view(torch.float32))
        if self.dtype == torch.float16:  # whose subnormal numbers are float32's normal ones
            magnitudes = np.bitwise_and(bits, np.int32(_MAGNITUDE), out=sums)
            small = np.flatnonzero(magnitudes < self._smallest_normal)
            values = bits[small].view(np.float32).astype(np.float64)
            out[torch.from_numpy(small)] = _chosen(values, random[small], self.dtype)

    def _mend_largest(self, values: torch.Tensor, out: torch.Tensor) -> bool:
        """Round to nearest what has no neighbour farther from zero; return whether all of it is finite."""
        nearest = values.to(self.dtype)
        finite = nearest.isfinite()
        out.copy_(torch.where(out.isfinite() & finite, out, nearest))
        if bool(finite.all()):
            return True
        self._let_through(values)
        return False


def _chosen(values: npt.NDArray[np.float64], random: Random, dtype: torch.dtype) -> torch.Tensor:
    """Return a neighbour of each value, infinity past the largest; the scaling by powers of two is exact."""
    exponents = np.maximum(np.frexp(values)[1] - 1, _MIN_EXPONENT[dtype]) - MANTISSA_BITS[dtype]
    steps = np.ldexp(np.abs(values), -exponents)
    whole = np.floor(steps)
    farther = steps - whole + (random + 0.5) / 2**16 >= 1
    return torch.from_numpy(np.copysign(np.ldexp(whole + farther, exponents), values)).to(dtype)


def _largest_magnitude(bits: npt.NDArray[np.int32]) -> int:
    """Return the bits of the largest magnitude of float32 values: read as signed numbers, negative ones lie lowest."""
    return max(int(bits.max()), int(bits.view(np.uint32).max()) - (1 << 31))


def _float32_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))
