"""The block scale of least squared error, for codebooks whose values a scale multiplies.

The largest magnitude of a block, as scale, wastes codes on one element. Smaller scales clip it and bring the others
nearer to their codes. For the codes q that a scale gives to the weights w of a block, the best scale is that of least
squares, s = Σ w·q / Σ q², and it leaves the error Σ w² - (Σ w·q)² / Σ q². A few shares of the largest magnitude are
tried, and of their codes those are taken whose best scale leaves the least.

Shape letters: B = blocks, S = elements of a block, H = shares.
"""

from __future__ import annotations

from functools import cache

import torch

from loraweld.compute.codecs.bnb4 import piece_blocks
from loraweld.compute.scripted import scripted

_SHARES = (1.0, 0.93, 0.87)
_STEPS = 2048  # of the tables, from 0 to the absmax
# Within these absmax no step of the search leaves float32.
_LEAST, _LARGEST = 1e-35, 1e36


class ScaleSearch:
    """Finds scales for one codebook with values in [-1, 1], within one thread and on the codebook's device."""

    def __init__(self, codebook: torch.Tensor, blocksize: int) -> None:
        self._tables = [table.to(codebook.device) for table in _tables(tuple(codebook.cpu().tolist()))]
        self._blocksize = blocksize

    def scales(self, blocks_BS: torch.Tensor, absmax_B: torch.Tensor) -> torch.Tensor:
        """Return a scale for each block with an error no larger than that of its absmax.

        Blocks that are not finite, or close to the end of float32, keep their absmax.
        """
        if not float(absmax_B.amax()) < _LARGEST:
            return absmax_B
        factor_B, gain_B = torch.ones_like(absmax_B), torch.zeros_like(absmax_B)
        for products_B, squares_B in ((sums_B.real, sums_B.imag) for sums_B in self._sums(blocks_BS, absmax_B)):
            fit_B = products_B / squares_B
            # Not a number in a block of zeros: no share is better than 1 there.
            gain = products_B.mul_(fit_B)
            factor_B = torch.where(gain > gain_B, fit_B, factor_B)
            gain_B = torch.fmax(gain, gain_B)
        return factor_B.mul_(absmax_B)

    def _sums(self, blocks_BS: torch.Tensor, absmax_B: torch.Tensor) -> torch.Tensor:
        """Return Σ w·q over the absmax, and Σ q², of each block for the codes at each share, as complex numbers."""
        factor_B1 = absmax_B.clamp(min=_LEAST).reciprocal_().mul_(_STEPS)[:, None]
        sums_HB = torch.empty(len(_SHARES), len(absmax_B), dtype=torch.complex64, device=absmax_B.device)
        _sum_up(blocks_BS, factor_B1, self._tables, sums_HB, piece_blocks(self._blocksize, blocks_BS.device))
        return sums_HB


@scripted
def _sum_up(
    blocks_BS: torch.Tensor,
    factor_B1: torch.Tensor,
    tables: list[torch.Tensor],
    sums_HB: torch.Tensor,
    piece: int,
) -> None:
    """Write the sums over each block of what each table has at the places of its elements."""
    count, size = blocks_BS.shape
    scaled_BS = torch.empty([piece, size], device=blocks_BS.device)
    places_BS = torch.empty([piece, size], dtype=torch.int32, device=blocks_BS.device)
    terms_BS = torch.empty([piece, size], dtype=torch.complex64, device=blocks_BS.device)
    middle = float(tables[0].size(0) // 2)
    for start in range(0, count, piece):
        stop = min(count, start + piece)
        scaled, places, terms = scaled_BS[: stop - start], places_BS[: stop - start], terms_BS[: stop - start]
        torch.mul(blocks_BS[start:stop], factor_B1[start:stop], out=scaled)
        places.copy_(scaled.add_(middle + 0.5))
        for share, table in enumerate(tables):
            torch.index_select(table, 0, places.view(-1), out=terms.view(-1))
            sums_HB[share, start:stop] = terms.sum(1)


@cache
def _tables(values: tuple[float, ...]) -> list[torch.Tensor]:
    """Return w·q and q² for weights w from -1 to 1, a table for each share, as complex numbers: one look for both."""
    codebook, weights = torch.tensor(values), torch.arange(-_STEPS, _STEPS + 1) / _STEPS
    nearest = [codebook[(weights[:, None] / share - codebook).abs().argmin(1)] for share in _SHARES]
    return [torch.complex(weights * q, q * q) for q in nearest]
