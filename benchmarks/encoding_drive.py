"""Encoding a weight in memory as `loraweld/compute/encoding.py` does it: float32 tiles in order, twice if need be."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loraweld.checkpoint.encodings.encoded import Encoding
from loraweld.compute.codecs.encoder import Encoder
from loraweld.compute.tiles import TileGrid


class TileFeeder:
    """Gives an encoder the tiles of a 16-bit weight, from one buffer."""

    def __init__(self, weight: torch.Tensor, encoding: Encoding) -> None:
        """Prepare the buffer."""
        self._rows = weight.view(-1, weight.shape[-1])
        self._grid = TileGrid(*self._rows.shape, encoding.unit_rows(tuple(weight.shape)))
        self._buffer = torch.empty((self._grid.height + 1) * self._rows.shape[1])

    def encode(self, encoder: Encoder) -> None:
        """Encode the whole weight and drop what comes out."""
        if encoder.observes:
            for top, tile in self._tiles():
                encoder.observe(top, tile)
        for top, tile in self._tiles():
            encoder.encode(top, tile)
        encoder.parts()

    def _tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        for top, bottom in self._grid.tiles(0, len(self._rows)):
            tile = self._buffer[: (bottom - top) * self._rows.shape[1]].view(bottom - top, -1)
            yield top, tile.copy_(self._rows[top:bottom])
