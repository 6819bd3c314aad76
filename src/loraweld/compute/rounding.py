"""The one rounding of a result, and the repair of elements where float32 is not enough for it.

float32 arithmetic leaves an error, small against the terms of a sum but not against their difference. In two
cases it can show in the 16-bit result, and the element is computed again in float64:

- base and delta cancel: the result is so small that the error passes one unit of its last place (bfloat16 and
  float16; about one element in 10**5, found by its bits);
- the result lies so close to the middle between two neighbours that the error decides (float16, whose three
  more bits make this common: about one element in 10**3).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from loraweld.errors import NumericsError

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_FLOAT32_EPSILON = 2.0**-23
Ints = npt.NDArray[np.int64]
NONE = np.empty(0, dtype=np.int64)


class Rounder:
    """Rounds float32 tiles to `dtype`; keeps its scratch memory, so it belongs to one thread."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._bits = np.empty(0, dtype=np.uint16)
        self._infinity = _magnitude_bits(float("inf"), dtype) if dtype in _MANTISSA_BITS else 0

    def round(self, tile_nC: torch.Tensor, out_nC: torch.Tensor, error: float) -> Ints:
        """Write `tile_nC`, right within the absolute `error`, to `out_nC`, rounded once, to nearest even.

        Returns:
            The flat positions of elements that float32 may have wrong by too much; `round_exact` has the cure.

        Raises:
            NumericsError: a result is infinite or not a number.
        """
        out_nC.copy_(tile_nC)
        if self.dtype not in _MANTISSA_BITS:
            _check_finite(out_nC)
            return NONE
        magnitudes_nC = self._magnitudes(out_nC)
        if magnitudes_nC.size and int(magnitudes_nC.max()) >= self._infinity:
            raise _not_finite(tile_nC, self.dtype)
        if error == 0:
            return NONE
        if self.dtype == torch.float16:
            return _near_middle(tile_nC, self.dtype, error)
        return _below(magnitudes_nC, _magnitude_bits(error * 2.0 ** (_MANTISSA_BITS[self.dtype] + 1), self.dtype))

    def _magnitudes(self, out_nC: torch.Tensor) -> npt.NDArray[np.uint16]:
        """The bits of all elements without their signs, shifted up by one: they order as the magnitudes do."""
        bits = out_nC.view(torch.int16).numpy().view(np.uint16)
        if len(self._bits) < bits.size:
            self._bits = np.empty(bits.size, np.uint16)
        return np.left_shift(bits, 1, out=self._bits[: bits.size].reshape(bits.shape))


def round_exact(values: npt.NDArray[np.float64], dtype: torch.dtype) -> torch.Tensor:
    """Round exact values to a 16-bit type.

    Raises:
        NumericsError: a result is infinite or not a number.
    """
    rounded = round_once(values, dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise _not_finite(torch.from_numpy(values), dtype)
    return rounded


def round_once(values: npt.NDArray[np.float64], dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to a 16-bit type directly: by way of float32 it would be rounded twice.

    float32 is first rounded to odd: truncated, its last bit set if anything was lost. Rounding that to 16 bit
    gives the correctly rounded value (Boldo and Melquiond, 2008, "Emulation of FMA and correctly rounded sums").
    """
    nearest = values.astype(np.float32)
    lost = nearest != values
    too_far = np.abs(nearest) > np.abs(values)  # rounded away from zero: one step back truncates
    odd = (nearest.view(np.int32) - too_far) | lost
    return torch.from_numpy(odd.view(np.float32)).to(dtype)


def _below(magnitudes_nC: npt.NDArray[np.uint16], limit: int) -> Ints:
    """Flat positions of magnitudes below `limit`; most rows have none, and a row's minimum is cheap."""
    if not magnitudes_nC.size:
        return NONE
    rows = np.flatnonzero(magnitudes_nC.min(axis=1) < limit)
    found, cols = np.nonzero(magnitudes_nC[rows] < limit)
    flat: Ints = rows[found] * magnitudes_nC.shape[1] + cols
    return flat


def _near_middle(tile_nC: torch.Tensor, dtype: torch.dtype, error: float) -> Ints:
    """Flat positions of results between which and the next 16-bit value the error may decide."""
    margin_nC = tile_nC.abs().mul_(_FLOAT32_EPSILON).add_(error)
    below = (tile_nC - margin_nC).to(dtype).view(torch.int16).numpy()
    above = (tile_nC + margin_nC).to(dtype).view(torch.int16).numpy()
    return np.flatnonzero(below != above)


def _magnitude_bits(value: float, dtype: torch.dtype) -> int:
    """The bits of `value` without its sign, as the upper 15 of 16: they order as the values do."""
    bits = int(torch.tensor(value, dtype=dtype).view(torch.int16).item())
    return (bits << 1) & 0xFFFF


def _check_finite(out_nC: torch.Tensor) -> None:
    if out_nC.numel() and not bool(torch.isfinite(out_nC.sum())) and not bool(torch.isfinite(out_nC).all()):
        raise _not_finite(out_nC, out_nC.dtype)


def _not_finite(tile_nC: torch.Tensor, dtype: torch.dtype) -> NumericsError:
    largest = float(tile_nC.abs().max())
    name = str(dtype).removeprefix("torch.")
    if largest == float("inf") or largest != largest:
        return NumericsError("holds values that are not finite; base or adapter is damaged")
    return NumericsError(f"has a value of {largest:.4g}, too large for {name}; give --dtype bfloat16 or float32")
