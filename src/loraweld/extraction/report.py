"""What an extraction found: a value for programs, a few lines for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from loraweld.report import human_bytes

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedModule:
    """One low-rank change: `squared_norm` is ‖Δ‖² of what was between the models, `squared_kept` ‖Δ_r‖²."""

    module: str
    kind: str
    rank: int
    squared_norm: float
    squared_kept: float

    @property
    def kept(self) -> float:
        """The part of the change that is in the adapter, 1 for all of it."""
        return self.squared_kept / self.squared_norm

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "kind": self.kind,
            "rank": self.rank,
            "kept": self.kept,
            "norm": math.sqrt(self.squared_norm),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedParameter:
    """A parameter that is in the adapter as a whole, `how` "modules_to_save" or "bias"."""

    parameter: str
    how: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """The outcome of `loraweld.extract`. Sizes in bytes, time in seconds; `unchanged` counts equal parameters."""

    output: Path
    base: str
    tuned: str
    rank: int
    energy: float | None
    modules: tuple[ExtractedModule, ...]
    saved: tuple[SavedParameter, ...]
    unchanged: int
    notes: tuple[str, ...]
    bytes_written: int
    seconds: float

    @property
    def kept(self) -> float:
        """The part of the change of all weights with a low rank that is in the adapter: Σ‖Δ_r‖² / Σ‖Δ‖²."""
        return sum(m.squared_kept for m in self.modules) / sum(m.squared_norm for m in self.modules)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values: `loraweld extract --json`."""
        return {
            "output": str(self.output),
            "base": self.base,
            "tuned": self.tuned,
            "rank": self.rank,
            "energy": self.energy,
            "kept": self.kept,
            "modules": [module.to_json() for module in self.modules],
            "saved": [asdict(parameter) for parameter in self.saved],
            "unchanged": self.unchanged,
            "notes": list(self.notes),
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
        }

    def lines(self) -> list[str]:
        """Return the report for a person."""
        ranks = sorted(module.rank for module in self.modules)
        least = sorted(self.modules, key=lambda module: module.kept)[:_SHOWN]
        return [
            f"{self.output}: {human_bytes(self.bytes_written)} in {self.seconds:.1f} s",
            f"base {self.base}, tuned model {self.tuned}",
            f"{len(self.modules)} modules of rank {_span(ranks)}; the adapter has {self.kept:.2%} of their change "
            f"(‖Δ_r‖²/‖Δ‖², median {median(module.kept for module in self.modules):.2%})",
            "least: " + ", ".join(f"{module.module} {module.kept:.2%}" for module in least),
            *_saved_lines(self.saved),
            f"{self.unchanged} parameters are equal in both",
            *(f"note: {note}" for note in self.notes),
        ]


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"


def _saved_lines(saved: Sequence[SavedParameter]) -> list[str]:
    lines = []
    for how in dict.fromkeys(parameter.how for parameter in saved):
        names = [parameter.parameter for parameter in saved if parameter.how == how]
        size = human_bytes(sum(parameter.num_bytes for parameter in saved if parameter.how == how))
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"whole, as {how} ({size}): {', '.join(names[:_SHOWN])}{more}")
    return lines
