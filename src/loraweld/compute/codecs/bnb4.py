"""bitsandbytes 4 bit: value = codebook[code] · absmax of its block, blocks along the flattened weight.

The higher half of a byte is the earlier code. Double quantisation: absmax = nested codebook[code] · nested absmax +
offset. Source: `dequantize_4bit` of bitsandbytes 0.50.2.
"""

from __future__ import annotations

import math

import torch

from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.reader import Reader
from loraweld.compute.tensors import as_tensor, read_flat, torch_dtype


class Bnb4Decoder:
    """One NF4 or FP4 weight."""

    def __init__(self, source: EncodedTensor, encoding: Bnb4, reader: Reader) -> None:
        self.source = source
        self.encoding = encoding
        self.reader = reader
        self.dtype = torch_dtype(source.dtype)
        self.size = math.prod(source.shape)
        codebook = read_flat(reader, source.need("quant_map"))
        high, low = codebook.repeat_interleave(16), codebook.repeat(16)
        # Two float32 values in one int64: a byte is looked up once.
        self.pairs = torch.stack([high, low], dim=1).contiguous().view(torch.int64).view(-1)

    def rows(self, start: int, stop: int) -> Bnb4Rows:
        return Bnb4Rows(self, start, stop)

    def absmax(self, first: int, last: int) -> torch.Tensor:
        """Return the scales of blocks [first, last) in float32."""
        stored = read_flat(self.reader, self.source.need("absmax"), first, last)
        nested = self.encoding.nested_blocksize
        if not nested:
            return stored
        begin, end = first // nested, -(-last // nested)
        scales = read_flat(self.reader, self.source.need("nested_absmax"), begin, end)
        codebook = read_flat(self.reader, self.source.need("nested_quant_map"))
        of_block = torch.arange(first, last).div_(nested, rounding_mode="floor").sub_(begin)
        return codebook[stored.long()] * scales[of_block] + self.encoding.nested_offset


class Bnb4Rows:
    def __init__(self, decoder: Bnb4Decoder, start: int, stop: int) -> None:
        self._decoder = decoder
        self._cols = decoder.source.cols
        self._blocksize = decoder.encoding.blocksize
        self._first = start * self._cols // self._blocksize
        self._absmax = decoder.absmax(self._first, -(-stop * self._cols // self._blocksize))

    def read(self, top: int, bottom: int) -> torch.Tensor:
        decoder, size = self._decoder, self._blocksize
        start, stop = top * self._cols, bottom * self._cols
        first, last = start // size, -(-stop // size)
        codes = self._codes(first * size // 2, (min(last * size, decoder.size) + 1) // 2)
        values = torch.index_select(decoder.pairs, 0, codes.int()).view(torch.float32)
        if len(values) < (last - first) * size:  # the last block of the weight may be partial
            values = torch.nn.functional.pad(values, (0, (last - first) * size - len(values)))
        absmax = self._absmax[first - self._first : last - self._first]
        values = values.view(-1, size).mul_(absmax[:, None]).view(-1)
        return values[start - first * size : stop - first * size].to(decoder.dtype).view(bottom - top, self._cols)

    def _codes(self, first: int, last: int) -> torch.Tensor:
        data = self._decoder.reader.read(self._decoder.source.codes, first, last - first)
        return as_tensor(data, "U8", (last - first,))
