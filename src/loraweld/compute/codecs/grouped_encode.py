"""Into integers of a few bits packed in words: compressed-tensors, GPTQ and AWQ.

Scales and zeros stay as the base has them for each group whose values lie within half a step of what its codes can say.
A group that outgrows them gets new ones from its largest and its least value, 0 counted: scale = (largest - least) /
(codes - 1), or the larger magnitude over half of (codes - 1) where the weight's zeros all lie in the middle, as kernels
for symmetric weights take for granted. A new scale is rounded up to its stored dtype: rounded to nearest it could cut
off more than half a step. A group of zeros gets the scale 1.

A code is the nearest one, (value / scale + zero) rounded, ties to even, as `quantize` of compressed-tensors 0.20 and
`pack` of AutoGPTQ and AutoAWQ do.

Shape letters: O = outputs, n = those at hand, I = inputs, G = groups, W = words.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor
from loraweld.checkpoint.encodings.grouped import Awq, Gptq, Packed, num_words
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.grouped import WORD_BITS, AwqDecoder, GptqDecoder, PackedDecoder, pick
from loraweld.compute.tensors import read_flat, torch_dtype

_AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
# A piece whose temporaries stay near the core.
_PIECE_ELEMENTS = 1 << 16
# What a scale of 0 is taken for as a divisor: then 0 alone is within its range.
LEAST_DIVISOR = 2.0**-149


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (…, I), as bytes, as streams of `bits` each along the last axis, lowest bits first, in int32 words.

    Eight codes fill `bits` bytes: neighbours are joined three times over.
    """
    count = codes.shape[-1]
    joined = torch.nn.functional.pad(codes, (0, -count % 8))
    if bits < 8:
        for level, dtype in enumerate((torch.int16, torch.int32, torch.int64)):
            joined = joined[..., ::2].to(dtype) | joined[..., 1::2].to(dtype).bitwise_left_shift_(bits << level)
        joined = joined.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    words = codes.new_zeros(*codes.shape[:-1], WORD_BITS // 8 * num_words(count, bits))
    filled = min(words.shape[-1], joined.shape[-1])
    words[..., :filled] = joined[..., :filled]
    return words.view(torch.int32)


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """Return scales as what values can be divided by."""
    return torch.copysign(scale.abs().clamp_(min=LEAST_DIVISOR), scale)


def pieces(count: int, step: int) -> list[tuple[int, int]]:
    """Return the ranges of at most `step` (and at least one) that `count` falls into."""
    step = max(1, step)
    return [(first, min(count, first + step)) for first in range(0, count, step)]


def reach(room: torch.Tensor, half_step: float, dtype: torch.dtype) -> torch.Tensor:
    """Return how far values may lie from a zero that has `room` for codes: half a step more, or what rounding adds.

    Of more than 128 codes, the last ones decoded to bfloat16 can come out further.
    """
    return torch.maximum(room + half_step, room * (1 + torch.finfo(dtype).eps / 2))


def fitted_with_zeros(
    high: torch.Tensor, low: torch.Tensor, half: int, dtype: torch.dtype, *, least_zero: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros by which codes from -half to half - 1 reach the largest and the least values."""
    scale = torch.maximum((high - low) / (2 * half - 1), high / (half - 1 - least_zero))
    scale = _rounded_up(scale, dtype)
    return scale, (-half - low / scale).round_().clamp_(least_zero, half - 1)


def _rounded_up(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as the next that `dtype` has, in float32; 1 for 0."""
    scale = scale.masked_fill(scale == 0, 1)
    rounded = scale.to(dtype)
    if dtype == torch.float32:
        return rounded
    next_one = rounded.view(torch.int16).add(1).view(dtype)
    return torch.where(rounded < scale, next_one, rounded).float()


class Groups:
    """Scales and zeros of a weight, and its codes by them.

    Zeros and the range of codes are here less half the number of codes, as compressed-tensors counts.
    """

    def __init__(
        self,
        decoder: PackedDecoder | GptqDecoder | AwqDecoder,
        bits: int,
        *,
        keeps: bool,
        is_one: bool = False,
        least_zero: int = 0,
    ) -> None:
        """`keeps`: the scales hold unless outgrown. `is_one`: one for the weight. `least_zero`: of new ones."""
        self.half = 1 << (bits - 1)
        self.scale_OG = decoder.scale_OG.clone()
        self.zero_OG = None if decoder.zero_OG is None else decoder.zero_OG - self.half
        self.is_refitted = False
        self._decoder = decoder
        self._has_zeros = self.zero_OG is not None and bool(self.zero_OG.any())
        self._keeps = keeps
        self._is_one = is_one
        self._least_zero = least_zero - self.half
        self._scale_dtype = torch_dtype(decoder.source.need("scale").dtype)
        self._dtype = torch_dtype(decoder.source.dtype)
        self._step = _PIECE_ELEMENTS // decoder.source.cols
        self._members = _Members(decoder.group_of, self.scale_OG.shape[1])
        # Several codes decode to the same bits by a scale of 0, or if there are more of them on one side of a zero than
        # bfloat16 has numbers.
        is_crowded = bits == 8 and self._dtype == torch.bfloat16 and self._has_zeros
        self._asks_base = keeps and (is_crowded or bool((self.scale_OG == 0).any()))
        self._high, self._low = torch.zeros(1, 1), torch.zeros(1, 1)
        self._last = torch.empty(0), 0

    def observe(self, values_nI: torch.Tensor) -> None:
        """See values that share one scale with all others."""
        high_nG, low_nG = self._extremes(values_nI)
        self._high = torch.maximum(self._high, high_nG.amax())
        self._low = torch.minimum(self._low, low_nG.amin())

    def codes(self, top: int, values_nI: torch.Tensor) -> torch.Tensor:
        """Return the codes of outputs from `top` on, (n, I), as bytes."""
        here = slice(None) if self._is_one else slice(top, top + len(values_nI))
        self._fit(here, *((self._high, self._low) if self._is_one else self._extremes(values_nI)))
        codes_nI = torch.empty(values_nI.shape, dtype=torch.uint8)
        for first, last in pieces(len(values_nI), self._step):
            scaled_nI = values_nI[first:last] / self._spread(divisor(self.scale_OG[top + first : top + last]))
            if self.zero_OG is not None and self._has_zeros:
                scaled_nI.add_(self._spread(self.zero_OG[top + first : top + last]))
            codes_nI[first:last] = scaled_nI.round_().clamp_(-self.half, self.half - 1).add_(self.half)
        if self._asks_base:
            codes_nI = self._as_in_base(top, values_nI, codes_nI)
        self._last = codes_nI, top
        return codes_nI

    def decoded(self) -> torch.Tensor:
        """Return what the last codes decode to."""
        return self._decoded(*self._last)

    def _decoded(self, codes_nI: torch.Tensor, top: int) -> torch.Tensor:
        values_nI = torch.empty(codes_nI.shape, dtype=self._dtype)
        for first, last in pieces(len(codes_nI), self._step):
            whole_nI = codes_nI[first:last].float().sub_(self.half)
            if self.zero_OG is not None and self._has_zeros:
                whole_nI.sub_(self._spread(self.zero_OG[top + first : top + last]))
            values_nI[first:last] = whole_nI.mul_(self._spread(self.scale_OG[top + first : top + last]))
        return values_nI

    def _as_in_base(self, top: int, values_nI: torch.Tensor, codes_nI: torch.Tensor) -> torch.Tensor:
        """Take the base's own code where it decodes to the very value."""
        stop = top + len(values_nI)
        stored_nI = self._decoder.rows(top, stop).codes(top, stop).to(torch.uint8)
        return torch.where(self._decoded(stored_nI, top) == values_nI, stored_nI, codes_nI)

    def _spread(self, of_groups_nG: torch.Tensor) -> torch.Tensor:
        return pick(of_groups_nG, self._decoder.group_of)

    def _extremes(self, values_nI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest and the least value of each group, 0 counted, (n, G)."""
        found = [self._members.extremes(values_nI[first:last]) for first, last in pieces(len(values_nI), self._step)]
        high_nG, low_nG = (torch.cat(parts) for parts in zip(*found, strict=True))
        return high_nG.clamp_(min=0), low_nG.clamp_(max=0)

    def _fit(self, here: slice, high_nG: torch.Tensor, low_nG: torch.Tensor) -> None:
        scale_nG, zero_nG = self.scale_OG[here], self.zero_OG[here] if self.zero_OG is not None else None
        outgrown_nG = self._outgrown(scale_nG, zero_nG, high_nG, low_nG)
        if not bool(outgrown_nG.any()):
            return
        self.is_refitted = True
        new_scale_nG, new_zero_nG = self._fitted(high_nG, low_nG)
        scale_nG.copy_(torch.where(outgrown_nG, new_scale_nG, scale_nG))
        if zero_nG is not None and self._has_zeros:
            zero_nG.copy_(torch.where(outgrown_nG, new_zero_nG, zero_nG))

    def _outgrown(
        self, scale_nG: torch.Tensor, zero_nG: torch.Tensor | None, high_nG: torch.Tensor, low_nG: torch.Tensor
    ) -> torch.Tensor:
        if not self._keeps:
            return torch.ones_like(scale_nG, dtype=torch.bool)
        ends = [extreme_nG / divisor(scale_nG) for extreme_nG in (high_nG, low_nG)]
        zero_nG = torch.zeros(1, 1) if zero_nG is None else zero_nG
        outgrown_nG = torch.maximum(*ends) > reach(self.half - 1 - zero_nG, 0.5, self._dtype)
        outgrown_nG |= -torch.minimum(*ends) > reach(self.half + zero_nG, 0.5, self._dtype)
        return outgrown_nG.any().expand_as(scale_nG) if self._is_one else outgrown_nG

    def _fitted(self, high_nG: torch.Tensor, low_nG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new scales and zeros."""
        if self._has_zeros:
            return fitted_with_zeros(high_nG, low_nG, self.half, self._scale_dtype, least_zero=self._least_zero)
        scale_nG = torch.maximum(high_nG, -low_nG) / (self.half - 0.5)
        return _rounded_up(scale_nG, self._scale_dtype), torch.zeros_like(scale_nG)


class _Members:
    """Which inputs belong to which group."""

    def __init__(self, group_of: torch.Tensor, num_groups: int) -> None:
        sizes = torch.bincount(group_of, minlength=num_groups)
        is_sorted = bool((group_of.diff() >= 0).all())
        self._num_groups = num_groups
        self._order = None if is_sorted else torch.argsort(group_of, stable=True)
        self._is_even = is_sorted and bool((sizes == sizes[0]).all())
        self._present = torch.nonzero(sizes).view(-1)
        self._starts = (sizes.cumsum(0) - sizes)[self._present].numpy()

    def extremes(self, values_nI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest and the least value of each group, 0 for one without members."""
        if self._is_even:
            groups = values_nI.view(len(values_nI), self._num_groups, -1)
            return groups.amax(2), groups.amin(2)
        ordered_nI = values_nI if self._order is None else values_nI.index_select(1, self._order)
        return self._reduced(np.maximum, ordered_nI), self._reduced(np.minimum, ordered_nI)

    def _reduced(self, extreme: np.ufunc, ordered_nI: torch.Tensor) -> torch.Tensor:
        reduced_nG = torch.zeros(len(ordered_nI), self._num_groups)
        reduced_nG[:, self._present] = torch.from_numpy(extreme.reduceat(ordered_nI.numpy(), self._starts, axis=1))
        return reduced_nG


class PackedEncoder:
    """compressed-tensors `pack-quantized`; order of columns and shape are the base's."""

    def __init__(self, form: EncodedTensor, encoding: Packed, reader: Reader, *, keeps: bool) -> None:
        self.observes = len(encoding.scale_shape) < 2  # one scale for the weight
        self._form = form
        self._encoding = encoding
        self._reader = reader
        self._groups = Groups(PackedDecoder(form, encoding, reader), encoding.bits, keeps=keeps, is_one=self.observes)

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        self._groups.observe(values_nC)

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        return pack(self._groups.codes(top, values_nC), self._encoding.bits)

    def decoded(self) -> torch.Tensor:
        return self._groups.decoded()

    def parts(self) -> Mapping[str, torch.Tensor]:
        parts = _stored_parts(self._form, self._reader)
        parts["scale"] = self._as_stored(self._groups.scale_OG).to(parts["scale"].dtype)
        if "zero" in parts and self._groups.is_refitted:
            parts["zero"] = self._zeros()
        return parts

    def _zeros(self) -> torch.Tensor:
        assert self._groups.zero_OG is not None
        if not self._encoding.zero_packed:
            return self._as_stored(self._groups.zero_OG).to(torch.int8)
        return pack(_bytes(self._groups.zero_OG.T, self._groups.half), self._encoding.bits).T

    def _as_stored(self, of_groups_OG: torch.Tensor) -> torch.Tensor:
        """One for the weight is held once for each row."""
        return of_groups_OG[:1] if self.observes else of_groups_OG


class GptqEncoder:
    """GPTQ: holds the words of all codes, since those of an output lie in a column."""

    observes = False

    def __init__(self, form: EncodedTensor, encoding: Gptq, reader: Reader, *, keeps: bool) -> None:
        self._form = form
        self._encoding = encoding
        self._reader = reader
        # The first format has a zero of 0 as the largest code, which not all kernels read as 0.
        self._groups = Groups(
            GptqDecoder(form, encoding, reader), encoding.bits, keeps=keeps, least_zero=encoding.zero_offset
        )
        self._words_WO = torch.empty(form.codes.shape, dtype=torch.int32)

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        raise AssertionError("scales of outputs are their own")

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        codes_nI = self._groups.codes(top, values_nC)
        self._words_WO[:, top : top + len(codes_nI)] = pack(codes_nI, self._encoding.bits).T
        return codes_nI

    def decoded(self) -> torch.Tensor:
        return self._groups.decoded()

    def parts(self) -> Mapping[str, torch.Tensor]:
        parts = _stored_parts(self._form, self._reader) | {CODES: self._words_WO}
        parts["scale"] = self._groups.scale_OG.T.to(parts["scale"].dtype)
        if self._groups.is_refitted:
            parts["zero"] = self._zeros()
        return parts

    def _zeros(self) -> torch.Tensor:
        assert self._groups.zero_OG is not None
        bits, offset = self._encoding.bits, self._encoding.zero_offset
        zeros_GO = _bytes(self._groups.zero_OG.T, self._groups.half)
        if self._encoding.carries:
            return pack(zeros_GO, bits) - offset * sum(1 << place for place in range(0, WORD_BITS, bits))
        return pack(zeros_GO.sub_(offset).bitwise_and_((1 << bits) - 1), bits)


class AwqEncoder:
    """AWQ: holds the words of all codes, since those of an output lie in a column."""

    observes = False

    def __init__(self, form: EncodedTensor, encoding: Awq, reader: Reader, *, keeps: bool) -> None:
        self._form = form
        self._reader = reader
        self._groups = Groups(AwqDecoder(form, encoding, reader), 4, keeps=keeps)
        self._words_IW = torch.empty(form.codes.shape, dtype=torch.int32)

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        raise AssertionError("scales of outputs are their own")

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        codes_nI = self._groups.codes(top, values_nC)
        self._words_IW[:, top // 8 : (top + len(codes_nI)) // 8] = _pack_awq(codes_nI.T)
        return codes_nI

    def decoded(self) -> torch.Tensor:
        return self._groups.decoded()

    def parts(self) -> Mapping[str, torch.Tensor]:
        parts = _stored_parts(self._form, self._reader) | {CODES: self._words_IW}
        parts["scale"] = self._groups.scale_OG.T.to(parts["scale"].dtype)
        if self._groups.is_refitted:
            assert self._groups.zero_OG is not None
            parts["zero"] = _pack_awq(_bytes(self._groups.zero_OG.T, self._groups.half))
        return parts


def _pack_awq(codes: torch.Tensor) -> torch.Tensor:
    eights = codes.reshape(len(codes), -1, 8).index_select(-1, _AWQ_ORDER)
    return pack(eights, 4).squeeze(-1)


def _stored_parts(form: EncodedTensor, reader: Reader) -> dict[str, torch.Tensor]:
    """All parts but the codes, as the base has them."""
    return {role: read_flat(reader, stored) for role, stored in form.parts if role != CODES}


def _bytes(zeros: torch.Tensor, half: int) -> torch.Tensor:
    return (zeros + half).to(torch.uint8)
