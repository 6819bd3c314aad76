"""Floating point by definition: the unit of the last place of a value, and the values it is rounded to, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

# Significant bits, and the exponent of the smallest step (that of subnormal numbers).
_FORMATS = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}
_LARGEST = {"BF16": (2 - 2.0**-7) * 2.0**127, "F16": 65504.0}
_EXPONENT, _BIAS, _SHIFT = 0x7FF << 52, 1023, 52


def quanta(values: Tensor, dtype: str) -> Tensor:
    """Return the distance between neighbours of `dtype` around each float64 value, of the same shape."""
    bits, smallest = _FORMATS[dtype]
    exponents = (values.view(torch.int64) & _EXPONENT) - ((bits - 1) << _SHIFT)
    return exponents.clamp_(min=(smallest + _BIAS) << _SHIFT).view(torch.float64)


def nearest(values: Tensor, dtype: str) -> Tensor:
    """Return float64 values rounded to `dtype`, to nearest, ties to even; those that are too large stay as they are."""
    if dtype not in _FORMATS:
        return values
    steps = quanta(values, dtype)
    return (values / steps).round_().mul_(steps)


def drawn(values: Tensor, dtype: str, random: Tensor) -> Tensor:
    """Return float64 values rounded to a 16-bit `dtype` by chance; `random` are 16 bits for each, as whole numbers.

    The neighbour farther from zero is taken if the part of a step that lies beyond the other one, and (r + 1/2) /
    2**16, are at least 1 together; past the largest value the nearest is.
    """
    steps = quanta(values, dtype)
    whole = (values.abs() / steps).floor_()
    beyond = values.abs() / steps - whole
    farther = beyond + (random + 0.5) / 2**16 >= 1
    chosen = (whole + farther).mul_(steps).copysign_(values)
    return torch.where(chosen.abs() > _LARGEST[dtype], nearest(values, dtype), chosen)


def drawn_variance(values: Tensor, dtype: str) -> Tensor:
    """Return the variance of rounding float64 values by chance: f·(1 - f) steps², f the part of a step."""
    steps = quanta(values, dtype)
    beyond = (values / steps).frac_().abs_()
    return beyond * (1 - beyond) * steps.square()
