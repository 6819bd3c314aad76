"""Adapters that bring the head of another task: a classifier trained on a language model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from loraweld.adapter.files import Adapter
from loraweld.naming.families import layers_of_task
from loraweld.naming.roles import is_task_head
from loraweld.planning.changes import Change

_CLASS_SUFFIX = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The class that the adapter was trained on, by its suffix, and the number of labels of its head."""

    class_suffix: str
    num_labels: int


def find_task(adapters: Iterable[Adapter], changes: Mapping[str, Change]) -> Task | None:
    """Return the task whose head the adapters bring, None if they bring none."""
    suffixes = {_CLASS_SUFFIX.get(adapter.config.task_type) for adapter in adapters}
    heads = [
        change.replacement
        for name, change in changes.items()
        if change.replacement and name.endswith(".weight") and is_task_head(name)
    ]
    suffix = suffixes.pop() if len(suffixes) == 1 else None
    return Task(class_suffix=suffix, num_labels=heads[-1].rows) if suffix and heads else None


def missing_layers(adapters: Iterable[Adapter], model_type: str, written: Collection[str]) -> list[str]:
    """Return the layers that the class of an adapter's task has, and that are not among the tensors written."""
    layers = [layer for a in adapters for layer in layers_of_task(a.config.task_type, model_type)]
    return [layer for layer in dict.fromkeys(layers) if not _is_among(f"{layer}.weight", written)]


def _is_among(parameter: str, written: Collection[str]) -> bool:
    """True if `parameter` is written under its name, or with one leading component more or less."""
    shorter = {name.partition(".")[2] for name in written}
    return parameter in written or parameter in shorter or parameter.partition(".")[2] in written
