"""What a verification found: values for programs, lines for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """What is left of an adapter's change Δ of a weight W in the stored weight S.

    `change`: ‖Δ‖ / ‖W‖. `error`: ‖(S - W) - Δ‖ / ‖Δ‖. `kept`: the part of Δ that S - W has along it, 1 for all.
    `lost`: share of the elements with a change whose value is still W. `cosine`: between S - W and Δ.
    """

    change: float
    error: float
    kept: float
    lost: float
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorResult:
    """One tensor that was compared with float64.

    `steps`: the largest distance in units of the last place of the stored dtype. `misrounded`: share of elements that
    are not the correctly rounded value. `rounded`: "once", "twice" (the change first), "after each adapter", "float32",
    "encoded", "wrong". `relative_error`: ‖stored - exact‖ / ‖exact‖.
    """

    tensor: str
    kind: str
    dtype: str
    rounded: str
    elements: int
    steps: float
    misrounded: float
    relative_error: float
    retention: Retention | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The outcome of `loraweld.verify`. `equal` counts the tensors whose bytes are the base's; time in seconds."""

    output: Path | str
    base: str
    adapters: tuple[str, ...]
    sample: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    tensors: tuple[TensorResult, ...]
    equal: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the output is base + adapters."""
        return not self.findings

    @property
    def retention(self) -> dict[str, float] | None:
        """What is left of the change over all changed weights: medians and the worst; None without one."""
        kept = [result.retention for result in self.tensors if result.retention is not None]
        if not kept:
            return None
        return {
            "tensors": len(kept),
            "median_change": _median([one.change for one in kept]),
            "median_error": _median([one.error for one in kept]),
            "median_kept": _median([one.kept for one in kept]),
            "least_kept": min(one.kept for one in kept),
            "median_lost": _median([one.lost for one in kept]),
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
            "retention": self.retention,
            "tensors": [_finite(asdict(result)) for result in self.tensors],
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
            *_retention_lines(self.retention),
            *(f"note: {note}" for note in self.notes),
        ]


def lost_change_warnings(tensors: Sequence[TensorResult]) -> list[str]:
    """Warn of weights that hold less than half of the adapter's change, and say what to do."""
    lost = [one for one in tensors if one.retention is not None and not one.retention.kept >= _LITTLE]
    blurred = [
        one for one in tensors if one.retention is not None and one.retention.error > _LITTLE and one not in lost
    ]
    return [
        *_warning(lost, "less than half of the adapter's change is in"),
        *_warning(blurred, "rounding is more than half as large as the adapter's change in"),
    ]


def _warning(tensors: Sequence[TensorResult], what: str) -> list[str]:
    if not tensors:
        return []
    worst = max(tensors, key=lambda one: one.retention.error if one.retention else 0.0)
    if any(one.rounded == "encoded" for one in tensors):
        cure = "save in 16 bit (--save-method merged_16bit), or in an encoding of more bits"
    else:
        cure = "write float32 (--dtype float32), or merge with a larger --scale"
    return [f"WARNING: {what} {len(tensors)} weights, {worst.tensor} the worst, because their steps are larger: {cure}"]


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


def _retention_lines(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return []
    return [
        f"of the adapter's change ({found['median_change']:.2%} of a weight's norm) the weights have "
        f"{found['median_kept']:.0%} (median; least {found['least_kept']:.0%}), with an error of "
        f"{found['median_error']:.0%} of it; in {found['median_lost']:.0%} of the elements it was rounded away"
    ]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
