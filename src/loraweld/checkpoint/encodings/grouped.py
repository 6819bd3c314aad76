"""Integers of a few bits packed into int32, with a scale and a zero for each group of inputs.

value = (code - zero) · scale. Three ways to pack:

- compressed-tensors `pack-quantized`: rows as the weight has them, codes along the columns, lowest bits first,
  stored with 2**(bits-1) added; zeros packed down the rows. Source: compressed-tensors 0.x, `pack_to_int32`.
- GPTQ: the weight transposed, codes packed down the inputs, lowest bits first (3 bit: 32 codes in three words);
  zeros packed along the outputs, one less than they are in the format "gptq", as they are in "gptq_v2"; `g_idx`
  names the group of each input. Source: Frantar et al. 2023; the layout of AutoGPTQ and GPTQModel.
- AWQ, GEMM layout: the weight transposed, 8 codes of 4 bit along the outputs in the order 0 2 4 6 1 3 5 7.
  Source: Lin et al. 2023; `WQLinear_GEMM` of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import unpack

from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, PartLayout, encoded
from loraweld.checkpoint.stored import StoredTensor, read_bytes
from loraweld.errors import CheckpointError

_SCALES = ("F16", "BF16", "F32")
_WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """compressed-tensors: codes of `bits`, in groups of `group` columns."""

    bits: int
    group: int

    @property
    def kind(self) -> str:
        return f"compressed-tensors int{self.bits}"

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem, (rows, cols) = name.removesuffix("weight"), shape
        per_word, groups = _WORD_BITS // self.bits, -(-cols // self.group)
        return {
            CODES: PartLayout(name=f"{stem}weight_packed", dtypes=("I32",), shape=(rows, -(-cols // per_word))),
            "scale": PartLayout(name=f"{stem}weight_scale", dtypes=_SCALES, shape=(rows, groups)),
            "zero": PartLayout(
                name=f"{stem}weight_zero_point", dtypes=("I32",), shape=(-(-rows // per_word), groups), required=False
            ),
            "group_of": PartLayout(name=f"{stem}weight_g_idx", dtypes=("I32",), shape=(cols,), required=False),
            "shape": PartLayout(name=f"{stem}weight_shape", dtypes=("I64", "I32"), shape=(2,)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """`bits` of a code, inputs in a group, and what to add to a stored zero."""

    bits: int
    group: int
    zero_offset: int

    @property
    def kind(self) -> str:
        return f"GPTQ {self.bits} bit"

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem, (outputs, inputs) = name.removesuffix("weight"), shape
        groups = -(-inputs // self.group)
        return {
            CODES: PartLayout(
                name=f"{stem}qweight", dtypes=("I32",), shape=(inputs * self.bits // _WORD_BITS, outputs)
            ),
            "scale": PartLayout(name=f"{stem}scales", dtypes=_SCALES, shape=(groups, outputs)),
            "zero": PartLayout(
                name=f"{stem}qzeros", dtypes=("I32",), shape=(groups, -(-outputs * self.bits // _WORD_BITS))
            ),
            "group_of": PartLayout(name=f"{stem}g_idx", dtypes=("I32", "I64"), shape=(inputs,), required=False),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """Inputs in a group; codes are of 4 bit."""

    group: int
    kind: str = "AWQ"

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem, (outputs, inputs) = name.removesuffix("weight"), shape
        groups = -(-inputs // self.group)
        return {
            CODES: PartLayout(name=f"{stem}qweight", dtypes=("I32",), shape=(inputs, outputs // 8)),
            "scale": PartLayout(name=f"{stem}scales", dtypes=_SCALES, shape=(groups, outputs)),
            "zero": PartLayout(name=f"{stem}qzeros", dtypes=("I32",), shape=(groups, outputs // 8)),
        }


def find_packed(tensors: Mapping[str, StoredTensor], *, bits: Sequence[int]) -> Iterator[EncodedTensor]:
    """Yield the `pack-quantized` weights; `bits` are the code sizes that the config names, the shapes say which.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    for stem in _stems(tensors, "weight_packed"):
        shape_tensor = tensors.get(f"{stem}weight_shape")
        scale = tensors.get(f"{stem}weight_scale")
        if shape_tensor is None or scale is None:
            lacking = "weight_shape" if shape_tensor is None else "weight_scale"
            raise CheckpointError(f"compressed-tensors weight {stem + 'weight'!r} lacks its tensor {stem + lacking!r}")
        shape = _stored_shape(shape_tensor)
        group = -(-shape[1] // max(1, scale.cols)) if len(scale.shape) == 2 else shape[1]
        encoding = Packed(bits=_code_bits(tensors[f"{stem}weight_packed"], shape, bits), group=max(1, group))
        yield encoded(f"{stem}weight", scale.dtype, shape, encoding, tensors)


def find_gptq(
    tensors: Mapping[str, StoredTensor], *, bits: int, group: int, zero_offset: int
) -> Iterator[EncodedTensor]:
    """Yield the GPTQ weights; `group` -1 is one for all inputs.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    for stem in _stems(tensors, "qweight"):
        codes, scales = tensors[f"{stem}qweight"], _need(tensors, stem, "scales", "GPTQ")
        shape = codes.cols, codes.rows * _WORD_BITS // bits
        encoding = Gptq(bits=bits, group=group if group > 0 else max(1, shape[1]), zero_offset=zero_offset)
        yield encoded(f"{stem}weight", scales.dtype, shape, encoding, tensors)


def find_awq(tensors: Mapping[str, StoredTensor], *, group: int) -> Iterator[EncodedTensor]:
    """Yield the AWQ weights; `group` -1 is one for all inputs.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    for stem in _stems(tensors, "qweight"):
        codes, scales = tensors[f"{stem}qweight"], _need(tensors, stem, "scales", "AWQ")
        shape = codes.cols * 8, codes.rows
        encoding = Awq(group=group if group > 0 else max(1, shape[1]))
        yield encoded(f"{stem}weight", scales.dtype, shape, encoding, tensors)


def _stems(tensors: Mapping[str, StoredTensor], suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in tensors if name.endswith(f".{suffix}")]


def _need(tensors: Mapping[str, StoredTensor], stem: str, part: str, kind: str) -> StoredTensor:
    if stem + part not in tensors:
        raise CheckpointError(f"{kind} weight {stem + 'weight'!r} lacks its tensor {stem + part!r}")
    return tensors[stem + part]


def _code_bits(codes: StoredTensor, shape: tuple[int, int], named: Sequence[int]) -> int:
    fitting = [bits for bits in named if codes.shape == (shape[0], -(-shape[1] // (_WORD_BITS // bits)))]
    if not fitting:
        raise CheckpointError(
            f"tensor {codes.name!r} is {codes.shape}, which no packing of {shape} in {list(named)} bits gives",
            path=codes.path,
        )
    return fitting[0]


def _stored_shape(tensor: StoredTensor) -> tuple[int, int]:
    formats = {("I64", 16): "<2q", ("I32", 8): "<2i"}
    code = formats.get((tensor.dtype, tensor.num_bytes))
    if code is None:
        raise CheckpointError(
            f"tensor {tensor.name!r} is {tensor.dtype} {tensor.shape}, expected two integers", path=tensor.path
        )
    rows, cols = unpack(code, read_bytes(tensor))
    if not (0 < rows < 2**40 and 0 < cols < 2**40):
        raise CheckpointError(f"tensor {tensor.name!r} says the weight is {(rows, cols)}", path=tensor.path)
    return rows, cols
