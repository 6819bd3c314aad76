"""Rows plus low-rank deltas, rounded in one go: against float64, in pieces of any size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from exact import BF16, rounded, steps_apart
from loraweld.compute import low_rank
from loraweld.compute.bfloat16 import flushed, multiplies_bfloat16
from loraweld.compute.editor import _stored
from loraweld.compute.low_rank import PieceRoom, Rounded, Term, add_rounded

SHAPES = st.tuples(st.integers(1, 40), st.sampled_from([1, 3, 8, 64, 96, 513, 1024]))
RANKS = st.lists(st.integers(0, 5), min_size=1, max_size=3)
# Elements of a piece, and of the right factors that one takes: rows, columns, and both.
PIECES = st.tuples(st.sampled_from([1, 64, 1000, 1 << 19]), st.sampled_from([1, 300, 1 << 18]))
WHOLE = 1 << 19, 1 << 18
multiplied = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="NO BFLOAT16 PRODUCT IS TRIED: this processor has no instructions for them"
)


def added(
    base_nC: torch.Tensor, terms: list[Term], piece: tuple[int, int], room: PieceRoom | None = None
) -> tuple[Rounded, torch.Tensor]:
    """Return what is made of the rows in pieces of about this size."""
    out_nC = torch.full(base_nC.shape, math.nan, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "PIECE_ELEMENTS", piece[0])
        patch.setattr(low_rank, "RIGHT_ELEMENTS", piece[1])
        return add_rounded(base_nC, terms, out_nC, room or PieceRoom()), out_nC


def exact_sum(base_nC: torch.Tensor, terms: list[Term]) -> torch.Tensor:
    """Return the sum in float64."""
    return base_nC.double() + sum(term.scaling * (term.left_nR.double() @ term.right_RC.double()) for term in terms)


@given(shape=SHAPES, ranks=RANKS, piece=PIECES, dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
@example(shape=(7, 8), ranks=[2], piece=(24, 1 << 18), dtype=torch.bfloat16)  # a last piece of one row
@example(shape=(4, 3), ranks=[2], piece=(8, 4), dtype=torch.bfloat16)  # of one column
@example(shape=(7, 1024), ranks=[3], piece=(1000, 1200), dtype=torch.bfloat16)  # of fewer rows and of fewer columns
def test_sums_that_float32_holds_are_rounded_once(
    shape: tuple[int, int], ranks: list[int], piece: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of small integers every sum is exact, so every bit is known, and nothing else is in doubt than asked for."""
    rows, cols = shape
    draw = torch.Generator().manual_seed(rows * cols + sum(ranks))

    def whole(*size: int) -> torch.Tensor:
        return torch.randint(-60, 61, size, generator=draw).float()

    base_nC = whole(rows, cols).to(dtype)
    terms = [
        Term(whole(rows, rank), whole(rank, cols), 2.0 ** (index - 1), 2.0**-9) for index, rank in enumerate(ranks)
    ]
    made, out_nC = added(base_nC, terms, piece)
    expected = rounded(exact_sum(base_nC, terms).numpy(), BF16)
    assert made.finite
    assert torch.equal(out_nC.view(torch.int16), expected.view(shape).view(torch.int16))
    limit = sum(term.error for term in terms) * 2**8
    small = np.flatnonzero(expected.view(-1).abs().double().numpy() < limit)
    assert np.isin(small, made.doubtful).all()
    assert (expected.view(-1)[made.doubtful].abs().double() <= limit).all()
    assert (np.diff(made.doubtful) > 0).all()
    assert torch.equal(made.stored, base_nC.view(-1)[made.doubtful])


@given(rows=st.integers(2, 60), cols=st.sampled_from([64, 200, 1024]), rank=st.integers(1, 32), piece=PIECES)
def test_sums_of_any_numbers_are_a_step_off_at_most(rows: int, cols: int, rank: int, piece: tuple[int, int]) -> None:
    """What is not in doubt is the nearest value, or next to it where float32 decides so; that is rare."""
    draw = torch.Generator().manual_seed(rows * cols * rank)
    base_nC = torch.randn(rows, cols, generator=draw).bfloat16()
    left, right = torch.randn(rows, rank, generator=draw), torch.randn(rank, cols, generator=draw)
    norms = float(left.norm(dim=1).max()) * float(right.norm(dim=0).max())
    terms = [Term(left, right, 0.3, 0.3 * norms * math.sqrt(rank) * 2**-23)]
    made, out_nC = added(base_nC, terms, piece)
    steps = steps_apart(out_nC.view(-1), rounded(exact_sum(base_nC, terms).view(-1).numpy(), BF16))
    steps[made.doubtful] = 0
    assert made.finite and steps.abs().max() <= 1
    assert steps.count_nonzero() <= 2 + 1e-3 * steps.numel()


@multiplied
@given(rows=st.integers(8, 200), cols=st.sampled_from([64, 200, 1024]), rank=st.integers(1, 96), whole=st.booleans())
def test_bfloat16_factors_make_the_same_sums(rows: int, cols: int, rank: int, whole: bool) -> None:
    """Of integers every bit is known; of any numbers as above."""
    draw = torch.Generator().manual_seed(rows * cols * rank)

    def numbers(*size: int) -> torch.Tensor:
        drawn = torch.randint(-60, 61, size, generator=draw).float() if whole else torch.randn(size, generator=draw)
        return drawn.bfloat16()

    base_nC, left, right = numbers(rows, cols), numbers(rows, rank), numbers(rank, cols)
    norms = float(left.float().norm(dim=1).max()) * float(right.float().norm(dim=0).max())
    scaling = 0.5 if whole else math.sqrt(0.1)
    terms = [Term(left, right, scaling, scaling * norms * math.sqrt(rank) * 2**-23)]
    made, out_nC = added(base_nC, terms, WHOLE)
    steps = steps_apart(out_nC.view(-1), rounded(exact_sum(base_nC, terms).view(-1).numpy(), BF16))
    steps[made.doubtful] = 0
    assert made.finite and steps.abs().max() <= 1
    assert steps.count_nonzero() <= (0 if whole else 2 + 1e-3 * steps.numel())
    assert torch.equal(made.stored, base_nC.view(-1)[made.doubtful])


@multiplied
@pytest.mark.parametrize("factor", ["left", "right"])
@pytest.mark.parametrize("exponent", [-127, -130, -133])
def test_what_instructions_take_for_0_is_within_the_bound(exponent: int, factor: str) -> None:
    """Numbers below 2⁻¹²⁶ on one side, large ones on the other."""
    draw = torch.Generator().manual_seed(exponent)
    scales = (2.0**exponent, 2.0**100) if factor == "left" else (2.0**100, 2.0**exponent)
    left, right = ((torch.randn(64, 64, generator=draw) * scale).bfloat16() for scale in scales)
    made = torch.addmm(torch.zeros_like(left), left, right)
    exact = left.double() @ right.double()
    norms = float(left.double().norm(dim=1).max()), float(right.double().norm(dim=0).max())
    bound = flushed(1.0, 64, *norms) + 8 * norms[0] * norms[1] * 2**-23
    assert float((made.double() - exact).abs().max()) <= bound + 2**-8 * float(exact.abs().max())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38])
@pytest.mark.parametrize("place", [0, 700, 3 * 513 - 1])
@pytest.mark.parametrize("piece", [(64, 1 << 18), (64, 1), WHOLE])
def test_a_result_that_is_not_finite_is_seen(value: float, place: int, piece: tuple[int, int]) -> None:
    """Wherever it lies, infinite only by the rounding too, in the same room as finite ones before and after."""
    base_nC, room = torch.ones(3, 513), PieceRoom()
    terms = [Term(torch.ones(3, 2), torch.ones(2, 513), 1.0, 1e-7)]
    assert added(base_nC, terms, piece, room)[0].finite
    base_nC.view(-1)[place] = value
    assert not added(base_nC, terms, piece, room)[0].finite
    assert added(torch.ones(3, 513), terms, piece, room)[0].finite


def test_room_is_made_for_larger_rows() -> None:
    """One room serves tensors of any shape, one after the other."""
    room = PieceRoom()
    for rows, cols in ((2, 8), (9, 8), (3, 64), (1, 1), (9, 8)):
        base_nC = torch.ones(rows, cols)
        made, out_nC = added(base_nC, [Term(torch.ones(rows, 1), torch.ones(1, cols), 2.0, 0.0)], WHOLE, room)
        assert made.finite and not len(made.doubtful) and bool((out_nC == 3).all())


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_what_is_stored_is_found_whatever_its_dtype(dtype: torch.dtype) -> None:
    """By the fast way and by the other, where new rows hold nothing."""
    base_nC = torch.arange(32.0).view(4, 8).to(dtype)
    terms = [Term(torch.zeros(4, 1), torch.zeros(1, 8), 1.0, 1.0)]
    made, _ = added(base_nC, terms, WHOLE)
    values = base_nC.double().view(-1).tolist()
    assert made.stored.double().tolist() == values
    found = _stored(base_nC, np.array([0, 9, 31, 32, 40]))
    assert found.dtype == dtype and found.double().tolist() == [values[0], values[9], values[31], 0, 0]
