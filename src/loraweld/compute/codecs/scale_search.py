"""The block scale of least squared error, for codebooks whose values a scale multiplies.

The largest magnitude of a block, as scale, wastes codes on one element. Smaller scales clip it and bring the others
nearer to their codes. A few are tried; then, for the codes of the best, the scale of least squares is taken:
s = Σ w·q / Σ q².

Shape letters: B = blocks, S = elements of a block, H = shares.
"""

from __future__ import annotations

from typing import Protocol

import torch

from loraweld.compute.codecs.bnb4 import in_pieces, piece_blocks

_SHARES = (1.0, 0.93, 0.87, 0.81, 0.75)
_REACH = 1.35  # of the table: a little over 1 / the smallest share
_STEPS = 4096
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
        # The squared distance to the nearest value, at evenly spaced places from -_REACH to _REACH.
        places = (torch.arange(_STEPS) - _STEPS / 2) * (2 * _REACH / _STEPS)
        self._errors = (places[:, None] - codebook.values[None, :]).abs().amin(1).square_()
        # At a share, the places from 0 to an absmax; the square of the share.
        self._places_H1 = torch.tensor([_STEPS / 2 / _REACH / share for share in _SHARES])[:, None]
        self._squares_H1 = torch.tensor([share**2 for share in _SHARES])[:, None]
        self._blocksize = blocksize
        # Scratch, since fresh memory costs more than the arithmetic.
        self._scaled_BS = torch.empty(piece_blocks(blocksize), blocksize)
        self._places_BS = torch.empty(piece_blocks(blocksize), blocksize, dtype=torch.int32)

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
        factors_HB = absmax_B.clamp(min=_LEAST).reciprocal_() * self._places_H1
        errors_HB = torch.empty(factors_HB.shape)
        pieces = in_pieces(self._blocksize, blocks_BS, factors_HB.T, errors_HB.T)
        for blocks, factors_BH, errors_BH in pieces:
            for factor_B, error_B in zip(factors_BH.unbind(1), errors_BH.unbind(1), strict=True):
                self._error(blocks, factor_B, error_B)
        return errors_HB.mul_(self._squares_H1)

    def _error(self, blocks_BS: torch.Tensor, factor_B: torch.Tensor, out_B: torch.Tensor) -> None:
        """Write the squared error of each block, in which so many places are 1."""
        scaled_BS, places_BS = self._scaled_BS[: len(blocks_BS)], self._places_BS[: len(blocks_BS)]
        torch.mul(blocks_BS, factor_B[:, None], out=scaled_BS)
        places_BS.copy_(scaled_BS.add_(_STEPS / 2 + 0.5))
        torch.index_select(self._errors, 0, places_BS.view(-1), out=scaled_BS.view(-1))
        torch.sum(scaled_BS, 1, out=out_B)

    def _fit(
        self, blocks_BS: torch.Tensor, inverse_B: torch.Tensor, fitted_B: torch.Tensor, squares_B: torch.Tensor
    ) -> None:
        """Write Σ w·q and Σ q² of each block."""
        room_BS = self._scaled_BS[: len(blocks_BS)]
        values_BS = self._codebook.nearest(torch.mul(blocks_BS, inverse_B[:, None], out=room_BS)).view(room_BS.shape)
        torch.sum(torch.mul(values_BS, blocks_BS, out=room_BS), 1, out=fitted_B)
        torch.sum(torch.mul(values_BS, values_BS, out=room_BS), 1, out=squares_B)


def _best_shares(errors_HB: torch.Tensor) -> torch.Tensor:
    """Return the share of least error for each block, of equal ones the largest."""
    shares_B, (least_B, *others) = torch.full(errors_HB.shape[1:], _SHARES[0]), errors_HB.unbind()
    for share, error_B in zip(_SHARES[1:], others, strict=True):
        shares_B = torch.where(error_B < least_B, share, shares_B)
        least_B = torch.minimum(error_B, least_B)
    return shares_B
