"""Rows plus low-rank deltas, rounded to bfloat16: what nearly every merge does to nearly every row, in one go.

A tile is done in pieces that stay near the core, from its numbers in float32 to the search for elements in doubt, and
in one function without the interpreter's lock: threads that take it for each operation wait for each other.

Shape letters: n = rows of a tile, C = columns, R = rank, p = rows of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraweld.compute.magnitudes import Ints, lower_than, order_of, run_length, write_least
from loraweld.compute.scripted import scripted

PIECE_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class Term:
    """The delta scaling · L·R of a tile's rows, and a bound of the absolute error that float32 leaves in it."""

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
        self.values_pC = torch.empty((0, 0))
        self.order_pC = torch.empty((0, 0), dtype=torch.int16)

    def of(self, rows: int, cols: int) -> PieceRoom:
        """Return it with room for this many rows."""
        held_rows, held_cols = self.values_pC.shape
        if cols != held_cols or rows > held_rows:
            self.values_pC = torch.empty((rows, cols))
            self.order_pC = torch.empty((rows, cols), dtype=torch.int16)
        return self


def add_rounded(base_nC: torch.Tensor, terms: Sequence[Term], out_nC: torch.Tensor, room: PieceRoom) -> Rounded:
    """Write stored rows (n, C), of any float dtype, plus `terms` to `out_nC` (n, C) in bfloat16, rounded once.

    To nearest even, from sums in float32. There is at least one element. One is in doubt if its step may be smaller
    than the error of the terms. Nothing is raised: what is not finite is written too, and said.
    """
    rows, cols = out_nC.shape
    shift, below = order_of(out_nC.dtype, sum(term.error for term in terms))
    pieces = -(-rows * cols // PIECE_ELEMENTS)
    height = -(-rows // pieces)
    room = room.of(height, cols)
    lowest, places, stored = _add_rounded(
        base_nC,
        [term.left_nR for term in terms],
        [term.right_RC for term in terms],
        [term.scaling for term in terms],
        out_nC,
        out_nC.view(torch.int16),
        room.values_pC,
        room.order_pC,
        height,
        shift,
        below,
        run_length(cols),
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
    values_pC: torch.Tensor,
    order_pC: torch.Tensor,
    height: int,
    shift: int,
    below: int,
    run: int,
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return the lowest place in the order, the flat positions of elements in doubt, and what is stored there."""
    rows, cols = out_nC.size(0), out_nC.size(1)
    least_r = torch.empty([rows * cols // run], dtype=torch.int16)
    for top in range(0, rows, height):
        bottom = min(rows, top + height)
        values = values_pC[: bottom - top]
        values.copy_(base_nC[top:bottom])
        for index in range(len(left)):
            values.addmm_(left[index][top:bottom], right[index], alpha=scaling[index])
        out_nC[top:bottom].copy_(values)
        least = least_r[top * cols // run : bottom * cols // run]
        write_least(bits_nC[top:bottom].view(-1), shift, order_pC[: bottom - top].view(-1), least)
    places = lower_than(below, bits_nC.view(-1), shift, least_r)
    return int(least_r.min()), places, base_nC.view(-1).index_select(0, places)
