"""The block scale of least squared error, for codebooks whose values a scale multiplies.

The largest magnitude of a block, as scale, wastes codes on one element. Smaller scales clip it and bring the others
nearer to their codes. A few are tried; then, for the codes of the best, the scale of least squares is taken:
s = Σ w·q / Σ q².

Shape letters: B = blocks, S = elements of a block.
"""

from __future__ import annotations

from typing import Protocol

import torch

_SHARES = (1.0, 0.93, 0.87, 0.81, 0.75)
_REACH = 1.35  # of the table: a little over 1 / the smallest share
_STEPS = 4096
_TINY = 1e-38
_LEAST = 1e-30  # a block of zeros has no scale to divide by, and its inverse times _STEPS must be a float32


class Values(Protocol):
    """A codebook in [-1, 1]."""

    @property
    def values(self) -> torch.Tensor: ...

    def codes(self, scaled: torch.Tensor) -> torch.Tensor: ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor: ...


class ScaleSearch:
    """Finds scales for one codebook; keeps its scratch, since fresh memory costs more than the arithmetic."""

    def __init__(self, codebook: Values) -> None:
        self._codebook = codebook
        # The squared distance to the nearest value, at evenly spaced places from -_REACH to _REACH.
        places = (torch.arange(_STEPS) - _STEPS / 2) * (2 * _REACH / _STEPS)
        self._errors = (places[:, None] - codebook.values[None, :]).abs().amin(1).square_()
        self._scaled = torch.empty(0)
        self._places = torch.empty(0, dtype=torch.int32)

    def scales(self, blocks_BS: torch.Tensor, absmax_B: torch.Tensor) -> torch.Tensor:
        """Return a scale for each block with an error no larger than that of its absmax."""
        if self._scaled.shape != blocks_BS.shape:
            self._scaled = torch.empty(blocks_BS.shape)
            self._places = torch.empty(blocks_BS.shape, dtype=torch.int32)
        shares_B, errors_B = torch.ones_like(absmax_B), torch.full_like(absmax_B, torch.inf)
        for share in _SHARES:
            found_B = self._error(blocks_BS, absmax_B, share)
            shares_B[found_B < errors_B] = share
            errors_B = torch.minimum(errors_B, found_B)
        return self._least_squares(blocks_BS, absmax_B * shares_B)

    def _error(self, blocks_BS: torch.Tensor, absmax_B: torch.Tensor, share: float) -> torch.Tensor:
        """Return the squared error of each block at this share of its absmax, over its absmax squared."""
        factor_B = (_STEPS / 2 / _REACH / share) / absmax_B.clamp(min=_LEAST)
        torch.mul(blocks_BS, factor_B[:, None], out=self._scaled)
        self._places.copy_(self._scaled.add_(_STEPS / 2 + 0.5))
        torch.index_select(self._errors, 0, self._places.view(-1), out=self._scaled.view(-1))
        return self._scaled.sum(1).mul_(share**2)

    def _least_squares(self, blocks_BS: torch.Tensor, scales_B: torch.Tensor) -> torch.Tensor:
        """Return the best scales for the codes that these scales give."""
        torch.mul(blocks_BS, (1.0 / scales_B.clamp(min=_TINY))[:, None], out=self._scaled)
        values_BS = self._codebook.decode(self._codebook.codes(self._scaled))
        fitted_B = torch.mul(values_BS, blocks_BS, out=self._scaled).sum(1)
        squares_B = torch.mul(values_BS, values_BS, out=self._scaled).sum(1)
        return torch.where(squares_B > 0, fitted_B / squares_B, scales_B)
