"""8-bit codes, each times the scale of its block."""

from __future__ import annotations

import torch

from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.scaled import Scaled
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.plain import PlainRows
from loraweld.compute.tensors import read_vector, torch_dtype


class ScaledDecoder:
    """value = code · scale · factor, in float32, rounded once to the decoded dtype."""

    def __init__(self, source: EncodedTensor, encoding: Scaled, reader: Reader) -> None:
        self.source = source
        self.reader = reader
        self.factor = encoding.factor
        self.dtype = torch_dtype(source.dtype)
        self.block = encoding.block
        self.scale_RC = read_vector(reader, source.need("scale")).view(-(-source.rows // encoding.block[0]), -1)

    def rows(self, start: int, stop: int) -> ScaledRows:
        return ScaledRows(self)


class ScaledRows:
    def __init__(self, decoder: ScaledDecoder) -> None:
        self._decoder = decoder
        self._codes = PlainRows(decoder.source.codes, decoder.reader)

    def read(self, top: int, bottom: int) -> torch.Tensor:
        decoder = self._decoder
        values_nC = self._codes.read(top, bottom).float()
        block_rows, block_cols = decoder.block
        of_row = torch.arange(top, bottom) // block_rows
        scale_nK = decoder.scale_RC[of_row]
        if scale_nK.shape[1] > 1:
            scale_nK = scale_nK.repeat_interleave(block_cols, dim=1)[:, : values_nC.shape[1]]
        values_nC.mul_(scale_nK)
        if decoder.factor != 1:
            values_nC.mul_(decoder.factor)
        return values_nC.to(decoder.dtype)
