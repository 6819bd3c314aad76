"""Floating point by definition: the unit of the last place of a value, and the nearest value, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

# Significant bits, and the exponent of the smallest step (that of subnormal numbers).
_FORMATS = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}
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
