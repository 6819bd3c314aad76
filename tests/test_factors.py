"""The left factor of a delta, of which a thread holds two stretches of rows."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraweld.compute.factors import Left
from loraweld.compute.tiles import TileGrid
from loraweld.planning.memory import BUFFER_BYTES, stretch_rows

RANK = 3


class Loader:
    """A left factor, and the ranges of its rows that were asked for."""

    def __init__(self, num_rows: int) -> None:
        self.rows_NR = torch.arange(num_rows * RANK, dtype=torch.float32).view(num_rows, RANK)
        self.loaded: list[range] = []

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        assert 0 <= start < stop <= len(self.rows_NR)
        self.loaded.append(range(start, stop))
        return self.rows_NR[start:stop]


@given(st.data())
def test_any_rows_are_those_of_the_factor(data: st.DataObject) -> None:
    """Tiles and picked rows, wherever they lie."""
    num_rows = data.draw(st.integers(1, 60))
    load = Loader(num_rows)
    left = Left(load, num_rows, data.draw(st.integers(1, 20)))
    row = st.integers(0, num_rows - 1)
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            top = data.draw(row)
            count = data.draw(st.integers(1, num_rows - top))
            assert torch.equal(left.rows(top, count), load.rows_NR[top : top + count])
        else:
            picked = np.array(sorted(data.draw(st.lists(row, min_size=1, max_size=30))))
            assert np.array_equal(left.pick(picked), load.rows_NR.numpy()[picked])


@given(
    num_cols=st.sampled_from([64, 576, 1024, 4096, 5120, 14336, 1 << 21, 1 << 23]),
    tiles=st.integers(1, 40),
    offset=st.integers(0, BUFFER_BYTES - 1),
    cut=st.booleans(),
)
def test_a_merge_loads_every_row_once(num_cols: int, tiles: int, offset: int, cut: bool) -> None:
    """Tile after tile, with repairs of the tiles that begin in a buffer at its end."""
    height, row_bytes = TileGrid(1 << 40, num_cols).height, 2 * num_cols
    num_rows = tiles * height + (height // 2 if cut else 0)
    load = Loader(num_rows)
    left = Left(load, num_rows, stretch_rows(num_cols))
    pending: list[int] = []
    for top, bottom in TileGrid(num_rows, num_cols).tiles(0, num_rows):
        if pending and (offset + pending[0] * row_bytes) // BUFFER_BYTES < (offset + top * row_bytes) // BUFFER_BYTES:
            left.pick(np.array(pending))
            pending = []
        left.rows(top, bottom - top)
        pending += [top, bottom - 1]
    left.pick(np.array(pending))
    borders = [0, *(loaded.stop for loaded in load.loaded)]
    assert [loaded.start for loaded in load.loaded] == borders[:-1], "a row was loaded twice, or never"
    assert borders[-1] == num_rows
    assert max(map(len, load.loaded)) <= stretch_rows(num_cols) + 1
