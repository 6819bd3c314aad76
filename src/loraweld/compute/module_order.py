"""The order of a model's layers, which no checkpoint tells: safetensors files are sorted by name.

Two tuners number the layers in the order in which the class makes them (Uni-LoRA, TinyLoRA). It is asked of
transformers, on the meta device: nothing but names is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loraweld.adapter.edits import Layer
from loraweld.errors import AdapterError


def in_order(layers: Sequence[Layer], config: Mapping[str, Any]) -> list[Layer]:
    """Return `layers` in the order of the class that the base's config names.

    Raises:
        AdapterError: the class is not known to transformers, or has no such layer.
    """
    places = {name: place for place, name in enumerate(_module_names(config))}
    return sorted(layers, key=lambda layer: _place_of(layer.module, places))


def _module_names(config: Mapping[str, Any]) -> list[str]:
    import transformers

    names = config.get("architectures") or [""]
    architecture = getattr(transformers, str(names[0]), None)
    if architecture is None:
        raise AdapterError(
            f"the base's config.json names the class {names[0]!r}, which transformers {transformers.__version__} does "
            "not have; this tuner numbers the layers in the order of the class. Merge with PEFT"
        )
    options = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model = architecture(transformers.AutoConfig.for_model(config["model_type"], **options))
    return [name for name, _ in model.named_modules()]


def _place_of(module: str, places: Mapping[str, int]) -> int:
    """The place of a module by its path, with one leading component more or less where the path is not the class's."""
    shorter = {name.partition(".")[2]: place for name, place in places.items()}
    for known, path in ((places, module), (shorter, module), (places, module.partition(".")[2])):
        if path in known:
            return known[path]
    raise AdapterError(f"the class of the base has no layer {module!r}, so its place among the others is not known")
