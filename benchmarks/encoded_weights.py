"""One weight in every encoding that loraweld reads, and the functions of other libraries that decode and encode it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

ROWS = COLS = 4096
LAYER = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
WEIGHT_STD = 0.02
FP8_LARGEST = 448
Call = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedWeight:
    """The tensors of a weight `name` and the settings of its config; what others do with it, where they do."""

    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = f"{LAYER}.weight"
    library: str = ""
    decode: Call | None = None
    encode: Call | None = None


def plain_weight() -> torch.Tensor:
    """Return the weight in bfloat16."""
    return (torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * WEIGHT_STD).bfloat16()


def random_bytes(*shape: int) -> torch.Tensor:
    """Return codes, each as likely as the others."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def random_words(*shape: int) -> torch.Tensor:
    """Return codes packed into int32."""
    return random_bytes(*shape[:-1], shape[-1] * 4).view(torch.int32)


def of_layer(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer under their full names."""
    return {f"{LAYER}.{name}": tensor for name, tensor in parts.items()}


def bnb4(quant_type: str) -> EncodedWeight:
    """NF4 or FP4, double quantisation, blocks of 64."""
    weight = plain_weight()
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
    parts = {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    packed = QuantState.from_dict({k.removeprefix("weight."): v for k, v in parts.items()}, torch.device("cpu"))
    return EncodedWeight(
        tensors=of_layer(weight=codes, **parts),
        settings={"quant_method": "bitsandbytes", "load_in_4bit": True},
        library="bitsandbytes",
        decode=lambda: dequantize_4bit(codes, packed),
        encode=lambda: quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True),
    )


def llm_int8() -> EncodedWeight:
    """bitsandbytes' int8 with a scale for each row."""
    weight = plain_weight().half()
    codes, scale, _ = int8_vectorwise_quant(weight)
    return EncodedWeight(
        tensors=of_layer(weight=codes, SCB=scale),
        settings={"quant_method": "bitsandbytes", "load_in_8bit": True},
        library="bitsandbytes",
        decode=lambda: int8_vectorwise_dequant(codes, scale).bfloat16(),
        encode=lambda: int8_vectorwise_quant(weight),
    )


def fp8_blocks() -> EncodedWeight:
    """DeepSeek's FP8: blocks of 128 by 128."""
    weight, grid = plain_weight(), (ROWS // 128, COLS // 128)
    codes = (weight.float() * (FP8_LARGEST / 0.12)).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    scale = torch.full(grid, 0.12 / FP8_LARGEST)
    encode = scheme(num_bits=8, type="float", strategy="block", block_structure=[128, 128], symmetric=True)
    return EncodedWeight(
        tensors=of_layer(weight=codes, weight_scale_inv=scale),
        settings={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        library="transformers; compressed-tensors encodes",
        decode=lambda: Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16),
        encode=lambda: NaiveQuantizationCompressor.compress(
            {"weight": weight, "weight_scale": scale.bfloat16()}, encode
        ),
    )


def fp8_rows() -> EncodedWeight:
    """compressed-tensors' FP8 with a scale for each row."""
    args = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    parts = {"weight": plain_weight(), "weight_scale": torch.full((ROWS, 1), 0.09 / FP8_LARGEST).bfloat16()}
    return compressed(NaiveQuantizationCompressor, parts, args, "float-quantized")


def packed_int4() -> EncodedWeight:
    """compressed-tensors' int4, symmetric, groups of 128."""
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    parts = {"weight": plain_weight(), "weight_scale": torch.full((ROWS, COLS // 128), 0.008).bfloat16()}
    return compressed(PackedQuantizationCompressor, parts, args, "pack-quantized")


def nvfp4() -> EncodedWeight:
    """compressed-tensors' NVFP4."""
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    parts = {
        "weight": plain_weight(),
        "weight_scale": torch.full((ROWS, COLS // 16), 64.0),
        "weight_global_scale": torch.full((1,), 64 / 0.01),
    }
    return compressed(NVFP4PackedCompressor, parts, args, "nvfp4-pack-quantized")


def compressed(compressor: Any, parts: dict[str, torch.Tensor], args: dict[str, Any], form: str) -> EncodedWeight:
    """Return a weight that compressed-tensors has encoded with scales that were given."""
    made = compressor.compress(dict(parts), scheme(**args))
    return EncodedWeight(
        tensors=of_layer(**made),
        settings={
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
        },
        library="compressed-tensors",
        decode=lambda: compressor.decompress(dict(made), scheme(**args))["weight"],
        encode=lambda: compressor.compress(dict(parts), scheme(**args)),
    )


def scheme(**args: Any) -> QuantizationScheme:
    """Return a scheme of compressed-tensors."""
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


def gptq() -> EncodedWeight:
    """GPTQ, 4 bit, groups of 128."""
    groups = COLS // 128
    parts = of_layer(
        qweight=random_words(COLS // 8, ROWS),
        qzeros=random_words(groups, ROWS // 8),
        scales=torch.full((groups, ROWS), 0.01).half(),
        g_idx=(torch.arange(COLS) // 128).int(),
    )
    return EncodedWeight(tensors=parts, settings={"quant_method": "gptq", "bits": 4, "group_size": 128})


def awq() -> EncodedWeight:
    """AWQ, GEMM layout, groups of 128."""
    groups = COLS // 128
    parts = of_layer(
        qweight=random_words(COLS, ROWS // 8),
        qzeros=random_words(groups, ROWS // 8),
        scales=torch.full((groups, ROWS), 0.01).half(),
    )
    return EncodedWeight(
        tensors=parts, settings={"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    )


def mxfp4() -> EncodedWeight:
    """Four experts of gpt-oss."""
    blocks, scales = random_bytes(4, ROWS, COLS // 4 // 32, 16), torch.full((4, ROWS, COLS // 4 // 32), 120).byte()
    return EncodedWeight(
        tensors={f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales},
        settings={"quant_method": "mxfp4"},
        name=EXPERTS,
        library="transformers",
        decode=lambda: convert_moe_packed_tensors(blocks, scales),
    )


ENCODINGS: dict[str, Callable[[], EncodedWeight]] = {
    "NF4": lambda: bnb4("nf4"),
    "FP4": lambda: bnb4("fp4"),
    "LLM.int8": llm_int8,
    "FP8, blocks": fp8_blocks,
    "FP8, rows": fp8_rows,
    "packed int4": packed_int4,
    "GPTQ": gptq,
    "AWQ": awq,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
}
