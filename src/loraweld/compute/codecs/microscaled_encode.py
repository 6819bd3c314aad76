"""Into 4-bit floats (E2M1) with a scale for each small block: MXFP4 and NVFP4.

Scales stay as the base has them for each block whose values lie within half a step beyond 6, the largest code. A block
that outgrows its scale gets a new one from its largest magnitude. MXFP4: the power of two at or above a sixth of it, as
`downcast_to_mxfp` of triton_kernels makes it for gpt-oss. NVFP4: a sixth of it, by the weight's own scale, as the
nearest FP8 value of at most 448, as `calculate_qparams` of compressed-tensors 0.20 does; the weight's own scale stays,
for the runtime may share it among layers. A block of zeros gets the scale 1.

A code is the nearest one, ties to even, with the sign of its value even where that is 0: OCP Microscaling Formats 1.0,
section 5.3; `quantize_and_pack_fp4` of compressed-tensors. (triton_kernels rounds ties away from zero.)

Shape letters: E = experts, I = inputs, O = outputs, n = those at hand, C = columns, K = blocks of an output,
S = elements of a block, H = half as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.microscaled import MX_BLOCK, NV_BLOCK, NvFp4
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.grouped_encode import divisor, pieces
from loraweld.compute.codecs.microscaled import e2m1_values
from loraweld.compute.tensors import read_flat, torch_dtype

_LARGEST, _OUTGROWN = 6.0, 7.0
# Middles between neighbours, and whether a value there goes to the upper one, whose mantissa is even.
_MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_LEAST_FP8, _LARGEST_FP8 = 2.0**-9, 448.0
_MX_BIAS = _MX_ONE = 127
_MANTISSA_BITS = 23  # of float32
_PIECE_ELEMENTS = 1 << 18


class Scale(Protocol):
    """What a stored byte says of its block."""

    def units(self, stored: torch.Tensor) -> torch.Tensor:
        """Return what the values of codes are multiplied with, in float32."""

    def fitted(self, absmax: torch.Tensor) -> torch.Tensor:
        """Return the bytes for blocks of these largest magnitudes."""


class Blocks:
    """The blocks of a weight: their scales as `stored` bytes (…, K), and codes by them."""

    def __init__(self, scale: Scale, stored: torch.Tensor, *, keeps: bool) -> None:
        self.stored = stored
        self._scale = scale
        self._keeps = keeps

    def encode(self, here: tuple[int | slice, ...], blocks_nKS: torch.Tensor) -> torch.Tensor:
        """Fit the scales of some blocks to their values and return the packed codes, (n, K, S / 2)."""
        absmax_nK, stored_nK = blocks_nKS.abs().amax(2), self.stored[here]
        outgrown_nK = absmax_nK > _OUTGROWN * self._scale.units(stored_nK).abs()
        if not self._keeps or bool(outgrown_nK.any()):
            fitted_nK = self._scale.fitted(absmax_nK)
            stored_nK.copy_(torch.where(outgrown_nK, fitted_nK, stored_nK) if self._keeps else fitted_nK)
        return _packed(blocks_nKS / divisor(self._scale.units(stored_nK))[..., None])

    def decode(self, here: tuple[int | slice, ...], packed_nKH: torch.Tensor) -> torch.Tensor:
        """Return the values of packed codes in float32, (n, K, S)."""
        return e2m1_values(packed_nKH).mul_(self._scale.units(self.stored[here])[..., None])


def _packed(scaled: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes of float32 values, two a byte, the earlier in the lower half; the last axis halves."""
    magnitudes = scaled.abs().numpy()
    codes = torch.signbit(scaled).numpy().view(np.uint8) << 3
    above = np.empty(codes.shape, dtype=np.bool_)
    for middle, goes_up in _MIDDLES:
        (np.greater_equal if goes_up else np.greater)(magnitudes, middle, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    return torch.from_numpy(codes[..., ::2] | (codes[..., 1::2] << 4))


class _Fp8Scale:
    """FP8 by the scale of the weight, which divides it or is a factor."""

    def __init__(self, of_weight: torch.Tensor, *, divides: bool) -> None:
        self._of_weight = of_weight
        self._divides = divides

    def units(self, stored: torch.Tensor) -> torch.Tensor:
        scales = stored.view(torch.float8_e4m3fn).float()
        return scales / self._of_weight if self._divides else scales * self._of_weight

    def fitted(self, absmax: torch.Tensor) -> torch.Tensor:
        wanted = absmax / _LARGEST
        wanted = wanted * self._of_weight if self._divides else wanted / self._of_weight
        wanted.clamp_(_LEAST_FP8, _LARGEST_FP8).masked_fill_(absmax == 0, 1)
        return wanted.to(torch.float8_e4m3fn).view(torch.uint8)


class NvFp4Encoder:
    """NVFP4: rows as they come."""

    observes = False

    def __init__(self, form: EncodedTensor, encoding: NvFp4, reader: Reader, *, keeps: bool) -> None:
        self._cols = form.cols
        self._dtype = torch_dtype(form.dtype)
        self._of_weight = read_flat(reader, form.need("global_scale"))
        stored_OK = read_flat(reader, form.need("scale")).view(torch.uint8).view(form.rows, -1)
        self._blocks = Blocks(_Fp8Scale(self._of_weight, divides=encoding.divides), stored_OK, keeps=keeps)
        self._last = torch.empty(0), 0

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        raise AssertionError("scales of blocks are their own")

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        padding = -self._cols % NV_BLOCK
        parts = []
        for first, last in pieces(len(values_nC), _PIECE_ELEMENTS // self._cols):
            padded_nC = torch.nn.functional.pad(values_nC[first:last], (0, padding))
            blocks_nKS = padded_nC.view(last - first, -1, NV_BLOCK)
            parts.append(self._blocks.encode((slice(top + first, top + last),), blocks_nKS))
        packed_nKH = torch.cat(parts)
        self._last = packed_nKH, top
        return packed_nKH.flatten(1)[:, : self._cols // 2]

    def decoded(self) -> torch.Tensor:
        packed_nKH, top = self._last
        values_nC = torch.empty(len(packed_nKH), self._cols, dtype=self._dtype)
        for first, last in pieces(len(packed_nKH), _PIECE_ELEMENTS // self._cols):
            blocks_nKS = self._blocks.decode((slice(top + first, top + last),), packed_nKH[first:last])
            values_nC[first:last] = blocks_nKS.flatten(1)[:, : self._cols]
        return values_nC

    def parts(self) -> Mapping[str, torch.Tensor]:
        return {"scale": self._blocks.stored, "global_scale": self._of_weight}


class _PowerOfTwo:
    """The exponent of a power of two, 127 added."""

    def units(self, stored: torch.Tensor) -> torch.Tensor:
        return torch.ldexp(torch.ones(stored.shape), stored.int() - _MX_BIAS)

    def fitted(self, absmax: torch.Tensor) -> torch.Tensor:
        bits = (absmax / _LARGEST).view(torch.int32)
        # The exponent of the float, plus one if anything follows it.
        exponents = (bits + (1 << _MANTISSA_BITS) - 1) >> _MANTISSA_BITS
        return exponents.masked_fill_(absmax == 0, _MX_ONE).to(torch.uint8)


class MxFp4Encoder:
    """MXFP4 experts: rows of values are inputs, rows of codes outputs."""

    observes = False

    def __init__(self, form: EncodedTensor, reader: Reader, *, keeps: bool) -> None:
        experts, self._inputs, self._outputs = form.shape
        self._dtype = torch_dtype(form.dtype)
        stored = read_flat(reader, form.need("scale")).view(torch.uint8)
        self._blocks = Blocks(_PowerOfTwo(), stored.view(experts, self._outputs, -1), keeps=keeps)
        self._last = torch.empty(0), 0

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        raise AssertionError("scales of blocks are their own")

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        expert, values_EIO = top // self._inputs, values_nC.view(-1, self._inputs, self._outputs)
        blocks = self._inputs // MX_BLOCK
        packed_EOKH = torch.empty(len(values_EIO), self._outputs, blocks, MX_BLOCK // 2, dtype=torch.uint8)
        for index, first, last in self._pieces(len(values_EIO)):
            blocks_nKS = values_EIO[index, :, first:last].T.contiguous().view(last - first, blocks, MX_BLOCK)
            here = expert + index, slice(first, last)
            packed_EOKH[index, first:last] = self._blocks.encode(here, blocks_nKS)
        self._last = packed_EOKH, expert
        return packed_EOKH

    def decoded(self) -> torch.Tensor:
        packed_EOKH, expert = self._last
        values_EIO = torch.empty(len(packed_EOKH), self._inputs, self._outputs, dtype=self._dtype)
        for index, first, last in self._pieces(len(packed_EOKH)):
            blocks_nKS = self._blocks.decode((expert + index, slice(first, last)), packed_EOKH[index, first:last])
            values_EIO[index, :, first:last] = blocks_nKS.flatten(1).T
        return values_EIO.view(-1, self._outputs)

    def parts(self) -> Mapping[str, torch.Tensor]:
        return {"scale": self._blocks.stored}

    def _pieces(self, experts: int) -> list[tuple[int, int, int]]:
        """Return (expert, first output, output after the last)."""
        of_one = pieces(self._outputs, _PIECE_ELEMENTS // self._inputs)
        return [(index, first, last) for index in range(experts) for first, last in of_one]
