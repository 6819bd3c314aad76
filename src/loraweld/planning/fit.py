"""Do adapters and base fit each other? All claims of all adapters, weighed, or a refusal that lists what does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import Base
from loraweld.errors import MatchError, listing
from loraweld.naming.names import Names
from loraweld.naming.tied import Tie
from loraweld.planning.claims import Claim, ClaimFinder
from loraweld.planning.completeness import check_completeness
from loraweld.planning.weights import weigh_claims


def fitting_claims(
    base: Base, adapters: Iterable[Adapter], ties: Sequence[Tie], *, expert_layout: str = "auto"
) -> list[Claim]:
    """Return what each adapter does to which tensor, at its weight.

    Raises:
        MatchError: a tensor has no place, or something is missing that was trained.
    """
    names = Names(base.tensors, base.config)
    claims: list[Claim] = []
    problems: list[str] = []
    for adapter in adapters:
        finder = ClaimFinder(base, names, adapter, ties, expert_layout=expert_layout)
        finder.find()
        found = finder.problems or check_completeness(base, names, adapter, finder.claims, ties)
        problems += found
        claims += weigh_claims(adapter, finder.claims, base.tensors, ties) if not found else ()
    if problems:
        raise MatchError(
            f"adapter and base {base.label} do not fit; nothing was written:\n{listing(problems)}\n"
            "Was the adapter trained on another base? Give the right one with --base"
        )
    return claims
