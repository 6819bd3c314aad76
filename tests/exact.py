"""The correctly rounded 16-bit value of an exact result: once with fractions, once with numpy for whole arrays."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A binary format: `precision` counts the hidden bit; exponents are those of the leading bit."""

    dtype: torch.dtype
    precision: int
    min_exponent: int
    max_exponent: int

    @property
    def infinity_from(self) -> Fraction:
        """The smallest value that rounds to infinity: half a step past the largest finite one."""
        return (2 - Fraction(1, 2**self.precision)) * 2**self.max_exponent


BF16 = Format(torch.bfloat16, precision=8, min_exponent=-126, max_exponent=127)
FP16 = Format(torch.float16, precision=11, min_exponent=-14, max_exponent=15)
FORMATS = {"bf16": BF16, "fp16": FP16}


def nearest_even(value: Fraction, form: Format) -> Fraction | None:
    """Return the value of `form` nearest to `value`, None for infinity; Python's round() takes ties to even."""
    if abs(value) >= form.infinity_from:
        return None
    step = Fraction(2) ** (max(_exponent(value), form.min_exponent) - form.precision + 1)
    return round(value / step) * step


def _exponent(value: Fraction) -> int:
    """The exponent of the leading bit of `value`; of zero, any small number."""
    if value == 0:
        return -10_000
    guess = abs(value.numerator).bit_length() - value.denominator.bit_length()
    return guess if abs(value) >= Fraction(2) ** guess else guess - 1


def bits_of(value: float, form: Format) -> int:
    """Return the 16 bits of a value that `form` holds exactly (or infinity)."""
    if form is FP16:
        return int.from_bytes(struct.pack("<e", value), "little")
    return int.from_bytes(struct.pack("<f", value), "little") >> 16


def rounded(values: np.ndarray, form: Format) -> Tensor:
    """Round a float64 array once, to nearest even; the scaling by powers of two is exact."""
    _, exponents = np.frexp(values)  # of a fraction in [0.5, 1): one more than the leading bit's
    steps = np.maximum(exponents - 1, form.min_exponent) - form.precision + 1
    nearest = np.ldexp(np.rint(np.ldexp(values, -steps)), steps)
    return torch.from_numpy(nearest).to(form.dtype)  # changes no value: it has at most 11 bits


def steps_apart(one: Tensor, other: Tensor) -> Tensor:
    """Return how many values of their 16-bit format lie between two tensors, element by element."""
    first, second = (_order(tensor) for tensor in (one, other))
    return (first - second).abs()


def _order(tensor: Tensor) -> Tensor:
    """Whole numbers in the order of the values; both zeros are 0."""
    bits = tensor.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
