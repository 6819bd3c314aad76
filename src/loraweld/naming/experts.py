"""Experts: a parameter that a trained model holds for all of them, and the tensors that a checkpoint has instead.

transformers 5 fuses the experts of a layer when it loads them: `experts.gate_up_proj` (experts, 2 · intermediate,
hidden), gate rows first, and `experts.down_proj`. Checkpoints have these, or a matrix for each expert and projection.
Source: `conversion_mapping.py` of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from loraweld.errors import MatchError
from loraweld.naming.names import Names

# Parameters in the order in which the classes define them: PEFT wraps the first of those it adapts innermost.
PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "w2", "down_proj")
# What the matrices of one expert are called on disk, in the order in which they are fused.
_SPLITS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# Other names of the module that holds the experts, and of a fused parameter, trained model → disk.
_MODULES = ((r"\bmlp\.experts$", "block_sparse_moe.experts"), (r"\bmlp\.experts$", "ffn.experts"))
_FUSED = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}
_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
# Classes that hold the weights of experts as (experts, inputs, outputs) and say so (`is_transposed`).
_TRANSPOSED = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor of a parameter: of `expert` alone (None: of all), part `part` of `parts` of its outputs."""

    name: str
    expert: int | None
    part: int = 0
    parts: int = 1


class ExpertNames:
    """Finds the stored tensors of the experts of a base."""

    def __init__(self, stored: Collection[str], names: Names) -> None:
        self._stored = frozenset(stored)
        self._names = names
        self._counts: dict[str, int] = {}
        for name in stored:
            if found := _ONE_EXPERT.match(name):
                self._counts[found[1]] = max(self._counts.get(found[1], 0), int(found[2]) + 1)

    def pieces(self, module: str, parameter: str) -> list[Piece]:
        """Return the tensors of `parameter` of all experts in `module`; none if the base has no such experts.

        Raises:
            MatchError: some of the experts are missing.
        """
        for place in self._modules(module):
            for name in (f"{place}.{parameter}", f"{place.removesuffix('.experts')}.{_FUSED.get(parameter, '')}"):
                found = self._names.find(name)
                if found is not None:
                    return [Piece(found, None)]
            for split in _SPLITS.get(parameter, ()):
                pieces = self._split(place, split)
                if pieces:
                    return pieces
        return []

    def one_expert(self, module: str) -> Piece | None:
        """Return the place in a fused tensor of a module of one expert, which is how older adapters name them."""
        found = _ONE_EXPERT.fullmatch(module)
        if found is None:
            return None
        stem, expert, projection = found[1], int(found[2]), found[3]
        for parameter, splits in _SPLITS.items():
            for split in splits:
                if projection in split:
                    pieces = self.pieces(stem, parameter)
                    if pieces and pieces[0].expert is None:
                        return Piece(pieces[0].name, expert, split.index(projection), len(split))
        return None

    def _modules(self, module: str) -> list[str]:
        renamed = (re.sub(pattern, new, module) for pattern, new in _MODULES)
        return list(dict.fromkeys([module, *renamed]))

    def _split(self, place: str, split: Sequence[str]) -> list[Piece]:
        first = self._names.find(f"{place}.0.{split[0]}.weight")
        if first is None:
            return []
        stem = first.removesuffix(f".0.{split[0]}.weight")
        pieces = [
            Piece(f"{stem}.{expert}.{projection}.weight", expert, part, len(split))
            for expert in range(self._counts[stem])
            for part, projection in enumerate(split)
        ]
        missing = [piece.name for piece in pieces if piece.name not in self._stored]
        if missing:
            raise MatchError(f"the base lacks tensors of its experts, among others {missing[0]!r}")
        return pieces


def has_transposed_experts(model_type: str) -> bool:
    """Return whether the model's class holds its experts as (experts, inputs, outputs) and says so."""
    return model_type in _TRANSPOSED
