"""The one rounding of float64 to 16 bit, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from exact import BF16, FORMATS, FP16, Format, bits_of, nearest_even, rounded
from loraweld.compute.magnitudes import MANTISSA_BITS, search
from loraweld.compute.rounding import Rounder, round_exact, round_once
from loraweld.errors import NumericsError
from strategies import near_ties

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def exact_bits(value: float, form: Format) -> int:
    """The 16 bits of the value nearest to `value`, by fractions."""
    nearest = nearest_even(Fraction(value), form)
    return bits_of(math.copysign(math.inf if nearest is None else float(nearest), value), form)


def bits(tensor: torch.Tensor) -> list[int]:
    return [pattern & 0xFFFF for pattern in tensor.view(torch.int16).tolist()]


@each_format
@given(value=st.floats(-LARGEST_FLOAT32, LARGEST_FLOAT32))
@example(value=2.0**-134)  # half of the smallest bf16: a tie with zero
@example(value=math.nextafter(2.0**-134, 1))
@example(value=2.0**-25)  # the same in fp16
@example(value=math.nextafter(2.0**-25, 1))
@example(value=65520.0)  # halfway between the largest fp16 and infinity
@example(value=math.nextafter(65520.0, 0))
@example(value=float(BF16.infinity_from))
@example(value=math.nextafter(float(BF16.infinity_from), 0))
@example(value=-0.0)
@example(value=5e-324)
@example(value=-LARGEST_FLOAT32)
def test_float64_is_rounded_once_to_nearest_even(form: Format, value: float) -> None:
    """A float64 that float32 has room for gives the nearest 16-bit value: ties to even, infinity past the largest."""
    made = round_once(np.array([value]), form.dtype)
    assert bits(made) == [exact_bits(value, form)]


@each_format
@given(data=st.data())
def test_ties_and_their_neighbours_are_rounded_once(form: Format, data: st.DataObject) -> None:
    """Halfway between two values the even one is taken; a float64 step beside it, the nearer one."""
    values = data.draw(st.lists(near_ties(form), min_size=1, max_size=20))
    made = round_once(np.array(values), form.dtype)
    assert bits(made) == [exact_bits(value, form) for value in values]


@each_format
def test_every_midpoint_is_rounded_to_even(form: Format) -> None:
    """All 2**16 patterns: the midpoint to the next value, and float64's neighbours of it, exhaustively."""
    low = torch.arange(0, bits_of(math.inf, form) - 1, dtype=torch.int16)
    middle = (low.view(form.dtype).double() + (low + 1).view(form.dtype).double()) / 2
    expected = torch.where(low % 2 == 0, low, low + 1)
    above = torch.nextafter(middle, torch.tensor(math.inf, dtype=torch.float64))
    below = torch.nextafter(middle, torch.tensor(-math.inf, dtype=torch.float64))
    for values, patterns in ((middle, expected), (above, low + 1), (below, low)):
        assert torch.equal(round_once(values.numpy(), form.dtype).view(torch.int16), patterns)


@each_format
@given(data=st.data())
def test_the_array_oracle_agrees_with_fractions(form: Format, data: st.DataObject) -> None:
    """What other tests compare with is itself correct: numpy's steps give the bits that fractions give."""
    finite = st.floats(-float(form.infinity_from), float(form.infinity_from), exclude_min=True, exclude_max=True)
    values = data.draw(st.lists(finite | near_ties(form), min_size=1, max_size=20))
    assert bits(rounded(np.array(values), form)) == [exact_bits(value, form) for value in values]


def round_row(exact: np.ndarray, tile: torch.Tensor, error: float, dtype: torch.dtype) -> torch.Tensor:
    """Round one row, with the exact values where float32 is in doubt."""
    out = torch.empty(tile.shape, dtype=dtype)
    doubtful = Rounder(dtype).round(tile, out, error)
    out[0, doubtful] = round_exact(exact[doubtful], dtype)
    return out[0]


@each_format
@given(data=st.data())
def test_results_in_doubt_are_taken_from_float64(form: Format, data: st.DataObject) -> None:
    """Where float32 may be wrong by as much as the result, the exact value decides, rounded once."""
    exact = np.array(data.draw(st.lists(near_ties(form), min_size=1, max_size=20)))
    error = 1e3 + float(np.abs(exact).max())
    made = round_row(exact, torch.zeros(1, len(exact)), error, form.dtype)
    assert bits(made) == [exact_bits(value, form) for value in exact]


@each_format
@given(data=st.data())
def test_small_results_are_in_doubt_wherever_they_lie(form: Format, data: st.DataObject) -> None:
    """Of any number of values, those whose step is below the error are found, and no others but a few next to them."""
    rows, cols = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 130)))
    signs = np.random.default_rng(rows * cols).choice([-1.0, 1.0], rows * cols)
    values = torch.from_numpy(signs).to(form.dtype)
    places = data.draw(st.lists(st.integers(0, rows * cols - 1), max_size=30))
    sizes = data.draw(st.lists(st.floats(0, 0.5), min_size=len(places), max_size=len(places)))
    values[places] *= torch.tensor(sizes, dtype=form.dtype)
    limit = 0.25
    error = limit / 2 ** (MANTISSA_BITS[form.dtype] + 1)
    found = np.zeros(rows * cols, dtype=bool)
    finite, places = search(values.view(rows, cols), error)
    assert finite
    found[places] = True
    size = values.abs().double().numpy()
    assert found[size < limit].all()
    assert not found[size > limit].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(dtype: torch.dtype, value: float) -> None:
    """Neither NaN nor infinity is ever written as a result."""
    tile = torch.ones(3, 5)
    tile[1, 2] = value
    with pytest.raises(NumericsError, match="not finite"):
        Rounder(dtype).round(tile, torch.empty(3, 5, dtype=dtype), 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_starts_where_rounding_gives_infinity(sign: int) -> None:
    """65519.996 still is the largest fp16; 65520 has no value there and the error says what would hold it."""
    out = torch.empty(1, 1, dtype=torch.float16)
    last = math.nextafter(65520.0, 0)
    Rounder(torch.float16).round(torch.tensor([[sign * 65519.996]]), out, 0.0)
    assert out.item() == sign * 65504 == rounded(np.array([sign * last]), FP16).item()
    with pytest.raises(NumericsError, match=r"6\.552e\+04.*float16.*bfloat16"):
        Rounder(torch.float16).round(torch.tensor([[sign * 65520.0]]), out, 0.0)


def test_overflow_in_float64_alone_is_refused() -> None:
    """float32 says 65504, but the exact sum has no value in fp16: infinity is not written for it."""
    tile = torch.tensor([[1.0, math.nextafter(65520.0, 0)]]).nextafter(torch.tensor(0.0))
    with pytest.raises(NumericsError, match="too large for float16"):
        round_row(np.array([1.0, 65520.5]), tile, 1.0, torch.float16)
