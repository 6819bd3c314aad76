"""Into 8-bit codes with a scale for each block: LLM.int8, int8 and FP8.

A scale is the least that lets the largest value of its block be stored; where scales are given (a grid), they stay
unless a value outgrows them by more than half a step.

Shape letters: n = rows at hand, C = columns, R = block rows, r = those at hand, K = blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.scaled import MAX_UNIT_ROWS, Scaled
from loraweld.checkpoint.reader import Reader
from loraweld.compute.tensors import read_flat, torch_dtype


@dataclass(frozen=True, slots=True)
class _Range:
    """The least and the largest code, and half a step beyond them."""

    lowest: float
    highest: float
    half_step: float


_RANGES = {
    "F8_E4M3": _Range(-448, 448, 16),
    "F8_E5M2": _Range(-57344, 57344, 4096),
    "I8": _Range(-128, 127, 0.5),
}
_LEAST_ROOM = 1e-6  # in codes, beside a zero at the end of the range


class ScaledEncoder:
    """value = (code - zero) · scale / levels; LLM.int8 stores 127 times the scale."""

    def __init__(
        self, encoding: Scaled, shape: tuple[int, ...], dtype: str, grid: EncodedTensor | None, reader: Reader
    ) -> None:
        rows, cols = shape
        self.observes = encoding.block[0] > MAX_UNIT_ROWS
        self._block = encoding.block
        self._cols = cols
        self._dtype = torch_dtype(dtype)
        self._code_dtype = torch_dtype(encoding.code_dtypes[0])
        self._range = _RANGES[encoding.code_dtypes[0]]
        self._levels = float(round(1 / encoding.factor))
        self._factor = encoding.factor
        self._scale_dtype = torch_dtype(encoding.scale_dtypes[0])
        self._scale_RK = torch.zeros(-(-rows // encoding.block[0]), -(-cols // encoding.block[1]))
        self._zero_RK = torch.zeros_like(self._scale_RK)
        self._parts = {"format": torch.zeros(1, dtype=torch.uint8)}
        if grid is not None:
            self._take_grid(grid, reader)
        self._last = torch.empty(0), 0

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        high_rK, low_rK = self._extremes(values_nC)
        here = slice(top // self._block[0], top // self._block[0] + len(high_rK))
        scale_rK, zero_rK, span = self._scale_RK[here], self._zero_RK[here], self._range
        above, below = (span.highest - zero_rK).clamp(min=_LEAST_ROOM), (zero_rK - span.lowest).clamp(min=_LEAST_ROOM)
        unit_rK = scale_rK / self._levels
        outgrown = (high_rK > (above + span.half_step) * unit_rK) | (-low_rK > (below + span.half_step) * unit_rK)
        least_rK = torch.maximum(high_rK / (above / self._levels), -low_rK / (below / self._levels))
        scale_rK.copy_(torch.where(outgrown, self._rounded(torch.maximum(least_rK, scale_rK)), scale_rK))

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        if not self.observes:
            self.observe(top, values_nC)
        inverse_RK = torch.where(self._scale_RK > 0, self._levels / self._scale_RK, 0.0)
        scaled_nC = values_nC * self._spread(inverse_RK, top, len(values_nC))
        if "zero" in self._parts:
            scaled_nC.add_(self._spread(self._zero_RK, top, len(values_nC)))
        if self._code_dtype == torch.int8:
            scaled_nC.round_()
        codes_nC = scaled_nC.clamp_(self._range.lowest, self._range.highest).to(self._code_dtype)
        self._last = codes_nC, top
        return codes_nC

    def decoded(self) -> torch.Tensor:
        codes_nC, top = self._last
        values_nC = codes_nC.float().sub_(self._spread(self._zero_RK, top, len(codes_nC)))
        values_nC.mul_(self._spread(self._scale_RK, top, len(codes_nC)))
        return (values_nC if self._factor == 1 else values_nC.mul_(self._factor)).to(self._dtype)

    def parts(self) -> Mapping[str, torch.Tensor]:
        return self._parts | {"scale": self._scale_RK.to(self._scale_dtype)}

    def _take_grid(self, grid: EncodedTensor, reader: Reader) -> None:
        scale, zero = grid.need("scale"), grid.part("zero")
        self._scale_dtype = torch_dtype(scale.dtype)
        self._scale_RK = read_flat(reader, scale).float().view(self._scale_RK.shape)
        if zero is not None:
            self._parts["zero"] = read_flat(reader, zero)
            self._zero_RK = self._parts["zero"].float().view(self._scale_RK.shape)

    def _extremes(self, values_nC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest and the least value of each block (0 counts), (r, K)."""
        rows, cols = self._block
        rows = min(rows, len(values_nC))
        missing = -len(values_nC) % rows, -self._cols % cols
        if any(missing):
            values_nC = torch.nn.functional.pad(values_nC, (0, missing[1], 0, missing[0]))
        blocks = values_nC.view(len(values_nC) // rows, rows, -1, cols)
        if "zero" in self._parts:
            return blocks.amax((1, 3)).clamp_(min=0), blocks.amin((1, 3)).clamp_(max=0)
        largest_rK = blocks.abs().amax((1, 3))
        # Symmetric: the same room on both sides, though int8 has one code more below.
        return largest_rK, torch.zeros_like(largest_rK)

    def _rounded(self, scale_rK: torch.Tensor) -> torch.Tensor:
        """A new scale as it can be stored; powers of two upwards."""
        if self._scale_dtype == torch.float8_e8m0fnu:
            return torch.exp2(torch.ceil(torch.log2(scale_rK)))
        return scale_rK.to(self._scale_dtype).float()

    def _spread(self, of_blocks_RK: torch.Tensor, top: int, count: int) -> torch.Tensor:
        """Return a value of each block for the elements of some rows, (n, C), or (n, 1) where a row is one block."""
        of_rows = of_blocks_RK[torch.arange(top, top + count) // self._block[0]]
        return of_rows if of_rows.shape[1] == 1 else of_rows.repeat_interleave(self._block[1], dim=1)[:, : self._cols]
