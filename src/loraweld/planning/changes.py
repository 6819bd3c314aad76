"""Claims of all adapters → one change per tensor, with tied parameters resolved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loraweld.adapter.edits import (
    AddVector,
    Dora,
    Edit,
    LowRank,
    PeftLayer,
    ReplaceAll,
    ReplaceRows,
    Weighted,
    unwrapped,
)
from loraweld.adapter.values import same_values, same_values_transposed
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import MatchError, listing
from loraweld.naming.tied import Tie
from loraweld.planning.claims import Claim


@dataclass(slots=True, kw_only=True)
class Change:
    """What happens to tensor `name`: a replacement of the whole tensor first, then edits in order.

    `is_copy`: the replacement is PEFT's untrained copy of the layer (of the resized base, perhaps).
    """

    name: str
    replacement: StoredTensor | None = None
    is_copy: bool = False
    edits: list[Edit] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Resolved:
    """Changes by tensor name after ties; `untied` are the ties that the result no longer has."""

    changes: dict[str, Change]
    untied: tuple[Tie, ...]


def combine_claims(claims: Sequence[Claim]) -> dict[str, Change]:
    """Put the claims on each tensor together, in adapter order.

    Raises:
        MatchError: two adapters replace one tensor differently, or one replaces what another edits.
    """
    changes: dict[str, Change] = {}
    owners: dict[str, Path] = {}
    problems: list[str] = []
    acting = [claim for claim in claims if not claim.aside]
    for claim in sorted(acting, key=lambda claim: claim.replacement is None):
        change = changes.setdefault(claim.name, Change(name=claim.name))
        if claim.replacement is None:
            if change.replacement and not change.is_copy and owners[claim.name] != claim.owner:
                problems.append(f"{claim.name}: {owners[claim.name]} replaces it, {claim.owner} edits it")
            change.edits += claim.edits
        elif change.replacement is None:
            change.replacement, change.is_copy = claim.replacement, claim.is_copy
            owners[claim.name] = claim.owner
        elif not same_values(change.replacement, claim.replacement):
            problems.append(f"{claim.name}: {owners[claim.name]} and {claim.owner} replace it differently")
    by_name = _by_name(acting)
    for change in changes.values():
        for what in _contradictions(change):
            editors = dict.fromkeys(claim.adapter for claim in by_name[change.name] if claim.edits)
            problems.append(f"{change.name}: {', '.join(editors)} {what}")
    problems += _shared_in_part(by_name)
    if problems:
        raise MatchError(f"the adapters contradict each other:\n{listing(problems)}\nMerge them one by one")
    return changes


def _by_name(claims: Iterable[Claim]) -> dict[str, list[Claim]]:
    by_name: dict[str, list[Claim]] = {}
    for claim in claims:
        by_name.setdefault(claim.name, []).append(claim)
    return by_name


def _shared_in_part(by_name: Mapping[str, Sequence[Claim]]) -> list[str]:
    """Tensors that an adapter replaces with a weight other than 1, and another one changes too."""
    problems = []
    for name, found in by_name.items():
        if len(found) == 1:
            continue
        in_part = [claim for claim in found if any(isinstance(e, Weighted) and e.replaces for e in claim.edits)]
        if in_part and (len(in_part) > 1 or any(claim.owner != in_part[0].owner for claim in found)):
            names = ", ".join(dict.fromkeys(claim.adapter for claim in found))
            problems.append(
                f"{name}: {in_part[0].adapter} replaces it with a weight other than 1, then no other adapter may "
                f"change it; of {names} give one the weight 1, the others 0"
            )
    return problems


def _contradictions(change: Change) -> list[str]:
    """Edits of one tensor that were made for different numbers of rows, or for the same token."""
    deltas = [edit.delta if isinstance(edit, Dora) else edit for edit in unwrapped(change.edits)]
    rows = {edit.num_rows for edit in deltas if isinstance(edit, LowRank)}  # not those of parts of a tensor
    rows |= {change.replacement.rows} if change.replacement and rows else set()
    tokens = [index for edit in deltas if isinstance(edit, ReplaceRows) for index in edit.indices]
    twice = sorted(token for token, count in Counter(tokens).items() if count > 1) if tokens else []
    problems = [f"were trained with different numbers of rows: {sorted(rows)}"] if len(rows) > 1 else []
    if any(isinstance(edit, PeftLayer) and edit.needs_base for edit in unwrapped(change.edits[1:])):
        problems.append("hang on the weight's own values and are merged by PEFT's layer: such an adapter comes first")
    return problems + ([f"train the same tokens: {twice}"] if twice else [])


def resolve_ties(
    changes: dict[str, Change], ties: Sequence[Tie], stored: Mapping[str, Source], *, by_flag: bool = True
) -> Resolved:
    """Decide for each tied pair: one tensor if both sides come out the same, else two.

    `by_flag`: the config's flag is the only thing that ties, so what unties one pair unties all (BART's head, and the
    embeddings of its two sides).

    Raises:
        MatchError: an alias changed in two ways, or an output embedding that would keep the old vocabulary.
    """
    result = dict(changes)
    for tie in ties:
        if tie.alias:
            _follow_alias(result, tie)
    untied = [tie for tie in ties if not tie.alias and not _stays_tied(result, tie, stored[tie.source])]
    if untied:
        # An untied head no longer finds its bias through the tie: it gets one of its own.
        others = [tie for tie in ties if tie.alias or (by_flag and tie not in untied)]
        for tie in others:
            source = result.get(tie.source, Change(name=tie.source))
            result[tie.target] = Change(name=tie.target, replacement=source.replacement, edits=list(source.edits))
        untied += [tie for tie in others if not tie.alias]
    return Resolved(result, tuple(untied))


def _follow_alias(changes: dict[str, Change], tie: Tie) -> None:
    target = changes.pop(tie.target, None)
    if target is None:
        return
    source = changes.get(tie.source)
    if source is not None and not _same(target, source):
        raise MatchError(f"{tie.target!r} and {tie.source!r} are one parameter, the adapter holds two values")
    changes[tie.source] = Change(name=tie.source, replacement=target.replacement, edits=target.edits)


def _stays_tied(changes: dict[str, Change], tie: Tie, stored: Source) -> bool:
    """Return whether target and source stay one tensor; otherwise see to it that the target has a change."""
    target, source = changes.get(tie.target), changes.get(tie.source)
    if target is None and source is None:
        return True
    if source is not None and target is None and (_only_token_rows(source) or _is_resized(source, stored)):
        return True  # PEFT saves once what it does to both sides: trained rows, a resized table
    if target is not None and source is not None and _same(target, source):
        del changes[tie.target]
        return True
    target = changes.setdefault(tie.target, Change(name=tie.target))
    if source is not None and target.replacement is None and _only_token_rows(source):
        if not any(isinstance(edit, ReplaceRows) for edit in unwrapped(target.edits)):
            target.edits[:0] = source.edits  # the other side of the tie has the trained rows below its own edits
    if source is not None and source.replacement is not None and target.replacement is None:
        if source.is_copy:
            target.replacement, target.is_copy = source.replacement, True
    return False


def _only_token_rows(change: Change) -> bool:
    return change.replacement is None and all(isinstance(edit, ReplaceRows) for edit in unwrapped(change.edits))


def _is_resized(change: Change, stored: Source) -> bool:
    return change.replacement is not None and change.replacement.rows != stored.rows


def _same(one: Change, other: Change) -> bool:
    """Return whether two changes of the same tensor give the same values."""
    if one.replacement is None or other.replacement is None:
        same = one.replacement is other.replacement
    else:
        same = same_values(one.replacement, other.replacement)
    return same and len(one.edits) == len(other.edits) and all(map(_same_edit, one.edits, other.edits))


def _same_edit(one: Edit, other: Edit) -> bool:
    match one, other:
        case ReplaceRows(), ReplaceRows():
            return one.indices == other.indices and same_values(one.rows, other.rows)
        case ReplaceAll(), ReplaceAll():
            return same_values(one.values, other.values)
        case Weighted(), Weighted():
            same = one.weight == other.weight and len(one.edits) == len(other.edits)
            return same and all(map(_same_edit, one.edits, other.edits))
        case AddVector(), AddVector():
            return one.scaling == other.scaling and same_values(one.values, other.values)
        case LowRank(), LowRank() if one.scaling == other.scaling:
            if one.transposed == other.transposed:
                return same_values(one.a, other.a) and same_values(one.b, other.b)
            return same_values_transposed(one.a, other.b) and same_values_transposed(one.b, other.a)
    return False
