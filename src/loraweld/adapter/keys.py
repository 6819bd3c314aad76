"""The key grammar of an adapter file: which module a tensor belongs to, and which part of it this is.

    key := ["_orig_mod."] ["base_model.model."] <module path> "." <suffix>
         | ["_orig_mod."] "base_model." <name that all modules share>

The suffix of a tuner other than LoRA begins with the tuner's prefix; the whole of it is the part.
Source: PEFT 0.21.2, `peft.utils.save_and_load.get_peft_model_state_dict` (adapter names are not on disk).
"""

from __future__ import annotations

from dataclasses import dataclass

from loraweld.adapter.tuners import TUNERS, Tuner

_PREFIXES = ("_orig_mod.", "base_model.model.")
_SHARED = "base_model."
# State of training that two LoRA variants keep (VeLoRA, MonteCLoRA): their merge is that of plain LoRA.
_OF_TRAINING = (".lora_velora_embed", ".lora_monteclora_sampler.")

# A resized vocabulary in modules_to_save is written twice: the trained tensor and the module it was copied from.
_TRAINED_INFIX = ".modules_to_save."
_UNTRAINED_INFIX = ".original_module."

# Longest first where one suffix ends with another. A suffix that stands for a parameter of the module
# itself ("weight", "bias") is a replacement of that parameter.
_SUFFIXES = (
    (".token_adapter.trainable_tokens_delta", "token_rows"),
    (".token_adapter.base_layer.weight", "weight"),
    (".token_adapter.base_layer.bias", "bias"),
    (".trainable_tokens_delta", "token_rows"),
    (".ln_tuning_layers.weight", "weight"),
    (".ln_tuning_layers.bias", "bias"),
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
    """`module` is the path in the trained model; `part` a word of the table above or a tuner's own name of a tensor.

    For "parameter" the module path includes the parameter's own name: the tensor replaces it as a whole.
    For "shared" it is the name of a tensor that all modules use.
    "untrained" is the copy that PEFT keeps of a module it trained elsewhere, or state of training; it plays no part
    in the result.
    """

    module: str
    part: str


def parse_key(key: str, tuner: Tuner = TUNERS["LORA"]) -> Key:
    """Split the name of a tensor of an adapter of this tuner into module path and part."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    if key.startswith(_SHARED) and key.removeprefix(_SHARED).startswith(tuner.prefix):
        return Key(key.removeprefix(_SHARED), "shared")
    if _UNTRAINED_INFIX in key or any(name in key for name in _OF_TRAINING):
        return Key(key, "untrained")
    key = key.replace(_TRAINED_INFIX, ".")
    for suffix, part in _SUFFIXES:
        if key.endswith(suffix):
            module = key.removesuffix(suffix)
            return Key(f"{module}.{part}", "parameter") if part in REPLACEMENTS else Key(module, part)
    return _of_tuner(key, tuner) or Key(key, "parameter")


def _of_tuner(key: str, tuner: Tuner) -> Key | None:
    """Split in front of the last component that begins with the tuner's prefix, if one does."""
    names = key.split(".")
    starts = [place for place, name in enumerate(names) if place and name.startswith(tuner.prefix)]
    return Key(".".join(names[: starts[-1]]), ".".join(names[starts[-1] :])) if starts else None


def own_name(key: str, module: str) -> str:
    """Return what a tensor is called behind the path of its module."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key.removeprefix(f"{module}.")
