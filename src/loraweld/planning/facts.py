"""What a merge reads, opened by header and config alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraweld.adapter.files import Adapter, open_adapter
from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.hub import Located, locate_adapter, locate_base, locate_tokenizer, stream_base
from loraweld.checkpoint.stored import StoredTensor, same_bytes
from loraweld.checkpoint.url import check_not_url
from loraweld.combine.adapter import combined_adapter
from loraweld.errors import RequestError, listing
from loraweld.naming.tied import Tie, find_ties, known_ties
from loraweld.planning.fit import fitting_claims
from loraweld.planning.paths import check_output
from loraweld.planning.replication import replicated_base
from loraweld.planning.trained_base import as_given_notes, requantised_base
from loraweld.request import QUANTIZED_FROM, MergeRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The base, the adapters, and which parameters of the base share a tensor.

    `given` are the adapters as asked for, `adapters` those that are merged: the same, or the one they were combined to.
    `tokenizer` is the folder of the one to ship, if it was asked for.
    `twins` are those of the ties whose values are stored under both names: they stay so.
    """

    base: Base
    adapters: tuple[Adapter, ...]
    given: tuple[Adapter, ...]
    ties: tuple[Tie, ...]
    tokenizer: Located | None = None
    twins: tuple[Tie, ...] = ()
    notes: tuple[str, ...] = ()


def gather_facts(request: MergeRequest) -> Facts:
    """Open base and adapters.

    Raises:
        LoraweldError: something is missing, damaged or of an unknown kind.
    """
    adapters = open_adapters(request)
    name, revision = named_base(request, adapters)
    locate = stream_base if request.stream_base else locate_base
    located = locate(name, revision=revision, token=request.token)
    base = open_base(located.folder, label=located.label, commit=located.commit, scratch=located.scratch)
    facts = facts_of(request, base, adapters)
    return _combined(request, facts, (name, revision)) if request.combination.makes_adapter else facts


def _combined(request: MergeRequest, facts: Facts, base: tuple[str, str | None]) -> Facts:
    """Return the facts with the adapters made one. That may take long, so what can be refused before is."""
    check_output(request, input_folders(facts.base, facts.given, facts.tokenizer))
    fitting_claims(facts.base, [replace(adapter, weight=1.0) for adapter in facts.given], facts.ties)
    return replace(facts, adapters=(combined_adapter(facts.given, request.combination, base=base),))


def input_folders(base: Base | None, adapters: Iterable[Adapter], tokenizer: Located | None) -> list[Path]:
    """Return the folders that are read, none of which an output may touch."""
    return [place.folder for place in (base, *adapters, tokenizer) if place is not None]


def open_tokenizer(request: MergeRequest) -> Located | None:
    """Return the folder of the tokenizer that was asked for, None if none was.

    Raises:
        RequestError: it is not a folder.
        CheckpointError: there is no such folder at its URL.
    """
    if request.tokenizer is None:
        return None
    located = locate_tokenizer(request.tokenizer, token=request.token)
    if not located.folder.is_dir():
        raise RequestError(f"tokenizer {request.tokenizer} is not a folder")
    return located


def open_adapters(request: MergeRequest) -> tuple[Adapter, ...]:
    """Open the adapters, folders or those of the Hub, each with its weight.

    Raises:
        LoraweldError: one is missing, damaged or of an unknown kind.
    """
    weights = request.combination.weights
    return tuple(_open(name, weight, request) for name, weight in zip(request.adapters, weights, strict=True))


def _open(name: str, weight: float, request: MergeRequest) -> Adapter:
    located = locate_adapter(name, token=request.token)
    adapter = open_adapter(located.folder, label=located.label if located.commit else None, place=located.scratch)
    return replace(adapter, weight=weight)


def facts_of(request: MergeRequest, base: Base, adapters: tuple[Adapter, ...]) -> Facts:
    """Return what a merge of these adapters into `base` has to know.

    Raises:
        LoraweldError: a base that the request would have taken to another form cannot be.
    """
    base, twins = stored_once(base)
    if request.merge_base == QUANTIZED_FROM:
        base, *notes = requantised_base(request, base, adapters)
    else:
        notes = as_given_notes(base, adapters)
    base, replicated = replicated_base(request, base, adapters)
    ties = find_ties(base.tensors, base.config)
    return Facts(
        base=base,
        adapters=adapters,
        given=adapters,
        ties=ties,
        tokenizer=open_tokenizer(request),
        twins=twins,
        notes=(*notes, *replicated),
    )


def stored_once(base: Base) -> tuple[Base, tuple[Tie, ...]]:
    """Leave out the second name of a tied parameter where both stand for the same values; return those stored twice.

    Then the tie is seen, and what the adapter does to either side counts as in a base that stores it once. In a pickle
    the two names share their bytes.
    """
    equal = [
        tie
        for tie in known_ties(base.tensors, base.config)
        if tie.target in base.tensors and _is_equal(base.tensors[tie.target], base.tensors[tie.source])
    ]
    dropped = {tie.target for tie in equal}
    tensors = {name: tensor for name, tensor in base.tensors.items() if name not in dropped}
    twins = tuple(tie for tie in equal if base.stored[tie.target].place != base.stored[tie.source].place)
    return replace(base, tensors=tensors), twins


def _is_equal(one: Source, other: Source) -> bool:
    if not (isinstance(one, StoredTensor) and isinstance(other, StoredTensor)):
        return False
    return one.place == other.place or same_bytes(one, other)


def named_base(request: MergeRequest, adapters: Sequence[Adapter]) -> tuple[str, str | None]:
    """Return the base that was asked for, else the base and the revision that all adapters name.

    Raises:
        RequestError: they name none, or different ones.
        CheckpointError: they name a URL.
    """
    if request.base is not None:
        return request.base, None
    named = {(adapter.config.base, adapter.config.revision) for adapter in adapters}
    if len(named) > 1:
        found = listing(f"{a.label}: {a.config.base} {a.config.revision or ''}" for a in adapters)
        raise RequestError(f"the adapters name different bases; say which with --base:\n{found}")
    name, revision = named.pop()
    if not name:
        raise RequestError(f"{adapters[0].config.path}: names no base model; give it with --base")
    check_not_url(name, str(adapters[0].config.path), "--base")
    return name, revision
