"""bitsandbytes 4 bit: value = codebook[code] · absmax of its block, blocks along the flattened weight.

The higher half of a byte is the earlier code. Double quantisation: absmax = nested codebook[code] · nested absmax +
offset. Source: `dequantize_4bit` of bitsandbytes 0.50.2.

Shape letters: B = blocks, S = elements of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.reader import Reader
from loraweld.compute.tensors import read_flat, torch_dtype

_PIECE_ELEMENTS = 1 << 16
_DEVICE_PIECE_ELEMENTS = 1 << 20  # a tile at once: an accelerator waits for calls, not for its memory


def piece_blocks(blocksize: int, device: torch.device) -> int:
    """Return the blocks of a piece: its temporaries stay near the core, and the cost of calls does not show."""
    return max(1, (_PIECE_ELEMENTS if device.type == "cpu" else _DEVICE_PIECE_ELEMENTS) // blocksize)


def in_pieces(blocksize: int, *of_blocks: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same piece of each tensor; all have one row a block, on one device."""
    count = piece_blocks(blocksize, of_blocks[0].device)
    return zip(*(torch.split(tensor, count) for tensor in of_blocks), strict=True)


def pair_table(codebook: torch.Tensor) -> torch.Tensor:
    """Return the two float32 values of each byte of codes as one int64: a byte is looked up once."""
    high, low = codebook.repeat_interleave(16), codebook.repeat(16)
    return torch.stack([high, low], dim=1).contiguous().view(torch.int64).view(-1)


class BlockDecoder:
    """Codes in memory → values, within one thread; keeps its scratch: fresh memory costs more than the arithmetic.

    Everything lies on the device of the codebook.
    """

    def __init__(self, codebook: torch.Tensor, blocksize: int) -> None:
        self._pairs = pair_table(codebook)
        blocks = piece_blocks(blocksize, codebook.device)
        self._places = torch.empty(blocks * blocksize // 2, dtype=torch.int32, device=codebook.device)
        self._values = torch.empty(blocks * blocksize // 2, dtype=torch.int64, device=codebook.device)
        self._values_BS = self._values.view(torch.float32).view(blocks, blocksize)

    def decode(self, codes: torch.Tensor, absmax_B: torch.Tensor, out: torch.Tensor) -> None:
        """Write the values of whole blocks to `out`, rounded to its dtype."""
        out_BS = out.view(len(absmax_B), -1)
        blocks, half = self._values_BS.shape[0], len(self._values)
        pieces = torch.split(codes, half), torch.split(absmax_B[:, None], blocks), torch.split(out_BS, blocks)
        for some, scales_B1, made_BS in zip(*pieces, strict=True):
            places, values, values_BS = self._places, self._values, self._values_BS
            if len(some) < half:
                places, values, values_BS = places[: len(some)], values[: len(some)], values_BS[: len(made_BS)]
            torch.index_select(self._pairs, 0, places.copy_(some), out=values)
            torch.mul(values_BS, scales_B1, out=made_BS)


class Bnb4Decoder:
    """One NF4 or FP4 weight."""

    def __init__(self, source: EncodedTensor, encoding: Bnb4, reader: Reader) -> None:
        self.source = source
        self.encoding = encoding
        self.reader = reader
        self.dtype = torch_dtype(source.dtype)
        self.size = math.prod(source.shape)
        self.codebook = read_flat(reader, source.need("quant_map"))

    def rows(self, start: int, stop: int) -> Bnb4Rows:
        return Bnb4Rows(self, start, stop)

    def absmax(self, first: int, last: int) -> torch.Tensor:
        """Return the scales of blocks [first, last) in float32."""
        nested = self.encoding.nested_blocksize
        stored = self.source.need("absmax")
        if not nested:
            return read_flat(self.reader, stored, first, last)
        begin, end = first // nested, -(-last // nested)
        codes = read_flat(self.reader, stored, begin * nested, last)
        scales = read_flat(self.reader, self.source.need("nested_absmax"), begin, end)
        codebook = read_flat(self.reader, self.source.need("nested_quant_map"))
        values = torch.empty((end - begin) * nested)
        torch.index_select(codebook, 0, codes.int(), out=values[: len(codes)])
        values.view(-1, nested).mul_(scales[:, None])
        return values[first - begin * nested : len(codes)].add_(self.encoding.nested_offset)


class Bnb4Rows:
    """Decodes into one buffer again and again."""

    def __init__(self, decoder: Bnb4Decoder, start: int, stop: int) -> None:
        self._decoder = decoder
        self._cols = decoder.source.cols
        self._blocksize = decoder.encoding.blocksize
        self._first = start * self._cols // self._blocksize
        self._absmax_B = decoder.absmax(self._first, -(-stop * self._cols // self._blocksize))
        self._blocks = BlockDecoder(decoder.codebook, self._blocksize)
        self._codes = torch.empty(0, dtype=torch.uint8)
        self._values = torch.empty(0, dtype=decoder.dtype)

    def read(self, top: int, bottom: int) -> torch.Tensor:
        size = self._blocksize
        start, stop = top * self._cols, bottom * self._cols
        first, last = start // size, -(-stop // size)
        codes = self._load(first, last)
        if self._values.numel() < 2 * len(codes):
            self._values = torch.empty(2 * len(codes), dtype=self._decoder.dtype)
        values = self._values[: 2 * len(codes)]
        self._blocks.decode(codes, self._absmax_B[first - self._first : last - self._first], values)
        return values[start - first * size : stop - first * size].view(bottom - top, self._cols)

    def _load(self, first: int, last: int) -> torch.Tensor:
        """Read the codes of whole blocks; the last block of the weight may be partial, its rest is anything."""
        decoder, start = self._decoder, first * self._blocksize // 2
        room = (last - first) * self._blocksize // 2
        if len(self._codes) < room:
            self._codes = torch.zeros(room, dtype=torch.uint8)
        codes, stored = self._codes[:room], decoder.source.codes
        count = min(room, (decoder.size + 1) // 2 - start)
        decoder.reader.read_into(stored.path, stored.offset + start, codes.numpy().data[:count])
        return codes
