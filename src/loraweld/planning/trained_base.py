"""`--merge-base quantized-from`: the base as the adapter saw it in training, where that was a 4-bit model.

QLoRA trains against dequant(quant(W)), not W. A 16-bit base is taken to that point by quantising and decoding the
weights that the 4-bit model held as codes; embeddings, heads and routers stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import CONFIG_NAME, Base, open_base
from loraweld.checkpoint.encodings.bnb4 import NESTED_BLOCKSIZE, Bnb4, state_bytes
from loraweld.checkpoint.encodings.encoded import EncodedTensor, RequantisedTensor, Source
from loraweld.checkpoint.encodings.recognise import quantization_settings
from loraweld.checkpoint.hub import Located, known_config, locate_config
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.checkpoint.mounted import mounted_in
from loraweld.checkpoint.stored import StoredTensor
from loraweld.checkpoint.url import check_not_url
from loraweld.errors import CheckpointError, MatchError, RequestError
from loraweld.naming.linear import is_expert, is_linear, is_named
from loraweld.request import QUANT_TYPES, MergeRequest


def requantised_base(request: MergeRequest, base: Base, adapters: Sequence[Adapter]) -> tuple[Base, str]:
    """Return `base` with the weights that were 4-bit in training as a 4-bit model has them, and a note that says so.

    Raises:
        RequestError: the base is quantised itself, or the checkpoint named is not.
        CheckpointError: the checkpoint cannot be read.
        MatchError: it holds weights that the base has not.
    """
    if base.is_quantised:
        raise RequestError(
            f"merge_base quantized-from is for a 16-bit base; {base.label} is quantised, and is what the adapter is "
            "folded onto as it stands"
        )
    located = _checkpoint(request, adapters)
    folder, name = located.folder, located.label
    settings = quantization_settings(read_json_object(folder / CONFIG_NAME)) if (folder / CONFIG_NAME).exists() else {}
    if settings and _has_weights(folder):
        encodings = _from_weights(folder, base)
    elif settings:
        encodings = _from_config(_four_bit(settings, name), base)
    elif request.quantized_base is not None:
        raise RequestError(f"merge_base quantized-from:{name}: that checkpoint is not quantised")
    else:
        encodings = _from_config(_asked(request), base)
    return replace(base, tensors=_replaced(base, encodings)), _note(encodings, name, bool(settings))


def as_given_notes(base: Base, adapters: Sequence[Adapter]) -> list[str]:
    """Say of adapters known to be trained on a 4-bit model that they are folded onto other weights than they saw."""
    notes = []
    for adapter in adapters:
        name = adapter.config.base
        path = known_config(name, revision=adapter.config.revision) if name and not base.is_quantised else None
        if path is not None and quantization_settings(read_json_object(path)).get("load_in_4bit"):
            notes.append(
                f"{adapter.label} was trained on the 4-bit model {name}; it is folded onto the 16-bit base as given. "
                "--merge-base quantized-from folds onto what it saw"
            )
    return notes


def _checkpoint(request: MergeRequest, adapters: Sequence[Adapter]) -> Located:
    config = adapters[0].config
    name, revision = (request.quantized_base, None) if request.quantized_base else (config.base, config.revision)
    if not name:
        raise RequestError(
            f"{config.path}: names no base model; say which 4-bit checkpoint it was trained on: "
            "--merge-base quantized-from:CHECKPOINT"
        )
    if request.quantized_base is None:
        check_not_url(name, str(config.path), "--merge-base quantized-from:CHECKPOINT")
    return locate_config(name, revision=revision)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or bool(mounted_in(folder))


def _from_weights(folder: Path, base: Base) -> dict[str, Bnb4]:
    """The 4-bit weights of the checkpoint itself."""
    trained = open_base(folder)
    found = {
        name: replace(weight.encoding, state_bytes=0, nested_offset=0.0)
        for name, weight in trained.tensors.items()
        if isinstance(weight, EncodedTensor) and isinstance(weight.encoding, Bnb4)
    }
    missing = [name for name in found if not isinstance(base.tensors.get(name), StoredTensor)]
    if missing or not found:
        what = f"has {missing[0]!r} in 4 bit, which {base.label} does not hold" if missing else "has no 4-bit weights"
        raise MatchError(f"{folder}: {what}; is it the checkpoint that the adapter was trained on?")
    return found


def _four_bit(settings: Mapping[str, Any], name: str) -> tuple[str, bool, Sequence[str]]:
    quant_type = settings.get("bnb_4bit_quant_type")
    if not settings.get("load_in_4bit") or quant_type not in QUANT_TYPES:
        method = str(settings.get("quant_method"))[:80]
        raise CheckpointError(
            f"{name} is quantised with {method!r}; merge_base quantized-from knows the 4 bit of bitsandbytes. Give the "
            "quantised checkpoint itself with --base"
        )
    skipped = settings.get("llm_int8_skip_modules") or []
    is_list = isinstance(skipped, list) and all(isinstance(module, str) for module in skipped)
    return quant_type, settings.get("bnb_4bit_use_double_quant") is True, skipped if is_list else []


def _asked(request: MergeRequest) -> tuple[str, bool, Sequence[str]]:
    """A 16-bit checkpoint was loaded in 4 bit: nothing says how, so what QLoRA does, or what the options say."""
    return request.quant_type, request.double_quant, ()


def _from_config(form: tuple[str, bool, Sequence[str]], base: Base) -> dict[str, Bnb4]:
    quant_type, double_quant, skipped = form
    nested = NESTED_BLOCKSIZE if double_quant else 0
    encoding = Bnb4(quant_type=quant_type, blocksize=64, nested_blocksize=nested, state_bytes=0)
    return {
        name: encoding
        for name, stored in base.tensors.items()
        if is_linear(name, stored.shape, base.model_type, base.tensors)
        and not is_expert(name)
        and not is_named(name, skipped)
    }


def _replaced(base: Base, encodings: Mapping[str, Bnb4]) -> dict[str, Source]:
    tensors = dict(base.tensors)
    for name, encoding in encodings.items():
        plain = base.stored[name]
        own = replace(encoding, state_bytes=state_bytes(plain.shape))
        tensors[name] = RequantisedTensor(plain=plain, encoding=own)
    return tensors


def _note(encodings: Mapping[str, Bnb4], name: str, is_said: bool) -> str:
    one = next(iter(encodings.values()))
    double = "with" if one.nested_blocksize else "without"
    form = f"{one.quant_type}, blocks of {one.blocksize}, {double} double quantisation"
    source = f"as {name} is" if is_said else f"assumed: {name} is a 16-bit model, nothing says how it was loaded"
    return f"folded onto the dequantised 4-bit form of {len(encodings)} weights ({form}; {source})"
