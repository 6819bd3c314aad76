"""`layer_replication`: a base whose layers are written several times, each to get the adapter's own delta.

PEFT stacks ranges of the base's layers; layers that come twice share their weights, and the adapter names them by their
numbers in the stack. Here the base becomes one that stores them under these numbers, each a tensor at the old place.
Source: PEFT 0.21.2, `replicate_layers` (tuners_utils.py). Its merge adds the deltas of all copies to the shared weight
(huggingface/peft#1707); what it computes without merging is what is written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.encodings.encoded import EncodedTensor, RequantisedTensor, Source
from loraweld.checkpoint.encodings.recognise import quantization_settings
from loraweld.errors import MatchError, RequestError, listing
from loraweld.request import MergeRequest

# Where PEFT looks for layers: `layers`, `encoder.layer` or `h` of the model or of what its class wraps.
_LAYER = re.compile(r"(?P<stack>(?:[A-Za-z_]\w*\.)?(?:layers|encoder\.layer|h))\.(?P<number>\d+)\.(?P<rest>.+)")
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Lists of a config with an entry for each layer, besides those with "layer" in their names …
_PER_LAYER = frozenset(
    {"num_attention_heads", "num_key_value_heads", "intermediate_size", "activation_sparsity_pattern"}
)
# … and lists of the numbers of some layers.
_NUMBERS = frozenset({"mlp_only_layers", "moe_layers", "attn_layer_indices", "cross_attention_layers"})
# Rules that say from its number what a layer is; the second kind only where `layer_types` does not say it.
_RULES = ("first_k_dense_replace", "decoder_sparse_step", "attn_layer_period", "expert_layer_period", "moe_layer_freq")
_ATTENTION_RULES = ("sliding_window_pattern", "full_attention_interval", "global_attn_every_n_layers")
_ALTERNATING = frozenset({"gemma2", "gemma3_text", "cohere2"})
_NUMBERED_MODULE = re.compile(r"(layers|layer|h)\W+\d")


def replicated_base(request: MergeRequest, base: Base, adapters: Sequence[Adapter]) -> tuple[Base, list[str]]:
    """Return `base` with the layers that the adapters were trained on, and a note; as it is if they replicate none.

    Raises:
        MatchError: the adapters do not agree, or the base has no such layers.
        RequestError: the encoding's settings name modules by the number of their layer, and would have to be kept.
    """
    asked = {adapter.config.layer_replication for adapter in adapters}
    if asked <= {()}:
        return base, []
    if len(asked) > 1:
        found = listing(f"{a.label}: {[list(r) for r in a.config.layer_replication] or 'none'}" for a in adapters)
        raise MatchError(f"the adapters were trained on different stacks of layers (layer_replication):\n{found}")
    if request.save_method == "preserve" and _NUMBERED_MODULE.search(str(quantization_settings(base.config))):
        raise RequestError(
            "the base's quantization settings name modules by the number of their layer, and layer_replication gives "
            "other numbers; save_method preserve cannot keep them. Give merged_16bit"
        )
    ranges = asked.pop()
    stack, count = _find_stack(base)
    outside = [f"[{start}, {stop})" for start, stop in ranges if stop > count]
    if outside:
        raise MatchError(f"layer_replication asks for the layers {', '.join(outside)}, but {base.label} has {count}")
    order = [layer for start, stop in ranges for layer in range(start, stop)]
    shown = ", ".join(f"[{start}, {stop})" for start, stop in ranges)
    return _restacked(base, stack, count, order), [f"layers replicated: {shown} of {count} are {len(order)} now"]


def _find_stack(base: Base) -> tuple[str, int]:
    """Return the path of the list of layers and how many the trained class has.

    Raises:
        MatchError: there is none, or more than one.
    """
    numbers: dict[str, set[int]] = {}
    for name in base.tensors:
        if found := _LAYER.fullmatch(name):
            numbers.setdefault(found["stack"], set()).add(int(found["number"]))
    if len(numbers) != 1:
        raise MatchError(
            "layer_replication is for models with one stack of layers (…layers.N, …encoder.layer.N, …h.N); "
            f"{base.label} has {', '.join(sorted(numbers)) or 'none'}"
        )
    ((stack, found_numbers),) = numbers.items()
    level = _count_level(base.config)
    said = next((level[key] for key in _COUNT_KEYS if type(level.get(key)) is int), None)
    return stack, max(found_numbers) + 1 if said is None else said


def _restacked(base: Base, stack: str, count: int, order: Sequence[int]) -> Base:
    """The base with layer `order[i]` as layer i; layers past the class's own (of other predictions) come after."""
    copies: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        copies.setdefault(old, []).append(new)

    def names(name: str) -> list[str]:
        found = _LAYER.fullmatch(name)
        if found is None:
            return [name]
        number = int(found["number"])
        numbers = copies.get(number, []) if number < count else [number - count + len(order)]
        return [f"{stack}.{new}.{found['rest']}" for new in numbers]

    tensors = {new: _renamed(tensor, name, new) for name, tensor in base.tensors.items() for new in names(name)}
    stored = {new: replace(tensor, name=new) for name, tensor in base.stored.items() for new in names(name)}
    return replace(
        base,
        tensors=_in_order(tensors),
        stored=stored,
        aside=tuple(new for name in base.aside for new in names(name)),
        origins={new: name for name in base.tensors for new in names(name)},
        config=_restacked_config(base, count, order),
    )


def _renamed(tensor: Source, old: str, new: str) -> Source:
    """The same bytes under another name; the parts of an encoded weight are named after it."""
    match tensor:
        case RequantisedTensor():
            return replace(tensor, plain=replace(tensor.plain, name=new))
        case EncodedTensor():
            before, after = (name.removesuffix("weight") for name in (old, new))
            parts = tuple(
                (role, replace(part, name=part.name.replace(before, after, 1))) for role, part in tensor.parts
            )
            return replace(tensor, name=new, parts=parts)
        case _:
            return replace(tensor, name=new)


def _in_order(tensors: Mapping[str, Source]) -> dict[str, Source]:
    """Layers one after the other, at the place of the first; what is around them as it was."""

    def number(name: str) -> int:
        found = _LAYER.fullmatch(name)
        return -1 if found is None else int(found["number"])

    names = list(tensors)
    first = min(i for i, name in enumerate(names) if number(name) >= 0)
    layered = sorted((name for name in names if number(name) >= 0), key=number)
    others = [name for name in names if number(name) < 0]
    before = sum(number(name) < 0 for name in names[:first])
    return {name: tensors[name] for name in (*others[:before], *layered, *others[before:])}


def _count_level(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that says how many layers there are."""
    text = config.get("text_config")
    if not any(key in config for key in _COUNT_KEYS) and isinstance(text, dict):
        return text
    return config


def _restacked_config(base: Base, count: int, order: Sequence[int]) -> Mapping[str, Any]:
    """Return a config with the new number of layers, and what it says of single layers moved with them.

    Raises:
        MatchError: a rule of the config makes of a layer what its number says.
    """
    level = _count_level(base.config)
    _check_rules(base, level)
    changed = {key: _moved(key, value, count, order) for key, value in level.items()}
    if level is base.config:
        return changed
    return {**base.config, "text_config": changed}


def _moved(key: str, value: Any, count: int, order: Sequence[int]) -> Any:
    if key in _COUNT_KEYS and value == count:
        return len(order)
    if not isinstance(value, list):
        return value
    if key in _NUMBERS:
        return [new for new, old in enumerate(order) if old in value]
    if len(value) == count and (key in _PER_LAYER or "layer" in key):
        return [value[old] for old in order]
    return value


def _check_rules(base: Base, level: Mapping[str, Any]) -> None:
    types_are_said = isinstance(level.get("layer_types"), list)
    asked = _RULES if types_are_said else (*_RULES, *_ATTENTION_RULES)
    rules = [f"{key} {level[key]}" for key in asked if level.get(key) not in (None, 0, 1, [])]
    if not types_are_said:
        if not rules and level.get("model_type") in _ALTERNATING:
            rules = [f"no layer_types, so that the layers of {level['model_type']} alternate"]
    if rules:
        raise MatchError(
            f"layer_replication gives layers other numbers, and the config of {base.label} makes of a layer what its "
            f"number says; the model written would not be the one that was trained:\n{listing(rules)}"
        )
