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
from loraweld.checkpoint.stored import StoredTensor
from loraweld.dtypes import FLOAT_CODE_BY_NAME, is_plain_float
from loraweld.errors import CheckpointError

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
    r"|SVh|Qidxs|indices|centroids)|_blocks|_scales)"
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
        by_codes[weight.codes.name] = weight
        taken.update(part.name for _, part in weight.parts)
    aside = [name for name in stored if name not in taken and (settings or by_codes) and _OF_RUNTIME.fullmatch(name)]
    tensors: dict[str, Source] = {}
    for name, tensor in stored.items():
        if name in by_codes:
            tensors[by_codes[name].name] = by_codes[name]
        elif name not in taken and name not in aside:
            tensors[name] = tensor
    _check_plain((tensors[name] for name in tensors if name in stored and name not in by_codes), settings)
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
    """The model's own 16-bit type, where the stored parts do not say one."""
    for level in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            code = FLOAT_CODE_BY_NAME.get(str(level.get(key)).removeprefix("torch."))
            if code in ("BF16", "F16"):
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
    yield from bnb4.find(stored)
    yield from scaled.find(_not_of(stored, bnb4.find(stored)), block=None, dtype=dtype)


def _fp8(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    yield from scaled.find(stored, block=_block(settings.get("weight_block_size")), dtype=dtype)


def _compressed_tensors(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    schemes = [group.get("weights") or {} for group in _groups(settings)]
    if any(str(scheme.get("actorder")) == "group" for scheme in schemes) and not any(
        name.endswith("weight_g_idx") for name in stored
    ):
        raise CheckpointError("the config says actorder 'group', but no weight_g_idx is stored")
    bits = list(
        dict.fromkeys(b for b in (scheme.get("num_bits") for scheme in schemes) if type(b) is int and 0 < b <= 8)
    )
    blocks = [scheme.get("block_structure") for scheme in schemes if scheme.get("block_structure")]
    nvfp4 = list(microscaled.find_nvfp4(stored, dtype=dtype))
    yield from nvfp4
    rest = _not_of(stored, nvfp4)
    packed = list(grouped.find_packed(rest, bits=bits or [4, 8]))
    yield from packed
    yield from scaled.find(_not_of(rest, packed), block=_block(blocks[0] if blocks else None), dtype=dtype)


def _modelopt(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    nvfp4 = list(microscaled.find_nvfp4(stored, dtype=dtype))
    yield from nvfp4
    yield from scaled.find(_not_of(stored, nvfp4), block=None, dtype=dtype)


def _mxfp4(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    yield from microscaled.find_mxfp4(stored, dtype=dtype)


def _gptq(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    bits, form = settings.get("bits"), str(settings.get("checkpoint_format") or "gptq").lower()
    if bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"the base is GPTQ of {bits} bits in the format {form!r}; loraweld reads 2, 3, 4 and 8 bits in the "
            "formats gptq and gptq_v2"
        )
    offset = 1 if form == "gptq" else 0
    yield from grouped.find_gptq(stored, bits=bits, group=_group_size(settings), zero_offset=offset)


def _awq(stored: Mapping[str, StoredTensor], settings: Settings, dtype: str) -> Iterator[EncodedTensor]:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise CheckpointError(f"the base is AWQ of {bits} bits in the layout {version!r}; loraweld reads 4 bits, gemm")
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


def _block(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int and 0 < v < 2**31 for v in value):
        return value[0], value[1]
    raise CheckpointError(f"the block size in quantization_config is {str(value)[:80]}, expected two positive integers")


def _groups(settings: Settings) -> list[Settings]:
    groups = settings.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _group_size(settings: Settings) -> int:
    size = settings.get("group_size", settings.get("q_group_size"))
    if type(size) is int and (size == -1 or 0 < size < 2**31):
        return size
    raise CheckpointError(f"group_size in quantization_config is {str(size)[:80]}, expected -1 or a positive integer")


def _check_plain(tensors: Iterable[Source], settings: Settings) -> None:
    for tensor in tensors:
        codes = tensor.dtype in _CODE_DTYPES
        if codes or (_OF_CODES.fullmatch(tensor.name) and (settings or not is_plain_float(tensor.dtype))):
            method = settings.get("quant_method")
            raise CheckpointError(
                f"tensor {tensor.name!r} ({tensor.dtype}) is part of a quantised weight that loraweld does not know"
                + (f" as {method}" if method else "; the config has no quantization_config to say how")
            )
