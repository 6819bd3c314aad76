"""What a combination of LoRA adapters consists of: for each module who takes part in it, with every check of shapes.

Shape letters: O = output features, I = input features, R = rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from loraweld.adapter.files import Adapter
from loraweld.adapter.values import same_values
from loraweld.checkpoint.stored import StoredTensor
from loraweld.combine.methods import Combination
from loraweld.dtypes import is_plain_float
from loraweld.errors import AdapterError, listing

# The pairs of parts that are a LoRA, with the ends of their keys.
_PAIRS = {
    ("lora_A", "lora_B"): (".lora_A.weight", ".lora_B.weight"),
    ("embedding_A", "embedding_B"): (".lora_embedding_A", ".lora_embedding_B"),
}
_TOKENS = "token_rows"
_COPY = ".base_layer."


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One adapter's part in a module: a (R, I, …), b (O, R, …); the module gains weight · scaling · b·a.

    `number` is the adapter's place among those that are combined.
    """

    number: int
    a: StoredTensor
    b: StoredTensor
    scaling: float
    weight: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedModule:
    """A module of the new adapter; `ends` are those of its two keys, `rank` the number of rows of its A."""

    path: str
    ends: tuple[str, str]
    terms: tuple[Term, ...]
    rank: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        first = self.terms[0]
        return (self.rank, *first.a.shape[1:]), (first.b.shape[0], self.rank, *first.b.shape[2:])


def combined_modules(adapters: Sequence[Adapter], combination: Combination) -> list[CombinedModule]:
    """Return the modules of the new adapter, in the order in which the adapters have them.

    Raises:
        AdapterError: an adapter that is more than LoRA, shapes that do not fit each other, or ranks that differ where
            A and B are combined apart.
    """
    _check_kinds(adapters, combination)
    terms: dict[str, list[Term]] = {}
    ends: dict[str, set[tuple[str, str]]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, combination.weights, strict=True)):
        for path, parts in adapter.modules.items():
            if _TOKENS not in parts:
                pair = tuple(sorted(parts))
                terms.setdefault(path, []).append(_term(number, adapter, path, [parts[p] for p in pair], weight))
                ends.setdefault(path, set()).add(_PAIRS[pair[0], pair[1]])
    _check_shapes(terms, ends)
    if not combination.uses_deltas and combination.method != "cat":
        _check_ranks(terms, adapters, combination)
    largest = max((term.rank for found in terms.values() for term in found), default=0)
    limit = combination.svd_rank or largest
    return [
        CombinedModule(path=path, ends=min(ends[path]), terms=tuple(found), rank=_rank(found, combination, limit))
        for path, found in terms.items()
    ]


def kept_tensors(adapters: Sequence[Adapter], modules: Sequence[CombinedModule]) -> list[tuple[Adapter, StoredTensor]]:
    """Return what the new adapter has as one of the adapters has it: tensors and token rows trained as a whole.

    An adapter of weight 0 gives none.

    Raises:
        AdapterError: two adapters hold different values of one, or one replaces what another one changes.
    """
    acting = [adapter for adapter in adapters if adapter.weight]
    problems = list(_conflicts(acting, {module.path for module in modules}))
    if problems:
        raise AdapterError(
            f"the adapters contradict each other:\n{listing(problems)}\nCombining takes such tensors from one adapter "
            "only; give the others the weight 0, or merge them one by one"
        )
    found: dict[str, tuple[Adapter, StoredTensor]] = {}
    for adapter in acting:
        for name, tensor in _whole(adapter).items():
            found.setdefault(name, (adapter, tensor))
    return list(found.values())


def _check_kinds(adapters: Sequence[Adapter], combination: Combination) -> None:
    problems = [f"{adapter.label}: {what}" for adapter in adapters for what in _other_kinds(adapter)]
    if problems:
        raise AdapterError(
            f"combine {combination.method} is for LoRA alone:\n{listing(problems)}\n"
            "combine sum takes adapters of any kind"
        )


def _other_kinds(adapter: Adapter) -> Iterator[str]:
    config = adapter.config
    if config.peft_type != "LORA":
        yield f"is of the type {config.peft_type}"
    if config.use_dora:
        yield "is a DoRA"
    if config.init in ("pissa", "olora"):
        yield f"was initialised with {config.init!r}, so that it changes its base too; PEFT can convert it to a LoRA"
    if config.raw.get("target_parameters"):
        yield "has target_parameters"
    pairs = [set(pair) for pair in _PAIRS]
    for path, parts in adapter.modules.items():
        if set(parts) != {_TOKENS} and set(parts) not in pairs and not config.use_dora:
            yield f"{path} has the parts {', '.join(sorted(parts))}, expected A and B"


def _term(number: int, adapter: Adapter, path: str, pair: Sequence[StoredTensor], weight: float) -> Term:
    a, b = pair
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"{path}: A {a.shape} and B {b.shape} have different ranks", path=adapter.weights)
    for tensor in pair:
        if not is_plain_float(tensor.dtype):
            raise AdapterError(f"{tensor.name!r} is stored as {tensor.dtype}, expected a float", path=adapter.weights)
    scaling = adapter.config.scaling(path, a.shape[0])
    return Term(number=number, a=a, b=b, scaling=scaling, weight=weight)


def _check_shapes(terms: Mapping[str, Sequence[Term]], ends: Mapping[str, set[tuple[str, str]]]) -> None:
    problems = []
    for path, found in terms.items():
        shapes = {(term.a.shape[1:], term.b.shape[:1], term.b.shape[2:]) for term in found}
        if len(shapes) > 1 or len(ends[path]) > 1:
            problems.append(f"{path}: A and B are " + "; ".join(f"{term.a.shape}, {term.b.shape}" for term in found))
    if problems:
        raise AdapterError(f"the adapters were trained on different layers:\n{listing(problems, limit=8)}")


def _check_ranks(terms: Mapping[str, Sequence[Term]], adapters: Sequence[Adapter], combination: Combination) -> None:
    problems = [
        f"{path}: " + ", ".join(f"{adapters[term.number].label} has rank {term.rank}" for term in found)
        for path, found in terms.items()
        if len({term.rank for term in found}) > 1
    ]
    if problems:
        raise AdapterError(
            f"combine {combination.method} works on A and B apart and needs equal ranks:\n"
            f"{listing(problems, limit=8)}\ncat, svd and the methods that end with _svd take any"
        )


def _rank(terms: Sequence[Term], combination: Combination, limit: int) -> int:
    """The rows of the new A. What is only summed has no more than the ranks together."""
    total = sum(term.rank for term in terms)
    if combination.method == "cat":
        return total
    if not combination.uses_deltas:
        return terms[0].rank
    full = min(terms[0].b.shape[0], math.prod(terms[0].a.shape[1:]))
    return min(limit, full, total) if combination.method == "svd" else min(limit, full)


def _whole(adapter: Adapter) -> dict[str, StoredTensor]:
    """The tensors that are no part of a LoRA, by what they stand for."""
    rows = {path: parts[_TOKENS] for path, parts in adapter.modules.items() if _TOKENS in parts}
    return {f"{path} ({_TOKENS})": tensor for path, tensor in rows.items()} | dict(adapter.parameters)


def _conflicts(adapters: Sequence[Adapter], combined: set[str]) -> Iterator[str]:
    whole = [_whole(adapter) for adapter in adapters]
    for (one, first), (other, second) in combinations(zip(adapters, whole, strict=True), 2):
        for name in first.keys() & second.keys():
            if _TOKENS in name or not same_values(first[name], second[name]):
                yield f"{name}: {one.label} and {other.label} both hold it"
    for adapter, found in zip(adapters, whole, strict=True):
        for name, tensor in found.items():
            module = name.removesuffix(".weight").removesuffix(f" ({_TOKENS})")
            if module in combined and _COPY not in tensor.name:
                yield f"{name}: {adapter.label} replaces it, and a LoRA acts on it"
