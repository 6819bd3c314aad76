"""Rows of a stored weight as numbers, whatever its encoding: the one door to a base's values."""

from __future__ import annotations

from typing import Protocol

import torch

from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.encoded import RequantisedTensor, Source
from loraweld.checkpoint.encodings.grouped import Awq, Gptq, Packed
from loraweld.checkpoint.encodings.microscaled import MxFp4, NvFp4
from loraweld.checkpoint.encodings.scaled import Scaled
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.codecs.bnb4 import Bnb4Decoder
from loraweld.compute.codecs.grouped import AwqDecoder, GptqDecoder, PackedDecoder
from loraweld.compute.codecs.microscaled import MxFp4Decoder, NvFp4Decoder
from loraweld.compute.codecs.plain import PlainDecoder
from loraweld.compute.codecs.requantised import RequantisedDecoder
from loraweld.compute.codecs.scaled import ScaledDecoder


class Rows(Protocol):
    """Some rows of a weight, for one thread."""

    def read(self, top: int, bottom: int) -> torch.Tensor:
        """Return rows [top, bottom) of the matrix view in the weight's decoded dtype, valid until the next call."""


class Decoder(Protocol):
    """One stored weight; serves all threads."""

    def rows(self, start: int, stop: int) -> Rows:
        """Load what reading within rows [start, stop) needs."""


def open_decoder(source: Source, reader: Reader) -> Decoder:
    """Return the decoder of a weight; it reads what all rows share (codebooks, scales of the whole)."""
    if isinstance(source, StoredTensor):
        return PlainDecoder(source, reader)
    if isinstance(source, RequantisedTensor):
        return RequantisedDecoder(source, reader)
    match source.encoding:
        case Bnb4() as encoding:
            return Bnb4Decoder(source, encoding, reader)
        case Scaled() as encoding:
            return ScaledDecoder(source, encoding, reader)
        case Packed() as encoding:
            return PackedDecoder(source, encoding, reader)
        case Gptq() as encoding:
            return GptqDecoder(source, encoding, reader)
        case Awq() as encoding:
            return AwqDecoder(source, encoding, reader)
        case MxFp4():
            return MxFp4Decoder(source, reader)
        case NvFp4() as encoding:
            return NvFp4Decoder(source, encoding, reader)
        case _:
            raise AssertionError(f"no decoder for {source.encoding.kind}")
