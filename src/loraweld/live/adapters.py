"""The adapters of a model in memory, as the folders that PEFT writes."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from loraweld.adapter.config import CONFIG_NAME, AdapterConfig, read_adapter_config
from loraweld.adapter.files import SAFE_NAME
from loraweld.adapter.tuners import TUNERS
from loraweld.errors import AdapterError, RequestError, listing
from loraweld.live.weights import PEFT_PREFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveAdapters:
    """Which adapters act in the model now: `active` are to be merged, `merged` are in its weights already.

    `disabled`: there are adapters, but the model computes without them.
    """

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    disabled: bool = False


def find_adapters(inner: Any) -> LiveAdapters:
    """Say which adapters act.

    Raises:
        RequestError: some layers are merged and others not, or layers differ in which adapters are active.
    """
    layers = list(_layers(inner))
    if not layers:
        return LiveAdapters()
    merged = {name for _, layer in layers for name in layer.merged_adapters}
    active = list(dict.fromkeys(name for _, layer in layers for name in layer.active_adapters))
    _check_uniform(layers, active)
    if all(layer.disable_adapters for _, layer in layers):
        return LiveAdapters(merged=tuple(sorted(merged)), disabled=not merged)
    if merged:
        _check_merged(layers, active, merged)
        return LiveAdapters(merged=tuple(sorted(merged)))
    return LiveAdapters(active=tuple(active))


def save_adapter(inner: Any, name: str, folder: Path, *, state: Mapping[str, torch.Tensor]) -> Path:
    """Write adapter `name` to `folder` as PEFT does, and return the folder; the model's own config is not changed."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    # Without the embeddings: those of the base in memory are what counts.
    tensors = adapter_tensors(inner, name, state=state, embeddings=False)
    save_file(tensors, folder / SAFE_NAME, metadata={"format": "pt"})
    save_adapter_config(inner, name, folder)
    return folder


def adapter_tensors(
    inner: Any, name: str, *, state: Mapping[str, torch.Tensor], embeddings: Literal["auto"] | bool
) -> dict[str, torch.Tensor]:
    """Return the tensors of PEFT's file by their names in it, each in memory of its own.

    Raises:
        RequestError: one has no values, or some lie outside the model.
    """
    from peft.utils import get_peft_model_state_dict

    kind = str(getattr(inner.peft_config[name].peft_type, "value", ""))
    if kind in TUNERS and TUNERS[kind].shares_tensors:
        raise RequestError(
            f"adapter {name!r} is of {kind}, whose layers share tensors that PEFT keeps outside the model: save it "
            "with save_pretrained, and merge the folder with loraweld.merge"
        )
    found = get_peft_model_state_dict(
        inner, state_dict=dict(state), adapter_name=name, save_embedding_layers=embeddings
    )
    away = [key for key, tensor in found.items() if tensor.device.type == "meta"]
    if away:
        raise RequestError(
            f"tensors of adapter {name!r} have no values in memory (device meta): PEFT makes them so on layers that "
            f"accelerate has offloaded; give their values with state_dict:\n{listing(away, limit=8)}"
        )
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, tensor in found.items():
        own = tensor.detach().contiguous()
        if own.numel() and own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        tensors[PEFT_PREFIX + key] = own
    return tensors


def save_adapter_config(inner: Any, name: str, folder: Path) -> None:
    """Write adapter_config.json as PEFT does when it saves a model."""
    config = copy.deepcopy(inner.peft_config[name])
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(inner, "name_or_path", None) or None
    config.inference_mode = True
    kind = type(inner)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping if config.task_type is None else None)
    _honour_scales(inner, name, folder)


def as_in_memory(folder: Path) -> None:
    """Say of an adapter that its base is as it is: what changes it at the start (PiSSA, more layers) is in memory."""
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    if not isinstance(config.get("init_lora_weights", True), bool) or config.get("layer_replication"):
        as_it_is = {"init_lora_weights": True, "layer_replication": None}
        path.write_text(json.dumps({**config, **as_it_is}, indent=2, sort_keys=True))


def _honour_scales(inner: Any, name: str, folder: Path) -> None:
    """Where a layer's scaling is not what the config says, the config of the saved adapter gets what makes it so.

    Raises:
        RequestError: no alpha gives that scaling.
    """
    path = folder / CONFIG_NAME
    raw = json.loads(path.read_text())
    if raw.get("peft_type") != "LORA":
        return
    as_saved = {**raw, "init_lora_weights": True}
    path.write_text(json.dumps(as_saved))
    try:
        config = read_adapter_config(folder)
        changed = dict(_changed_alphas(inner, name, config))
    except AdapterError:  # of a kind that is not merged; said where it is opened
        changed = {}
    if changed:
        raw["alpha_pattern"] = {**changed, **raw.get("alpha_pattern", {})}
    path.write_text(json.dumps(raw, indent=2, sort_keys=True))


def _changed_alphas(inner: Any, name: str, config: AdapterConfig) -> Iterator[tuple[str, float]]:
    for path, layer in _layers(inner):
        scaling = getattr(layer, "scaling", {})
        if name not in scaling or name not in getattr(layer, "r", {}):
            continue
        rank, found = layer.r[name], float(scaling[name])
        module = path.removesuffix(".base_layer")
        if config.scaling(module, rank) != found:
            yield re.escape(module), _alpha(found, rank, config.use_rslora, module)


def _alpha(scaling: float, rank: int, use_rslora: bool, module: str) -> float:
    divisor = math.sqrt(rank) if use_rslora else rank
    near = scaling * divisor
    for alpha in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / divisor == scaling:
            return alpha
    raise RequestError(f"the scaling {scaling!r} of layer {module!r} was changed to what no lora_alpha gives")


def _layers(inner: Any) -> Iterator[tuple[str, Any]]:
    """The layers in which adapters act, without modules that are only trained as a whole."""
    if not hasattr(inner, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in inner.named_modules():
        if isinstance(module, BaseTunerLayer) and set(module.adapter_layer_names) and _has_adapters(module):
            yield path, module


def _has_adapters(layer: Any) -> bool:
    return any(len(getattr(layer, name, ())) for name in layer.adapter_layer_names)


def _check_uniform(layers: Sequence[tuple[str, Any]], active: Sequence[str]) -> None:
    disabled = {bool(layer.disable_adapters) for _, layer in layers}
    if len(disabled) > 1:
        paths = [path for path, layer in layers if layer.disable_adapters]
        raise RequestError(
            f"adapters are disabled in some layers only; disable all or none:\n{listing(paths, limit=8)}"
        )
    for path, layer in layers:
        present = {name for part in layer.adapter_layer_names for name in getattr(layer, part, ())}
        missing = (present & set(active)) - set(layer.active_adapters)
        if missing:
            raise RequestError(
                f"adapter {min(missing)!r} is active in some layers, but not in {path!r}; set_adapter makes it uniform"
            )


def _check_merged(layers: Sequence[tuple[str, Any]], active: Sequence[str], merged: set[str]) -> None:
    for path, layer in layers:
        present = {name for part in layer.adapter_layer_names for name in getattr(layer, part, ())}
        if set(layer.merged_adapters) != present & merged:
            raise RequestError(
                f"adapters {sorted(merged)} are merged in some layers, but not in {path!r}; merge or unmerge all"
            )
    if merged != set(active):
        raise RequestError(
            f"merged into the weights are {sorted(merged)}, active are {sorted(active)}: unmerge_adapter() first, "
            "or set_adapter to what is merged"
        )
