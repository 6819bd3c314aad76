"""Quantised weights decode to the bit as the libraries that write them decode, whole and in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import strategies  # noqa: F401  (the profile of hypothesis)
from encoded_bases import (
    FLOATS,
    HALVES,
    WEIGHT,
    assert_same_bits,
    check_decoding,
    codes,
    compressed_config,
    config_of,
    decoded,
    generators,
    grouped_weight,
    integer_scheme,
    integer_weights,
    nf4,
    of_layer,
    opened,
    pack_rows,
    random_bytes,
    scales,
    scheme_of,
    sizes,
)

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
halves, floats = st.sampled_from(list(HALVES)), st.sampled_from(list(FLOATS))
few = settings(max_examples=80)


@pytest.fixture(autouse=True, scope="module")
def uncompiled() -> Iterator[None]:
    """bitsandbytes would compile its arithmetic for each shape anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


# bitsandbytes


@settings(max_examples=400)
@given(st.data(), generators(), floats, st.sampled_from(["nf4", "fp4"]))
def test_4_bit_weights_of_bitsandbytes(
    data: st.DataObject, generator: torch.Generator, dtype: str, quant_type: str
) -> None:
    """NF4 and FP4, double quantisation or not, every block size, every dtype of storage, one and two dimensions."""
    shape = data.draw(st.tuples(sizes(9000)) | st.tuples(sizes(70), sizes(130)) | st.just((311, 67)), label="shape")
    weight = torch.randn(shape, generator=generator) * 10.0 ** data.draw(st.integers(-4, 2), label="magnitude")
    tensors = nf4(
        (weight * (torch.rand(shape, generator=generator) > 0.1)).to(FLOATS[dtype]),
        blocksize=data.draw(st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]), label="block"),
        quant_type=quant_type,
        compress_statistics=data.draw(st.booleans(), label="nested"),
    )
    # All bytes, also those that this weight would not give.
    tensors[WEIGHT] = random_bytes(generator, *tensors[WEIGHT].shape)
    state = QuantState.from_dict({k.removeprefix(f"{WEIGHT}."): v for k, v in tensors.items() if k != WEIGHT}, "cpu")
    expected = dequantised(tensors[WEIGHT], state)
    storages = [
        kind for kind in (torch.uint8, torch.bfloat16, torch.float32) if len(tensors[WEIGHT]) % kind.itemsize == 0
    ]
    storage = data.draw(st.sampled_from(storages), label="storage")
    tensors[WEIGHT] = tensors[WEIGHT].flatten().view(storage).view(-1, 1)
    config = data.draw(st.sampled_from([config_of("bitsandbytes", load_in_4bit=True), config_of(None), None]))
    # Code 8 of FP4 is 0 in the stored codebook and in bitsandbytes' Python, -0 in its C.
    check_decoding(data, tensors, config, expected, zero_signs=quant_type == "nf4")


def dequantised(quantised: Tensor, state: QuantState) -> Tensor:
    """What bitsandbytes makes of a weight.

    Where a block ends within a row, the CPU kernel of 0.50.2 takes the wrong scale ((3, 48) in blocks of 32 comes back
    off by half): there its arithmetic in Python, which its other kernels are held to.
    """
    if state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(quantised, state).reshape(state.shape)
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    parts = quantised.flatten(), absmax, state.code, state.blocksize
    return _dequantize_4bit_compute(*parts, state.shape, state.dtype).reshape(state.shape)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_4_bit_codes_may_be_stored_as_any_dtype(storage: torch.dtype) -> None:
    """bnb_4bit_quant_storage changes the dtype in the file and no value."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    with opened(nf4(weight, quant_storage=storage), config_of("bitsandbytes")) as base:
        with opened(nf4(weight), config_of("bitsandbytes")) as plain:
            assert base.stored[WEIGHT].dtype != plain.stored[WEIGHT].dtype or storage == torch.uint8
            assert torch.equal(decoded(base, WEIGHT), decoded(plain, WEIGHT))


@few
@given(st.data(), generators(), halves)
def test_llm_int8(data: st.DataObject, generator: torch.Generator, dtype: str) -> None:
    """code · SCB · float32(1/127), rounded to the model's dtype."""
    shape = data.draw(st.tuples(sizes(60), sizes(300)), label="shape")
    quantised, scale, _ = int8_vectorwise_quant((torch.randn(shape, generator=generator) * 3).half())
    expected = int8_vectorwise_dequant(quantised, scale).to(HALVES[dtype])
    tensors = {"weight": quantised, "SCB": scale}
    if data.draw(st.booleans(), label="weight_format"):
        tensors["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    config = data.draw(st.sampled_from([{"quant_method": "bitsandbytes"}, {"quant_method": None}]))
    check_decoding(
        data,
        of_layer(tensors),
        config_of(None, dtype=dtype) | {"quantization_config": {**config, "load_in_8bit": True}},
        expected,
    )


def test_llm_int8_is_scaled_in_the_order_of_bitsandbytes() -> None:
    """Scaling the scales first would differ in some fifty of these million elements."""
    generator = torch.Generator().manual_seed(0)
    quantised = codes(generator, (1000, 1000), 8).to(torch.uint8).view(torch.int8)
    scale = torch.rand(1000, generator=generator)
    with opened(of_layer({"weight": quantised, "SCB": scale}), config_of("bitsandbytes", dtype="float16")) as base:
        assert_same_bits(decoded(base, WEIGHT), int8_vectorwise_dequant(quantised, scale).half())


# FP8


@st.composite
def fp8_codes(draw: st.DrawFn, shape: tuple[int, int]) -> Tensor:
    """All codes, infinities and NaN too."""
    return random_bytes(draw(generators()), *shape).view(draw(st.sampled_from(FP8)))


def in_blocks(quantised: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """DeepSeek-V3's `weight_dequant`: block (i, j) is what rows i·B0… and columns j·B1… share; the last are cut."""
    result = torch.empty(quantised.shape, dtype=dtype)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            result[part] = (quantised[part].float() * scale[i, j].float()).to(dtype)
    return result


@few
@given(st.data(), generators(), halves)
def test_fp8_in_blocks_with_the_last_ones_cut(data: st.DataObject, generator: torch.Generator, dtype: str) -> None:
    """DeepSeek's layout, 128 by 128 and odd blocks, with scales in float32, bfloat16 and powers of two."""
    block = data.draw(st.just((128, 128)) | st.tuples(sizes(9), sizes(40)), label="block")
    shape = data.draw(st.tuples(sizes(300), sizes(300)), label="shape")
    quantised = data.draw(fp8_codes(shape))
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu]), label="scale")
    scale = scales(generator, (-(-shape[0] // block[0]), -(-shape[1] // block[1])), torch.float32).to(kind)
    check_decoding(
        data,
        of_layer({"weight": quantised, "weight_scale_inv": scale}),
        config_of("fp8", dtype=dtype, weight_block_size=list(block)),
        in_blocks(quantised, scale, block, HALVES[dtype]),
    )


@few
@given(st.data(), generators(), halves)
def test_fp8_as_transformers_dequantises_it(data: st.DataObject, generator: torch.Generator, dtype: str) -> None:
    """Where blocks divide the weight; else `Fp8Dequantize` of 5.23 refuses it or takes other blocks than were meant."""
    block = data.draw(st.tuples(sizes(9), sizes(40)), label="block")
    grid = data.draw(st.tuples(sizes(8), sizes(8)), label="blocks")
    quantised = data.draw(fp8_codes((block[0] * grid[0], block[1] * grid[1])))
    scale = scales(generator, grid, torch.float32)
    expected = Fp8Dequantize(None)._dequantize_one(quantised, scale, HALVES[dtype])
    config = config_of("fp8", dtype=dtype, weight_block_size=list(block), activation_scheme="dynamic")
    check_decoding(data, of_layer({"weight": quantised, "weight_scale_inv": scale}), config, expected)


@few
@given(st.data(), generators(), halves)
def test_fp8_with_one_scale_or_one_a_row(data: st.DataObject, generator: torch.Generator, dtype: str) -> None:
    """fbgemm_fp8 (rows), ModelOpt and transformers (the whole weight)."""
    shape = data.draw(st.tuples(sizes(60), sizes(200)), label="shape")
    quantised = data.draw(fp8_codes(shape))
    forms = [(shape[0], 1), (shape[0],), (), (1,), (1, 1)]
    scale = scales(generator, data.draw(st.sampled_from(forms), label="scale"), torch.float32)
    spread = scale.view(-1, 1).expand(shape[0], 1)
    expected = (quantised.float() * spread).to(HALVES[dtype])
    method = data.draw(st.sampled_from(["fbgemm_fp8", "modelopt", "compressed-tensors", "fp8", None]), label="method")
    suffix = "weight_scale_inv" if method == "fp8" else "weight_scale"
    check_decoding(data, of_layer({"weight": quantised, suffix: scale}), config_of(method, dtype=dtype), expected)


# compressed-tensors


@settings(max_examples=300)
@given(st.data(), integer_weights(st.integers(1, 8)))
def test_packed_integers_of_compressed_tensors(
    data: st.DataObject, case: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    """1 to 8 bits; a scale for the weight, a row or a group; with zeros or without."""
    args, tensors = case
    compressed = PackedQuantizationCompressor.compress(tensors, scheme_of(args))
    # Not `decompress`: release 0.20 cannot unpack 4-bit zeros of fewer than 9 rows.
    numbers = tensors["weight_scale"], tensors.get("weight_zero_point"), scheme_of(args).weights
    expected = dequantize(quantize(tensors["weight"], *numbers, dtype=torch.int8), *numbers)
    config = compressed_config(expected.dtype, args, format="pack-quantized")
    check_decoding(data, of_layer(compressed), config, expected)


@few
@given(st.data(), integer_weights(st.just(8)))
def test_plain_int8_of_compressed_tensors(data: st.DataObject, case: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    """`int-quantized`: codes as they are, with zeros or without; the decoded dtype is the model's."""
    args, tensors = case
    compressed = NaiveQuantizationCompressor.compress(tensors, scheme_of(args))
    expected = NaiveQuantizationCompressor.decompress(compressed, scheme_of(args))["weight"]
    dtype = torch.bfloat16 if expected.dtype == torch.float32 else expected.dtype
    config = compressed_config(dtype, args, format="int-quantized")
    check_decoding(data, of_layer(compressed), config, expected.to(dtype))


@few
@given(st.data(), generators(), halves)
def test_fp8_of_compressed_tensors(data: st.DataObject, generator: torch.Generator, dtype: str) -> None:
    """`float-quantized`: one scale, one a row, a group or a block; the last blocks are cut."""
    shape = data.draw(st.tuples(sizes(40), sizes(200)), label="shape")
    block, group = data.draw(st.tuples(sizes(9), sizes(40)), label="block"), data.draw(sizes(20), label="group")
    strategy = data.draw(st.sampled_from(["tensor", "channel", "group", "block"]), label="strategy")
    args: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "group":
        shape = (shape[0], group * 3)
    args |= {"block": {"block_structure": list(block)}, "group": {"group_size": group}}.get(strategy, {})
    grids = {
        "tensor": (1,),
        "channel": (shape[0], 1),
        "group": (shape[0], 3),
        "block": (-(-shape[0] // block[0]), -(-shape[1] // block[1])),
    }
    parts = {
        "weight": random_bytes(generator, *shape).view(torch.float8_e4m3fn),
        "weight_scale": scales(generator, grids[strategy], HALVES[dtype]),
    }
    expected = NaiveQuantizationCompressor.decompress(parts, scheme_of(args))["weight"]
    config = compressed_config(HALVES[dtype], args, format="float-quantized")
    check_decoding(data, of_layer(parts), config, expected)


@few
@given(st.data(), generators(), st.sampled_from([3, 4, 8]), st.booleans())
def test_packed_integers_in_the_order_of_activations(
    data: st.DataObject, generator: torch.Generator, bits: int, symmetric: bool
) -> None:
    """actorder "group" (gone from release 0.20): weight_g_idx names the group of each column."""
    rows, group, groups = data.draw(sizes(40)), data.draw(sizes(20)), data.draw(sizes(6))
    values = codes(generator, (rows, group * groups), bits)
    zeros = codes(generator, (groups, rows), bits) if not symmetric else torch.full((groups, rows), 2 ** (bits - 1))
    scale = scales(generator, (groups, rows), torch.bfloat16)
    order = torch.randperm(group * groups, generator=generator) // group
    parts = {
        "weight_packed": pack_rows(values, bits),
        "weight_scale": scale.T,
        "weight_shape": torch.tensor(values.shape),
        "weight_g_idx": order.int(),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack_rows(zeros, bits).T
    args = integer_scheme(bits, group=group, symmetric=symmetric) | {"actorder": "group"}
    expected = grouped_weight(values, zeros, scale, order)
    check_decoding(data, of_layer(parts), compressed_config(torch.bfloat16, args), expected)


def test_each_weight_has_the_scheme_that_its_shapes_fit() -> None:
    """A config may name several; which weight has which is not in its words but in the stored sizes."""
    generator = torch.Generator().manual_seed(0)
    schemes = [integer_scheme(bits, group=group, symmetric=True) for bits, group in ((4, 32), (8, None), (4, None))]
    tensors, expected = {}, {}
    for number, args in enumerate(schemes):
        grid = (6, 64 // (args["group_size"] or 64))
        parts = {
            "weight": torch.randn(6, 64, generator=generator),
            "weight_scale": scales(generator, grid, torch.bfloat16),
        }
        parts = PackedQuantizationCompressor.compress(parts, scheme_of(args))
        expected[f"layer{number}.weight"] = PackedQuantizationCompressor.decompress(parts, scheme_of(args))["weight"]
        tensors |= {f"layer{number}.{name}": tensor for name, tensor in parts.items()}
    with opened(tensors, compressed_config(torch.bfloat16, *schemes)) as base:
        assert {name: decoded(base, name).tolist() for name in base.tensors} == {
            name: weight.tolist() for name, weight in expected.items()
        }
