"""The block scale of least squared error, for codebooks whose values a scale multiplies.

The largest magnitude of a block, as scale, wastes codes on one element. Smaller scales clip it and bring the others
nearer to their codes. A few are tried; then, for the codes of the best, the scale of least squares is taken:
s = Σ w·q / Σ q².

Shape letters: B = blocks, S = elements of a block, P = pairs of shares, H = shares.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch

from loraweld.compute.codecs.bnb4 import in_pieces, piece_blocks

_SHARES = (1.0, 0.93, 0.87, 0.81, 0.75, 0.69)
_STEPS = 2048  # of the table, from 0 to the absmax
_TINY = 1e-38
# Within these absmax no step of the search leaves float32.
_LEAST, _LARGEST = 1e-35, 1e36


class Values(Protocol):
    """A codebook in [-1, 1]."""

    @property
    def values(self) -> torch.Tensor: ...

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """Return the nearest value for each element, flat; valid until the next call."""


class ScaleSearch:
    """Finds scales for one codebook, within one thread."""

    def __init__(self, codebook: Values, blocksize: int) -> None:
        self._codebook = codebook
        self._tables = _error_tables(tuple(codebook.values.tolist()))
        self._blocksize = blocksize
        # Scratch, since fresh memory costs more than the arithmetic.
        shape = piece_blocks(blocksize), blocksize
        self._scaled_BS = torch.empty(shape)
        self._places_BS = torch.empty(shape, dtype=torch.int32)
        self._errors_BS = torch.empty(shape, dtype=torch.complex64)

    def scales(self, blocks_BS: torch.Tensor, absmax_B: torch.Tensor) -> torch.Tensor:
        """Return a scale for each block with an error no larger than that of its absmax.

        Blocks that are not finite, or close to the end of float32, keep their absmax.
        """
        if not float(absmax_B.amax()) < _LARGEST:
            return absmax_B
        scales_B = absmax_B * _best_shares(self._errors_of_shares(blocks_BS, absmax_B))
        fitted_B, squares_B = torch.empty_like(scales_B), torch.empty_like(scales_B)
        inverse_B = 1.0 / scales_B.clamp(min=_TINY)
        for blocks, *of_blocks in in_pieces(self._blocksize, blocks_BS, inverse_B, fitted_B, squares_B):
            self._fit(blocks, *of_blocks)
        return torch.where(squares_B > 0, fitted_B / squares_B, scales_B)

    def _errors_of_shares(self, blocks_BS: torch.Tensor, absmax_B: torch.Tensor) -> torch.Tensor:
        """Return the squared error of each block at each share of its absmax, over its absmax squared."""
        factor_B = absmax_B.clamp(min=_LEAST).reciprocal_().mul_(_STEPS)
        errors_BP = torch.empty(len(absmax_B), len(self._tables), dtype=torch.complex64)
        for blocks, factor, out_BP in in_pieces(self._blocksize, blocks_BS, factor_B, errors_BP):
            places = self._places(blocks, factor)
            errors_BS = self._errors_BS[: len(blocks)]
            for table, out in zip(self._tables, out_BP.unbind(1), strict=True):
                torch.index_select(table, 0, places, out=errors_BS.view(-1))
                torch.sum(errors_BS, 1, out=out)
        return torch.view_as_real(errors_BP).view(len(absmax_B), -1).T

    def _places(self, blocks_BS: torch.Tensor, factor_B: torch.Tensor) -> torch.Tensor:
        """Return the place in the tables of each element."""
        scaled_BS = torch.mul(blocks_BS, factor_B[:, None], out=self._scaled_BS[: len(blocks_BS)])
        return self._places_BS[: len(blocks_BS)].copy_(scaled_BS.add_(_STEPS + 0.5)).view(-1)

    def _fit(
        self, blocks_BS: torch.Tensor, inverse_B: torch.Tensor, fitted_B: torch.Tensor, squares_B: torch.Tensor
    ) -> None:
        """Write Σ w·q and Σ q² of each block."""
        room_BS = self._scaled_BS[: len(blocks_BS)]
        values_BS = self._codebook.nearest(torch.mul(blocks_BS, inverse_B[:, None], out=room_BS)).view(room_BS.shape)
        torch.sum(torch.mul(values_BS, blocks_BS, out=room_BS), 1, out=fitted_B)
        torch.sum(torch.mul(values_BS, values_BS, out=room_BS), 1, out=squares_B)


@cache
def _error_tables(values: tuple[float, ...]) -> list[torch.Tensor]:
    """Return the squared error of numbers from -1 to 1 at two shares each, as one complex number: one look for two."""
    places = torch.arange(-_STEPS, _STEPS + 1) / _STEPS
    errors = [(places[:, None] - share * torch.tensor(values)).abs().amin(1).square_() for share in _SHARES]
    return [torch.complex(one, other) for one, other in zip(errors[::2], errors[1::2], strict=True)]


def _best_shares(errors_HB: torch.Tensor) -> torch.Tensor:
    """Return the share of least error for each block, of equal ones the largest."""
    shares_B, (least_B, *others) = torch.full(errors_HB.shape[1:], _SHARES[0]), errors_HB.unbind()
    for share, error_B in zip(_SHARES[1:], others, strict=True):
        shares_B = torch.where(error_B < least_B, share, shares_B)
        least_B = torch.minimum(error_B, least_B)
    return shares_B
