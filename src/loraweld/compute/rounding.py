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

from loraweld.compute.magnitudes import MANTISSA_BITS, NONE, Ints, are_finite, search
from loraweld.errors import NumericsError

_FLOAT32_EPSILON = 2.0**-23


class Rounder:
    """Rounds float32 tiles to `dtype`; `saw_nonfinite`: whether it let a value through that is not finite."""

    def __init__(self, dtype: torch.dtype, *, allow_nonfinite: bool = False) -> None:
        self.dtype = dtype
        self.saw_nonfinite = False
        self._allows = allow_nonfinite

    @property
    def to_nearest_bfloat16(self) -> bool:
        """Whether it rounds as `low_rank.add_rounded` does."""
        return self.dtype == torch.bfloat16

    def round(self, tile_nC: torch.Tensor, out_nC: torch.Tensor, error: float, first: int = 0) -> Ints:
        """Write `tile_nC`, right within the absolute `error`, to `out_nC`, rounded once, to nearest even.

        `first` is the flat position of the tile's first element in its tensor.

        Returns:
            The flat positions in the tile of elements that float32 may have wrong by too much, ascending; `exact`
            has the cure.

        Raises:
            NumericsError: a result is infinite or not a number, and that is not allowed.
        """
        out_nC.copy_(tile_nC)
        if self.dtype not in MANTISSA_BITS:
            if not _is_finite(out_nC):
                self._let_through(out_nC)
            return NONE
        finite, doubtful = search(out_nC, error)
        if not finite:
            self._let_through(tile_nC)
            return NONE  # float32 is near enough for the other values of such a tile
        if self.dtype == torch.float16 and error:
            return _near_middle(tile_nC, self.dtype, error)
        return doubtful

    def exact(self, values: npt.NDArray[np.float64], flat: Ints) -> torch.Tensor:
        """Return the exact values of elements at flat positions of the tensor, rounded as `round` does.

        Raises:
            NumericsError: a result is infinite or not a number.
        """
        return round_exact(values, self.dtype)

    def _let_through(self, tile_nC: torch.Tensor) -> None:
        if not self._allows:
            raise _not_finite(tile_nC, self.dtype)
        self.saw_nonfinite = True


def round_exact(values: npt.NDArray[np.float64], dtype: torch.dtype) -> torch.Tensor:
    """Round exact values to a 16-bit type.

    Raises:
        NumericsError: a result is infinite or not a number.
    """
    rounded = round_once(values, dtype)
    if not are_finite(rounded):
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


def _near_middle(tile_nC: torch.Tensor, dtype: torch.dtype, error: float) -> Ints:
    """Flat positions of results between which and the next 16-bit value the error may decide."""
    margin_nC = tile_nC.abs().mul_(_FLOAT32_EPSILON).add_(error)
    below = (tile_nC - margin_nC).to(dtype).view(torch.int16).numpy()
    above = (tile_nC + margin_nC).to(dtype).view(torch.int16).numpy()
    return np.flatnonzero(below != above)


def check_finite(out_nC: torch.Tensor) -> None:
    """Return if all values are finite.

    Raises:
        NumericsError: one is not.
    """
    if not _is_finite(out_nC):
        raise _not_finite(out_nC, out_nC.dtype)


def _is_finite(out_nC: torch.Tensor) -> bool:
    """Whether all values are finite; if their sum is, they are."""
    return not out_nC.numel() or bool(torch.isfinite(out_nC.sum())) or bool(torch.isfinite(out_nC).all())


def _not_finite(tile_nC: torch.Tensor, dtype: torch.dtype) -> NumericsError:
    largest = float(tile_nC.abs().max())
    name = str(dtype).removeprefix("torch.")
    if largest == float("inf") or largest != largest:
        return NumericsError(
            "holds values that are not finite; base or adapter is damaged. --allow-nonfinite writes them as they are"
        )
    return NumericsError(f"has a value of {largest:.4g}, too large for {name}; give --dtype bfloat16 or float32")
