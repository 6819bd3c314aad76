"""The fixed grid of row tiles in which a tensor is computed.

A tile is always computed as a whole, whatever part of it is wanted: the matrix products then have the same
shapes for any block size and number of threads, and with them the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraweld.planning.memory import tile_height


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Tiles of a matrix with `num_rows` rows and `num_cols` columns, each from a multiple of `unit_rows` on."""

    num_rows: int
    num_cols: int
    unit_rows: int = 1

    @property
    def height(self) -> int:
        return tile_height(self.num_cols, self.unit_rows)

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (first row, row after the last) of each tile that overlaps rows [start, stop)."""
        height, count = self.height, self._count
        for index in range(min(start // height, count - 1), count):
            top = index * height
            if top >= stop:
                return
            yield top, self.num_rows if index == count - 1 else top + height

    @property
    def _count(self) -> int:
        """A last tile of one row joins the tile before it: BLAS treats a single row differently."""
        whole, rest = divmod(self.num_rows, self.height)
        return max(1, whole + (rest > 1))
