"""Integers of a few bits packed into int32 words: value = (code - zero) · scale of its group.

Shape letters: O = outputs, n = those at hand, I = inputs, G = groups, W = words.
"""

from __future__ import annotations

import torch

from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.grouped import Awq, Gptq, Packed
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.codecs.plain import PlainRows
from loraweld.compute.tensors import read_block, read_flat, read_vector, torch_dtype
from loraweld.errors import CheckpointError

WORD_BITS = 32
_AWQ_SHIFTS = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` codes of the bit streams along the last axis of int32 `words`, lowest bits first."""
    if WORD_BITS % bits == 0:
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
        return (words.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).flatten(-2)[..., :count]
    # A code may cross the border of two words; but eight codes are `bits` bytes: they are halved three times over.
    num_eights = -(-count // 8)
    stream = torch.nn.functional.pad(words, (0, 2)).view(torch.uint8)[..., : num_eights * bits]
    eights = stream.reshape(*words.shape[:-1], num_eights, bits)
    codes = torch.nn.functional.pad(eights, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    for level, dtype in ((2, torch.int32), (1, torch.int16), (0, torch.uint8)):
        width = bits << level
        codes = torch.stack([codes & ((1 << width) - 1), codes >> width], dim=-1).flatten(-2).to(dtype)
    return codes[..., :count].int()


def _group_of(source: EncodedTensor, reader: Reader, inputs: int, group: int, num_groups: int) -> torch.Tensor:
    """The group of each input, (I,)."""
    named = source.part("group_of")
    if named is None:
        return torch.arange(inputs) // group
    groups = read_flat(reader, named).long()
    if len(groups) and not (0 <= int(groups.min()) and int(groups.max()) < num_groups):
        raise CheckpointError(
            f"tensor {named.name!r} names groups {int(groups.min())} to {int(groups.max())}, there are {num_groups}",
            path=named.path,
        )
    return groups


def pick(of_groups_nG: torch.Tensor, group_of: torch.Tensor) -> torch.Tensor:
    """Return a value of each group for all of its inputs, (n, I)."""
    return of_groups_nG.index_select(1, group_of)  # several times as fast as indexing


class PackedDecoder:
    """compressed-tensors `pack-quantized`."""

    def __init__(self, source: EncodedTensor, encoding: Packed, reader: Reader) -> None:
        self.source = source
        self.encoding = encoding
        self.reader = reader
        self.dtype = torch_dtype(source.dtype)
        rows, cols = source.shape
        groups = cols // encoding.group
        # One scale for the whole weight is seen as one for each row.
        self.scale_OG = read_vector(reader, source.need("scale")).view(-1, groups).expand(rows, groups)
        zero = source.part("zero")
        self.zero_OG = None if zero is None else self._zeros(zero, groups).expand(rows, groups)
        self.group_of = _group_of(source, reader, cols, encoding.group, groups)

    def _zeros(self, zero: StoredTensor, groups: int) -> torch.Tensor:
        stored = read_flat(self.reader, zero).view(-1, groups)
        if not self.encoding.zero_packed:
            return stored.float() + (1 << (self.encoding.bits - 1))
        return unpack(stored.T.contiguous(), self.encoding.bits, self.source.rows).T.float()

    def rows(self, start: int, stop: int) -> PackedRows:
        return PackedRows(self)


class PackedRows:
    def __init__(self, decoder: PackedDecoder) -> None:
        self._decoder = decoder
        self._words = PlainRows(decoder.source.codes, decoder.reader)

    def codes(self, top: int, bottom: int) -> torch.Tensor:
        """Return the codes of rows [top, bottom), (n, I)."""
        return unpack(self._words.read(top, bottom), self._decoder.encoding.bits, self._decoder.source.cols)

    def read(self, top: int, bottom: int) -> torch.Tensor:
        decoder = self._decoder
        values_nI = self.codes(top, bottom).float()
        if decoder.zero_OG is None:
            values_nI.sub_(1 << (decoder.encoding.bits - 1))
        else:
            values_nI.sub_(pick(decoder.zero_OG[top:bottom], decoder.group_of))
        return values_nI.mul_(pick(decoder.scale_OG[top:bottom], decoder.group_of)).to(decoder.dtype)


class GptqDecoder:
    """GPTQ: codes packed down the inputs of the transposed weight."""

    def __init__(self, source: EncodedTensor, encoding: Gptq, reader: Reader) -> None:
        outputs, inputs = source.shape
        scale, zero = source.need("scale"), source.need("zero")
        self.source = source
        self.reader = reader
        self.bits = encoding.bits
        self.group_of = _group_of(source, reader, inputs, encoding.group, scale.rows)
        self.scale_OG = read_vector(reader, scale).view(scale.shape).T
        words = read_flat(reader, zero).view(zero.shape)
        if encoding.carries:
            words = words + encoding.zero_offset * sum(1 << place for place in range(0, WORD_BITS, encoding.bits))
        zeros = unpack(words, encoding.bits, outputs).add_(0 if encoding.carries else encoding.zero_offset)
        self.zero_OG = zeros.bitwise_and_((1 << encoding.bits) - 1).float().T

    def rows(self, start: int, stop: int) -> TransposedRows:
        codes = self.source.codes
        words_WO = read_block(self.reader, codes, (0, codes.rows), (start, stop))
        return TransposedRows(self, words_WO, start)

    def unpack(self, words_WO: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return the codes (n, I) of outputs [first, last) of some words."""
        return unpack(words_WO[:, first:last].T.contiguous(), self.bits, self.source.cols)


class AwqDecoder:
    """AWQ: eight codes of neighbouring outputs in a word, in an order of their own."""

    def __init__(self, source: EncodedTensor, encoding: Awq, reader: Reader) -> None:
        scale, zero = source.need("scale"), source.need("zero")
        self.source = source
        self.reader = reader
        self.group_of = _group_of(source, reader, source.cols, encoding.group, scale.rows)
        self.scale_OG = read_vector(reader, scale).view(scale.shape).T
        self.zero_OG = _unpack_awq(read_flat(reader, zero).view(zero.shape)).float().T

    def rows(self, start: int, stop: int) -> TransposedRows:
        codes, first = self.source.codes, start // 8
        words_IW = read_block(self.reader, codes, (0, codes.rows), (first, -(-stop // 8)))
        return TransposedRows(self, words_IW, first * 8)

    def unpack(self, words_IW: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return the codes (n, I) of outputs [first, last) of some words."""
        start = first // 8
        codes_In = _unpack_awq(words_IW[:, start : -(-last // 8)])
        return codes_In[:, first - start * 8 : last - start * 8].T.contiguous()


def _unpack_awq(words: torch.Tensor) -> torch.Tensor:
    return (words.unsqueeze(-1) >> _AWQ_SHIFTS).bitwise_and_(0xF).flatten(-2)


class TransposedRows:
    """Outputs of a weight whose stored form has the outputs side by side; `words` are those from `start` on."""

    def __init__(self, decoder: GptqDecoder | AwqDecoder, words: torch.Tensor, start: int) -> None:
        self._decoder = decoder
        self._words = words
        self._start = start
        self._dtype = torch_dtype(decoder.source.dtype)

    def codes(self, top: int, bottom: int) -> torch.Tensor:
        """Return the codes of outputs [top, bottom), (n, I)."""
        return self._decoder.unpack(self._words, top - self._start, bottom - self._start)

    def read(self, top: int, bottom: int) -> torch.Tensor:
        decoder = self._decoder
        values_nI = self.codes(top, bottom).float()
        values_nI.sub_(pick(decoder.zero_OG[top:bottom], decoder.group_of))
        return values_nI.mul_(pick(decoder.scale_OG[top:bottom], decoder.group_of)).to(self._dtype)
