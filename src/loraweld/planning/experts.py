"""LoRA on the experts of a layer (`target_parameters`) → edits of the tensors that a checkpoint has of them.

Shape letters: E = experts, R = rank of one expert, O and I = sizes of the delta of one expert, as B·A has them.

    A (R·E, I)   expert e has rows [e·R, (e+1)·R)
    B (O, R·E)   expert e has columns e, e+E, e+2E, …
    Δ_e = scaling · B_e·A_e

Source: PEFT 0.21.2, `ParamWrapper` in lora/layer.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loraweld.adapter.config import AdapterConfig
from loraweld.adapter.edits import Columns, Edit, LowRank, OnRows
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import AdapterError, MatchError
from loraweld.naming.experts import PARAMETERS, ExpertNames, Piece, has_transposed_experts

_WRAPPER = ".base_layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPair:
    """The factors of one parameter of all experts, and what decides how they lie."""

    parameter: str
    a: StoredTensor
    b: StoredTensor
    config: AdapterConfig
    model_type: str
    layout: str  # "auto", "standard" or "swapped"


def wrapped_parameter(config: AdapterConfig, module: str, experts: ExpertNames) -> tuple[str, list[Piece]] | None:
    """Return the path of the parameter that a pair belongs to, and its tensors; None if the base has no such experts.

    Several parameters of a module are wrapped one into the other, the first one innermost: its keys have the most
    `base_layer` in them.

    Raises:
        AdapterError: the config does not say which parameter it is.
    """
    stem = module
    while stem.endswith(_WRAPPER):
        stem = stem.removesuffix(_WRAPPER)
    depth = (len(module) - len(stem)) // len(_WRAPPER)
    targets = [name for name in PARAMETERS if _is_target(config, f"{stem}.{name}")]
    wanted = {name: pieces for name in targets if (pieces := experts.pieces(stem, name))}
    if not wanted:
        return None
    if depth >= len(wanted):
        raise AdapterError(f"is wrapped {depth + 1} times, target_parameters names {', '.join(wanted)} of this module")
    name = list(wanted)[len(wanted) - 1 - depth]
    return f"{stem}.{name}", wanted[name]


def _is_target(config: AdapterConfig, path: str) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in config.target_parameters)


def expert_edits(pair: ExpertPair, pieces: list[Piece], tensors: Mapping[str, Source]) -> list[tuple[str, Edit]]:
    """Return (tensor, edit) for all that the pair changes.

    Raises:
        MatchError: the factors do not fit the tensors.
        AdapterError: the experts are square, and nothing says how the factors lie.
    """
    if pieces[0].expert is None:
        return _fused(pair, pieces[0].name, tensors[pieces[0].name])
    return _split(pair, pieces, tensors)


def _fused(pair: ExpertPair, name: str, stored: Source) -> list[tuple[str, Edit]]:
    if len(stored.shape) != 3 or not stored.shape[0]:
        raise MatchError(f"{name!r} is {stored.shape}, expected (experts, rows, columns)")
    experts, rows, cols = stored.shape
    whole = _Side(b=pair.b, transposed=_is_transposed(pair, (rows, cols)))
    scaling = _scaling(pair, experts)
    return [
        (name, OnRows(edit=_delta(factors, whole, scaling), start=e * rows, stop=(e + 1) * rows))
        for e, factors in enumerate(_factors(pair, experts))
    ]


def _split(pair: ExpertPair, pieces: list[Piece], tensors: Mapping[str, Source]) -> list[tuple[str, Edit]]:
    """A matrix (outputs, inputs) for each expert and part, which lie one above the other in the delta."""
    parts = pieces[0].parts
    experts = len(pieces) // parts
    outputs, inputs = tensors[pieces[0].name].shape
    transposed = _is_transposed(pair, (outputs * parts, inputs))
    sides = [_side(pair, part * outputs, (part + 1) * outputs, transposed=transposed) for part in range(parts)]
    scaling, factors = _scaling(pair, experts), _factors(pair, experts)
    edits: list[tuple[str, Edit]] = []
    for piece in pieces:
        shape = tensors[piece.name].shape
        if shape != (outputs, inputs):
            raise MatchError(f"{piece.name!r} is {shape}, other experts are {(outputs, inputs)}")
        assert piece.expert is not None
        edits.append((piece.name, _delta(factors[piece.expert], sides[piece.part], scaling)))
    return edits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """The rows of B, or the columns of A if the delta is stored transposed, that make one part of every expert."""

    b: StoredTensor
    transposed: bool
    a_columns: Columns | None = None


def _side(pair: ExpertPair, start: int, stop: int, *, transposed: bool) -> _Side:
    if transposed:
        return _Side(b=pair.b, transposed=True, a_columns=Columns(start=start, stop=stop))
    return _Side(b=pair.b.part(start, stop), transposed=False)


def _factors(pair: ExpertPair, experts: int) -> list[tuple[StoredTensor, Columns]]:
    """The rows of A, and which columns of B, that each expert has; the parts of an expert share them."""
    rank, cols = _rank(pair, experts), pair.b.cols
    return [(pair.a.part(e * rank, (e + 1) * rank), Columns(start=e, stop=cols, step=experts)) for e in range(experts)]


def _scaling(pair: ExpertPair, experts: int) -> float:
    return pair.config.scaling(pair.parameter, _rank(pair, experts))


def _delta(factors: tuple[StoredTensor, Columns], side: _Side, scaling: float) -> LowRank:
    """The delta of one expert, of some of the rows of the stored matrix."""
    a, b_columns = factors
    return LowRank(
        a=a,
        b=side.b,
        scaling=scaling,
        transposed=side.transposed,
        a_columns=side.a_columns,
        b_columns=b_columns,
    )


def _rank(pair: ExpertPair, experts: int) -> int:
    a, b = pair.a.shape, pair.b.shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % experts:
        raise MatchError(f"A is {a} and B is {b}, expected (rank · {experts}, …) and (…, rank · {experts})")
    return a[0] // experts


def _is_transposed(pair: ExpertPair, stored: tuple[int, int]) -> bool:
    """Whether a stored matrix is the transpose of B·A. The shapes tell, unless it is square."""
    delta = pair.b.shape[0], pair.a.shape[1]
    if delta not in (stored, stored[::-1]):
        raise MatchError(f"A is {pair.a.shape} and B is {pair.b.shape}, but an expert of the base is {stored}")
    return _square(pair) if stored[0] == stored[1] else delta != stored


def _square(pair: ExpertPair) -> bool:
    """How the factors of square experts lie: PEFT has changed it twice.

    0.17 and 0.18 took the first size for the inputs, always; 0.19.0 had the classes that hold their experts transposed
    the wrong way round; since 0.19.1 the last size is the inputs, and the first one for these classes.
    """
    if pair.layout != "auto":
        return pair.layout == "swapped"
    version = version_of(pair.config.peft_version)
    if version is None:
        raise AdapterError(
            "the experts are square, and the config has no peft_version that tells how A and B lie; give "
            "--expert-layout standard (A reads the last size, PEFT ≥ 0.19.1) or swapped"
        )
    holds_transposed = has_transposed_experts(pair.model_type)
    if version < (0, 19, 0):
        return True
    return not holds_transposed if version == (0, 19, 0) else holds_transposed


def version_of(text: str | None) -> tuple[int, int, int] | None:
    """Return the three numbers that a version of PEFT begins with, None if it is none."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def one_expert_edit(
    config: AdapterConfig, module: str, a: StoredTensor, b: StoredTensor, piece: Piece, stored: Source
) -> Edit:
    """Return the edit of a pair that was trained on one expert alone, where all of them are one stored tensor.

    Raises:
        MatchError: the factors do not fit, or act on columns that lie apart.
    """
    assert piece.expert is not None
    _, rows, cols = stored.shape
    outputs, inputs = b.shape[0], a.shape[1]
    scaling = config.scaling(module, a.shape[0])
    if (outputs * piece.parts, inputs) == (rows, cols):
        start = piece.expert * rows + piece.part * outputs
        edit = LowRank(a=a, b=b, scaling=scaling, transposed=False)
        return OnRows(edit=edit, start=start, stop=start + outputs)
    if piece.parts == 1 and (inputs, outputs) == (rows, cols):
        edit = LowRank(a=a, b=b, scaling=scaling, transposed=True)
        return OnRows(edit=edit, start=piece.expert * rows, stop=(piece.expert + 1) * rows)
    raise MatchError(f"A is {a.shape} and B is {b.shape}, but an expert of {piece.name!r} is {(rows, cols)}")
