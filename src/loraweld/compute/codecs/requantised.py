"""A plain weight as a 4-bit model computes with it: each tile is quantised as bitsandbytes does, and decoded again."""

from __future__ import annotations

import copy
import math
import threading

import torch

from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.encoded import RequantisedTensor
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.bnb4_encode import Bnb4Encoder
from loraweld.compute.codecs.plain import PlainDecoder
from loraweld.compute.rounding import check_finite
from loraweld.compute.tiles import TileGrid
from loraweld.errors import NumericsError


class Difference:
    """How far the decoded values are from the plain ones, over all rows that were read."""

    def __init__(self) -> None:
        self.squared_error = 0.0
        self.squared_weight = 0.0
        self._lock = threading.Lock()

    def add(self, decoded_nC: torch.Tensor, plain_nC: torch.Tensor) -> None:
        error, plain = (decoded_nC.float() - plain_nC.float()).view(-1), plain_nC.float().view(-1)
        with self._lock:
            self.squared_error += float(torch.dot(error, error))
            self.squared_weight += float(torch.dot(plain, plain))


class RequantisedDecoder:
    """Serves all threads: the block scales are found once, in a pass over the weight."""

    def __init__(self, source: RequantisedTensor, reader: Reader) -> None:
        assert isinstance(source.encoding, Bnb4)
        self.source = source
        self.plain = PlainDecoder(source.plain, reader)
        self.difference = Difference()
        self.unit_rows = source.encoding.unit_rows(source.shape)
        self.encoder = Bnb4Encoder(source.encoding, source.shape, source.dtype, searches=False)
        rows = self.plain.rows(0, source.rows)
        for top, bottom in TileGrid(source.rows, source.cols, self.unit_rows).tiles(0, source.rows):
            self.encoder.observe(top, rows.read(top, bottom).float())
        self.encoder.settle()

    def rows(self, start: int, stop: int) -> RequantisedRows:
        return RequantisedRows(self)


class RequantisedRows:
    def __init__(self, decoder: RequantisedDecoder) -> None:
        self._decoder = decoder
        self._plain = decoder.plain.rows(0, decoder.source.rows)
        self._encoder = copy.deepcopy(decoder.encoder)  # it keeps what it encoded last: one for each thread

    def read(self, top: int, bottom: int) -> torch.Tensor:
        decoder, unit = self._decoder, self._decoder.unit_rows
        first, last = top // unit * unit, min(decoder.source.rows, math.ceil(bottom / unit) * unit)
        plain_nC = self._plain.read(first, last)
        try:
            check_finite(plain_nC)
        except NumericsError as problem:
            raise NumericsError(f"tensor {decoder.source.name!r}, rows {first} to {last - 1}: {problem}") from None
        self._encoder.encode(first, plain_nC.float())
        decoded_nC = self._encoder.decoded()
        decoder.difference.add(decoded_nC, plain_nC)
        return decoded_nC[top - first : bottom - first]
