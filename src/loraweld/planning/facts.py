"""What a merge reads, opened by header and config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraweld.adapter.files import Adapter, open_adapter
from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.hub import locate_base
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import RequestError, listing
from loraweld.naming.tied import Tie, find_ties, known_ties
from loraweld.request import MergeRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The base, the adapters, and which parameters of the base share a tensor."""

    base: Base
    adapters: tuple[Adapter, ...]
    ties: tuple[Tie, ...]


def gather_facts(request: MergeRequest) -> Facts:
    """Open base and adapters.

    Raises:
        LoraweldError: something is missing, damaged or of an unknown kind.
    """
    adapters = tuple(open_adapter(path) for path in request.adapters)
    name, revision = (request.base, None) if request.base is not None else _named_base(adapters)
    located = locate_base(name, revision=revision)
    base = _stored_once(open_base(located.folder, label=located.label, commit=located.commit))
    return Facts(base=base, adapters=adapters, ties=find_ties(base.tensors, base.config))


def _stored_once(base: Base) -> Base:
    """Leave out the second name of a tied parameter where both stand for the same bytes, as in a pickle.

    Then the tie is seen, and what the adapter does to either side counts as in a base of safetensors.
    """
    twice = {
        tie.target
        for tie in known_ties(base.tensors, base.config)
        if tie.target in base.tensors and _same_bytes(base.tensors[tie.target], base.tensors[tie.source])
    }
    return replace(base, tensors={name: tensor for name, tensor in base.tensors.items() if name not in twice})


def _same_bytes(one: Source, other: Source) -> bool:
    return isinstance(one, StoredTensor) and isinstance(other, StoredTensor) and one.place == other.place


def _named_base(adapters: Sequence[Adapter]) -> tuple[str, str | None]:
    """Return the base and the revision that all adapters name."""
    named = {(adapter.config.base, adapter.config.revision) for adapter in adapters}
    if len(named) > 1:
        found = listing(f"{a.label}: {a.config.base} {a.config.revision or ''}" for a in adapters)
        raise RequestError(f"the adapters name different bases; say which with --base:\n{found}")
    name, revision = named.pop()
    if not name:
        raise RequestError(f"{adapters[0].config.path}: names no base model; give it with --base")
    return name, revision
