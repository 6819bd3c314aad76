"""Weights go back into the encoding they came from: what does not change stays, all else is the nearest there is.

The decoders that read results back are held to the libraries in test_codecs_decode.py and test_codecs_packed.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import loraweld
import strategies  # noqa: F401  (the profile of hypothesis)
from encoded_bases import (
    FLOATS,
    GPTQ_SETTINGS,
    HALVES,
    LAYER,
    WEIGHT,
    assert_same_bits,
    codes,
    compressed_config,
    config_of,
    decoded,
    generators,
    integer_scheme,
    nf4,
    of_layer,
    opened,
    pack_awq,
    pack_rows,
    packed_zeros,
    random_bytes,
    scales,
    scheme_of,
    sizes,
)
from fakes import contents, load_folder, save_base
from handmade import lora, save_adapter
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.encodings.bnb4 import Bnb4, state_bytes
from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, Encoding
from loraweld.checkpoint.encodings.grouped import Awq, Gptq, Packed
from loraweld.checkpoint.encodings.microscaled import NvFp4
from loraweld.checkpoint.encodings.scaled import Scaled, fp8_rows, llm_int8
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute import encoding
from loraweld.compute.codecs.encoder import open_encoder
from loraweld.compute.codecs.grouped import AwqDecoder, GptqDecoder, PackedDecoder
from loraweld.dtypes import DTYPES
from loraweld.errors import LoraweldError, NumericsError
from loraweld.planning import memory
from loraweld.planning.merge_plan import Recipe
from processes import run_python

few, some = settings(max_examples=60), settings(max_examples=200)
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a merge; and the mean of bitsandbytes depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Bases in every encoding


@dataclass(frozen=True)
class Stored:
    """A weight as the tensors of a base, the config that goes with it, and the scheme of compressed-tensors if any."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    name: str = WEIGHT
    scheme: Mapping[str, Any] | None = None


@st.composite
def packed(draw: st.DrawFn, least_bits: int = 1) -> Stored:
    """pack-quantized: 1 to 8 bits, one scale, one a row or a group, with zeros or without, reordered or not."""
    generator, group, rows = draw(generators()), draw(st.none() | sizes(40)), draw(sizes(40))
    cols = draw(sizes(200)) if group is None else group * draw(sizes(6))
    whole, symmetric = group is None and draw(st.booleans()), draw(st.booleans())
    scheme = integer_scheme(draw(st.integers(least_bits, 8)), group=group, symmetric=symmetric, whole=whole)
    grid, width = (1,) if whole else (rows, cols // (group or cols)), scheme["num_bits"]
    parts = {
        "weight_packed": pack_rows(codes(generator, (rows, cols), width), width),
        "weight_scale": scales(generator, grid, draw(st.sampled_from([*FLOATS.values()]))),
        "weight_shape": torch.tensor([rows, cols]),
    }
    if not symmetric:
        zeros = codes(generator, grid, width)
        parts["weight_zero_point"] = (zeros - 2 ** (width - 1)).to(torch.int8) if whole else pack_rows(zeros.T, width).T
    if group is not None and draw(st.booleans(), label="reordered"):
        parts["weight_g_idx"] = torch.randperm(cols, generator=generator).int() // group
        scheme |= {"actorder": "group"}
    config = compressed_config(parts["weight_scale"].dtype, scheme, format="pack-quantized")
    return Stored(of_layer(parts), config, scheme=scheme)


@st.composite
def gptq(draw: st.DrawFn) -> Stored:
    """GPTQ: all bits and formats, the middle as every zero or any zeros, with g_idx or without, a last group cut."""
    generator, bits, form = draw(generators()), draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([*FORMATS]))
    outputs, inputs = draw(sizes(40)), 32 * draw(sizes(5))
    size = draw(st.sampled_from([16, 32, inputs]) | sizes(inputs))
    groups = -(-inputs // size)
    middle = torch.full((groups, outputs), 2 ** (bits - 1))
    zeros = draw(st.sampled_from([middle, codes(generator, (groups, outputs), bits)]))
    parts = {
        "qweight": pack_rows(codes(generator, (outputs, inputs), bits), bits).T,
        "scales": scales(generator, (groups, outputs), draw(st.sampled_from([*FLOATS.values()]))),
        "qzeros": packed_zeros(zeros, bits, form),
    }
    if inputs % size or draw(st.booleans(), label="g_idx"):
        order = torch.randperm(inputs, generator=generator) if draw(st.booleans()) else torch.arange(inputs)
        parts["g_idx"] = (order // size).to(draw(st.sampled_from([torch.int32, torch.int64])))
    return Stored(of_layer(parts), config_of("gptq", bits=bits, group_size=size, **GPTQ_SETTINGS[form]))


FORMATS = tuple(GPTQ_SETTINGS)


@st.composite
def awq(draw: st.DrawFn) -> Stored:
    generator = draw(generators())
    outputs, groups, size = 8 * draw(sizes(9)), draw(sizes(4)), draw(sizes(40))
    parts = {
        "qweight": pack_awq(codes(generator, (groups * size, outputs), 4)),
        "qzeros": pack_awq(codes(generator, (groups, outputs), 4)),
        "scales": scales(generator, (groups, outputs), draw(st.sampled_from([*HALVES.values()]))),
    }
    return Stored(of_layer(parts), config_of("awq", bits=4, group_size=size))


@st.composite
def nvfp4(draw: st.DrawFn) -> Stored:
    """NVFP4 of compressed-tensors and of ModelOpt; scales of blocks from the least to the largest."""
    generator, rows, blocks = draw(generators()), draw(sizes(40)), draw(sizes(9))
    dtype, divides = draw(st.sampled_from([*HALVES])), draw(st.booleans())
    of_blocks = torch.randint(1, 127, (rows, blocks), generator=generator).to(torch.uint8).view(torch.float8_e4m3fn)
    packed, scheme = random_bytes(generator, rows, blocks * 8), NVFP4 if divides else None
    if divides:
        of_weight = 1 / scales(generator, (1,), torch.float32)
        parts = {"weight_packed": packed, "weight_scale": of_blocks, "weight_global_scale": of_weight}
        config = config_of("compressed-tensors", dtype=dtype, config_groups={"group_0": {"weights": NVFP4}})
    else:
        of_weight = scales(generator, draw(st.sampled_from([(), (1,)])), torch.float32)
        parts = {"weight": packed, "weight_scale": of_blocks, "weight_scale_2": of_weight}
        config = config_of("modelopt", dtype=dtype, quant_algo="NVFP4")
    return Stored(of_layer(parts), config, scheme=scheme)


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}


@st.composite
def mxfp4(draw: st.DrawFn) -> Stored:
    """Experts of gpt-oss; powers of two from 2**-27 to 2**2, or about the least there is."""
    generator = draw(generators())
    experts, outputs, blocks = (draw(sizes(largest)) for largest in (4, 20, 4))
    exponents = torch.randint(*draw(st.sampled_from([(100, 130), (0, 4)])), (experts, outputs, blocks))
    parts = {"blocks": random_bytes(generator, experts, outputs, blocks, 16), "scales": exponents.to(torch.uint8)}
    if draw(st.booleans(), label="named scales"):
        parts["scales"] = parts["scales"].view(torch.float8_e8m0fnu)
    return Stored({f"{EXPERTS}_{part}": t for part, t in parts.items()}, config_of("mxfp4"), name=EXPERTS)


@st.composite
def fp8(draw: st.DrawFn) -> Stored:
    """FP8 in blocks, by rows or as a whole; all numbers, no infinity."""
    generator, shape = draw(generators()), draw(st.tuples(sizes(300), sizes(60)))
    block = draw(st.tuples(sizes(300), sizes(40)))
    number = random_bytes(generator, *shape)
    kind = draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
    number[~number.view(kind).float().isfinite()] = 128  # -0
    grid = draw(st.sampled_from([(), (shape[0], 1), (-(-shape[0] // block[0]), -(-shape[1] // block[1]))]))
    scale = scales(generator, grid, torch.float32).to(draw(st.sampled_from([torch.float32, torch.float8_e8m0fnu])))
    config = config_of("fp8", dtype=draw(st.sampled_from([*HALVES])), weight_block_size=list(block))
    return Stored(of_layer({"weight": number.view(kind), "weight_scale_inv": scale}), config)


@st.composite
def int8(draw: st.DrawFn) -> Stored:
    """`int-quantized` with zeros or without, and LLM.int8."""
    generator, shape = draw(generators()), draw(st.tuples(sizes(40), sizes(60)))
    parts = {"weight": random_bytes(generator, *shape).view(torch.int8)}
    if draw(st.booleans(), label="bitsandbytes"):
        scale = {
            "SCB": scales(generator, shape[:1], torch.float32),
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }
        return Stored(of_layer(parts | scale), config_of("bitsandbytes", load_in_8bit=True))
    scheme = integer_scheme(8, group=None, symmetric=draw(st.booleans()))
    parts["weight_scale"] = scales(generator, (shape[0], 1), draw(st.sampled_from([*HALVES.values()])))
    if not scheme["symmetric"]:
        parts["weight_zero_point"] = random_bytes(generator, shape[0], 1).view(torch.int8)
    return Stored(of_layer(parts), compressed_config(parts["weight_scale"].dtype, scheme, format="int-quantized"))


WEIGHTS = {
    "packed": packed(),
    "gptq": gptq(),
    "awq": awq(),
    "nvfp4": nvfp4(),
    "mxfp4": mxfp4(),
    "fp8": fp8(),
    "int8": int8(),
}
every_encoding = pytest.mark.parametrize("kind", WEIGHTS)


# Encoding outside of a merge


def encoded_weight(base: Base, stored: Stored) -> EncodedTensor:
    weight = base.tensors[stored.name]
    assert isinstance(weight, EncodedTensor)
    return weight


NOT_ENCODED = StoredTensor(name="", dtype="F32", shape=(1,), path=Path(), offset=0)


def recipe_for(weight: EncodedTensor, *, keeps: bool) -> Recipe:
    source = weight if keeps else NOT_ENCODED
    options = {"shape": weight.shape, "source": source, "encoding": weight.encoding, "form": weight}
    return Recipe(name=weight.name, dtype=weight.dtype, edits=(), kind="edit", **options)


def encode(recipe: Recipe, values: Tensor, heights: Sequence[int] = ()) -> tuple[dict[str, Tensor], Tensor]:
    """Encode rows in tiles of so many units each, over and over; return the parts' bytes by role, and what they say.

    Without `heights`: all rows at once.
    """
    assert recipe.encoding is not None
    rows, reader = values.reshape(-1, values.shape[-1]).contiguous(), Reader()
    unit, tiles, top, number = recipe.encoding.unit_rows(recipe.shape), [], 0, 0
    while top < len(rows):
        height = heights[number % len(heights)] * unit if heights else len(rows)
        tiles.append((top, rows[top : top + height]))
        top, number = top + height, number + 1
    encoder = open_encoder(recipe, reader)
    for tile in tiles if encoder.observes else ():
        encoder.observe(*tile)
    made, said = [], []
    for start, tile in tiles:
        made.append(encoder.encode(start, tile.clone()).clone())
        said.append(encoder.decoded().clone())
    parts = dict(encoder.parts())
    if recipe.encoding.streams:
        parts[CODES] = torch.cat([codes.contiguous().view(torch.uint8).flatten() for codes in made])
    reader.close()
    as_bytes = {role: part.contiguous().view(-1).view(torch.uint8) for role, part in parts.items()}
    return as_bytes, torch.cat(said).view(recipe.shape)


def stored_bytes(weight: EncodedTensor) -> dict[str, Tensor]:
    reader = Reader()
    found = {
        role: torch.frombuffer(reader.read(part, 0, part.num_bytes), dtype=torch.uint8) for role, part in weight.parts
    }
    reader.close()
    return found


def as_tensors(weight: EncodedTensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a base that holds these parts."""
    assert set(parts) >= {role for role, _ in weight.parts}
    return {
        part.name: parts[role].clone().view(getattr(torch, DTYPES[part.dtype].torch_name)).view(part.shape)
        for role, part in weight.parts
    }


heights = st.lists(st.integers(1, 7), min_size=1, max_size=3)


@every_encoding
@some
@given(data=st.data())
def test_a_weight_that_does_not_change_comes_back_byte_for_byte(kind: str, data: st.DataObject) -> None:
    """All codes, scales and zeros, in whatever tiles."""
    stored = data.draw(WEIGHTS[kind])
    with opened(stored.tensors, stored.config) as base:
        weight, values = encoded_weight(base, stored), decoded(base, stored.name)
        parts, said = encode(recipe_for(weight, keeps=True), values.float(), data.draw(heights))
        assert_same_bits(said, values)
        is_blurred = kind == "fp8" and weight.dtype == "F16"  # the least codes are beyond float16
        for role, expected in stored_bytes(weight).items():
            assert torch.equal(parts[role], expected) or (role == CODES and is_blurred), role


@dataclass(frozen=True)
class Grid:
    """What a weight can hold, element by element in float64: the scale, half a step, and how far beyond the end it is.

    `beyond` is in steps of the code, positive where the nearest code is more than half a step away; the largest of the
    group's elements.
    """

    scale: Tensor
    half_step: Tensor
    beyond: Tensor


def grid_of(weight: EncodedTensor, tensors: Mapping[str, Tensor], values: Tensor) -> Grid:
    parts = {role: tensors[part.name] for role, part in weight.parts}
    match weight.encoding:
        case Packed() | Gptq() | Awq():
            return grouped_grid(weight, values.double())
        case NvFp4() as encoding:
            of_weight, of_blocks = parts["global_scale"].double(), parts["scale"].float().double()
            scale = of_blocks / of_weight if encoding.divides else of_blocks * of_weight
            return float_grid(scale.repeat_interleave(16, 1), values.double(), 16)
        case Scaled() as encoding:
            return scaled_grid(encoding, parts, values.double())
        case _:
            exponents = parts["scale"].view(torch.uint8).double() - 127
            grid = float_grid(torch.exp2(exponents).repeat_interleave(32, 2), values.double().transpose(1, 2), 32)
            return Grid(*(part.transpose(1, 2) for part in (grid.scale, grid.half_step, grid.beyond)))


def grouped_grid(weight: EncodedTensor, values: Tensor) -> Grid:
    reader, encoding = Reader(), weight.encoding
    decoders: dict[type, Any] = {Packed: PackedDecoder, Gptq: GptqDecoder, Awq: AwqDecoder}
    decoder, bits = decoders[type(encoding)](weight, encoding, reader), getattr(encoding, "bits", 4)
    reader.close()
    scale = decoder.scale_OG.double()[:, decoder.group_of]
    zero = 2 ** (bits - 1) if decoder.zero_OG is None else decoder.zero_OG.double()[:, decoder.group_of]
    place = values / scale + zero
    beyond = torch.maximum(place - (2**bits - 0.5), -0.5 - place)
    whole = isinstance(encoding, Packed) and len(encoding.scale_shape) < 2
    number = decoder.group_of + torch.arange(len(values))[:, None] * len(decoder.scale_OG[0])
    return Grid(scale, scale.abs() / 2, of_groups(beyond, number * (0 if whole else 1)))


def float_grid(scale: Tensor, values: Tensor, block: int) -> Grid:
    """E2M1: steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6."""
    place = (values / scale).abs()
    half_step = torch.where(place < 2, 0.25, torch.where(place < 4, 0.5, 1.0)) * scale
    number = torch.arange(values.numel()).view(values.shape) // block
    return Grid(scale, half_step, of_groups(place - 7, number))


def scaled_grid(encoding: Scaled, parts: Mapping[str, Tensor], values: Tensor) -> Grid:
    """8-bit integers or floats; a scale, and perhaps a zero, for each block."""
    rows, cols = (torch.arange(size) // block for size, block in zip(values.shape, encoding.block, strict=True))
    scale, zero = (
        parts[role].double().view(int(rows.max()) + 1, -1)[rows][:, cols] if role in parts else torch.zeros(1, 1)
        for role in ("scale", "zero")
    )
    scale = scale * encoding.factor
    place, number = values / scale, rows[:, None] * (int(cols.max()) + 1) + cols
    if encoding.code_dtypes == ("I8",):
        beyond = torch.maximum(place + zero - 127.5, -128.5 - place - zero)
        return Grid(scale, scale / 2, of_groups(beyond, number))
    info = torch.finfo(parts[CODES].dtype)
    binade = torch.exp2(torch.frexp(place)[1].double() - 1).clamp(min=info.smallest_normal, max=info.max)
    beyond = place.abs() - info.max * (1 + info.eps / 4)
    return Grid(scale, binade * info.eps / 2 * scale, of_groups(beyond, number))


def of_groups(values: Tensor, number: Tensor) -> Tensor:
    """The largest value of each element's group."""
    largest = torch.full((int(number.max()) + 1,), -torch.inf, dtype=torch.float64)
    largest.scatter_reduce_(0, number.reshape(-1), values.reshape(-1), "amax")
    return largest[number]


def rounding(values: Tensor) -> Tensor:
    """The most that rounding to their dtype can have moved these values."""
    info = torch.finfo(values.dtype)
    return (values.double().abs() + info.smallest_normal) * info.eps / 2 * (1 + info.eps)


def check_written(stored: Stored, tensors: Mapping[str, Tensor], wanted: Tensor, said: Tensor) -> Grid:
    """Tensors of a weight decode to what was said, by libraries too, each element within half a step of `wanted`."""
    with opened(tensors, stored.config) as base:
        weight, found = encoded_weight(base, stored), decoded(base, stored.name)
        grid = grid_of(weight, tensors, wanted)
    assert_same_bits(found, said)
    by_library = decompressed(stored, tensors)
    if by_library is not None and by_library.dtype == found.dtype:  # NVFP4's has bfloat16 alone
        assert_same_bits(found, by_library)
    in_float32 = wanted.double().abs() * 2.0**-22  # what encoders are given, a sum of products, is float32
    bound = grid.half_step * (1 + 1e-5) + rounding(found) + in_float32
    error = (found.double() - wanted.double()).abs()
    cut_off = (grid.beyond > 0) & isinstance(weight.encoding, NvFp4)  # whose scales end at 448
    assert (error <= bound)[~cut_off].all()
    return grid


def decompressed(stored: Stored, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What the library of the format makes of a weight; None if it has none here, or cannot."""
    if stored.name == EXPERTS:
        return convert_moe_packed_tensors(tensors[f"{EXPERTS}_blocks"], tensors[f"{EXPERTS}_scales"].view(torch.uint8))
    if stored.scheme is None or "actorder" in stored.scheme:  # gone from release 0.20
        return None
    parts = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in tensors.items()}
    if stored.scheme["type"] == "float":
        return NVFP4PackedCompressor.decompress(parts, scheme_of(stored.scheme))["weight"]
    if len(parts["weight_packed"]) < 9 and not stored.scheme["symmetric"]:  # its zeros cannot be unpacked
        return None
    return PackedQuantizationCompressor.decompress(parts, scheme_of(stored.scheme))["weight"]


@st.composite
def changed(draw: st.DrawFn, values: Tensor) -> Tensor:
    """Values of which some change: by less than a step or by many, few or all, rows or single ones."""
    generator, size = draw(generators()), values.double().abs().mean().float()
    noise = torch.randn(values.shape, generator=generator) * size * draw(st.sampled_from([0.02, 0.3, 4.0]))
    chosen = torch.rand(values.shape, generator=generator) < draw(st.sampled_from([0.02, 0.5, 1.0]))
    if draw(st.booleans(), label="whole rows"):
        chosen[torch.rand(values.shape[:-1], generator=generator) < 0.5] = False
    return values.float() + noise * chosen


@every_encoding
@some
@given(data=st.data())
def test_a_changed_weight_is_within_half_a_step_on_the_grid_of_the_base(kind: str, data: st.DataObject) -> None:
    """A group that can say its values keeps its scale and what has not changed; another gets a scale that can."""
    stored = data.draw(WEIGHTS[kind])
    with opened(stored.tensors, stored.config) as base:
        weight, values = encoded_weight(base, stored), decoded(base, stored.name)
        wanted = data.draw(changed(values))
        recipe = recipe_for(weight, keeps=True)
        parts, said = encode(recipe, wanted)
        tiled, _ = encode(recipe, wanted, data.draw(heights))
        before = grid_of(weight, stored.tensors, wanted)
    assert parts.keys() == tiled.keys()
    assert all(torch.equal(parts[role], tiled[role]) for role in parts)
    after = check_written(stored, as_tensors(weight, parts), wanted, said)
    stays = before.beyond < -1e-5
    assert torch.equal(after.scale[stays], before.scale[stays])
    same = stays & (wanted == values.float())
    assert_same_bits(said[same], values[same], zero_signs=False)


@every_encoding
@some
@given(data=st.data(), generator=generators())
def test_a_weight_from_elsewhere_has_scales_of_its_own(
    kind: str, data: st.DataObject, generator: torch.Generator
) -> None:
    """Normal, one-sided, with groups of zeros; the order of inputs and the weight's own scale are the base's."""
    stored = data.draw(WEIGHTS[kind])
    with opened(stored.tensors, stored.config) as base:
        weight = encoded_weight(base, stored)
        size = decoded(base, stored.name).double().abs().mean().float() * data.draw(st.sampled_from([0.1, 1, 3]))
        wanted = torch.randn(weight.shape, generator=generator) * size
        wanted = data.draw(st.sampled_from([wanted, wanted.abs(), -wanted.abs(), wanted * 0]))
        wanted[..., : data.draw(st.integers(0, weight.shape[-1]))] = 0
        recipe = recipe_for(weight, keeps=False)
        parts, said = encode(recipe, wanted)
        tiled, _ = encode(recipe, wanted, data.draw(heights))
        before = stored_bytes(weight)
    assert all(torch.equal(parts[role], tiled[role]) for role in parts)
    check_written(stored, as_tensors(weight, parts), wanted, said)
    assert (said[wanted == 0] == 0).all()
    assert all(
        torch.equal(parts[role], before[role]) for role in ("group_of", "shape", "global_scale") if role in before
    )


# What libraries make of the same values and scales


@some
@given(st.data(), packed(least_bits=2))
def test_packed_codes_are_those_of_compressed_tensors(data: st.DataObject, stored: Stored) -> None:
    """Given the same scales and zeros, its quantiser makes the same bytes."""
    assert stored.scheme is not None
    assume("actorder" not in stored.scheme)
    with opened(stored.tensors, stored.config) as base:
        weight = encoded_weight(base, stored)
        wanted = data.draw(changed(decoded(base, stored.name)))
        # What bfloat16 cannot tell apart keeps the base's code, which need not be the nearest.
        keeps = data.draw(st.booleans()) and (stored.scheme["num_bits"] < 8 or stored.scheme["symmetric"])
        parts = as_tensors(weight, encode(recipe_for(weight, keeps=keeps), wanted)[0])
    tensors = {"weight": wanted, "weight_scale": parts[f"{LAYER}.weight_scale"]}
    with opened(parts, stored.config) as written:
        zero = zeros_of(encoded_weight(written, stored))
    if not stored.scheme["symmetric"]:
        whole = tensors["weight_scale"].dim() < 2
        tensors["weight_zero_point"] = (zero[0] if whole else zero).to(torch.int8)
    made = PackedQuantizationCompressor.compress(tensors, scheme_of(stored.scheme))
    assert torch.equal(made["weight_packed"], parts[f"{LAYER}.weight_packed"])
    if "weight_zero_point" in made:
        assert torch.equal(made["weight_zero_point"], parts[f"{LAYER}.weight_zero_point"])


def zeros_of(weight: EncodedTensor) -> Tensor:
    """Zeros as compressed-tensors counts them."""
    assert isinstance(weight.encoding, Packed)
    reader = Reader()
    zero = PackedDecoder(weight, weight.encoding, reader).zero_OG
    reader.close()
    return torch.zeros(weight.rows, 1) if zero is None else zero - 2 ** (weight.encoding.bits - 1)


@some
@given(st.data(), nvfp4())
def test_nvfp4_codes_are_those_of_compressed_tensors(data: st.DataObject, stored: Stored) -> None:
    """But for -0, whose sign its CPU path loses."""
    assume(stored.scheme is not None)
    with opened(stored.tensors, stored.config) as base:
        weight = encoded_weight(base, stored)
        wanted = data.draw(changed(decoded(base, stored.name))) + 0.0
        parts = as_tensors(weight, encode(recipe_for(weight, keeps=data.draw(st.booleans())), wanted)[0])
    tensors = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in parts.items()}
    made = NVFP4PackedCompressor.compress(
        {**tensors, "weight": wanted, "weight_scale": tensors["weight_scale"].float()}, scheme_of(NVFP4)
    )
    assert all(torch.equal(made[part].view(torch.uint8), tensors[part].view(torch.uint8)) for part in tensors)


@few
@given(st.data(), fp8() | int8())
def test_fp8_and_int8_codes_are_those_of_compressed_tensors(data: st.DataObject, stored: Stored) -> None:
    """`quantize`, given the same scales and zeros, by rows; LLM.int8 has a test of its own."""
    weight_of = f"{LAYER}.weight"
    assume(f"{LAYER}.SCB" not in stored.tensors and stored.tensors[weight_of].dtype != torch.float8_e5m2)
    with opened(stored.tensors, stored.config) as base:
        weight = encoded_weight(base, stored)
        assert isinstance(weight.encoding, Scaled)
        assume(weight.encoding.block[1] == weight.cols and (weight.encoding.block[0] == 1 or weight.rows == 1))
        wanted = data.draw(changed(decoded(base, stored.name)))
        parts = as_tensors(weight, encode(recipe_for(weight, keeps=False), wanted)[0])
    scale = next(part for name, part in parts.items() if "weight_scale" in name).float().view(-1, 1)
    zero = parts.get(f"{LAYER}.weight_zero_point")
    kind = "int" if parts[weight_of].dtype == torch.int8 else "float"
    args = QuantizationArgs(num_bits=8, type=kind, strategy="channel", symmetric=zero is None)
    scale[scale == 0] = 1
    made = quantize(wanted, scale, zero, args, dtype=parts[weight_of].dtype)
    assert torch.equal(made.view(torch.uint8), parts[weight_of].view(torch.uint8))


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_ties_of_4_bit_floats_go_to_even_mantissas() -> None:
    """And a negative value that becomes zero keeps its sign, as in `quantize_and_pack_fp4`."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    row = torch.cat([torch.stack([middles, -middles]).flatten(), torch.tensor([0.1, -0.1])])
    parts = {
        "weight_packed": torch.zeros(1, 8, dtype=torch.uint8),
        "weight_scale": torch.ones(1, 1).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    config = config_of("compressed-tensors", config_groups={"group_0": {"weights": NVFP4}})
    with opened(of_layer(parts), config) as base:
        weight = base.tensors[WEIGHT]
        assert isinstance(weight, EncodedTensor)
        found, said = encode(recipe_for(weight, keeps=True), row[None])
    even = torch.tensor([0.0, 1, 1, 2, 2, 4, 4])
    expected = torch.cat([even, -even, torch.tensor([0.0, -0.0])])
    assert_same_bits(said, expected[None].bfloat16())
    assert bytes(found[CODES].tolist()).hex() == "20426486aaccee80"


# Groups that outgrow their scale, and groups that say nothing


def gptq_of(codes_OI: Tensor, zeros: Tensor, scale: Tensor, form: str, bits: int = 4) -> Stored:
    parts = {"qweight": pack_rows(codes_OI, bits).T, "qzeros": packed_zeros(zeros, bits, form), "scales": scale}
    config = config_of("gptq", bits=bits, group_size=codes_OI.shape[1] // len(scale), **GPTQ_SETTINGS[form])
    return Stored(of_layer(parts), config)


def encoded_anew(stored: Stored, change: Callable[[Tensor], Tensor], *, keeps: bool = True) -> tuple[Any, Any]:
    """Return the decoders of a GPTQ weight before and after a change."""
    decoders, reader = [], Reader()
    with opened(stored.tensors, stored.config) as base:
        weight = encoded_weight(base, stored)
        parts, _ = encode(recipe_for(weight, keeps=keeps), change(decoded(base, stored.name).float()))
        decoders.append(GptqDecoder(weight, weight.encoding, reader))  # type: ignore[arg-type]
    with opened(as_tensors(weight, parts), stored.config) as base:
        weight = encoded_weight(base, stored)
        decoders.append(GptqDecoder(weight, weight.encoding, reader))  # type: ignore[arg-type]
    reader.close()
    return decoders[0], decoders[1]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_only_a_group_that_outgrows_its_scale_gets_another(form: str, is_symmetric: bool) -> None:
    """Where all zeros lie in the middle the new one does too: kernels for symmetric weights do not look."""
    generator = torch.Generator().manual_seed(0)
    zeros = torch.full((4, 16), 8) if is_symmetric else codes(generator, (4, 16), 4).clamp(1, 14)
    scale = scales(generator, (4, 16), torch.float16)
    stored = gptq_of(codes(generator, (16, 128), 4), zeros, scale, form)

    def grow(values: Tensor) -> Tensor:
        values[3, 32:64] *= 5
        return values

    before, after = encoded_anew(stored, grow)
    changed_groups = torch.zeros(16, 4, dtype=torch.bool)
    changed_groups[3, 1] = True
    assert torch.equal(before.scale_OG != after.scale_OG, changed_groups)
    assert torch.equal(before.zero_OG[~changed_groups], after.zero_OG[~changed_groups])
    if is_symmetric:
        assert (after.zero_OG == 8).all()


@pytest.mark.parametrize(("form", "least"), [("gptq", 1), ("gptqmodel", 1), ("gptq_v2", 0)])
def test_a_new_zero_is_one_that_every_kernel_reads_alike(form: str, least: int) -> None:
    """The first format stores one less: a zero of 0 as 15, which exllama's kernels take for 16."""
    generator = torch.Generator().manual_seed(0)
    zeros = codes(generator, (2, 8), 4).clamp(1)
    stored = gptq_of(codes(generator, (8, 64), 4), zeros, scales(generator, (2, 8), torch.float16), form)
    _, after = encoded_anew(stored, lambda values: values.abs() + 1, keeps=False)
    assert (after.zero_OG == least).all()


def test_a_group_with_a_scale_of_zero_keeps_what_it_decodes_to() -> None:
    """Codes below the zero are -0 then; and a value that is not 0 gives the group a scale."""
    generator = torch.Generator().manual_seed(0)
    scale = scales(generator, (2, 8), torch.float16)
    scale[0] = 0
    stored = gptq_of(codes(generator, (8, 64), 4), codes(generator, (2, 8), 4), scale, "gptq_v2")
    with opened(stored.tensors, stored.config) as base:
        weight, values = encoded_weight(base, stored), decoded(base, WEIGHT)
        parts, said = encode(recipe_for(weight, keeps=True), values.float())
        assert all(torch.equal(parts[role], part) for role, part in stored_bytes(weight).items())
        wanted = values.float()
        wanted[2, 5] = -0.3
        said = encode(recipe_for(weight, keeps=True), wanted)[1]
    assert abs(float(said[2, 5]) + 0.3) < 0.01
    wanted[2, 5] = said[2, 5]
    assert torch.equal(said.float(), wanted)


def test_nvfp4_blocks_of_a_scale_of_zero_and_of_nan() -> None:
    """Zeros keep their signs; what a scale of NaN says stays NaN (a merge refuses it)."""
    parts = {
        "weight_packed": random_bytes(torch.Generator().manual_seed(0), 3, 16),
        "weight_scale": torch.tensor([[0.0, 1], [-0.0, 2], [torch.nan, 3]]).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    config = config_of("compressed-tensors", config_groups={"group_0": {"weights": NVFP4}})
    with opened(of_layer(parts), config) as base:
        weight, values = encoded_weight(base, Stored({}, {})), decoded(base, WEIGHT)
        found, said = encode(recipe_for(weight, keeps=True), values.float())
        assert torch.equal(found["scale"], stored_bytes(weight)["scale"])
    assert_same_bits(said, values)


def test_nvfp4_scales_end_at_448() -> None:
    """The weight's own scale stays, and what is too large for it is cut off there."""
    parts = {
        "weight_packed": torch.full((1, 8), 0x77, dtype=torch.uint8),
        "weight_scale": torch.ones(1, 1).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.full((1,), 100.0),
    }
    config = config_of("compressed-tensors", config_groups={"group_0": {"weights": NVFP4}})
    with opened(of_layer(parts), config) as base:
        weight = encoded_weight(base, Stored({}, {}))
        _, said = encode(recipe_for(weight, keeps=True), torch.full((1, 16), 50.0))
    assert (said == torch.tensor(6 * 448 / 100).bfloat16()).all()


# Through a whole merge

KEPT = "model.layers.1.mlp.up_proj"


def base_of(stored: Stored, folder: Path, *, num_files: int) -> Path:
    """A weight twice, under the names of two layers, among plain ones."""
    tensors = {"model.embed_tokens.weight": torch.randn(5, 4).bfloat16()}
    for name, tensor in stored.tensors.items():
        tensors |= {name: tensor, name.replace("layers.0", "layers.1"): tensor.clone()}
    tensors |= {"model.norm.weight": torch.randn(4).bfloat16(), f"{LAYER}.input_scale": torch.ones(1)}
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return save_base(folder, own, {**stored.config, "tie_word_embeddings": False}, num_files=num_files)


def exact_lora(module: str, shape: Sequence[int], generator: torch.Generator, size: float) -> dict[str, Tensor]:
    """Factors whose product has few bits: it is the same in whatever order it is summed."""
    a, b = (torch.randint(-3, 4, grid, generator=generator).float() for grid in ((1, shape[1]), (shape[0], 1)))
    power = 2.0 ** round(torch.log2(torch.tensor(size)).item())
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b * power}


@st.composite
def adapters(draw: st.DrawFn, stored: Stored, values: Tensor, folder: Path) -> Tensor:
    """Write an adapter that changes a weight, or trained it anew; return what it should become, in float64."""
    generator = draw(generators())
    size = float(values.double().abs().mean()) * draw(st.sampled_from([0.02, 0.3, 3.0])) + 1e-6
    if stored.name == EXPERTS or draw(st.booleans(), label="saved"):
        saved = torch.randn(values.shape, generator=generator) * size
        module = "layers.0.mlp.experts" if stored.name == EXPERTS else "layers.0.mlp.up_proj"
        save_adapter(folder, {stored.name: saved}, modules_to_save=[module], target_modules=["q_proj"])
        return saved.double()
    factors = exact_lora(LAYER, values.shape, generator, size)
    save_adapter(folder, factors, lora_alpha=2, target_modules=[LAYER])
    return values.double() + 2 * factors[f"{LAYER}.lora_B.weight"].double() @ factors[f"{LAYER}.lora_A.weight"].double()


@every_encoding
@settings(max_examples=15)
@given(data=st.data())
def test_a_merge_into_the_encoding_of_the_base(kind: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    """One weight is within half a step of what it should be; all else, config and runtime scales too, is as it was."""
    stored, folder = data.draw(WEIGHTS[kind]), tmp_path_factory.mktemp("merge")
    source = base_of(stored, folder / "base", num_files=data.draw(st.integers(1, 3)))
    with opened(stored.tensors, stored.config) as alone:
        values = decoded(alone, stored.name)
    wanted = data.draw(adapters(stored, values, folder / "adapter"))
    with unless_refused():
        # Others may have no code near what is wanted, which `verify` rightly finds.
        verify = kind in ("fp8", "mxfp4")
        loraweld.merge(folder / "adapter", base=source, output=folder / "out", save_method="preserve", verify=verify)
    merged, before = load_folder(folder / "out"), load_folder(source)
    assert merged.keys() == before.keys()
    for name, tensor in before.items():
        assert (merged[name].dtype, merged[name].shape) == (tensor.dtype, tensor.shape)
        if name not in stored.tensors:
            assert torch.equal(merged[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    assert (folder / "out/config.json").read_text() == (source / "config.json").read_text()
    check_index(folder / "out")
    with opened({name: merged[name] for name in stored.tensors}, stored.config) as alone:
        said = decoded(alone, stored.name)
    check_written(stored, {name: merged[name] for name in stored.tensors}, wanted, said)


@contextmanager
def unless_refused() -> Iterator[None]:
    """What a merge refuses: no code has room for the change, or a value is none of the model's dtype."""
    try:
        yield
    except NumericsError as error:
        assert re.search(r"every change of the adapter is smaller|too large for float16", str(error))
        reject()


@few
@given(data=st.data(), generator=generators(), nested=st.booleans())
def test_a_merge_into_4_bit_weights_of_bitsandbytes(
    data: st.DataObject, generator: torch.Generator, nested: bool, tmp_path_factory: Any
) -> None:
    """With absmax the bytes are those that it makes of the merged weight in float32."""
    folder, shape = tmp_path_factory.mktemp("bnb4"), data.draw(st.tuples(sizes(40), sizes(70)))
    options = {"blocksize": data.draw(st.sampled_from([32, 64, 128])), "compress_statistics": nested}
    tensors = nf4(torch.randn(shape, generator=generator).bfloat16(), **options)
    stored = Stored(tensors, config_of("bitsandbytes", load_in_4bit=True))
    source = base_of(stored, folder / "base", num_files=1)
    with opened(stored.tensors, stored.config) as alone:
        values = decoded(alone, WEIGHT)
    factors = exact_lora(LAYER, shape, generator, 0.1)
    save_adapter(folder / "adapter", factors, lora_alpha=1, target_modules=[LAYER])
    merged = values.float() + factors[f"{LAYER}.lora_B.weight"] @ factors[f"{LAYER}.lora_A.weight"]
    with unless_refused():
        loraweld.merge(
            folder / "adapter", base=source, output=folder / "out", save_method="preserve", quantizer="absmax"
        )
    found, expected = load_folder(folder / "out"), nf4(merged, **options)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) or "quant_state" in name, name
        kept = name.replace("layers.0", "layers.1")
        assert torch.equal(found[kept], tensors[name])


def check_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert index.exists() == (len(files) > 1)
    if index.exists():
        written = json.loads(index.read_text())
        assert written["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        assert written["metadata"]["total_size"] == total


@every_encoding
@settings(max_examples=6)
@given(data=st.data(), elements=st.sampled_from([1, 50, 500]))
def test_neither_tiles_nor_memory_nor_threads_show_in_the_bytes(
    kind: str, data: st.DataObject, elements: int, tmp_path_factory: Any
) -> None:
    stored, folder = data.draw(WEIGHTS[kind]), tmp_path_factory.mktemp("tiles")
    source = base_of(stored, folder / "base", num_files=2)
    with opened(stored.tensors, stored.config) as alone:
        data.draw(adapters(stored, decoded(alone, stored.name), folder / "adapter"))
    options: dict[str, Any] = {"base": source, "save_method": "preserve"}
    with unless_refused():
        loraweld.merge(folder / "adapter", output=folder / "out", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "TILE_ELEMENTS", elements)
        patch.setattr(encoding, "_SESSION_ELEMENTS", elements)  # a session for each tile
        loraweld.merge(folder / "adapter", output=folder / "other", max_memory="64MB", workers=1, **options)
    (one, other) = (
        {name: data for name, data in contents(folder / out).items() if name != "loraweld.json"}
        for out in ("out", "other")
    )
    assert one == other


def test_an_adapter_that_changes_nothing_leaves_every_tensor_as_it_was(tmp_path: Path) -> None:
    """Through decoding and encoding, not by a copy."""
    stored = gptq_of(*gptq_parts(), "gptq")
    source = base_of(stored, tmp_path / "base", num_files=1)
    factors = {name: torch.zeros_like(t) for name, t in lora(LAYER, (16, 128)).items()}
    save_adapter(tmp_path / "adapter", factors, target_modules=[LAYER])
    report = loraweld.merge(tmp_path / "adapter", base=source, output=tmp_path / "out", save_method="preserve")
    merged, before = load_folder(tmp_path / "out"), load_folder(source)
    assert all(torch.equal(merged[name], tensor) for name, tensor in before.items())
    assert report.fidelity[0].relative_error < 1e-3
    assert report.fidelity[0].kept is None


def gptq_parts() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    zeros = codes(generator, (4, 16), 4).clamp(1)
    return codes(generator, (16, 128), 4), zeros, scales(generator, (4, 16), torch.float16)


def test_a_weight_that_grows_is_refused(tmp_path: Path) -> None:
    """Its scales are laid out for the size it has; the message names it and says what to do."""
    codes_OI, zeros, scale = gptq_parts()
    stored = gptq_of(codes_OI, zeros, scale, "gptq")
    tensors = {name.replace(LAYER, "lm_head"): tensor for name, tensor in stored.tensors.items()}
    tensors["model.embed_tokens.weight"] = torch.randn(16, 128).half()
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    source = save_base(tmp_path / "base", own, {**stored.config, "tie_word_embeddings": False})
    saved = {f"{name}.weight": torch.randn(24, 128) for name in ("lm_head", "model.embed_tokens")}
    options: dict[str, Any] = {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"]}
    save_adapter(tmp_path / "adapter", saved, **options)
    with pytest.raises(LoraweldError, match=r"lm_head.weight: GPTQ 4 bit of \(16, 128\), will be \(24, 128\)"):
        loraweld.merge(tmp_path / "adapter", base=source, output=tmp_path / "out", save_method="preserve")


def test_a_value_that_the_decoded_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    """A float16 weight of a million would be infinite."""
    stored = gptq_of(*gptq_parts(), "gptq")
    source = base_of(stored, tmp_path / "base", num_files=1)
    factors = {name: t * 1000 for name, t in lora(LAYER, (16, 128)).items()}
    save_adapter(tmp_path / "adapter", factors, target_modules=[LAYER])
    with pytest.raises(LoraweldError, match=r"up_proj.weight', rows 0 to 15: has a value of .*too large for float16"):
        loraweld.merge(tmp_path / "adapter", base=source, output=tmp_path / "out", save_method="preserve")


PEAK = """
import resource, sys
import loraweld, loraweld.execute.fill
from loraweld.planning.memory import LIBRARY_BYTES
options = {"base": sys.argv[2], "output": sys.argv[3], "save_method": "preserve", "workers": 1}
planned = loraweld.plan(sys.argv[1], **options).peak_memory_bytes - LIBRARY_BYTES
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loraweld.merge(sys.argv[1], **options)
grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert grown <= planned, f"{grown} bytes, planned {planned}"
"""


@pytest.mark.parametrize("kind", ["packed", "gptq", "awq", "nvfp4", "mxfp4"])
def test_a_weight_takes_no_more_memory_than_planned(kind: str, tmp_path: Path) -> None:
    """One of 4096 x 4096, or 4 of 2048 x 2048; in a process that does nothing else."""
    stored = large_weight(kind)
    source = save_base(tmp_path / "base", stored.tensors, {**stored.config, "tie_word_embeddings": False})
    if kind == "mxfp4":
        saved = {EXPERTS: torch.randn(4, 2048, 2048).bfloat16()}
        save_adapter(tmp_path / "adapter", saved, modules_to_save=["experts"], target_modules=["q_proj"])
    else:
        save_adapter(tmp_path / "adapter", lora(LAYER, (4096, 4096), rank=16))
    done = run_python("-c", PEAK, tmp_path / "adapter", source, tmp_path / "out")
    assert done.returncode == 0, done.stderr


def large_weight(kind: str) -> Stored:
    """Random words; scales of groups of 128."""
    generator, size, groups = torch.Generator().manual_seed(0), 4096, 32

    def words(*shape: int) -> Tensor:
        return random_bytes(generator, *shape[:-1], 4 * shape[-1]).view(torch.int32)

    scale = scales(generator, (size, groups), torch.bfloat16)
    if kind == "packed":
        parts = {"weight_packed": words(size, 384), "weight_scale": scale, "weight_shape": torch.tensor([size, size])}
        return Stored(of_layer(parts), compressed_config(torch.bfloat16, integer_scheme(3, group=128, symmetric=True)))
    if kind == "gptq":
        parts = {"qweight": words(1024, size), "qzeros": words(groups, 1024), "scales": scale.T.contiguous()}
        return Stored(of_layer(parts), config_of("gptq", bits=8, group_size=128))
    if kind == "awq":
        parts = {"qweight": words(size, 512), "qzeros": words(groups, 512), "scales": scale.T.contiguous()}
        return Stored(of_layer(parts), config_of("awq", bits=4, group_size=128))
    if kind == "nvfp4":
        of_blocks = scales(generator, (size, 256), torch.float32).to(torch.float8_e4m3fn)
        parts = {"weight_packed": random_bytes(generator, size, 2048), "weight_scale": of_blocks}
        config = config_of("compressed-tensors", config_groups={"group_0": {"weights": NVFP4}})
        return Stored(of_layer(parts | {"weight_global_scale": torch.ones(1)}), config)
    blocks = {"blocks": (4, 2048, 64, 16), "scales": (4, 2048, 64)}
    tensors = {f"{EXPERTS}_{part}": codes(generator, grid, 7).to(torch.uint8) for part, grid in blocks.items()}
    return Stored(tensors, config_of("mxfp4"), name=EXPERTS)


# bitsandbytes


def fresh(encoding: Encoding, shape: tuple[int, ...], dtype: str, *, searches: bool = False) -> Recipe:
    options = {"shape": shape, "source": NOT_ENCODED, "encoding": encoding, "searches": searches}
    return Recipe(name=WEIGHT, dtype=dtype, edits=(), kind="encode", **options)


def bnb4_of(shape: tuple[int, ...], *, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False) -> Bnb4:
    options = {"nested_blocksize": 256 if nested else 0, "state_bytes": state_bytes(shape)}
    return Bnb4(quant_type=quant_type, blocksize=blocksize, **options)


@some
@given(st.data(), generators(), st.sampled_from(["nf4", "fp4"]), st.booleans())
def test_4_bit_bytes_are_those_of_bitsandbytes(
    data: st.DataObject, generator: torch.Generator, quant_type: str, nested: bool
) -> None:
    """Codes and scales with absmax; any shape, a last block that is not full, blocks of zeros."""
    shape = data.draw(st.tuples(sizes(70), sizes(300)) | st.just((311, 67)), label="shape")
    weight = torch.randn(shape, generator=generator) * 10.0 ** data.draw(st.integers(-4, 2), label="magnitude")
    weight[: data.draw(st.integers(0, shape[0] - 1))] = 0
    name = data.draw(st.sampled_from([*FLOATS]), label="dtype")
    blocksize = data.draw(st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]), label="block")
    options = {"quant_type": quant_type, "blocksize": blocksize}
    weight = weight.to(FLOATS[name])
    expected = nf4(weight, compress_statistics=nested, **options)
    encoding = bnb4_of(shape, nested=nested, **options)
    dtype = next(code for code, known in DTYPES.items() if known.torch_name == name)
    parts, said = encode(fresh(encoding, shape, dtype), weight.float(), data.draw(heights))
    for role, layout in encoding.layout(WEIGHT, shape).items():
        if role != "state":
            made = expected[layout.name].contiguous().view(-1).view(torch.uint8)
            assert torch.equal(parts[role], made), role
    state, known = (json.loads(bytes(text.tolist())) for text in (parts["state"], expected[state_name(quant_type)]))
    assert state == known | {"dtype": name}
    assert said.dtype == FLOATS[name]


def state_name(quant_type: str) -> str:
    return f"{WEIGHT}.quant_state.bitsandbytes__{quant_type}"


DISTRIBUTIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": lambda generator: torch.randn(64, 512, generator=generator),
    "uniform": lambda generator: torch.rand(64, 512, generator=generator) - 0.5,
    "one-sided": lambda generator: torch.rand(64, 512, generator=generator),
    "heavy tails": lambda generator: (
        torch.randn(64, 512, generator=generator) / torch.rand(64, 512, generator=generator)
    ),
    "one large": lambda generator: torch.eye(64, 512) * 100 + torch.randn(64, 512, generator=generator) * 0.01,
    "constant": lambda generator: torch.full((64, 512), 0.3),
    "two values": lambda generator: torch.randint(0, 2, (64, 512), generator=generator) * 2.0 - 1,
    "zeros": lambda generator: torch.zeros(64, 512),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_searched_scales_are_never_worse(distribution: str, quant_type: str, blocksize: int) -> None:
    """Least squares: at least 12 % less squared error than absmax on normal weights in NF4 by 64, no more on any."""
    weight = DISTRIBUTIONS[distribution](torch.Generator().manual_seed(0))
    encoding = bnb4_of((64, 512), quant_type=quant_type, blocksize=blocksize)
    errors = []
    for searches in (True, False):
        _, said = encode(fresh(encoding, (64, 512), "F32", searches=searches), weight)
        errors.append(float((said - weight).double().square().sum()))
    assert errors[0] <= errors[1] + 1e-12 * float(weight.square().sum())  # the scale itself is rounded
    if (distribution, quant_type) == ("normal", "nf4") and blocksize == 64:
        assert errors[0] <= 0.88 * errors[1]


@some
@given(st.data(), generators())
def test_llm_int8_bytes_are_those_of_bitsandbytes(data: st.DataObject, generator: torch.Generator) -> None:
    """`int8_vectorwise_quant` of float16 rows."""
    shape = data.draw(st.tuples(sizes(60), sizes(300)), label="shape")
    weight = (torch.randn(shape, generator=generator) * 10.0 ** data.draw(st.integers(-3, 2))).half()
    assume(bool(weight.any(1).all()))
    codes_of, scale, _ = int8_vectorwise_quant(weight)
    parts, _ = encode(fresh(llm_int8(shape), shape, "F16"), weight.float(), data.draw(heights))
    assert torch.equal(parts[CODES], codes_of.view(-1).view(torch.uint8))
    assert torch.equal(parts["scale"], scale.view(torch.uint8))
    assert parts["format"].tolist() == [0]


@some
@given(st.data(), generators(), st.sampled_from([*HALVES]))
def test_fp8_rows_are_those_of_compressed_tensors(data: st.DataObject, generator: torch.Generator, dtype: str) -> None:
    """`quantize` with our scales; each the largest magnitude of its row over 448, rounded to bfloat16."""
    shape = data.draw(st.tuples(sizes(60), sizes(300)), label="shape")
    weight = torch.randn(shape, generator=generator).to(HALVES[dtype]).float()
    assume(bool(weight.any(1).all()))
    parts, _ = encode(fresh(fp8_rows(shape), shape, "BF16"), weight, data.draw(heights))
    scale = parts["scale"].view(torch.bfloat16).view(-1, 1)
    assert torch.equal(scale, (weight.abs().amax(1, keepdim=True) / 448).bfloat16())
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    made = quantize(weight, scale, None, args, dtype=torch.float8_e4m3fn)
    assert torch.equal(parts[CODES], made.view(-1).view(torch.uint8))
