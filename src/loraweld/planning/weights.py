"""The claims of one adapter, weighed: what an adapter changes, times its weight.

A plain addition is scaled. Any other edit, and a tensor trained as a whole, is taken in part: W + weight · (W′ − W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loraweld.adapter.edits import ReplaceAll, Weighted, weighed
from loraweld.adapter.files import Adapter
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import MatchError, listing
from loraweld.naming.tied import Tie
from loraweld.planning.claims import Claim

_UNTRAINED_COPY = ".base_layer.weight"


def weigh_claims(
    adapter: Adapter, claims: Sequence[Claim], stored: Mapping[str, Source], ties: Sequence[Tie]
) -> list[Claim]:
    """Return what is left of an adapter's claims at its weight; at 0 all of them are set aside.

    Raises:
        MatchError: a trained tensor has no counterpart of its shape in the base, so nothing lies between the two.
    """
    if adapter.weight == 1:
        return list(claims)
    if adapter.weight == 0:
        return [replace(claim, aside="weight 0, not used") for claim in claims]
    sources = {tie.target: stored[tie.source] for tie in ties} | dict(stored)
    problems: list[str] = []
    found = [_weighed(claim, adapter.weight, sources.get(claim.name), problems) for claim in claims]
    if problems:
        raise MatchError(
            f"{adapter.label} has the weight {adapter.weight:g}, but nothing lies between these tensors and the "
            f"base's; give it the weight 1, or 0:\n{listing(problems)}"
        )
    return found


def _weighed(claim: Claim, weight: float, base: Source | None, problems: list[str]) -> Claim:
    if claim.replacement is None:
        return replace(claim, edits=weighed(claim.edits, weight))
    if base is None or claim.replacement.shape != base.shape:
        found = "the base has none" if base is None else f"{base.shape} in the base"
        problems.append(f"{claim.name}: {claim.replacement.shape} in the adapter, {found}")
        return claim
    if claim.is_copy and claim.keys[0].endswith(_UNTRAINED_COPY):
        return replace(claim, aside="PEFT's copy of the base's layer, not used")
    return replace(claim, replacement=None, is_copy=False, edits=(_in_part(claim.replacement, weight),))


def _in_part(values: StoredTensor, weight: float) -> Weighted:
    return Weighted(edits=(ReplaceAll(values=values),), weight=weight)
