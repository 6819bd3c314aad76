"""Into 8-bit codes with a scale for each block: LLM.int8, int8 and FP8.

A scale is the least that lets the largest value of its block be stored; where the base's are kept, they stay unless a
value outgrows them by more than half a step. Codes are the nearest, ties to even, as all of their quantisers round.

Shape letters: n = rows at hand, C = columns, R = block rows, r = those at hand, K = blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.scaled import Scaled
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.grouped_encode import divisor, fitted_with_zeros, reach
from loraweld.compute.codecs.plain import PlainRows
from loraweld.compute.device import HOST
from loraweld.compute.tensors import read_vector, torch_dtype


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


class ScaledEncoder:
    """value = (code - zero) · scale / levels; LLM.int8 stores 127 times the scale. All of it lies on one device."""

    def __init__(
        self,
        encoding: Scaled,
        shape: tuple[int, ...],
        dtype: str,
        form: EncodedTensor | None,
        reader: Reader,
        *,
        keeps: bool,
        device: torch.device = HOST,
    ) -> None:
        rows, cols = shape
        self.observes = encoding.is_of_all_rows(shape)
        self._block = encoding.block
        self._cols = cols
        self._dtype = torch_dtype(dtype)
        self._code_dtype = torch_dtype(encoding.code_dtypes[0])
        self._range = _RANGES[encoding.code_dtypes[0]]
        self._levels = float(round(1 / encoding.factor))
        self._factor = encoding.factor
        self._scale_dtype = torch_dtype(encoding.scale_dtypes[0])
        self._scale_RK = torch.zeros(-(-rows // encoding.block[0]), -(-cols // encoding.block[1]), device=device)
        self._zero_RK = torch.zeros_like(self._scale_RK)
        self._high_RK, self._low_RK = torch.zeros_like(self._scale_RK), torch.zeros_like(self._scale_RK)
        self._has_zeros = False
        self._stored: PlainRows | None = None
        if form is not None:
            self._take_form(form, reader, keeps=keeps)
        self._last = torch.empty(0), 0

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        high_rK, low_rK = self._extremes(values_nC)
        here = self._blocks_of(top, len(values_nC))
        self._high_RK[here] = torch.maximum(self._high_RK[here], high_rK)
        self._low_RK[here] = torch.minimum(self._low_RK[here], low_rK)

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        if not self.observes:
            self.observe(top, values_nC)
        self._fit(self._blocks_of(top, len(values_nC)))
        scaled_nC = self._scaled(top, values_nC)
        if self._has_zeros:
            scaled_nC.add_(self._spread(self._zero_RK, top, len(values_nC)))
        if self._code_dtype == torch.int8:
            scaled_nC.round_()
        codes_nC = scaled_nC.clamp_(self._range.lowest, self._range.highest).to(self._code_dtype)
        if self._stored is not None:
            stored_nC = self._stored.read(top, top + len(values_nC)).to(codes_nC.device)
            codes_nC = self._as_in_base(stored_nC, top, values_nC, codes_nC)
        self._last = codes_nC, top
        return codes_nC

    def decoded(self) -> torch.Tensor:
        return self._decoded(*self._last)

    def _blocks_of(self, top: int, count: int) -> slice:
        return slice(top // self._block[0], -(-(top + count) // self._block[0]))

    def _fit(self, here: slice) -> None:
        """Give new scales to blocks whose values lie more than half a step beyond what their scales can say."""
        high_rK, low_rK, scale_rK, zero_rK = (
            values_RK[here] for values_RK in (self._high_RK, self._low_RK, self._scale_RK, self._zero_RK)
        )
        above, below, step = self._range.highest - zero_rK, zero_rK - self._range.lowest, self._range.half_step
        unit_rK = scale_rK / self._levels
        outgrown = high_rK > reach(above, step, self._dtype) * unit_rK
        outgrown |= -low_rK > reach(below, step, self._dtype) * unit_rK
        if self._has_zeros:
            new_rK, new_zero_rK = fitted_with_zeros(high_rK, low_rK, 128, self._scale_dtype, least_zero=-128)
            zero_rK.copy_(torch.where(outgrown, new_zero_rK, zero_rK))
        else:
            # The same room on both sides, though int8 has one code more below.
            new_rK = self._rounded(torch.maximum(high_rK, -low_rK) / (self._range.highest / self._levels))
        scale_rK.copy_(torch.where(outgrown, new_rK, scale_rK))

    def _scaled(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        """Values over their scales; bitsandbytes multiplies by the inverse, compressed-tensors divides."""
        if self._factor == 1:
            return values_nC / self._spread(divisor(self._scale_RK), top, len(values_nC))
        inverse_RK = torch.where(self._scale_RK > 0, self._levels / self._scale_RK, 0.0)
        return values_nC * self._spread(inverse_RK, top, len(values_nC))

    def _as_in_base(
        self, stored_nC: torch.Tensor, top: int, values_nC: torch.Tensor, codes_nC: torch.Tensor
    ) -> torch.Tensor:
        """Take the base's own code where it decodes to the very value."""
        return torch.where(self._decoded(stored_nC, top) == values_nC, stored_nC, codes_nC)

    def _decoded(self, codes_nC: torch.Tensor, top: int) -> torch.Tensor:
        values_nC = codes_nC.float().sub_(self._spread(self._zero_RK, top, len(codes_nC)))
        values_nC.mul_(self._spread(self._scale_RK, top, len(codes_nC)))
        return (values_nC if self._factor == 1 else values_nC.mul_(self._factor)).to(self._dtype)

    def parts(self) -> Mapping[str, torch.Tensor]:
        return {
            "scale": self._scale_RK.to(self._scale_dtype),
            "zero": self._zero_RK.to(torch.int8),
            "format": torch.zeros(1, dtype=torch.uint8),
        }

    def _take_form(self, form: EncodedTensor, reader: Reader, *, keeps: bool) -> None:
        """Take over the dtype of scales and whether there are zeros, and, if it `keeps` them, both as they are."""
        scale, zero = form.need("scale"), form.part("zero")
        self._scale_dtype = torch_dtype(scale.dtype)
        shape, device = self._scale_RK.shape, self._scale_RK.device
        stored_zero_RK = self._zero_RK if zero is None else read_vector(reader, zero).view(shape).to(device)
        # Runtimes do not look at the zeros of symmetric weights.
        self._has_zeros = bool(stored_zero_RK.any())
        if keeps:
            self._scale_RK, self._zero_RK = read_vector(reader, scale).view(shape).to(device), stored_zero_RK
        if keeps and self._has_zeros and self._dtype == torch.bfloat16:
            # If there are more codes on one side of a zero than bfloat16 has numbers, several decode to the same bits.
            self._stored = PlainRows(form.codes, reader)

    def _extremes(self, values_nC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest and the least value of each block, 0 counted, (r, K)."""
        rows, cols = self._block
        rows = min(rows, len(values_nC))
        missing = -len(values_nC) % rows, -self._cols % cols
        if any(missing):
            values_nC = torch.nn.functional.pad(values_nC, (0, missing[1], 0, missing[0]))
        blocks = values_nC.view(len(values_nC) // rows, rows, -1, cols)
        return blocks.amax((1, 3)).clamp_(min=0), blocks.amin((1, 3)).clamp_(max=0)

    def _rounded(self, scale_rK: torch.Tensor) -> torch.Tensor:
        """A new scale as it can be stored; powers of two upwards."""
        if self._scale_dtype == torch.float8_e8m0fnu:
            return torch.exp2(torch.ceil(torch.log2(scale_rK)))
        return scale_rK.to(self._scale_dtype).float()

    def _spread(self, of_blocks_RK: torch.Tensor, top: int, count: int) -> torch.Tensor:
        """Return a value of each block for the elements of some rows, (n, C), or (n, 1) where a row is one block."""
        of_rows = of_blocks_RK[torch.arange(top, top + count, device=of_blocks_RK.device) // self._block[0]]
        return of_rows if of_rows.shape[1] == 1 else of_rows.repeat_interleave(self._block[1], dim=1)[:, : self._cols]
