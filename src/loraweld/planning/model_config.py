"""What config.json must say after the merge; the file is copied byte for byte where nothing changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraweld.checkpoint.base import CONFIG_NAME, Base
from loraweld.checkpoint.encodings.recognise import SETTINGS_KEYS
from loraweld.checkpoint.jsonfile import dump_json
from loraweld.dtypes import NAME_BY_FLOAT_CODE
from loraweld.naming.tied import flag_is_free
from loraweld.planning.merge_plan import SmallFile
from loraweld.planning.task import Task

_CLASS_ENDING = re.compile(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigEdits:
    """The facts of the output that its config must agree with; None where the merge changes nothing.

    `is_derived`: the base's config is not the one in its folder any more.
    """

    dtype: str | None = None
    drop_quantization: bool = False
    quantization: Mapping[str, Any] | None = None
    vocab_size: int | None = None
    untie: bool = False
    is_derived: bool = False
    task: Task | None = None


def config_file(base: Base, edits: ConfigEdits) -> list[SmallFile]:
    """Return config.json of the output: the base's own bytes where nothing changes, nothing if it has none."""
    if not base.config:
        return []
    if edits == ConfigEdits():
        return [SmallFile(name=CONFIG_NAME, source=base.folder / CONFIG_NAME)]
    return [SmallFile(name=CONFIG_NAME, text=dump_json(edited_config(base.config, edits)))]


def edited_config(config: Mapping[str, Any], edits: ConfigEdits) -> dict[str, Any]:
    """Return a copy of `config` that agrees with `edits`."""
    result = copy.deepcopy(dict(config))
    if edits.dtype is not None:
        _set_dtype(result, edits.dtype)
    if edits.drop_quantization:
        _drop_quantization(result)
    if edits.quantization is not None:
        result[SETTINGS_KEYS[0]] = dict(edits.quantization)
    if edits.vocab_size is not None:
        for level in _text_levels(result):
            if "vocab_size" in level or level is not result:
                level["vocab_size"] = edits.vocab_size
    if edits.untie and flag_is_free(config):
        for level in _text_levels(result):
            level["tie_word_embeddings"] = False
    if edits.task is not None:
        _set_task(result, edits.task)
    return result


def _text_levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The top level, and the text model's own level in a model with several parts."""
    yield config
    text = config.get("text_config")
    if isinstance(text, dict):
        yield text


def _set_dtype(level: dict[str, Any], code: str) -> None:
    for key, value in level.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            level[key] = NAME_BY_FLOAT_CODE[code]
        elif isinstance(value, dict):
            _set_dtype(value, code)


def _drop_quantization(level: dict[str, Any]) -> None:
    for key in SETTINGS_KEYS:
        level.pop(key, None)
    for value in level.values():
        if isinstance(value, dict):
            _drop_quantization(value)


def _set_task(config: dict[str, Any], task: Task) -> None:
    names = config.get("architectures")
    if names:
        config["architectures"] = [_CLASS_ENDING.sub("", str(names[0])) + task.class_suffix]
    if len(config.get("id2label") or {}) != task.num_labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(task.num_labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(task.num_labels)}
