"""What a verification found: values for programs, lines for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loraweld.naming.places import kind_of, places
from loraweld.verification.agreement import Behaviour

_SHOWN = 20
_LITTLE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong: `check` names the check, `where` the tensor or file."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is left of an adapter's change Δ of a weight W in the stored weight S; norms are over all elements.

    `change`: ‖Δ‖ / ‖W‖. `error`: ‖(S - W) - Δ‖ / ‖Δ‖. `kept`: ⟨S - W, Δ⟩ / ‖Δ‖², the part of Δ that S - W has along
    it, 1 for all. `lost`: of the elements with Δ ≠ 0 the share whose change was rounded away, so that S is what W alone
    would be stored as; None where that cannot be told, since plain weights have become codes. `cosine`: between S - W
    and Δ, 0 if nothing moved.
    """

    change: float
    error: float
    kept: float
    lost: float | None
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeSums:
    """What `Retention` is made from, summed over elements: of one weight, or of several added up.

    W is the base, S the stored value, Δ what the adapter changes.
    """

    weight: float = 0.0  # W²
    change: float = 0.0  # Δ²
    error: float = 0.0  # (S - W - Δ)²
    moved: float = 0.0  # (S - W)²
    along: float = 0.0  # (S - W)·Δ
    asked: int = 0  # elements with Δ ≠ 0 of which it is known what W alone would be stored as
    lost: int = 0  # of these, those with that value

    def __add__(self, other: ChangeSums) -> ChangeSums:
        return ChangeSums(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})

    @property
    def moved_share(self) -> float:
        """‖S - W‖ / ‖W‖."""
        return _ratio(self.moved, self.weight)

    @property
    def retention(self) -> Retention | None:
        """None where nothing was to change."""
        if not self.change:
            return None
        length = math.sqrt(self.change) * math.sqrt(self.moved)
        return Retention(
            change=_ratio(self.change, self.weight),
            error=_ratio(self.error, self.change),
            kept=self.along / self.change,
            lost=self.lost / self.asked if self.asked else None,
            cosine=self.along / length if length else 0.0,
        )


def _ratio(squares: float, of: float) -> float:
    if not squares:
        return 0.0
    return math.sqrt(squares / of) if of else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorResult:
    """One tensor that was compared with float64.

    `steps`: the largest distance in units of the last place of the stored dtype. `misrounded`: share of elements that
    are not the correctly rounded value. `rounded`: "once", "stochastically" (by the seed of the merge), "twice" (the
    change first), "after each adapter", "float32", "encoded", "wrong". `relative_error`: ‖stored - exact‖ / ‖exact‖.
    `stored`: its name in the output, where other tools use another prefix than the base.
    """

    tensor: str
    kind: str
    dtype: str
    rounded: str
    elements: int
    steps: float
    misrounded: float
    relative_error: float
    sums: ChangeSums
    stored: str

    @property
    def retention(self) -> Retention | None:
        """What is left of the change; None where there was to be none."""
        return self.sums.retention

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite number becomes text."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "sums"}
        return dict(_finite(values | {"retention": self.retention and asdict(self.retention)}))


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The outcome of `loraweld.verify`. `equal` counts the tensors whose bytes are the base's; time in seconds.

    `behaviour` is None if nothing was run, or the output could not be.
    """

    output: Path | str
    base: str
    adapters: tuple[str, ...]
    sample: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    tensors: tuple[TensorResult, ...]
    equal: int
    seconds: float
    behaviour: Behaviour | None = None

    @property
    def holds(self) -> bool:
        """Whether the output is base + adapters."""
        return not self.findings

    @property
    def changed(self) -> list[TensorResult]:
        """The weights that an adapter was to change."""
        return [result for result in self.tensors if result.retention is not None]

    @property
    def total(self) -> Retention | None:
        """What is left of the change of all weights together; None without one."""
        return _total(self.changed).retention

    @property
    def retention(self) -> dict[str, Any] | None:
        """What is left of the change of all weights together, medians and the worst; None if there was none."""
        kept = [result.retention for result in self.tensors if result.retention is not None]
        if self.total is None:
            return None
        lost = [one.lost for one in kept if one.lost is not None]
        return {
            "tensors": len(kept),
            "total": asdict(self.total),
            "median_change": _median([one.change for one in kept]),
            "median_error": _median([one.error for one in kept]),
            "median_kept": _median([one.kept for one in kept]),
            "least_kept": min(one.kept for one in kept),
            "median_lost": _median(lost) if lost else None,
            "least_cosine": min(one.cosine for one in kept),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values: `loraweld verify --json`; an infinite number becomes text."""
        return {
            "output": str(self.output),
            "holds": self.holds,
            "base": self.base,
            "adapters": list(self.adapters),
            "sample": self.sample,
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
            "equal": self.equal,
            "retention": _finite(self.retention),
            "tensors": [result.to_json() for result in self.tensors],
            "behaviour": _finite(self.behaviour.to_json()) if self.behaviour else None,
            "seconds": round(self.seconds, 3),
        }

    def lines(self) -> list[str]:
        """Return the report for a person."""
        share = "" if self.sample == 1 else f" ({self.sample:.1%} of the rows)"
        head = "holds" if self.holds else f"DOES NOT HOLD, {len(self.findings)} findings"
        found = [str(finding) for finding in self.findings[:_SHOWN]]
        more = [f"and {len(self.findings) - _SHOWN} more"] if len(self.findings) > _SHOWN else []
        return [
            f"{self.output}: {head}{share}, checked in {self.seconds:.1f} s",
            f"base {self.base}, adapter {', '.join(self.adapters)}",
            *found,
            *more,
            f"tensors: {self.equal} equal to the base, {len(self.tensors)} compared with float64",
            *_rounding_lines(self.tensors),
            *_retention_lines(self.changed),
            *(f"note: {note}" for note in self.notes),
            *(self.behaviour.lines() if self.behaviour else ()),
        ]


# What is wrong with what is left, and what to do about it in plain weights; a weight is told of once, by the first.
_IN_THE_MEAN = "keep it in the mean (--rounding stochastic --seed N), write float32 (--dtype float32)"
_WARNINGS: tuple[tuple[str, Callable[[Retention], bool], str], ...] = (
    ("less than half of the adapter's change is in", lambda left: not left.kept >= _LITTLE, _IN_THE_MEAN),
    (
        "in more than half of the elements the adapter's change was rounded away in",
        lambda left: _most(left.lost),
        _IN_THE_MEAN,
    ),
    (
        "rounding is more than half as large as the adapter's change in",
        lambda left: not left.error <= _LITTLE,
        "write float32 (--dtype float32)",
    ),
)


def _most(share: float | None) -> bool:
    return share is not None and share > _LITTLE


def lost_change_warnings(tensors: Sequence[TensorResult]) -> list[str]:
    """Warn of weights in which little is left of the adapter's change, and say what to do."""
    told: dict[str, list[TensorResult]] = {what: [] for what, _, _ in _WARNINGS}
    for result in tensors:
        left = result.retention
        first = next((what for what, is_so, _ in _WARNINGS if left is not None and is_so(left)), None)
        if first is not None:
            told[first].append(result)
    return [warning for what, _, cure in _WARNINGS for warning in _warning(told[what], what, cure)]


def _warning(tensors: Sequence[TensorResult], what: str, cure_of_plain: str) -> list[str]:
    if not tensors:
        return []
    worst = max(tensors, key=lambda one: one.retention.error if one.retention else 0.0)
    is_encoded = any(one.rounded == "encoded" for one in tensors)
    cure = (
        "save in 16 bit (--save-method merged_16bit), in another encoding, of more bits"
        if is_encoded
        else cure_of_plain
    )
    told = f"{what} {len(tensors)} weights, {worst.tensor} the worst, because their steps are larger"
    return [f"WARNING: {told}: {cure}, or merge with a larger --scale"]


def _rounding_lines(tensors: Sequence[TensorResult]) -> list[str]:
    kinds: dict[str, list[TensorResult]] = {}
    for result in tensors:
        kinds.setdefault(result.rounded, []).append(result)
    lines = []
    for name, results in kinds.items():
        total = max(1, sum(result.elements for result in results))
        if name == "encoded":
            lines.append(
                f"encoded: {len(results)}, relative error at most {max(r.relative_error for r in results):.2%}"
            )
            continue
        share = sum(result.misrounded * result.elements for result in results) / total
        steps = max(result.steps for result in results)
        lines.append(f"rounded {name}: {len(results)}, at most {steps:.2f} ulp from float64, {share:.2e} misrounded")
    return lines


def _retention_lines(changed: Sequence[TensorResult]) -> list[str]:
    """All together, then each kind of module over all layers, the least kept first."""
    total = _total(changed).retention
    if total is None:
        return []
    where = places([result.tensor for result in changed])
    kinds: dict[str, list[TensorResult]] = {}
    for result in changed:
        kinds.setdefault(kind_of(where[result.tensor].module), []).append(result)
    found = [(_total(results).retention, f"{kind} × {len(results)}") for kind, results in kinds.items()]
    rows = sorted(((left, name) for left, name in found if left), key=lambda row: row[0].cosine)
    return [
        f"of the adapter's change Δ the {len(changed)} weights together have {total.kept:.1%}; by module, the least "
        "alike first (error of the stored Δ, elements whose change was rounded away, cosine of stored and intended Δ):",
        *(f"  {name}: {_told(left)}" for left, name in [(total, "all"), *rows[:_SHOWN]]),
    ]


def _told(left: Retention) -> str:
    lost = "" if left.lost is None else f", rounded away {left.lost:.1%}"
    return f"‖Δ‖/‖W‖ {left.change:.3%}, error {left.error:.2%}{lost}, cosine {left.cosine:.6f}"


def _total(results: Iterable[TensorResult]) -> ChangeSums:
    return sum((result.sums for result in results), ChangeSums())


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
