"""Name of a stored tensor → name of the parameter in the model that transformers builds: the way back of `Names`.

PEFT finds modules by these names. Rows are (pattern, replacement) for `re.sub`, disk → trained model
(transformers 5.23, `conversion_mapping.py`); where there are none, both names are the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_GEMMA3_LIKE = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
_QWEN2_VL_LIKE = (
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    (r"^visual\.", "model.visual."),
)
_VIT_LIKE = (
    *(
        (rf"\bencoder\.layer\.(\d+)\.attention\.attention\.{name}\.", rf"layers.\1.attention.{name[0]}_proj.")
        for name in ("query", "key", "value")
    ),
    (r"\bencoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
    (r"\bencoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (r"\bencoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
    (r"\bencoder\.layer\.(\d+)\.(layernorm_before|layernorm_after)\.", r"layers.\1.\2."),
)
_ANY_FAMILY = ((r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias"))
_BY_MODEL_TYPE: dict[str, tuple[tuple[str, str], ...]] = {
    "vit": _VIT_LIKE,
    "gemma3": _GEMMA3_LIKE,
    "llava": _GEMMA3_LIKE,
    "mistral3": _GEMMA3_LIKE,
    "qwen2_vl": _QWEN2_VL_LIKE,
    "qwen2_5_vl": _QWEN2_VL_LIKE,
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
}
# What a class with a head puts before the names of the model inside, where old files leave it out.
_PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "falcon": "transformer.", "bert": "bert."}
_HEADS = ("lm_head.", "score.", "classifier.", "qa_outputs.", "cls.")
_BARE_CLASS = re.compile(r"(?<!LMHead)(?<!DoubleHeads)Model$")


class TrainedNames:
    """Gives the names that the parameters of a checkpoint have in its model."""

    def __init__(self, stored: Collection[str], config: Mapping[str, Any]) -> None:
        model_type = str(config.get("model_type") or "")
        self._rows = [(re.compile(row), new) for row, new in (*_BY_MODEL_TYPE.get(model_type, ()), *_ANY_FAMILY)]
        prefix = _PREFIXES.get(model_type, "")
        is_bare = _BARE_CLASS.search(str(next(iter(config.get("architectures") or ()), "")))
        has_prefix = any(name.startswith(prefix) for name in stored)
        self._prefix = "" if is_bare or has_prefix else prefix

    def of(self, name: str) -> str:
        """Return the trained model's name of the stored tensor `name`."""
        for pattern, new in self._rows:
            name, count = pattern.subn(new, name)
            if count:
                break
        return name if not self._prefix or name.startswith(_HEADS) else self._prefix + name
