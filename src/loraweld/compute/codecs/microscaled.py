"""4-bit floats (E2M1) times the scale of a small block. The lower half of a byte is the earlier code."""

from __future__ import annotations

import torch

from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.microscaled import MX_BLOCK, NV_BLOCK, NvFp4
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.plain import PlainRows
from loraweld.compute.tensors import read_flat, torch_dtype

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1).contiguous().view(torch.int64).view(-1)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of packed codes; the last axis doubles."""
    flat = torch.index_select(_PAIRS, 0, codes.reshape(-1).int()).view(torch.float32)
    return flat.view(*codes.shape[:-1], codes.shape[-1] * 2)


class NvFp4Decoder:
    """NVFP4: a scale in FP8 for 16 inputs and one in float32 for the weight."""

    def __init__(self, source: EncodedTensor, encoding: NvFp4, reader: Reader) -> None:
        self.source = source
        self.reader = reader
        self.dtype = torch_dtype(source.dtype)
        self.divides = encoding.divides
        self.global_scale = read_flat(reader, source.need("global_scale"))

    def rows(self, start: int, stop: int) -> NvFp4Rows:
        return NvFp4Rows(self)


class NvFp4Rows:
    def __init__(self, decoder: NvFp4Decoder) -> None:
        self._decoder = decoder
        self._codes = PlainRows(decoder.source.codes, decoder.reader)
        self._scales = PlainRows(decoder.source.need("scale"), decoder.reader)

    def read(self, top: int, bottom: int) -> torch.Tensor:
        decoder = self._decoder
        values_nC = e2m1_values(self._codes.read(top, bottom))
        scale_nK = self._scales.read(top, bottom).float()
        scale_nK = scale_nK / decoder.global_scale if decoder.divides else scale_nK * decoder.global_scale
        scale_nC = scale_nK.repeat_interleave(NV_BLOCK, dim=1)[:, : values_nC.shape[1]]
        return values_nC.mul_(scale_nC).to(decoder.dtype)


class MxFp4Decoder:
    """MXFP4 experts stored (experts, outputs, inputs / 32, 16), decoded (experts, inputs, outputs)."""

    def __init__(self, source: EncodedTensor, reader: Reader) -> None:
        self.source = source
        self.reader = reader
        self.dtype = torch_dtype(source.dtype)

    def rows(self, start: int, stop: int) -> MxFp4Rows:
        return MxFp4Rows(self)


class MxFp4Rows:
    """Holds the codes of one expert at a time."""

    def __init__(self, decoder: MxFp4Decoder) -> None:
        _, self._inputs, self._outputs = decoder.source.shape
        self._decoder = decoder
        self._codes = PlainRows(decoder.source.codes, decoder.reader)
        self._scales = PlainRows(decoder.source.need("scale"), decoder.reader)
        self._expert = -1
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, top: int, bottom: int) -> torch.Tensor:
        parts, row = [], top
        while row < bottom:
            expert, first = divmod(row, self._inputs)
            last = min(self._inputs, first + bottom - row)
            parts.append(self._of_expert(expert, first, last))
            row += last - first
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of_expert(self, expert: int, first: int, last: int) -> torch.Tensor:
        codes_OBH, scales_OB = self._load(expert)
        begin, end = first // MX_BLOCK, -(-last // MX_BLOCK)
        values_OBV = e2m1_values(codes_OBH[:, begin:end])
        exponents_OB = scales_OB[:, begin:end].int() - 127
        values_OI = torch.ldexp(values_OBV, exponents_OB[..., None]).flatten(1)
        return values_OI[:, first - begin * MX_BLOCK : last - begin * MX_BLOCK].T.to(self._decoder.dtype).contiguous()

    def _load(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._held is None or self._expert != expert:
            blocks = self._inputs // MX_BLOCK
            codes = self._codes.read(expert, expert + 1).view(self._outputs, blocks, MX_BLOCK // 2)
            scales = self._scales.read(expert, expert + 1).view(torch.uint8).view(self._outputs, blocks)
            self._expert, self._held = expert, (codes, scales)
        return self._held
