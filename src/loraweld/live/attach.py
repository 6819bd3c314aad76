"""The saving methods, put on a model that somebody made."""

from __future__ import annotations

from types import MethodType
from typing import Any

from loraweld.live.methods import (
    push_to_hub_gguf,
    push_to_hub_merged,
    save_pretrained_gguf,
    save_pretrained_merged,
)
from loraweld.live.weights import base_of

_METHODS = (save_pretrained_merged, push_to_hub_merged, save_pretrained_gguf, push_to_hub_gguf)


def attach(model: Any) -> Any:
    """Put `save_pretrained_merged`, `push_to_hub_merged` and their gguf forms on `model`, and return it.

    Raises:
        RequestError: the model is none of transformers, nor PEFT around one.
    """
    for target in {id(one): one for one in (model, base_of(model))}.values():
        for method in _METHODS:
            # Past torch's own __setattr__, which is for parameters and modules.
            object.__setattr__(target, method.__name__, MethodType(method, target))
    return model
