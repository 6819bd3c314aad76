"""Weights stored as the numbers they are."""

from __future__ import annotations

import torch

from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.tensors import as_tensor, item_size, torch_dtype


class PlainDecoder:
    """A tensor of floats."""

    def __init__(self, source: StoredTensor, reader: Reader) -> None:
        self._source = source
        self._reader = reader

    def rows(self, start: int, stop: int) -> PlainRows:
        return PlainRows(self._source, self._reader)


class PlainRows:
    """Reads into one buffer again and again, so that the bytes are near the core when they are used."""

    def __init__(self, source: StoredTensor, reader: Reader) -> None:
        self._source = source
        self._reader = reader
        self._row_bytes = source.cols * item_size(source.dtype)
        self._buffer = bytearray()
        self._rows_nC = torch.empty((0, source.cols), dtype=torch_dtype(source.dtype))

    def read(self, top: int, bottom: int) -> torch.Tensor:
        source, count = self._source, (bottom - top) * self._row_bytes
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        data = memoryview(self._buffer)[:count]
        if bottom - top != self._rows_nC.shape[0]:
            self._rows_nC = as_tensor(data, source.dtype, (bottom - top, source.cols))
        self._reader.read_into(source.path, source.offset + top * self._row_bytes, data)
        return self._rows_nC
