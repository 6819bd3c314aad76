"""What transformers knows of its classes, as data: the models inside a model, and what they tie.

The data is `renamings.json`, written by `scripts/make_naming_table.py`:

- `rows`: what happens to names while a checkpoint is loaded, see `loraweld.naming.conversions`.
- `classes`: class name → `prefix` (its `base_model_prefix`), `parts` (the models inside it in the order of
  `named_modules()`: [path, class name, model type, where the part's config is in the model's config]) and `ties`
  ([where the config is that decides, {parameter: the one it is tied to}]). What there is nothing to say of is left out.
- `bases`: model type → the class that AutoModel builds.
- `untied`: the model types that tie nothing where their config does not say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """A model inside a model; `config_key` says where its config is in that of the whole, "" if it has none."""

    path: str
    class_name: str
    model_type: str
    config_key: str = ""


def class_name(config: Mapping[str, Any]) -> str:
    """Return the class that a model was saved from; where it is not said, that of its type which writes text."""
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0])
    return _with_head(str(table()["bases"].get(str(config.get("model_type") or ""), "")))


def prefix_of(config: Mapping[str, Any]) -> str:
    """Return the name that the model without its head has inside the model; "" where it is not known."""
    return str(_entry(class_name(config)).get("prefix", ""))


def parts(config: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the models in a model with this config, the whole first; the config decides of which class a part is."""
    model_type = str(config.get("model_type") or "")
    return tuple(_parts(Part("", class_name(config), model_type), config))


def declared_ties(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield, for each part that ties, where its config is and {parameter: the one it is tied to}, as in memory."""
    entry = _entry(class_name(config))
    replaced = [part for part in parts(config) if part.path and part.config_key and _is_replaced(part, entry)]
    for key, pairs in entry.get("ties", ()):
        if not any(key == part.config_key for part in replaced):
            yield key, pairs
    for part in replaced:
        for _, pairs in _entry(part.class_name).get("ties", ()):
            yield part.config_key, {f"{part.path}.{name}": f"{part.path}.{source}" for name, source in pairs.items()}


def is_known(name: str) -> bool:
    """Return whether there is anything to say of the class `name`."""
    return name in table()["classes"]


def ties_by_default(model_type: str) -> bool:
    """Return whether a config of this type that does not say so ties the output embedding to the input embedding."""
    return model_type not in table()["untied"]


def level_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the part of a config that `key` ("text_config", "a.b") names, empty where there is none."""
    for step in key.split(".") if key else ():
        below = config.get(step)
        config = below if isinstance(below, dict) else {}
    return config


@cache
def table() -> dict[str, Any]:
    """Return the data, read once."""
    read: dict[str, Any] = json.loads(Path(__file__).with_name("renamings.json").read_bytes())
    return read


def _parts(whole: Part, config: Mapping[str, Any]) -> Iterator[Part]:
    replaced: list[str] = []
    inside = [Part(*fields) for fields in _entry(whole.class_name).get("parts", ())]
    for part in inside or [replace(whole, path="")]:
        if any(part.path.startswith(f"{path}.") for path in replaced):
            continue
        given = level_of(config, part.config_key)
        model_type = str(given.get("model_type") or part.model_type)
        if part.config_key and model_type != part.model_type:
            replaced.append(part.path)
            yield from _inside(replace(part, class_name=_of_type(model_type, part), model_type=model_type), given)
        else:
            yield part


def _inside(part: Part, config: Mapping[str, Any]) -> Iterator[Part]:
    """The models in a part, with paths in the whole; the part itself keeps the place of its config."""
    for inner in _parts(part, config):
        yield replace(inner, path=f"{part.path}.{inner.path}", config_key="") if inner.path else part


def _of_type(model_type: str, part: Part) -> str:
    """Return the class of another type that takes the place of a part: with a head where the part has one."""
    name = str(table()["bases"].get(model_type, ""))
    return _with_head(name) if part.class_name.endswith("ForCausalLM") else name


def _with_head(name: str) -> str:
    """Return the class that writes text with the model `name`, or `name` where there is none."""
    heads = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")
    with_head = (name.removesuffix("Model") + head for head in heads)
    return next(filter(is_known, with_head), name)


def _is_replaced(part: Part, entry: Mapping[str, Any]) -> bool:
    return [part.path, part.class_name] not in [fields[:2] for fields in entry.get("parts", ())]


def _entry(name: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = table()["classes"].get(name, {})
    return entry
