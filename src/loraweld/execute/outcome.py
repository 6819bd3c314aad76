"""What a run found out besides the bytes it made; the findings of several runs of one merge add up to one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from loraweld.errors import NumericsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Whether there was a delta, and whether any edited tensor differs from its base.

    `squared_error`, `squared_weight`: sums over the weights that were taken to their 4-bit form, of how far it is from
    the given weights and of these. `nonfinite`: the weights that were written with values that are not finite.
    """

    had_delta: bool = False
    any_change: bool = False
    squared_error: float = 0.0
    squared_weight: float = 0.0
    nonfinite: tuple[str, ...] = ()

    @property
    def base_difference(self) -> float | None:
        """‖dequant(quant(W)) - W‖ / ‖W‖ over all weights that were taken to their 4-bit form, None without."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else None

    def check_any_change(self) -> None:
        """Refuse a whole merge of which nothing is left.

        Raises:
            NumericsError: deltas were not zero, yet no tensor differs from its base after rounding.
        """
        if self.had_delta and not self.any_change:
            raise NumericsError(
                "every change of the adapter is smaller than the output can hold: the result would be the base. "
                "Give --dtype float32 or, to keep them in the mean, --rounding stochastic --seed N; --save-method "
                "merged_16bit if weights are encoded; or a larger --scale"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Outcome:
        return cls(**{**values, "nonfinite": tuple(values["nonfinite"])})


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome of a merge whose parts had these."""
    found = list(outcomes)
    return Outcome(
        had_delta=any(one.had_delta for one in found),
        any_change=any(one.any_change for one in found),
        squared_error=math.fsum(one.squared_error for one in found),
        squared_weight=math.fsum(one.squared_weight for one in found),
        nonfinite=tuple(sorted({name for one in found for name in one.nonfinite})),
    )
