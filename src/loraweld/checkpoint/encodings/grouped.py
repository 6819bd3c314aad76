"""Integers of a few bits packed into int32, with a scale and a zero for each group of inputs.

value = (code - zero) · scale. Three ways to pack:

- compressed-tensors `pack-quantized`: rows as the weight has them, codes along the columns, lowest bits first and
  without gaps (a code of 3 bits may cross the border of two words), stored with 2**(bits-1) added; zeros packed
  likewise down the rows. Source: compressed-tensors 0.20, `pack_to_int32`. Its releases of early June 2026 left gaps
  where `bits` does not divide 32; of those models the sizes do not fit and they are refused.
- GPTQ: the weight transposed, codes packed down the inputs, lowest bits first (3 bit: 32 codes in three words);
  zeros packed along the outputs, one less than they are in the format "gptq", as they are in "gptq_v2"; `g_idx`
  names the group of each input. Source: Frantar et al. 2023; `pack` of AutoGPTQ and GPTQModel.
- AWQ, GEMM layout: the weight transposed, 8 codes of 4 bit along the outputs in the order 0 2 4 6 1 3 5 7.
  Source: Lin et al. 2023; `WQLinear_GEMM` of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import unpack

from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, PartLayout, encoded
from loraweld.checkpoint.encodings.schemes import Scheme
from loraweld.checkpoint.stored import StoredTensor, read_bytes
from loraweld.errors import CheckpointError

_SCALES = ("F16", "BF16", "F32")
_WORD_BITS = 32


def num_words(codes: int, bits: int) -> int:
    """Return the int32 words that hold so many codes of `bits` without gaps."""
    return -(-codes * bits // _WORD_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """compressed-tensors: codes of `bits`, in groups of `group` columns; a scale stored as `scale_shape`.

    `zero_packed`: zeros are packed as the codes are, else each is an int8 (as one zero for the whole weight is).
    """

    bits: int
    group: int
    symmetric: bool
    reordered: bool
    scale_shape: tuple[int, ...]
    zero_packed: bool
    streams: bool = True

    @property
    def kind(self) -> str:
        return f"compressed-tensors int{self.bits}"

    def unit_rows(self, shape: tuple[int, ...]) -> int:
        return 1

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem, (rows, cols) = name.removesuffix("weight"), shape
        zero_shape = (num_words(rows, self.bits), cols // self.group) if self.zero_packed else self.scale_shape
        return {
            CODES: PartLayout(name=f"{stem}weight_packed", dtypes=("I32",), shape=(rows, num_words(cols, self.bits))),
            "scale": PartLayout(name=f"{stem}weight_scale", dtypes=_SCALES, shape=self.scale_shape),
            "zero": PartLayout(
                name=f"{stem}weight_zero_point",
                dtypes=("I32" if self.zero_packed else "I8",),
                shape=zero_shape,
                required=not self.symmetric,
            ),
            "group_of": PartLayout(name=f"{stem}weight_g_idx", dtypes=("I32",), shape=(cols,), required=self.reordered),
            "shape": PartLayout(name=f"{stem}weight_shape", dtypes=("I64", "I32"), shape=(2,)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """`bits` of a code, inputs in a group, and what to add to a stored zero.

    `carries`: it was subtracted from whole words, and a zero of 0 has borrowed from the next one.
    """

    bits: int
    group: int
    zero_offset: int
    carries: bool = False
    streams: bool = False

    @property
    def kind(self) -> str:
        return f"GPTQ {self.bits} bit"

    def unit_rows(self, shape: tuple[int, ...]) -> int:
        return 1

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem, (outputs, inputs) = name.removesuffix("weight"), shape
        groups = -(-inputs // self.group)
        return {
            CODES: PartLayout(name=f"{stem}qweight", dtypes=("I32",), shape=(num_words(inputs, self.bits), outputs)),
            "scale": PartLayout(name=f"{stem}scales", dtypes=_SCALES, shape=(groups, outputs)),
            "zero": PartLayout(name=f"{stem}qzeros", dtypes=("I32",), shape=(groups, num_words(outputs, self.bits))),
            "group_of": PartLayout(name=f"{stem}g_idx", dtypes=("I32", "I64"), shape=(inputs,), required=False),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """Inputs in a group; codes are of 4 bit."""

    group: int
    kind: str = "AWQ"
    streams: bool = False

    def unit_rows(self, shape: tuple[int, ...]) -> int:
        """Eight outputs share a word."""
        return 8

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        stem, (outputs, inputs) = name.removesuffix("weight"), shape
        groups = -(-inputs // self.group)
        return {
            CODES: PartLayout(name=f"{stem}qweight", dtypes=("I32",), shape=(inputs, outputs // 8)),
            "scale": PartLayout(name=f"{stem}scales", dtypes=_SCALES, shape=(groups, outputs)),
            "zero": PartLayout(name=f"{stem}qzeros", dtypes=("I32",), shape=(groups, outputs // 8)),
        }


def find_packed(tensors: Mapping[str, StoredTensor], *, schemes: Sequence[Scheme]) -> Iterator[EncodedTensor]:
    """Yield the `pack-quantized` weights; which of the config's `schemes` each has, its shapes say.

    Raises:
        CheckpointError: a part is missing, or the shapes fit no scheme, or two.
    """
    for stem in _stems(tensors, "weight_packed"):
        codes = tensors[f"{stem}weight_packed"]
        scale, shape_tensor = (
            _need(tensors, stem, part, "compressed-tensors") for part in ("weight_scale", "weight_shape")
        )
        shape, zero = _stored_shape(shape_tensor), tensors.get(f"{stem}weight_zero_point")
        fitting = {found for scheme in schemes if (found := _packed(scheme, codes, scale, zero, shape)) is not None}
        if len(fitting) > 1:  # they differ in which optional parts they have
            has = zero is None, f"{stem}weight_g_idx" in tensors
            fitting = {found for found in fitting if (found.symmetric, found.reordered) == has}
        if len(fitting) != 1:
            raise CheckpointError(
                f"tensors {codes.name!r} {codes.shape} and {scale.name!r} {scale.shape} of a weight that is {shape} "
                f"by {shape_tensor.name!r} fit {len(fitting)} of the schemes in quantization_config, expected one: "
                + ", ".join(f"{scheme.bits} bits in groups of {scheme.group or 'a row'}" for scheme in schemes),
                path=codes.path,
            )
        yield encoded(f"{stem}weight", scale.dtype, shape, fitting.pop(), tensors)


def _packed(
    scheme: Scheme, codes: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, shape: tuple[int, int]
) -> Packed | None:
    """Return the encoding by a scheme, None if codes and scales are not of its shapes."""
    (rows, cols), group = shape, scheme.group or shape[1]
    scales = {(rows, cols // group)} | ({(), (1,)} if group == cols else set())
    if codes.shape != (rows, num_words(cols, scheme.bits)) or cols % group or scale.shape not in scales:
        return None
    return Packed(
        bits=scheme.bits,
        group=group,
        symmetric=scheme.symmetric,
        reordered=scheme.reordered,
        scale_shape=scale.shape,
        zero_packed=zero is None or zero.dtype == "I32",
    )


def find_gptq(
    tensors: Mapping[str, StoredTensor], *, bits: int, group: int, zero_offset: int, carries: bool
) -> Iterator[EncodedTensor]:
    """Yield the GPTQ weights; `group` -1 is one for all inputs.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    for stem in _stems(tensors, "qweight"):
        codes, scales = tensors[f"{stem}qweight"], _need(tensors, stem, "scales", "GPTQ")
        shape = codes.cols, codes.rows * _WORD_BITS // bits
        encoding = Gptq(
            bits=bits, group=group if group > 0 else max(1, shape[1]), zero_offset=zero_offset, carries=carries
        )
        if f"{stem}g_idx" not in tensors:
            _check_divides(encoding.group, shape[1], codes)
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
        _check_divides(encoding.group, shape[1], codes)
        yield encoded(f"{stem}weight", scales.dtype, shape, encoding, tensors)


def _check_divides(group: int, inputs: int, codes: StoredTensor) -> None:
    """With a last group that is not full, several group sizes have the same number of scales."""
    if inputs % group:
        raise CheckpointError(
            f"tensor {codes.name!r} {codes.shape} has {inputs} inputs, which groups of {group} do not divide; "
            "is group_size in quantization_config right?",
            path=codes.path,
        )


def _stems(tensors: Mapping[str, StoredTensor], suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in tensors if name.endswith(f".{suffix}")]


def _need(tensors: Mapping[str, StoredTensor], stem: str, part: str, kind: str) -> StoredTensor:
    if stem + part not in tensors:
        raise CheckpointError(f"{kind} weight {stem + 'weight'!r} lacks its tensor {stem + part!r}")
    return tensors[stem + part]


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
