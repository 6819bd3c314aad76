"""Write src/loraweld/naming/renamings.json from the transformers that is installed.

    python scripts/make_naming_table.py

transformers 5 renames, splits and fuses parameters while it loads a checkpoint. What it does to which model is code
(`conversion_mapping.py`); this writes it down as data, so that a merge needs no transformers. What the file holds
say `loraweld.naming.architecture` and `conversions`, which read it. Every class is built once, without weights: it
takes a minute.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    GroupWeightRename,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

# What some default configs leave open.
_LEFT_OPEN = {"vocab_size": 99, "head_dim": 64}
TABLE = Path(__file__).parents[1] / "src" / "loraweld" / "naming" / "renamings.json"


def make_table() -> dict[str, Any]:
    """Return what the file holds."""
    rows = all_rows()
    return {
        "made_by": "scripts/make_naming_table.py",
        "transformers": tf.__version__,
        "rows": rows,
        "bases": base_classes(),
        "untied": untied_types(),
        "classes": all_classes(rows),
    }


def all_rows() -> dict[str, list[dict[str, Any]] | str]:
    """Return the rows by model type or class name; the name of another entry where the two are equal."""
    found: dict[str, list[dict[str, Any]] | str] = {}
    first: dict[str, str] = {}
    for name, transforms in sorted(conversion_mapping._build_checkpoint_conversion_mapping().items()):
        rows = [row(transform) for transform in transforms]
        other = first.setdefault(json.dumps(rows), name)
        found[name] = rows if other == name else other
    return found


def row(transform: WeightTransform) -> dict[str, Any]:
    """Return one transform as data."""
    made: dict[str, Any] = {"find": transform.compiled_sources.pattern, "put": transform.target_patterns}
    if isinstance(transform, WeightConverter):
        made["disk"] = transform._original_source_patterns
        made["memory"] = transform._original_target_patterns
        made["operations"] = [operation(step) for step in transform.operations]
    elif not isinstance(transform, WeightRenaming):
        raise TypeError(f"{type(transform).__name__} is a kind of transform that the table has no form for")
    if isinstance(transform, GroupWeightRename):
        made["only_if"] = transform.source_patterns[0]
    if hasattr(transform, "offset"):
        made["offset"] = transform.offset
    return made


def operation(step: ConversionOps) -> dict[str, Any]:
    """Return the name of an operation and its arguments."""
    arguments = {name: value for name, value in sorted(vars(step).items()) if value is not None}
    return {"name": type(step).__name__} | arguments


def base_classes() -> dict[str, str]:
    """Return the class that AutoModel builds, by model type."""
    named = sorted(MODEL_MAPPING_NAMES.items())
    return {model_type: name if isinstance(name, str) else name[0] for model_type, name in named}


def untied_types() -> list[str]:
    """Return the model types whose config does not tie the output embedding where it does not say so."""
    return [name for name, cls in sorted(CONFIG_MAPPING.items()) if not ties_by_default(cls)]


def ties_by_default(cls: type[tf.PretrainedConfig]) -> bool:
    try:
        return getattr(cls(), "tie_word_embeddings", False) is True
    except Exception:  # a config that has to be given its parts
        return getattr(cls, "tie_word_embeddings", False) is True


def all_classes(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the classes of which there is anything to say."""
    made = {cls.__name__: one_class(cls, rows) for cls in sorted(model_classes(), key=lambda cls: cls.__name__)}
    return {name: entry for name, entry in made.items() if entry}


def one_class(cls: type[tf.PreTrainedModel], rows: dict[str, Any]) -> dict[str, Any]:
    """Return a class as data; of one that cannot be built, what it says of itself."""
    model = build(cls)
    if model is None:
        return undescribed_class(cls, rows)
    models = [(path, part) for path, part in model.named_modules() if isinstance(part, tf.PreTrainedModel)]
    found = [
        [path, type(part).__name__, part.config.model_type, config_key(model.config, part.config)]
        for path, part in models
    ]
    ties = [[found[i][3], ties_of(path, part)] for i, (path, part) in enumerate(models) if ties_of(path, part)]
    return described(model.base_model_prefix, found, ties, rows)


def described(prefix: str, parts: list[list[str]], ties: list[Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Return what there is to say of a class with these parts."""
    has_rows = any({name, model_type} & rows.keys() or key for _, name, model_type, key in parts)
    found = {"prefix": prefix, "parts": parts} if has_rows else {}
    return found | ({"ties": ties} if ties else {})


def undescribed_class(cls: type[tf.PreTrainedModel], rows: dict[str, Any]) -> dict[str, Any]:
    """Return what a class says that cannot be built: it and its base model, and what it ties."""
    prefix, model_type = cls.base_model_prefix, cls.config_class.model_type
    base = base_classes().get(model_type)
    parts = [["", cls.__name__, model_type, ""]]
    if base and base != cls.__name__ and prefix:
        parts.append([prefix, base, model_type, ""])
    named = cls._tied_weights_keys or {}
    ties = {target: source for target, source in named.items() if re.fullmatch(r"[\w.]+\.(weight|bias)", target)}
    return described(prefix, parts, [["", ties]] if ties else [], rows)


def ties_of(path: str, part: tf.PreTrainedModel) -> dict[str, str]:
    """Return, of the model at `path`, the parameters that are tied and those that they are tied to.

    Whole layers that share their weights (Zamba, heads of detectors), named by patterns, are left out.
    """
    prefix = f"{path}." if path else ""
    named = part._tied_weights_keys or {}
    return {
        f"{prefix}{target}": f"{prefix}{source}"
        for target, source in part.get_expanded_tied_weights_keys().items()
        if named.get(target) == source
    }


def build(cls: type[tf.PreTrainedModel]) -> tf.PreTrainedModel | None:
    """Return a model without values, with everything tied that can be."""
    for more in ({}, _LEFT_OPEN):
        try:
            config = cls.config_class()
            tie(config)
            for key, value in more.items():
                if getattr(config, key, value) is None:
                    setattr(config, key, value)
            with torch.device("meta"), no_init_weights():
                return cls(config)
        except Exception:  # a default config that does not fit its class, a package that is not installed, …
            continue
    return None


def tie(config: tf.PretrainedConfig) -> None:
    config.tie_word_embeddings = True
    for value in list(vars(config).values()):
        if isinstance(value, tf.PretrainedConfig):
            tie(value)


def config_key(config: tf.PretrainedConfig, wanted: tf.PretrainedConfig) -> str:
    """Return where in `config` the config of a part is, as "text_config" or "a.b"; "" where it has none of its own.

    Nor where it is written under another type than the part has (MaskFormer's Swin): then it does not choose the class.
    """
    for key, value in vars(config).items():
        if isinstance(value, tf.PretrainedConfig) and config is not wanted:
            if value is wanted:
                return key if value.to_dict().get("model_type") == value.model_type else ""
            if below := config_key(value, wanted):
                return f"{key}.{below}"
    return ""


def model_classes() -> set[type[tf.PreTrainedModel]]:
    """Return every model class of transformers that has a config."""
    for package in pkgutil.iter_modules(tf.models.__path__):
        for path in sorted((Path(tf.models.__path__[0]) / package.name).glob("modeling_*.py")):
            try:
                importlib.import_module(f"transformers.models.{package.name}.{path.stem}")
            except ImportError:  # needs a package that is not installed
                continue
    return {cls for cls in descendants(tf.PreTrainedModel) if is_concrete(cls)}


def descendants(cls: type) -> Iterator[type]:
    for below in cls.__subclasses__():
        yield below
        yield from descendants(below)


def is_concrete(cls: type[tf.PreTrainedModel]) -> bool:
    is_ours = cls.__module__.startswith("transformers.models.")
    return is_ours and cls.config_class is not None and "PreTrainedModel" not in cls.__name__


def write(table: dict[str, Any], path: Path) -> None:
    """Write one entry a line, so that a difference can be read."""
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    tf.utils.logging.set_verbosity_error()
    write(make_table(), TABLE)
    print(f"{TABLE}: {TABLE.stat().st_size} bytes")
