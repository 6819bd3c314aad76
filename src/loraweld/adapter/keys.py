"""The key grammar of an adapter file: which module a tensor belongs to, and which part of it this is.

    key := ["_orig_mod."] ["base_model.model."] <module path> "." <suffix>

Source: PEFT 0.21.2, `peft.utils.save_and_load.get_peft_model_state_dict` (adapter names are not on disk).
"""

from __future__ import annotations

from dataclasses import dataclass

_PREFIXES = ("_orig_mod.", "base_model.model.")

# A resized vocabulary in modules_to_save is written twice: the trained tensor and the module it was copied from.
_TRAINED_INFIX = ".modules_to_save."
_UNTRAINED_INFIX = ".original_module."

# Longest first where one suffix ends with another. A suffix that stands for a parameter of the module
# itself ("weight", "bias") is a replacement of that parameter.
_SUFFIXES = (
    (".token_adapter.trainable_tokens_delta", "token_rows"),
    (".token_adapter.base_layer.weight", "weight"),
    (".token_adapter.base_layer.bias", "bias"),
    (".base_layer.weight", "weight"),
    (".base_layer.bias", "bias"),
    (".lora_A.weight", "lora_A"),
    (".lora_B.weight", "lora_B"),
    (".lora_B.bias", "lora_bias"),
    (".lora_embedding_A", "embedding_A"),
    (".lora_embedding_B", "embedding_B"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
)
REPLACEMENTS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Key:
    """`module` is the path in the trained model; `part` one of the words above, "parameter" or "untrained".

    For "parameter" the module path includes the parameter's own name: the tensor replaces it as a whole.
    "untrained" is the copy that PEFT keeps of a module it trained elsewhere; it plays no part in the result.
    """

    module: str
    part: str


def parse_key(key: str) -> Key:
    """Split an adapter tensor's name into module path and part."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    if _UNTRAINED_INFIX in key:
        return Key(key, "untrained")
    key = key.replace(_TRAINED_INFIX, ".")
    for suffix, part in _SUFFIXES:
        if key.endswith(suffix):
            module = key.removesuffix(suffix)
            return Key(f"{module}.{part}", "parameter") if part in REPLACEMENTS else Key(module, part)
    return Key(key, "parameter")
