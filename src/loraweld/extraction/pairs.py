"""Base and tuned model → the parameters to compare, each with what LoRA can say of it. Reads headers only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loraweld.checkpoint.base import Base
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.dtypes import is_plain_float
from loraweld.errors import MatchError, listing
from loraweld.naming.families import is_conv1d
from loraweld.naming.linear import is_expert, is_linear
from loraweld.naming.names import Names
from loraweld.naming.roles import has_row_per_token, is_embedding, is_output_embedding, is_task_head
from loraweld.naming.tied import Tie, find_ties
from loraweld.naming.trained import TrainedNames

# What older checkpoints hold of a model besides its parameters: tables that its code makes anew.
_BUFFER = re.compile(r"\b(inv_freq|position_ids|token_type_ids|masked_bias)$|\battn\.(attention\.)?bias$")
_CONVOLUTION = re.compile(r"(.*conv.*|projection|proj|patch_embed\w*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A module that shares a weight under another name; `kind` as in `Pair`."""

    module: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One parameter of both models; `parameter` is its name in the trained model, `module` what it belongs to.

    `kind` is what LoRA takes it for: "linear" (O, I), "conv1d" (I, O), "conv" (O, I, …), "embedding" (tokens, O), or
    "other": nothing of low rank. `twins` share it in both models.
    """

    name: str
    parameter: str
    kind: str
    base: Source
    tuned: Source
    twins: tuple[Twin, ...] = ()

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def is_bias(self) -> bool:
        return self.parameter.endswith(".bias")

    @property
    def is_resized(self) -> bool:
        return self.base.shape != self.tuned.shape

    @property
    def num_bytes(self) -> int:
        """Bytes that comparing reads."""
        return self.base.stored_bytes + self.tuned.stored_bytes


def find_pairs(base: Base, tuned: Base) -> tuple[Pair, ...]:
    """Return the parameters of both models in the order of the tuned one; a tied one is that of its source.

    Both are given as `stored_once` leaves them: a parameter that two names share is there once.

    Raises:
        MatchError: parameters that only one of the models has, or shapes that an adapter cannot change; all are listed.
    """
    ties, tuned_ties = (find_ties(model.tensors, model.config) for model in (base, tuned))
    sides = _with_ties(base, ties), _with_ties(tuned, tuned_ties)
    found, problems = _matched(*sides)
    problems += [f"{name}: {misfit}" for name, old, new in found if (misfit := _misfit(name, old, new))]
    if problems:
        raise MatchError(
            f"base {base.label} and tuned model {tuned.label} do not fit; nothing was written:\n{listing(problems)}\n"
            "Was the model trained from another base? Give the right one with --base"
        )
    old_of = {name: old for name, old, _ in found}
    # Tied in both: the base takes the two from one place as well.
    twice = {tie.target: tie.source for tie in tuned_ties if old_of[tie.target] is old_of[tie.source]}
    names = TrainedNames(tuned.tensors, tuned.config)
    twins = _twins(twice, tuned, names)
    return tuple(
        Pair(
            name=name,
            parameter=names.of(name),
            kind=_kind(name, new.shape, tuned.model_type, tuned.tensors),
            base=old,
            tuned=new,
            twins=tuple(twins.get(name, ())),
        )
        for name, old, new in found
        if name not in twice
    )


def _with_ties(model: Base, ties: Sequence[Tie]) -> dict[str, Source]:
    return {**model.tensors, **{tie.target: model.tensors[tie.source] for tie in ties if tie.source in model.tensors}}


def _matched(
    base: Mapping[str, Source], tuned: Mapping[str, Source]
) -> tuple[list[tuple[str, Source, Source]], list[str]]:
    """Tuned names with both weights, and what has no counterpart."""
    names = Names(base, {})
    found: dict[str, tuple[str, Source, Source]] = {}
    problems = []
    for name, source in tuned.items():
        old = names.find(name)
        if old is not None and old not in found:
            found[old] = (name, base[old], source)
        elif not _BUFFER.search(name):
            problems.append(f"{name}: only the tuned model has it")
    problems += [f"{name}: only the base has it" for name in base if name not in found and not _BUFFER.search(name)]
    return [match for match in found.values() if not _BUFFER.search(match[0])], problems


def _misfit(name: str, base: Source, tuned: Source) -> str | None:
    if base.shape != tuned.shape:
        may_resize = has_row_per_token(name) or is_task_head(name)
        if not may_resize or base.shape[1:] != tuned.shape[1:]:
            return f"is {base.shape} in the base and {tuned.shape} in the tuned model"
    odd = [source.dtype for source in (base, tuned) if not is_plain_float(source.dtype)]
    return f"is stored as {odd[0]}, which is not a weight that can be compared" if odd else None


def _twins(twice: Mapping[str, str], tuned: Base, names: TrainedNames) -> dict[str, list[Twin]]:
    found: dict[str, list[Twin]] = {}
    for target, source in twice.items():
        kind = "embedding" if is_embedding(target) else "linear"
        if target.endswith(".weight"):  # a bias under two names is one parameter
            found.setdefault(source, []).append(Twin(module=names.of(target).rpartition(".")[0], kind=kind))
    return found


def _kind(name: str, shape: tuple[int, ...], model_type: str, stored: Collection[str]) -> str:
    module, _, last = name.rpartition(".")
    if last != "weight" or is_task_head(name) or not all(shape):
        return "other"
    if len(shape) == 2:
        if is_embedding(name):
            return "embedding"
        if is_conv1d(model_type, module):
            return "conv1d"
        is_layer = is_output_embedding(name) or (is_linear(name, shape, "", stored) and not is_expert(name))
        return "linear" if is_layer else "other"
    # A single input channel is the mark of a convolution in groups, whose channels LoRA would mix.
    is_conv = len(shape) > 2 and shape[1] > 1 and _CONVOLUTION.fullmatch(module.rpartition(".")[2])
    return "conv" if is_conv else "other"
