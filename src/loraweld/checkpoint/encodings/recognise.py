"""Stored tensors + quantization_config → the weights a model has: quantised ones grouped, plain ones as they are.

What is quantised in a way that is not read is refused by its name: codes are never taken for numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraweld.checkpoint.encodings import bnb4, grouped, microscaled, scaled
from loraweld.checkpoint.encodings.encoded import EncodedTensor, Source
from loraweld.checkpoint.encodings.schemes import MAX_SIZE, parse_block, parse_schemes
from loraweld.checkpoint.stored import StoredTensor
from loraweld.dtypes import FLOAT_CODE_BY_NAME, is_plain_float
from loraweld.errors import CheckpointError, listing

Settings = Mapping[str, Any]
SETTINGS_KEYS = ("quantization_config", "compression_config")
# Scales of activations and caches: they belong to the quantised runtime and have no place in a plain model.
_OF_RUNTIME = re.compile(
    r".*\.(input_scale|input_scale_ub|input_zero_point|input_global_scale|output_scale|activation_scale"
    r"|[qkv]_scale|[qkv]_zero_point|kv_scale|output_zero_point)"
)
# How the parts of quantised weights are called by the formats of transformers 5.23 and their tools.
_OF_CODES = re.compile(
    r".*(\.(qweight|qzeros|scales|g_idx|SCB|CB|absmax|quant_map|nested_absmax|nested_quant_map|weight_format"
    r"|quant_state\..*|weight_scale|weight_scale_inv|weight_scale_2|weight_packed|weight_shape|weight_zero_point"
    r"|weight_g_idx|weight_global_scale|codes|codebooks|W_q|scale_and_zero|qscale|tensor_qdata|tensor_scale"
    r"|SVh|Qidxs|indices|centroids|pre_quant_scale|compressed|bitmask|row_offsets)|_blocks|_scales)"
)
_CODE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights by name, in the order of their codes; `aside` are tensors of the quantised runtime alone."""

    tensors: Mapping[str, Source]
    aside: tuple[str, ...]


def recognise(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Weights:
    """Group the parts of quantised weights.

    Raises:
        CheckpointError: an encoding that is not read, a part that is missing or does not fit, or codes that
            belong to no weight.
    """
    settings = quantization_settings(config)
    by_codes: dict[str, EncodedTensor] = {}
    taken: set[str] = set()
    for weight in _find(stored, settings, _decoded_dtype(config)):
        parts = {part.name for _, part in weight.parts}
        _check_once(weight, parts & taken, stored)
        by_codes[weight.codes.name] = weight
        taken |= parts
    quantised = bool(settings or by_codes)
    of_runtime = (name for name in stored if name not in taken and quantised and _OF_RUNTIME.fullmatch(name))
    aside = dict.fromkeys(of_runtime)
    tensors: dict[str, Source] = {}
    for name, tensor in stored.items():
        if name in by_codes:
            tensors[by_codes[name].name] = by_codes[name]
        elif name not in taken and name not in aside:
            tensors[name] = tensor
    _check_plain((tensor for tensor in tensors.values() if isinstance(tensor, StoredTensor)), settings, quantised)
    return Weights(tensors, tuple(aside))


def quantization_settings(config: Mapping[str, Any]) -> Settings:
    """Return the quantization_config of the model or of its text model, {} if there is none."""
    for level in (config, config.get("text_config") or {}):
        for key in SETTINGS_KEYS:
            if isinstance(level.get(key), dict) and level[key]:
                found: Settings = level[key]
                return found
    return {}


def _decoded_dtype(config: Mapping[str, Any]) -> str:
    """The model's own dtype, where the stored parts do not say one."""
    for level in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            code = FLOAT_CODE_BY_NAME.get(str(level.get(key)).removeprefix("torch."))
            if code in ("BF16", "F16", "F32"):
                return code
    return "BF16"


def _find(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    method = str(settings.get("quant_method") or _implied_method(settings)).lower()
    finder = _FINDERS.get(method)
    if finder is None:
        raise CheckpointError(
            f"the base is quantised with {method!r}, which loraweld does not read; it reads "
            f"{', '.join(name for name in _FINDERS if name)}. Give the model's 16-bit form with --base"
        )
    yield from finder(stored, settings, dtype)


def _implied_method(settings: Settings) -> str:
    """Old configs of bitsandbytes do not name their method."""
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else ""


def _bitsandbytes(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    four_bit = list(bnb4.find(stored))
    yield from four_bit
    yield from scaled.find(_not_of(stored, four_bit), codes=(*scaled.FP8, "I8"), blocks=(), dtype=dtype)


def _fp8(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    block = settings.get("weight_block_size")
    blocks = [parse_block(block)] if block is not None else []
    # int8 is not read here: transformers takes it for pairs of FP4 codes.
    yield from scaled.find(stored, codes=scaled.FP8, blocks=blocks, dtype=dtype)


def _compressed_tensors(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    schemes = parse_schemes(settings)
    nvfp4 = list(microscaled.find_nvfp4(stored, dtype=dtype))
    yield from nvfp4
    integers = [scheme for scheme in schemes if not scheme.is_float]
    rest = _not_of(stored, nvfp4)
    packed = list(grouped.find_packed(rest, schemes=integers))
    yield from packed
    yield from scaled.find(
        _not_of(rest, packed),
        codes=(*scaled.FP8, "I8"),
        blocks=list(dict.fromkeys(size for scheme in schemes for size in scheme.blocks)),
        dtype=dtype,
        symmetric=any(scheme.symmetric for scheme in integers) or not integers,
    )


def _modelopt(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    nvfp4 = list(microscaled.find_nvfp4(stored, dtype=dtype))
    yield from nvfp4
    yield from scaled.find(_not_of(stored, nvfp4), codes=scaled.FP8, blocks=(), dtype=dtype)


def _mxfp4(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    yield from microscaled.find_mxfp4(stored, dtype=dtype)


def _gptq(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    bits = settings.get("bits")
    forms = {str(settings[key]).lower() for key in ("checkpoint_format", "format") if settings.get(key)} or {"gptq"}
    if settings.get("is_marlin_format"):
        forms = {"marlin"}
    if type(bits) is not int or bits not in (2, 3, 4, 8) or len(forms) > 1 or not forms <= {"gptq", "gptq_v2"}:
        raise CheckpointError(
            f"the base is GPTQ of {str(bits)[:80]} bits in the format {' and '.join(sorted(forms))}; loraweld reads "
            "2, 3, 4 and 8 bits in the formats gptq and gptq_v2"
        )
    first = forms == {"gptq"}
    yield from grouped.find_gptq(
        stored,
        bits=bits,
        group=_group_size(settings),
        zero_offset=1 if first else 0,
        carries=first and bits != 3 and _is_of_gptqmodel(settings),
    )


def _is_of_gptqmodel(settings: Settings) -> bool:
    """GPTQModel made the old format by subtracting from whole words (not at 3 bits), AutoGPTQ from each zero."""
    meta = settings.get("meta")
    return isinstance(meta, dict) and "gptqmodel" in str(meta.get("quantizer")).lower()


def _awq(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    version = "llm-awq" if settings.get("backend") == "llm-awq" else version
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise CheckpointError(
            f"the base is AWQ of {str(bits)[:80]} bits in the layout {version!r}; loraweld reads 4 bits, gemm"
        )
    yield from grouped.find_awq(stored, group=_group_size(settings))


Finder = Callable[[Mapping[str, StoredTensor], Settings, str], Iterator[EncodedTensor]]
# By quant_method; a model without a config may still hold bitsandbytes weights, which describe themselves.
_FINDERS: dict[str, Finder] = {
    "": _bitsandbytes,
    "bitsandbytes": _bitsandbytes,
    "bitsandbytes_4bit": _bitsandbytes,
    "bitsandbytes_8bit": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
}


def _not_of(stored: Mapping[str, StoredTensor], weights: Iterable[EncodedTensor]) -> dict[str, StoredTensor]:
    taken = {part.name for weight in weights for _, part in weight.parts}
    return {name: tensor for name, tensor in stored.items() if name not in taken}


def _group_size(settings: Settings) -> int:
    size = settings.get("group_size", settings.get("q_group_size"))
    if type(size) is int and (size == -1 or 0 < size < MAX_SIZE):
        return size
    raise CheckpointError(f"group_size in quantization_config is {str(size)[:80]}, expected -1 or a positive integer")


def _check_once(weight: EncodedTensor, shared: set[str], stored: Mapping[str, StoredTensor]) -> None:
    if weight.name in stored and weight.name != weight.codes.name:
        shared = shared | {weight.name}
    if shared:
        raise CheckpointError(
            f"weight {weight.name!r} is stored twice: {weight.codes.name!r} is not all of it, there is also\n"
            + listing(repr(name) for name in shared)
        )


def _check_plain(tensors: Iterable[StoredTensor], settings: Settings, quantised: bool) -> None:
    for tensor in tensors:
        plain = is_plain_float(tensor.dtype)
        codes = tensor.dtype in _CODE_DTYPES or (tensor.name.endswith(".weight") and not plain)
        if codes or ((quantised or not plain) and _OF_CODES.fullmatch(tensor.name)):
            method = settings.get("quant_method")
            raise CheckpointError(
                f"tensor {tensor.name!r} ({tensor.dtype}) is part of a quantised weight that loraweld does not know"
                + (f" as {str(method)[:80]}" if method else "; the config has no quantization_config to say how")
            )
