"""What `loraweld verify` measures, as numbers of the page: of each weight, what is left of the adapter's change."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraweld.checkpoint.base import Base
from loraweld.errors import LoraweldError
from loraweld.naming.places import Place, places
from loraweld.page.changes import TensorChange
from loraweld.page.facts import PageFacts
from loraweld.request import PathLike
from loraweld.verification.findings import TensorResult, VerifyReport

Progress = Callable[[int], None]
_NOTES = {"once": "", "float32": "", "encoded": "", "wrong": "not base + adapter"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the caller says was merged, and how: `options` as for `verify`."""

    base: PathLike | None
    adapters: Sequence[PathLike]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The report of a verification, and the base as the merge took it; or `reason`, why there was none."""

    report: VerifyReport | None = None
    base: Base | None = None
    reason: str = ""


def prove(facts: PageFacts, given: Given, progress: Progress) -> Proof:
    """Compare the output with base + adapters: those that were given, else those that were found, if any.

    Raises:
        LoraweldError: adapters that were given do not fit.
    """
    if facts.model is None:
        return Proof(reason=facts.reason)
    if given.adapters:
        found = facts.found.folder if facts.found is not None else None
        return _proof(facts, replace(given, base=found if given.base is None else given.base), progress)
    if not facts.adapters:
        return Proof(reason="The adapters that were merged were not found; give them with --adapter.")
    if facts.found is None:
        return Proof(reason=facts.reason)
    try:
        return _proof(facts, replace(given, base=facts.found.folder, adapters=facts.adapters), progress)
    except LoraweldError as error:
        return Proof(reason=f"The merge could not be planned again: {error}")


def _proof(facts: PageFacts, given: Given, progress: Progress) -> Proof:
    # torch, which a page without numbers does without
    from loraweld.verification.verify import open_sides, verify_opened

    assert facts.model is not None
    started = time.monotonic()
    opened, intended = open_sides(facts.model.folder, base=given.base, adapters=given.adapters, options=given.options)
    report = verify_opened(opened, intended, sample=1.0, progress=progress, started=started)
    return Proof(report=report, base=intended.base)


def proven(report: VerifyReport, model: Base) -> dict[str, TensorChange]:
    """Return the numbers of the weights that were compared with float64, by their names in the output."""
    where = places(list(model.tensors))
    return {
        result.stored: _change(result, where[result.stored], model.tensors[result.stored].shape)
        for result in report.tensors
        if result.stored in where
    }


def _change(result: TensorResult, place: Place, shape: tuple[int, ...]) -> TensorChange:
    change = TensorChange(
        tensor=result.stored,
        layer=place.layer,
        module=place.module,
        shape=shape,
        relative_change=_finite(result.sums.moved_share),
        error=_finite(result.relative_error),
        note=_NOTES.get(result.rounded, f"rounded {result.rounded}"),
    )
    left = result.retention
    if left is None:
        return change
    return replace(
        change,
        intended=_finite(left.change),
        kept=_finite(left.kept),
        change_error=_finite(left.error),
        lost=left.lost,
        cosine=_finite(left.cosine),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
