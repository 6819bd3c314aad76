"""Rows plus low-rank deltas, rounded to bfloat16: what nearly every merge does to nearly every row, in one go.

A tile is done in pieces that stay near the core, from its numbers in float32 to the search for elements in doubt, and
in one function without the interpreter's lock: threads that take it for each operation wait for each other. A piece is
some whole rows, but at a high rank some columns of more rows: a product lays out the right factor's columns anew each
time, which many rows must be worth, and goes through them again and again.

Factors that are stored in bfloat16 need no float32 numbers: the processor multiplies them exactly, adds up in float32
and rounds once with the rows added, all in one operation (`compute/bfloat16.py`).

Shape letters: n = rows of a tile, C = columns, R = rank, p = elements of a piece, r = runs of neighbours in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraweld.compute.magnitudes import Ints, lower_than, order_of, run_length, write_least
from loraweld.compute.scripted import scripted

PIECE_ELEMENTS = 1 << 19
RIGHT_ELEMENTS = 1 << 18  # of the right factors, those in the columns of a piece


@dataclass(frozen=True, slots=True)
class Term:
    """The delta scaling · L·R of a tile's rows, and a bound of the absolute error that float32 leaves in it.

    Both factors are in float32, or in bfloat16 if the rows are so too and it is the only delta.
    """

    left_nR: torch.Tensor
    right_RC: torch.Tensor
    scaling: float
    error: float


@dataclass(frozen=True, slots=True)
class Rounded:
    """Whether all results are finite; flat positions of elements in doubt, ascending, and what is stored there."""

    finite: bool
    doubtful: Ints
    stored: torch.Tensor


class PieceRoom:
    """Memory for one piece, reused by one thread: its numbers in float32, and their order."""

    def __init__(self) -> None:
        self.values_p = torch.empty(0)
        self.order_p = torch.empty(0, dtype=torch.int16)

    def of(self, count: int) -> PieceRoom:
        """Return it with room for this many elements."""
        if len(self.values_p) < count:
            self.values_p = torch.empty(count)
            self.order_p = torch.empty(count, dtype=torch.int16)
        return self


def add_rounded(base_nC: torch.Tensor, terms: Sequence[Term], out_nC: torch.Tensor, room: PieceRoom) -> Rounded:
    """Write stored rows (n, C), of any float dtype, plus `terms` to `out_nC` (n, C) in bfloat16, rounded once.

    To nearest even, from sums in float32. There is at least one element. One is in doubt if its step may be smaller
    than the error of the terms. Nothing is raised: what is not finite is written too, and said.
    """
    rows, cols = out_nC.shape
    shift, below = order_of(out_nC.dtype, sum(term.error for term in terms))
    run = run_length(cols)
    rank = max(1, sum(len(term.right_RC) for term in terms))
    whole = len(terms) == 1 and terms[0].right_RC.dtype == torch.bfloat16
    width = cols if whole else min(cols, max(1, RIGHT_ELEMENTS // (rank * run)) * run)
    height = min(rows, max(1, PIECE_ELEMENTS // width))
    room = room.of(height * width)
    lowest, places, stored = _add_rounded(
        base_nC,
        [term.left_nR for term in terms],
        [term.right_RC for term in terms],
        [term.scaling for term in terms],
        out_nC,
        out_nC.view(torch.int16),
        room.values_p,
        room.order_p,
        whole,
        height,
        width,
        shift,
        below,
        run,
    )
    return Rounded(lowest >= shift, places.numpy(), stored)


@scripted
def _add_rounded(
    base_nC: torch.Tensor,
    left: list[torch.Tensor],
    right: list[torch.Tensor],
    scaling: list[float],
    out_nC: torch.Tensor,
    bits_nC: torch.Tensor,
    values_p: torch.Tensor,
    order_p: torch.Tensor,
    whole: bool,
    height: int,
    width: int,
    shift: int,
    below: int,
    run: int,
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return the lowest place in the order, the flat positions of elements in doubt, and what is stored there."""
    rows, cols = out_nC.size(0), out_nC.size(1)
    least_nr = torch.empty([rows, cols // run], dtype=torch.int16)
    if whole:
        torch.addmm(base_nC, left[0], right[0], alpha=scaling[0], out=out_nC)
    for top in range(0, rows, height):
        bottom = min(rows, top + height)
        for first in range(0, cols, width):
            last = min(cols, first + width)
            count = (bottom - top) * (last - first)
            if not whole:
                values = values_p[:count].view(bottom - top, -1)
                values.copy_(base_nC[top:bottom, first:last])
                for index in range(len(left)):
                    values.addmm_(left[index][top:bottom], right[index][:, first:last], alpha=scaling[index])
                out_nC[top:bottom, first:last].copy_(values)
            least = least_nr[top:bottom, first // run : last // run]
            write_least(bits_nC[top:bottom, first:last], shift, order_p[:count].view(bottom - top, -1), least)
    places = lower_than(below, bits_nC.view(-1), shift, least_nr.view(-1))
    return int(least_nr.min()), places, base_nC.view(-1).index_select(0, places)
