"""How true an encoded weight is to what was computed, and how much of the adapter's change is left in it.

Shape letters: n = rows at hand, C = columns. W = the edited weight, D = what the stored codes decode to, B = the base
as it was decoded; W - B is the change that the adapter asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Fidelity:
    """Sums over the elements of a weight."""

    squared_error: float = 0.0  # (D - W)²
    squared_weight: float = 0.0  # W²
    squared_change: float = 0.0  # (W - B)²
    kept_change: float = 0.0  # (D - B)·(W - B)

    @property
    def relative_error(self) -> float:
        """‖D - W‖ / ‖W‖: what the encoding added, as a share of the weight."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0

    @property
    def kept(self) -> float | None:
        """The part of the change that the stored weight has, along the change: 1 all, 0 nothing; None without one."""
        return self.kept_change / self.squared_change if self.squared_change else None

    def add(self, stored_nC: torch.Tensor, wanted_nC: torch.Tensor, base_nC: torch.Tensor) -> None:
        """Count some rows, all in float32; `stored_nC` is overwritten."""
        change = (wanted_nC - base_nC).view(-1)
        stored, wanted = stored_nC.view(-1), wanted_nC.view(-1)
        self.squared_weight += float(torch.dot(wanted, wanted))
        self.squared_change += float(torch.dot(change, change))
        error = stored.sub_(wanted)
        self.squared_error += float(torch.dot(error, error))
        # D - B = (D - W) + (W - B)
        self.kept_change += float(torch.dot(error, change)) + float(torch.dot(change, change))

    @property
    def sums(self) -> list[float]:
        """The sums in the order of the fields, for the journal of a run."""
        return [self.squared_error, self.squared_weight, self.squared_change, self.kept_change]
