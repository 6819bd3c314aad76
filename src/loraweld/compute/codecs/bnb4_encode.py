"""Into bitsandbytes 4 bit: NF4 or FP4, block by block of the flattened weight.

`absmax` scales make the bytes of `bitsandbytes.functional.quantize_4bit` 0.50.2; searched ones minimise the squared
error of each block, and are known before the first code where they are quantised themselves.

Shape letters: B = blocks, S = elements of a block; K = blocks of block scales, N = scales in one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from loraweld.checkpoint.encodings.bnb4 import CODEBOOKS, NESTED_BLOCKSIZE, Bnb4
from loraweld.compute.codecs.bnb4 import BlockDecoder, in_pieces, piece_blocks
from loraweld.compute.codecs.scale_search import ScaleSearch
from loraweld.compute.device import HOST
from loraweld.compute.scripted import scripted
from loraweld.compute.tensors import torch_dtype

_TINY = 1e-38  # bitsandbytes divides by no less
_PLACES = 65535
_IN_DOUBT = 128
_ROUNDING = 1e-6  # of a place computed in float32


class Codebook:
    """16 values and the borders between neighbours.

    On the CPU a code is looked up by one of 65,536 places between -1 and 1, and the few elements whose place a border
    runs through are compared with the borders themselves; elsewhere all are.
    """

    def __init__(self, values: tuple[float, ...], device: torch.device) -> None:
        on_host = torch.tensor(values) + 0.0  # FP4's -0 is stored as 0
        self.values = on_host.to(device)
        order = torch.argsort(on_host)
        ordered = on_host[order]
        self._borders = ((ordered[:-1] + ordered[1:]) / 2).numpy()
        self._ranks_of_places = _ranks_of_places(self._borders)
        is_ordered = bool((order == torch.arange(16)).all())
        codes_of_ranks = (order.repeat_interleave(16) << 4) + order.repeat(16)
        self._codes_of_ranks = None if is_ordered else codes_of_ranks.to(device, torch.uint8)

    def pack(self, blocks_BS: torch.Tensor, inverse_B: torch.Tensor, out: torch.Tensor, *, clips: bool) -> None:
        """Write the codes of the values nearest to blocks times inverse scales, two a byte, the earlier one higher.

        `clips`: some lie outside [-1, 1], and take the outermost value.
        """
        is_here = blocks_BS.is_cpu
        ranks = self._ranks(blocks_BS, inverse_B, clips) if is_here else self._device_ranks(blocks_BS, inverse_B)
        if self._codes_of_ranks is None:
            out.copy_(ranks)
        else:
            torch.index_select(self._codes_of_ranks, 0, ranks.int(), out=out)

    def _ranks(self, blocks_BS: torch.Tensor, inverse_B: torch.Tensor, clips: bool) -> torch.Tensor:
        """Return the ranks of the nearest values, the lower one of two, packed, as int16."""
        ranks_BS = torch.empty(blocks_BS.shape, dtype=torch.uint8)
        piece = piece_blocks(blocks_BS.shape[1], blocks_BS.device)
        _look_up(blocks_BS, inverse_B[:, None], self._ranks_of_places, ranks_BS, piece, clips)
        ranks = ranks_BS.view(-1).numpy()
        in_doubt = _in_doubt(ranks)
        scaled = blocks_BS.view(-1).numpy()[in_doubt] * inverse_B.numpy()[in_doubt // blocks_BS.shape[1]]
        ranks[in_doubt] = np.searchsorted(self._borders, scaled)
        pairs = ranks.view("<u2")
        # The earlier rank is the lower byte: 0x0L0E · 0x1001 = 0xELxx.
        np.multiply(pairs, 0x1001, out=pairs)
        np.right_shift(pairs, 8, out=pairs)
        return torch.from_numpy(pairs.view("<i2"))

    def _device_ranks(self, blocks_BS: torch.Tensor, inverse_B: torch.Tensor) -> torch.Tensor:
        """Return the same ranks as `_ranks`, as int32."""
        borders = torch.from_numpy(self._borders).to(blocks_BS.device)
        pairs = torch.bucketize(blocks_BS * inverse_B[:, None], borders, out_int32=True).view(-1, 2)
        return pairs[:, 0] << 4 | pairs[:, 1]


def _in_doubt(ranks: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Return the positions of ranks that the table does not know; eight at a time, since there are few."""
    words = np.flatnonzero((ranks.view(np.uint64) & (_IN_DOUBT * 0x0101010101010101)) != 0)
    near = (words[:, None] * 8 + np.arange(8)).ravel()
    found: npt.NDArray[np.intp] = near[ranks[near] >= _IN_DOUBT]
    return found


@scripted
def _look_up(
    blocks_BS: torch.Tensor,
    inverse_B1: torch.Tensor,
    table: torch.Tensor,
    out_BS: torch.Tensor,
    piece: int,
    clips: bool,
) -> None:
    """Write what the table, whose places go from -1 to 1, has for each element times the inverse of its scale.

    `clips`: some may lie outside.
    """
    count, size = blocks_BS.shape
    room_BS = torch.empty([piece, size])
    places_BS = torch.empty([piece, size], dtype=torch.int32)
    last = float(table.size(0) - 1)
    half = torch.tensor(last / 2 + 0.5)
    for start in range(0, count, piece):
        stop = min(count, start + piece)
        room, places = room_BS[: stop - start], places_BS[: stop - start]
        torch.mul(blocks_BS[start:stop], inverse_B1[start:stop], out=room)
        torch.add(half, room, alpha=last / 2, out=room)
        if clips:
            room.clamp_(0.0, last)
        places.copy_(room)
        torch.index_select(table, 0, places.view(-1), out=out_BS[start:stop].view(-1))


@scripted
def _write_absmax(blocks_BS: torch.Tensor, out_B: torch.Tensor, piece: int) -> None:
    """Write the largest magnitude of each block."""
    for start in range(0, blocks_BS.size(0), piece):
        blocks = blocks_BS[start : start + piece]
        out_B[start : start + piece] = torch.maximum(blocks.amax(1), blocks.amin(1).neg_()).abs_()  # no -0


def _ranks_of_places(borders: npt.NDArray[np.float32]) -> torch.Tensor:
    """Return the number of borders below each place, or _IN_DOUBT where one may run through it."""
    edges = (np.arange(_PLACES + 2) - 0.5) / (_PLACES / 2) - 1
    below = np.searchsorted(borders, edges[:-1] - _ROUNDING)
    above = np.searchsorted(borders, edges[1:] + _ROUNDING)
    return torch.from_numpy(np.where(below == above, below, _IN_DOUBT).astype(np.uint8))


class Bnb4Encoder:
    """One NF4 or FP4 weight, on one device.

    `decodes`: what the codes decode to is asked for while encoding, so block scales that are quantised themselves must
    be known first; searched ones must be anyway, since their codes are made for them.
    """

    def __init__(
        self,
        encoding: Bnb4,
        shape: tuple[int, ...],
        dtype: str,
        *,
        searches: bool,
        decodes: bool = True,
        device: torch.device = HOST,
    ) -> None:
        self.observes = encoding.nested_blocksize > 0 and (searches or decodes)
        self._encoding = encoding
        self._shape = shape
        self._dtype = torch_dtype(dtype)
        self._codebook = Codebook(CODEBOOKS[encoding.quant_type], device)
        self._search = ScaleSearch(self._codebook.values, encoding.blocksize) if searches else None
        self._count = math.prod(shape)
        self._absmax_B = torch.zeros(-(-self._count // encoding.blocksize), device=device)
        self._nested: Nested | None = None
        self._decoder = BlockDecoder(self._codebook.values, encoding.blocksize)
        self._last = torch.empty(0), torch.empty(0), 0

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        for first, blocks_BS in self._blocks(top, values_nC):
            self._set_scales(first, blocks_BS)

    def settle(self) -> None:
        """Fix the scales, once all rows have been seen."""
        if self._encoding.nested_blocksize and self._nested is None:
            self._nested = Nested(self._absmax_B)

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        if self.observes:
            self.settle()
        blocks = self._blocks(top, values_nC)
        count = sum(blocks_BS.numel() for _, blocks_BS in blocks) // 2
        codes = torch.empty(count, dtype=torch.uint8, device=values_nC.device)
        start = 0
        for first, blocks_BS in blocks:
            if not self.observes:
                self._set_scales(first, blocks_BS)
            stop = start + blocks_BS.numel() // 2
            self._pack(first, blocks_BS, codes[start:stop])
            start = stop
        self._last = codes, values_nC, self._first_block(top)
        # An odd last code shares its byte with the code of a zero: the last block is filled up with them.
        return codes[: (values_nC.numel() + 1) // 2]

    def decoded(self) -> torch.Tensor:
        codes, values_nC, first = self._last
        size = self._encoding.blocksize
        scales_B = self._stored_scales()[first : first + 2 * len(codes) // size]
        values = torch.empty(2 * len(codes), dtype=self._dtype, device=codes.device)
        self._decoder.decode(codes, scales_B, values)
        return values[: values_nC.numel()].view(values_nC.shape)

    def parts(self) -> Mapping[str, torch.Tensor]:
        self.settle()
        parts = {"quant_map": self._codebook.values, "state": self._state()}
        if self._nested is None:
            return parts | {"absmax": self._absmax_B}
        return parts | {
            "absmax": self._nested.codes_B,
            "nested_absmax": self._nested.absmax,
            "nested_quant_map": self._nested.codebook,
        }

    def _blocks(self, top: int, values_nC: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Return the blocks of a tile, with the number of the first; a cut one by itself, filled up with zeros."""
        size, flat, first = self._encoding.blocksize, values_nC.view(-1), self._first_block(top)
        whole = len(flat) // size * size
        blocks = [(first, flat[:whole].view(-1, size))] if whole else []
        if whole < len(flat):
            padded = torch.nn.functional.pad(flat[whole:], (0, size - len(flat) + whole))
            blocks.append((first + whole // size, padded[None]))
        return blocks

    def _first_block(self, top: int) -> int:
        return (
            top
            * (self._count // self._shape[0] if len(self._shape) == 1 else self._shape[-1])
            // (self._encoding.blocksize)
        )

    def _is_cut(self, first: int) -> bool:
        """Whether this is the weight's last block and not full: bitsandbytes treats it a little differently."""
        return (first + 1) * self._encoding.blocksize > self._count

    def _set_scales(self, first: int, blocks_BS: torch.Tensor) -> None:
        absmax_B = self._absmax_B[first : first + len(blocks_BS)]
        _write_absmax(blocks_BS, absmax_B, piece_blocks(self._encoding.blocksize, blocks_BS.device))
        if self._is_cut(first):
            absmax_B.clamp_(min=_TINY)
        if self._search is not None:
            absmax_B.copy_(self._search.scales(blocks_BS, absmax_B))

    def _pack(self, first: int, blocks_BS: torch.Tensor, out: torch.Tensor) -> None:
        """Write the codes of blocks over their scales: searched ones as they will be read, else as bitsandbytes."""
        scales_B = (self._absmax_B if self._search is None else self._stored_scales())[first : first + len(blocks_BS)]
        if self._is_cut(first):
            self._codebook.pack(blocks_BS / scales_B[:, None], torch.ones_like(scales_B), out, clips=True)
            return
        self._codebook.pack(blocks_BS, 1.0 / scales_B.clamp(min=_TINY), out, clips=self._search is not None)

    def _stored_scales(self) -> torch.Tensor:
        return self._absmax_B if self._nested is None else self._nested.decoded_B

    def _state(self) -> torch.Tensor:
        """The JSON beside the codes, with blanks up to the length that was planned."""
        state: dict[str, object] = {
            "quant_type": self._encoding.quant_type,
            "blocksize": self._encoding.blocksize,
            "dtype": str(self._dtype).removeprefix("torch."),
            "shape": list(self._shape),
        }
        if self._nested is not None:
            state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
            state |= {"nested_offset": self._nested.offset}
        text = json.dumps(state).encode().ljust(self._encoding.state_bytes)
        assert len(text) == self._encoding.state_bytes, f"{len(text)} bytes of state"
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Nested:
    """Double quantisation: block scales less their mean, in blocks of 256, as 8-bit codes of a dynamic codebook.

    Source: `quantize_blockwise` of bitsandbytes 0.50.2; Dettmers 2016, arXiv:1511.04561.
    """

    def __init__(self, absmax_B: torch.Tensor) -> None:
        offset, count, device = absmax_B.mean(), len(absmax_B), absmax_B.device
        self.offset = float(offset)
        self.codebook = dynamic_codebook().to(device)
        self._codes_of_places = _codes_of_places().to(device)
        blocks = torch.nn.functional.pad(absmax_B - offset, (0, -count % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
        codes = torch.empty(blocks.shape, dtype=torch.uint8, device=device)
        self.absmax = torch.empty(len(blocks), device=device)
        for piece in in_pieces(NESTED_BLOCKSIZE, blocks, self.absmax, codes):
            self._encode(*piece)
        self.codes_B = codes.view(-1)[:count]
        self.decoded_B = blocks.view(-1)[:count].add_(offset)

    def _encode(self, blocks_KN: torch.Tensor, absmax_K: torch.Tensor, codes_KN: torch.Tensor) -> None:
        """Write the scales and codes of some blocks, and over the blocks what they decode to."""
        torch.amax(blocks_KN.abs(), 1, out=absmax_K)
        places = _nearest_places(blocks_KN * (1.0 / absmax_K.clamp(min=_TINY))[:, None])
        torch.index_select(self._codes_of_places, 0, places.view(-1), out=codes_KN.view(-1))
        codes_KN.masked_fill_((absmax_K == 0)[:, None], 0)
        torch.index_select(self.codebook, 0, codes_KN.view(-1).int(), out=blocks_KN.view(-1))
        blocks_KN.mul_(absmax_K[:, None])


def _nearest_places(scaled: torch.Tensor) -> torch.Tensor:
    """Return places in the table of codes for elements of [-1, 1].

    bitsandbytes, too, finds the nearest values of the dynamic codebook by way of 65536 evenly spaced places.
    """
    return (scaled + 1).mul_(_PLACES / 2).add_(0.5).to(torch.int32).clamp_(0, _PLACES)


@cache
def _codes_of_places() -> torch.Tensor:
    codebook = dynamic_codebook()
    places = (torch.arange(_PLACES + 1).double() / (_PLACES / 2) - 1).float()
    right = torch.searchsorted(codebook, places).clamp_(1, len(codebook) - 1)
    is_right = (codebook[right] - places).abs() < (places - codebook[right - 1]).abs()
    return torch.where(is_right, right, right - 1).to(torch.uint8)


@cache
def dynamic_codebook() -> torch.Tensor:
    """Return the 256 values of signed dynamic 8-bit floats, in order.

    Seven decades; in decade e from 10**-6 up to 10**0 are 2**e evenly spaced fractions between 0.1 and 1, of both
    signs; and 0 and 1. Source: `create_dynamic_map` of bitsandbytes 0.50.2; arXiv:1511.04561, section 2.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        borders = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * (borders[:-1] + borders[1:]) / 2
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))
