"""Packed formats without a library to ask here decode to the bit as their definitions say, a code at a time.

GPTQ and AWQ: `pack` of AutoGPTQ and GPTQModel, `WQLinear_GEMM.from_linear` of AutoAWQ. NVFP4 and MXFP4: OCP
Microscaling Formats 1.0; MXFP4 also as transformers decodes it, NVFP4 as compressed-tensors does.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import strategies  # noqa: F401  (the profile of hypothesis)
from encoded_bases import (
    FLOATS,
    GPTQ_SETTINGS,
    HALVES,
    check_decoding,
    codes,
    config_of,
    generators,
    grouped_weight,
    of_layer,
    pack_awq,
    pack_rows,
    packed_zeros,
    random_bytes,
    scales,
    sizes,
)

few = settings(max_examples=80)


@few
@given(st.data(), generators())
def test_mxfp4_experts(data: st.DataObject, generator: torch.Generator) -> None:
    """gpt-oss: all codes, all scales (2**-127 to 2**127, NaN); rows of one expert and of several."""
    experts, outputs, blocks = (data.draw(sizes(largest)) for largest in (4, 20, 4))
    parts = {
        "blocks": random_bytes(generator, experts, outputs, blocks, 16),
        "scales": random_bytes(generator, experts, outputs, blocks),
    }
    expected = convert_moe_packed_tensors(parts["blocks"], parts["scales"])
    if data.draw(st.booleans(), label="named scales"):
        parts["scales"] = parts["scales"].view(torch.float8_e8m0fnu)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_{part}": tensor for part, tensor in parts.items()}
    check_decoding(data, tensors, config_of("mxfp4"), expected, name=name)


@few
@given(st.data(), generators())
def test_nvfp4_of_compressed_tensors(data: st.DataObject, generator: torch.Generator) -> None:
    """Scales of 16 codes are divided by the weight's own."""
    rows, blocks = data.draw(sizes(40)), data.draw(sizes(9))
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    parts = {
        "weight_packed": random_bytes(generator, rows, blocks * 8),
        "weight_scale": random_bytes(generator, rows, blocks).view(torch.float8_e4m3fn),
        "weight_global_scale": scales(generator, (1,), torch.float32) * 1000,
    }
    expected = NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
    config = config_of("compressed-tensors", config_groups={"group_0": {"weights": args}})
    check_decoding(data, of_layer(parts), config, expected)


def small_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """A float without infinities by its definition: sign, biased exponent, mantissa; exponent 0 is subnormal."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent, mantissa = (code >> mantissa_bits) % 2**exponent_bits, code % 2**mantissa_bits
    leading = 1 if exponent else 0
    return sign * (leading + mantissa / 2**mantissa_bits) * 2.0 ** (max(exponent, 1) - 2 ** (exponent_bits - 1) + 1)


@few
@given(st.data(), generators(), st.sampled_from([*HALVES]), st.sampled_from([(), (1,)]))
def test_nvfp4_of_modelopt(data: st.DataObject, generator: torch.Generator, dtype: str, whole: tuple[int, ...]) -> None:
    """E2M1 codes, the low half of a byte first; E4M3 scales of 16 codes, multiplied with the weight's own."""
    rows, blocks = data.draw(sizes(9)), data.draw(sizes(5))
    packed, scale = random_bytes(generator, rows, blocks * 8), random_bytes(generator, rows, blocks)
    scale[scale % 128 == 127] = 56  # NaN is not the point here
    of_weight = scales(generator, whole, torch.float32)
    expected = torch.empty(rows, blocks * 16)
    for row in range(rows):
        for col in range(blocks * 16):
            code = small_float(int(packed[row, col // 2]) >> (4 * (col % 2)) & 15, 2, 1)
            of_block = torch.tensor(small_float(int(scale[row, col // 16]), 4, 3)) * of_weight.view(())
            expected[row, col] = code * of_block
    parts = {"weight": packed, "weight_scale": scale.view(torch.float8_e4m3fn), "weight_scale_2": of_weight}
    config = config_of("modelopt", dtype=dtype, quant_algo="NVFP4")
    check_decoding(data, of_layer(parts), config, expected.to(HALVES[dtype]))


# GPTQ and AWQ: written from AutoGPTQ's and AutoAWQ's `pack`, a code at a time


@settings(max_examples=300)
@given(st.data(), generators(), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["gptq", "gptq_v2", "gptqmodel"]))
def test_gptq(data: st.DataObject, generator: torch.Generator, bits: int, form: str) -> None:
    """All zeros; in order, in the order of activations, without g_idx; one group or several, the last cut."""
    outputs, inputs = data.draw(sizes(40)), 32 * data.draw(sizes(5))
    group = data.draw(st.sampled_from([-1, 16, 32, inputs]) | sizes(inputs), label="group")
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    values, zeros = codes(generator, (outputs, inputs), bits), codes(generator, (groups, outputs), bits)
    scale = scales(generator, (groups, outputs), data.draw(st.sampled_from([*FLOATS.values()])))
    group_of = torch.arange(inputs) // size
    parts = {"qweight": pack_rows(values, bits).T, "scales": scale, "qzeros": packed_zeros(zeros, bits, form)}
    if inputs % size or data.draw(st.booleans(), label="g_idx"):
        if data.draw(st.booleans(), label="act order"):
            group_of = group_of[torch.randperm(inputs, generator=generator)]
        parts["g_idx"] = group_of.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    config = config_of("gptq", bits=bits, group_size=group, **GPTQ_SETTINGS[form])
    check_decoding(data, of_layer(parts), config, grouped_weight(values, zeros, scale, group_of))


@few
@given(st.data(), generators())
def test_awq(data: st.DataObject, generator: torch.Generator) -> None:
    """GEMM layout; rows from the middle of a word too."""
    outputs, groups, size = 8 * data.draw(sizes(9)), data.draw(sizes(4)), data.draw(sizes(40))
    values, zeros = codes(generator, (outputs, groups * size), 4), codes(generator, (groups, outputs), 4)
    scale = scales(generator, (groups, outputs), data.draw(st.sampled_from([*HALVES.values()])))
    expected = grouped_weight(values, zeros, scale, torch.arange(groups * size) // size)
    parts = {"qweight": pack_awq(values.T), "qzeros": pack_awq(zeros), "scales": scale}
    group = -1 if groups == 1 and data.draw(st.booleans()) else size
    config = config_of("awq", bits=4, group_size=group, version=data.draw(st.sampled_from(["gemm", "GEMM"])))
    check_decoding(data, of_layer(parts), config, expected)
