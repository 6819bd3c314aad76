"""What no low rank expresses: which modules an adapter holds whole, and which biases it replaces. Values only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from loraweld.errors import MatchError, listing
from loraweld.extraction.pairs import Pair

_EXPERTS = re.compile(r"\bexperts\.")
_NUMBER_INSIDE = re.compile(r".*\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Aside:
    """`modules` are saved whole, every parameter below their paths; the biases in `biases` are replaced one by one."""

    modules: tuple[str, ...]
    biases: tuple[str, ...]

    def holds(self, pair: Pair) -> bool:
        """Return whether a module that is saved whole has this parameter."""
        return any(pair.parameter.startswith(f"{module}.") for module in self.modules)


def put_aside(pairs: Sequence[Pair], changed: Sequence[Pair]) -> Aside:
    """Decide about the changed parameters that are no weights for LoRA; `pairs` are all there are.

    A bias is replaced as with PEFT's option `bias`, so that the weight beside it can have a low rank. Of other
    parameters the module is saved, as PEFT does with `modules_to_save`, and what shares a weight with it.

    Raises:
        MatchError: what PEFT has no adapter for; all of it is listed.
    """
    problems = [f"{pair.parameter}: {reason}" for pair in changed if (reason := _obstacle(pair, pairs))]
    if problems:
        raise MatchError(f"changed, but no PEFT LoRA adapter can hold it:\n{listing(problems)}")
    saved = _closed(dict.fromkeys(pair.module for pair in changed if not pair.is_bias), pairs)
    biases = tuple(pair.parameter for pair in changed if pair.is_bias and not saved.holds(pair))
    return Aside(modules=saved.modules, biases=biases)


def _obstacle(pair: Pair, pairs: Sequence[Pair]) -> str | None:
    if _EXPERTS.search(pair.parameter):
        return (
            "an expert; transformers holds experts otherwise than they are stored, and no adapter is written for them"
        )
    if pair.is_bias:
        return None
    if not pair.module:
        return "belongs to no module that could be saved"
    below = (other.parameter[len(pair.module) :] for other in pairs if other.parameter.startswith(f"{pair.module}."))
    if any(map(_NUMBER_INSIDE.match, below)):
        return f"saving {pair.module!r} would save all the layers in it"
    return None


def _closed(modules: dict[str, None], pairs: Sequence[Pair]) -> Aside:
    """The modules, without those inside others, and those that share a weight with them."""
    while True:
        outermost = [m for m in modules if not any(m.startswith(f"{other}.") for other in modules)]
        saved = Aside(modules=tuple(outermost), biases=())
        twins = dict.fromkeys(twin.module for pair in pairs if saved.holds(pair) for twin in pair.twins)
        if twins.keys() <= modules.keys():
            return saved
        modules = {**modules, **twins}
