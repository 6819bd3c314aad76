"""Into bitsandbytes 4 bit: NF4 or FP4, block by block of the flattened weight.

`absmax` scales make the bytes of `bitsandbytes.functional.quantize_4bit` 0.50.2; searched ones minimise the squared
error of each block. With double quantisation the scales are known before the first code.

Shape letters: B = blocks, S = elements of a block.
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
from loraweld.compute.codecs.scale_search import ScaleSearch
from loraweld.compute.tensors import torch_dtype

_TINY = 1e-38  # bitsandbytes divides by no less
_PLACES = 65535
# A piece whose temporaries stay near the core.
_PIECE_ELEMENTS = 1 << 16


class Codebook:
    """16 values and the borders between neighbours."""

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = torch.tensor(values) + 0.0  # FP4's -0 is stored as 0
        self._order = torch.argsort(self.values)
        ordered = self.values[self._order]
        self._borders = ((ordered[:-1] + ordered[1:]) / 2).numpy()
        self._is_ordered = bool((self._order == torch.arange(16)).all())

    def codes(self, scaled: torch.Tensor) -> torch.Tensor:
        """Return the number of the nearest value for each element of [-1, 1], the lower one of two, as bytes.

        A count of the borders below: 15 comparisons in vector registers are many times faster than a search.
        """
        count = np.zeros(scaled.shape, dtype=np.uint8)
        above = np.empty(scaled.shape, dtype=np.bool_)
        values, ones = scaled.numpy(), above.view(np.uint8)
        for border in self._borders:
            np.greater(values, border, out=above)
            np.add(count, ones, out=count)
        codes = torch.from_numpy(count)
        return codes if self._is_ordered else self._order.to(torch.uint8)[codes.int()]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of codes, in float32."""
        return torch.index_select(self.values, 0, codes.view(-1).int()).view(codes.shape)


class Bnb4Encoder:
    """One NF4 or FP4 weight."""

    def __init__(self, encoding: Bnb4, shape: tuple[int, ...], dtype: str, *, searches: bool) -> None:
        self.observes = encoding.nested_blocksize > 0
        self._encoding = encoding
        self._shape = shape
        self._dtype = torch_dtype(dtype)
        self._codebook = Codebook(CODEBOOKS[encoding.quant_type])
        self._search = ScaleSearch(self._codebook) if searches else None
        self._count = math.prod(shape)
        self._absmax_B = torch.zeros(-(-self._count // encoding.blocksize))
        self._nested: Nested | None = None
        self._last: tuple[torch.Tensor, torch.Tensor, int] | None = None

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        for first, blocks_BS in self._pieces(top, values_nC):
            self._absmax_B[first : first + len(blocks_BS)] = self._scales(first, blocks_BS)

    def settle(self) -> None:
        """Fix the scales, once all rows have been observed."""
        if self.observes and self._nested is None:
            self._nested = Nested(self._absmax_B)

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        self.settle()
        codes = []
        for first, blocks_BS in self._pieces(top, values_nC):
            last = first + len(blocks_BS)
            if not self.observes:
                self._absmax_B[first:last] = self._scales(first, blocks_BS)
            codes.append(self._codebook.codes(self._scaled(first, blocks_BS)))
        codes_BS = torch.cat(codes)
        self._last = codes_BS, values_nC, self._first_block(top)
        return _packed(codes_BS.view(-1)[: values_nC.numel()], self._codebook.codes(torch.zeros(1)))

    def decoded(self) -> torch.Tensor:
        assert self._last is not None
        codes_BS, values_nC, first = self._last
        scales_B = self._stored_scales()[first : first + len(codes_BS)]
        values = self._codebook.decode(codes_BS).mul_(scales_B[:, None]).view(-1)
        return values[: values_nC.numel()].view(values_nC.shape).to(self._dtype)

    def parts(self) -> Mapping[str, torch.Tensor]:
        parts = {"quant_map": self._codebook.values, "state": self._state()}
        if self._nested is None:
            return parts | {"absmax": self._absmax_B}
        return parts | {
            "absmax": self._nested.codes_B,
            "nested_absmax": self._nested.absmax,
            "nested_quant_map": self._nested.codebook,
        }

    def _pieces(self, top: int, values_nC: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Return (number of its first block, blocks) of a tile; the last block of a weight is filled up with zeros."""
        size, flat = self._encoding.blocksize, values_nC.view(-1)
        whole = len(flat) // size * size
        first, step = self._first_block(top), max(1, _PIECE_ELEMENTS // size)
        blocks_BS = flat[:whole].view(-1, size)
        pieces = [(first + start, blocks_BS[start : start + step]) for start in range(0, len(blocks_BS), step)]
        if whole < len(flat):
            padded = torch.nn.functional.pad(flat[whole:], (0, size - len(flat) + whole))
            pieces.append((first + len(blocks_BS), padded[None]))
        return pieces

    def _first_block(self, top: int) -> int:
        return (
            top
            * (self._count // self._shape[0] if len(self._shape) == 1 else self._shape[-1])
            // (self._encoding.blocksize)
        )

    def _is_cut(self, first: int) -> bool:
        """Whether this is the weight's last block and not full: bitsandbytes treats it a little differently."""
        return (first + 1) * self._encoding.blocksize > self._count

    def _scales(self, first: int, blocks_BS: torch.Tensor) -> torch.Tensor:
        absmax_B = blocks_BS.abs().amax(1)
        if self._is_cut(first):
            absmax_B.clamp_(min=_TINY)
        return absmax_B if self._search is None else self._search.scales(blocks_BS, absmax_B)

    def _scaled(self, first: int, blocks_BS: torch.Tensor) -> torch.Tensor:
        """Blocks over their scales: searched ones as they will be read, absmax as bitsandbytes takes it."""
        scales_B = (self._absmax_B if self._search is None else self._stored_scales())[first : first + len(blocks_BS)]
        if self._is_cut(first):
            return blocks_BS / scales_B[:, None]
        return blocks_BS * (1.0 / scales_B.clamp(min=_TINY))[:, None]

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


def _packed(codes: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the earlier in the higher half; an odd one is followed by the code of zero."""
    if len(codes) % 2:
        codes = torch.cat([codes, zero])
    pairs: npt.NDArray[np.uint16] = codes.numpy().view("<u2")
    return torch.from_numpy(((pairs << 4) | (pairs >> 8)).astype(np.uint8))


class Nested:
    """Double quantisation: block scales less their mean, in blocks of 256, as 8-bit codes of a dynamic codebook.

    Source: `quantize_blockwise` of bitsandbytes 0.50.2; Dettmers 2016, arXiv:1511.04561.
    """

    def __init__(self, absmax_B: torch.Tensor) -> None:
        offset = absmax_B.mean()
        self.offset = float(offset)
        self.codebook = dynamic_codebook()
        rest = len(absmax_B) % NESTED_BLOCKSIZE
        padding = NESTED_BLOCKSIZE - rest if rest else 0
        blocks = torch.nn.functional.pad(absmax_B - offset, (0, padding)).view(-1, NESTED_BLOCKSIZE)
        self.absmax = blocks.abs().amax(1)
        scaled = blocks * (1.0 / self.absmax.clamp(min=_TINY))[:, None]
        codes = _nearest(scaled.view(-1)).masked_fill_((self.absmax == 0).repeat_interleave(NESTED_BLOCKSIZE), 0)
        self.codes_B = codes[: len(absmax_B)].to(torch.uint8)
        values = self.codebook[codes].view(-1, NESTED_BLOCKSIZE) * self.absmax[:, None]
        self.decoded_B = values.view(-1)[: len(absmax_B)] + offset


def _nearest(scaled: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the nearest values of the dynamic codebook for elements of [-1, 1].

    As near as bitsandbytes finds them: by way of 65536 evenly spaced places.
    """
    places = ((scaled + 1) * (_PLACES / 2) + 0.5).to(torch.int32).clamp_(0, _PLACES)
    return torch.index_select(_codes_of_places(), 0, places)


@cache
def _codes_of_places() -> torch.Tensor:
    codebook = dynamic_codebook()
    places = (torch.arange(_PLACES + 1).double() / (_PLACES / 2) - 1).float()
    right = torch.searchsorted(codebook, places).clamp_(1, len(codebook) - 1)
    is_right = (codebook[right] - places).abs() < (places - codebook[right - 1]).abs()
    return torch.where(is_right, right, right - 1)


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
