"""The quantization_config of an output: how transformers and vLLM are told what its codes are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from loraweld.dtypes import NAME_BY_FLOAT_CODE
from loraweld.request import MergeRequest

# All experts of a model, as a config names them.
EXPERTS = r".*\.experts"


def _bitsandbytes(request: MergeRequest, dtype: str, skipped: list[str], **settings: Any) -> dict[str, Any]:
    return {
        "bnb_4bit_compute_dtype": NAME_BY_FLOAT_CODE[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": request.quant_type,
        "bnb_4bit_use_double_quant": request.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "quant_method": "bitsandbytes",
        **settings,
    }


def _bnb4_settings(request: MergeRequest, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """Source: `BitsAndBytesConfig` of transformers 5.23."""
    return _bitsandbytes(request, dtype, skipped, load_in_4bit=True, load_in_8bit=False)


def _int8_settings(request: MergeRequest, dtype: str, skipped: list[str]) -> dict[str, Any]:
    return _bitsandbytes(request, dtype, skipped, load_in_4bit=False, load_in_8bit=True)


def _fp8_settings(request: MergeRequest, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """Weights with a scale for each output, activations quantised as they come. Source: compressed-tensors 0.20."""
    codes = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**codes, "strategy": "channel", "dynamic": False},
                "input_activations": {**codes, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": [f"re:{EXPERTS}.*" if name == EXPERTS else f"re:.*{re.escape(name)}$" for name in skipped],
    }


SETTINGS: dict[str, Callable[[MergeRequest, str, list[str]], dict[str, Any]]] = {
    "merged_4bit": _bnb4_settings,
    "merged_8bit": _int8_settings,
    "merged_fp8": _fp8_settings,
}
