"""Quantised bases of one weight: written, opened, and read back in pieces; packers written from the formats' texts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import strategies as st
from torch import Tensor

from handmade import save_base
from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.dtypes import DTYPES

LAYER = "model.layers.0.mlp.up_proj"
WEIGHT = f"{LAYER}.weight"
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = {**HALVES, "float32": torch.float32}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def config_of(method: str | None, *, dtype: str = "bfloat16", **settings: Any) -> dict[str, Any]:
    quantisation = {"quantization_config": {"quant_method": method, **settings}} if method else {}
    return {"model_type": "llama", "dtype": dtype, **quantisation}


def of_layer(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{LAYER}.{name}": tensor for name, tensor in parts.items()}


@contextmanager
def opened(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, *, num_files: int = 1) -> Iterator[Base]:
    """Write a base, in as many files as it has tensors for, and open it."""
    with tempfile.TemporaryDirectory() as folder:
        # Shared memory is not stored twice without a word: each tensor has its own.
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        yield open_base(save_base(Path(folder) / "base", own, config, num_files=min(num_files, len(own))))


def decoded(base: Base, name: str) -> Tensor:
    """Return all of a weight, in its shape."""
    source, reader = base.tensors[name], Reader()
    rows = source.rows
    try:
        return open_decoder(source, reader).rows(0, rows).read(0, rows).clone().view(source.shape)
    finally:
        reader.close()


def assert_same_bits(found: Tensor, expected: Tensor, *, zero_signs: bool = True) -> None:
    """The bits of a NaN do not count, the sign of a zero does unless `zero_signs` is false."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    blank = nan if zero_signs else nan | (expected == 0)
    bits = [tensor.masked_fill(blank, 0).contiguous().view(_BITS_AS[tensor.itemsize]) for tensor in (found, expected)]
    assert torch.equal(*bits)
    assert torch.equal(found == 0, expected == 0)


def check_decoding(
    data: st.DataObject,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    expected: Tensor,
    *,
    name: str = WEIGHT,
    zero_signs: bool = True,
) -> None:
    """The weight is known by its shape and dtype; all of it and ranges of its rows are `expected`, to the bit."""
    with opened(tensors, config, num_files=data.draw(st.integers(1, 3), label="files")) as base:
        source = base.tensors[name]
        assert isinstance(source, EncodedTensor)
        assert base.aside == ()
        assert list(base.tensors) == [name]
        assert source.shape == tuple(expected.shape)
        assert getattr(torch, DTYPES[source.dtype].torch_name) == expected.dtype
        assert_same_bits(decoded(base, name), expected, zero_signs=zero_signs)
        matrix, reader = expected.reshape(source.rows, source.cols), Reader()
        start, stop = data.draw(row_ranges(0, source.rows), label="loaded")
        rows = open_decoder(source, reader).rows(start, stop)
        for _ in range(3):
            top, bottom = data.draw(row_ranges(start, stop), label="read")
            assert_same_bits(rows.read(top, bottom), matrix[top:bottom], zero_signs=zero_signs)
        reader.close()


@st.composite
def row_ranges(draw: st.DrawFn, start: int, stop: int) -> tuple[int, int]:
    """At least one row of [start, stop)."""
    top = draw(st.integers(start, stop - 1))
    return top, draw(st.integers(top + 1, stop))


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Sizes from 1 on; small ones and those about a power of two more often than others."""
    powers = [2**k + more for k in range(12) for more in (-1, 0, 1)]
    return st.sampled_from([n for n in powers if 0 < n <= largest]) | st.integers(1, largest)


def generators() -> st.SearchStrategy[torch.Generator]:
    return st.integers(0, 2**32).map(lambda seed: torch.Generator().manual_seed(seed))


def codes(generator: torch.Generator, shape: Sequence[int], bits: int) -> Tensor:
    """Whole numbers of so many bits, each as likely as the others."""
    return torch.randint(0, 2**bits, tuple(shape), generator=generator)


def random_bytes(generator: torch.Generator, *shape: int) -> Tensor:
    return codes(generator, shape, 8).to(torch.uint8)


def scales(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Positive numbers between 2**-10 and 1."""
    return torch.exp2(torch.rand(tuple(shape), generator=generator) * -10).to(dtype)


def packed_words(values: Sequence[int], bits: int) -> list[int]:
    """Codes one after the other, the first in the lowest bits, as signed 32-bit words."""
    stream = sum(value << (bits * place) for place, value in enumerate(values))
    return [_signed(stream >> start) for start in range(0, len(values) * bits, 32)]


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack each row of a matrix of codes on its own."""
    return torch.tensor([packed_words(row, bits) for row in values.tolist()], dtype=torch.int32)


def pack_awq(values: Tensor) -> Tensor:
    """Eight codes of 4 bit a word: the i-th place holds number AWQ_ORDER[i] of the eight."""
    order = [8 * word + place for word in range(values.shape[1] // 8) for place in AWQ_ORDER]
    return pack_rows(values[:, order], 4)


def grouped_weight(codes_OI: Tensor, zeros_GO: Tensor, scales_GO: Tensor, group_of: Tensor) -> Tensor:
    """(code - zero) · scale, exact in float64 (at most 33 bits), rounded once."""
    whole = codes_OI - zeros_GO.T[:, group_of]
    return (whole.double() * scales_GO.double().T[:, group_of]).to(scales_GO.dtype)


def nf4(weight: Tensor, **options: Any) -> dict[str, Tensor]:
    """Return a weight as bitsandbytes stores it; `options` are those of quantize_4bit."""
    quantised, state = quantize_4bit(weight, **options)
    return {WEIGHT: quantised, **{f"{WEIGHT}.{key}": part for key, part in state.as_dict(packed=True).items()}}


def compressed_config(dtype: torch.dtype, *schemes: dict[str, Any], **more: Any) -> dict[str, Any]:
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": args} for i, args in enumerate(schemes)}
    names = {kind: name for name, kind in FLOATS.items()}
    return config_of("compressed-tensors", dtype=names[dtype], config_groups=groups, **more)


def scheme_of(args: dict[str, Any]) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


def integer_scheme(bits: int, *, group: int | None, symmetric: bool, whole: bool = False) -> dict[str, Any]:
    strategy = {"strategy": "tensor" if whole else "channel"} if group is None else {"strategy": "group"}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group, **strategy}


@st.composite
def integer_weights(draw: st.DrawFn, bits: st.SearchStrategy[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of compressed-tensors and a weight with scales and zeros that fit them."""
    generator, group, rows = draw(generators()), draw(st.none() | sizes(40)), draw(sizes(40))
    cols = draw(sizes(200)) if group is None else group * draw(sizes(6))
    whole = group is None and draw(st.booleans())
    args = integer_scheme(draw(bits), group=group, symmetric=draw(st.booleans()), whole=whole)
    scale = scales(
        generator, (1,) if whole else (rows, cols // (group or cols)), draw(st.sampled_from([*FLOATS.values()]))
    )
    half = 2 ** (args["num_bits"] - 1)
    tensors = {"weight": torch.randn(rows, cols, generator=generator) * 0.05 * half, "weight_scale": scale}
    if not args["symmetric"]:
        tensors["weight_zero_point"] = (codes(generator, scale.shape, args["num_bits"]) - half).to(torch.int8)
    return args, tensors


GPTQ_SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptqmodel": {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:5.0.0"]}},
    "gptq_v2": {"format": "gptq_v2"},
}


def packed_zeros(zeros: Tensor, bits: int, form: str) -> Tensor:
    """v2: as they are. v1: one less modulo 2**bits; GPTQModel subtracts from whole words, but not at 3 bits."""
    if form == "gptq_v2":
        return pack_rows(zeros, bits)
    if form == "gptq" or bits == 3:
        return pack_rows((zeros - 1) % 2**bits, bits)
    ones = pack_rows(torch.ones(1, 32 // bits, dtype=torch.int64), bits)
    return ((pack_rows(zeros, bits).long() - ones + 2**31) % 2**32 - 2**31).int()
