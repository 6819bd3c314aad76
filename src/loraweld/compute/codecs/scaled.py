"""8-bit codes, each times the scale of its block."""

from __future__ import annotations

import torch

from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.scaled import Scaled
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.codecs.plain import PlainRows
from loraweld.compute.tensors import read_vector, torch_dtype


class ScaledDecoder:
    """value = (code - zero) · scale · factor, in float32, rounded once to the decoded dtype."""

    def __init__(self, source: EncodedTensor, encoding: Scaled, reader: Reader) -> None:
        self.source = source
        self.reader = reader
        self.factor = encoding.factor
        self.dtype = torch_dtype(source.dtype)
        self.block = encoding.block
        self.scale_RC = self._of_blocks(source.need("scale"))
        zero = source.part("zero")
        self.zero_RC = None if zero is None else self._of_blocks(zero)

    def rows(self, start: int, stop: int) -> ScaledRows:
        return ScaledRows(self)

    def _of_blocks(self, stored: StoredTensor) -> torch.Tensor:
        return read_vector(self.reader, stored).view(-(-self.source.rows // self.block[0]), -1)


class ScaledRows:
    def __init__(self, decoder: ScaledDecoder) -> None:
        self._decoder = decoder
        self._codes = PlainRows(decoder.source.codes, decoder.reader)

    def read(self, top: int, bottom: int) -> torch.Tensor:
        decoder = self._decoder
        values_nC = self._codes.read(top, bottom).float()
        of_row = torch.arange(top, bottom) // decoder.block[0]
        if decoder.zero_RC is not None:
            values_nC.sub_(self._spread(decoder.zero_RC[of_row]))
        values_nC.mul_(self._spread(decoder.scale_RC[of_row]))
        if decoder.factor != 1:
            values_nC.mul_(decoder.factor)
        return values_nC.to(decoder.dtype)

    def _spread(self, of_blocks_nK: torch.Tensor) -> torch.Tensor:
        """Repeat what a block shares over its columns, if there is more than one block in a row."""
        if of_blocks_nK.shape[1] == 1:
            return of_blocks_nK
        return of_blocks_nK.repeat_interleave(self._decoder.block[1], dim=1)[:, : self._decoder.source.cols]
