"""Adapters that bring the head of another task: a classifier trained on a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraweld.adapter.files import Adapter
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
        if name.endswith(".weight") and is_task_head(name) and change.replacement
    ]
    suffix = suffixes.pop() if len(suffixes) == 1 else None
    return Task(class_suffix=suffix, num_labels=heads[-1].rows) if suffix and heads else None
