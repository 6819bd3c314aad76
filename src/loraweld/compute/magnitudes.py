"""A search among 16-bit floats by their magnitudes.

Without its sign a float's bits order as absolute values do, with infinity and NaN last. Twice the bits plus a shift, in
16 bits that wrap, has no sign, puts infinity and NaN first and the rest behind them in order: one operation, and the
least of a run of neighbours tells both whether all are finite and whether any is small. Few are, so most runs are not
looked at again.

Shape letters: n = rows at hand, C = columns, r = runs.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from loraweld.compute.scripted import scripted

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in MANTISSA_BITS}
# Infinity is the first to wrap, so zero is at the shift itself, and places in the order are even.
_LOWEST, _HIGHEST = -0x8000, 0x7FFF
_RUN = 128  # the fewer, the less is looked at again where many are small
_PIECE_ELEMENTS = 1 << 17  # whose places in the order stay near the core
Ints = npt.NDArray[np.int64]
NONE = np.empty(0, dtype=np.int64)


def search(values_nC: torch.Tensor, error: float) -> tuple[bool, Ints]:
    """Look at values in bfloat16 or float16.

    Returns:
        Whether all of them are finite, and if so the flat positions of those whose step may be smaller than about the
        absolute `error`, ascending; none without an error.
    """
    if not values_nC.numel():
        return True, NONE
    shift, below = order_of(values_nC.dtype, error)
    run = run_length(values_nC.numel())
    lowest, places = _search(values_nC.view(torch.int16), shift, below, run, _PIECE_ELEMENTS)
    return lowest >= shift, places.numpy()


def order_of(dtype: torch.dtype, error: float) -> tuple[int, int]:
    """Return the place of zero in the order of a type, and the one that values in doubt are below."""
    shift = 2 * (0x8000 - _INFINITY[dtype]) + _LOWEST
    return shift, min(2 * _limit(error, dtype) + shift, _HIGHEST) if error else _LOWEST


def run_length(count: int) -> int:
    """Return how many neighbours a run has, of which any number of rows or pieces of `count` values have whole ones."""
    return math.gcd(count, _RUN)


@scripted
def write_least(bits_nC: torch.Tensor, shift: int, order_nC: torch.Tensor, least_nr: torch.Tensor) -> None:
    """Write the place of each value in the order, and the least of each run of a row."""
    torch.add(torch.tensor(shift, dtype=torch.int16), bits_nC, alpha=2, out=order_nC)
    torch.amin(order_nC.view(least_nr.size(0), least_nr.size(1), -1), [2], out=least_nr)


@scripted
def lower_than(below: int, bits_n: torch.Tensor, shift: int, least_r: torch.Tensor) -> torch.Tensor:
    """Return the flat positions of values lower than `below` in the order, ascending, from the least of each run."""
    run = bits_n.size(0) // least_r.size(0)
    low = torch.nonzero(least_r < below).view(-1)
    bits = bits_n.view(-1, run).index_select(0, low)
    found = torch.nonzero(torch.add(torch.tensor(shift, dtype=torch.int16), bits, alpha=2) < below)
    return low.index_select(0, found[:, 0]) * run + found[:, 1]


@scripted
def _search(bits_nC: torch.Tensor, shift: int, below: int, run: int, piece: int) -> tuple[int, torch.Tensor]:
    """Return the lowest place in the order, and the flat positions of those lower than `below`."""
    bits_1n = bits_nC.view(1, -1)
    count = bits_1n.size(1)
    order_1p = torch.empty([1, piece], dtype=torch.int16)
    least_1r = torch.empty([1, count // run], dtype=torch.int16)
    for start in range(0, count, piece):
        stop = min(count, start + piece)
        write_least(bits_1n[:, start:stop], shift, order_1p[:, : stop - start], least_1r[:, start // run : stop // run])
    return int(least_1r.min()), lower_than(below, bits_1n.view(-1), shift, least_1r.view(-1))


def are_finite(values: torch.Tensor) -> bool:
    """Return whether all of a few values in bfloat16 or float16 are finite."""
    return bool(((_bits(values) & 0x7FFF) < _INFINITY[values.dtype]).all())


def _bits(values: torch.Tensor) -> npt.NDArray[np.int16]:
    bits: npt.NDArray[np.int16] = values.view(torch.int16).numpy()
    return bits


def _limit(error: float, dtype: torch.dtype) -> int:
    """The bits of the 16-bit float next above the magnitude whose step is about a positive absolute `error`."""
    capped = np.float32(min(error * 2.0 ** (MANTISSA_BITS[dtype] + 1), _LARGEST[dtype]))
    if dtype == torch.bfloat16:
        return int(capped.view(np.uint32) >> 16) + 1
    nearest = capped.astype(np.float16)
    return int(nearest.view(np.int16)) + bool(nearest <= capped)
