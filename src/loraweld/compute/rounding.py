"""The one rounding of a result, and the repair of elements where float32 is not enough for it.

float32 sums carry an error of about 2**-23 of their terms. Where base and delta cancel, the result can be
so small that this error passes one unit of the output's last place. Those few elements (about one in 10**5)
are found by their bits and computed again in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from loraweld.errors import NumericsError

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_FLOAT32_ERROR_BITS = 23
# (rows, columns) of K elements of a tile → their exact float64 values
Exact = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Rounder:
    """Rounds float32 tiles to `dtype`; keeps its scratch memory between tiles."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._half = dtype in _MANTISSA_BITS
        self._infinity = 0
        if self._half:
            self._infinity = _magnitude_bits(float("inf"), dtype)

    def round(self, tile_nC: torch.Tensor, out_nC: torch.Tensor, error_scale: float, exact: Exact) -> None:
        """Write `tile_nC` to `out_nC`, rounded once, to nearest even.

        Raises:
            NumericsError: a result is infinite or not a number.
        """
        out_nC.copy_(tile_nC)
        if not self._half:
            _check_finite(out_nC)
            return
        magnitudes = np.left_shift(out_nC.view(torch.int16).numpy().view(np.uint16), 1)
        if magnitudes.size and int(magnitudes.max()) >= self._infinity:
            raise _not_finite(tile_nC, self.dtype)
        limit = _magnitude_bits(self._unsafe_below(error_scale), self.dtype)
        if limit and int(magnitudes.min(initial=0xFFFF)) < limit:
            self._repair(out_nC, np.flatnonzero(magnitudes < limit), exact)

    def _unsafe_below(self, error_scale: float) -> float:
        """Results smaller than this may be off by more than one unit in the last place."""
        return error_scale * 2.0 ** (_MANTISSA_BITS[self.dtype] + 1 - _FLOAT32_ERROR_BITS)

    def _repair(self, out_nC: torch.Tensor, flat: np.ndarray, exact: Exact) -> None:
        positions = torch.from_numpy(flat)
        rows, cols = positions // out_nC.shape[1], positions % out_nC.shape[1]
        out_nC[rows, cols] = _round_once(exact(rows, cols), self.dtype)


def _round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to a 16-bit type directly: by way of float32 it would be rounded twice.

    float32 is first rounded to odd: truncated, its last bit set if anything was lost. Rounding that to 16 bit
    gives the correctly rounded value (Boldo and Melquiond, 2008, "Emulation of FMA and correctly rounded sums").
    """
    nearest = values.float()
    error = values - nearest.double()
    bits = nearest.view(torch.int32)
    away = (error != 0) & ((error < 0) == (nearest > 0)) & (nearest != 0)
    truncated = torch.where(away, bits - 1, bits)
    odd = torch.where(error != 0, truncated | 1, truncated)
    return odd.view(torch.float32).to(dtype)


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
