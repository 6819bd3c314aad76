"""What changed in each tensor, as values: whoever measures it, the page shows these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loraweld.naming.places import kind_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """One weight of the output beside the base's; a number is None where there is none, and `note` may say why.

    `layer` is None outside the layers; `module` is the rest of the name. What the numbers are is said in `MEASURES`.
    """

    tensor: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    relative_change: float | None = None
    intended: float | None = None
    kept: float | None = None
    change_error: float | None = None
    lost: float | None = None
    cosine: float | None = None
    error: float | None = None
    largest: float | None = None
    alike: float | None = None
    note: str = ""

    @property
    def is_touched(self) -> bool:
        """Whether it changed or was to change."""
        return self.relative_change != 0 or bool(self.intended)


def percent(ratio: float) -> str:
    """Return a ratio as people read it, to six digits."""
    return f"{100 * ratio:.6g} %"


def number(value: float) -> str:
    """Return a number to eight digits, which tell cosines near 1 apart."""
    return f"{value:.8g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A number of each tensor: the field that has it, what it is called and what it is.

    W is the base's weight, S the stored one, Δ what base + adapter come to in float64 less W. `worst` chooses what a
    place in the map shows of several tensors; `top` is the end of its colours, None for the largest value.
    """

    key: str
    label: str
    meaning: str
    worst: Callable[[Iterable[float]], float] = max
    top: float | None = None
    show: Callable[[float], str] = percent

    @property
    def tick_format(self) -> str:
        """How plotly labels an axis of it."""
        return ".3~%" if self.show is percent else ""

    def of(self, change: TensorChange) -> float | None:
        value: float | None = getattr(change, self.key)
        return value


MEASURES = (
    Measure(
        key="relative_change",
        label="Change",
        meaning="‖S − W‖ / ‖W‖: how far the stored weight is from W, rounding and encoding included.",
    ),
    Measure(
        key="intended",
        label="Intended change",
        meaning="‖Δ‖ / ‖W‖: how far base + adapter in float64 is from W, before anything is rounded.",
    ),
    Measure(
        key="kept",
        label="Kept",
        meaning="⟨S − W, Δ⟩ / ‖Δ‖²: how much of the intended change is in the stored weight; 100 % is all of it.",
        worst=min,
        top=1.0,
    ),
    Measure(
        key="change_error",
        label="Error of the change",
        meaning="‖(S − W) − Δ‖ / ‖Δ‖: what rounding or encoding added, against the size of the intended change.",
    ),
    Measure(
        key="lost",
        label="Rounded away",
        meaning="Share of the elements with a change that hold what the base alone would be stored as.",
        top=1.0,
    ),
    Measure(
        key="cosine",
        label="Cosine",
        meaning="⟨S − W, Δ⟩ / (‖S − W‖·‖Δ‖): whether stored and intended change point the same way; 1 is the same.",
        worst=min,
        top=1.0,
        show=number,
    ),
    Measure(
        key="error",
        label="Error of the weight",
        meaning="‖S − (W + Δ)‖ / ‖W + Δ‖: what the one rounding, or the codes of an encoding, lost of the weight.",
    ),
    Measure(
        key="largest",
        label="Largest difference",
        meaning="Largest |S − W| of any element, in the units of the weights.",
        show=number,
    ),
    Measure(
        key="alike",
        label="Cosine of the weights",
        meaning="⟨S, W⟩ / (‖S‖·‖W‖); 1 is the same direction.",
        worst=min,
        top=1.0,
        show=number,
    ),
)


def measures(changes: Sequence[TensorChange]) -> tuple[Measure, ...]:
    """Return what is known of any tensor."""
    return tuple(one for one in MEASURES if any(one.of(change) is not None for change in changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A layer's tensors of one kind; `value` is the worst of theirs, `change` the tensor that has it."""

    layer: int
    kind: str
    change: TensorChange
    value: float
    num_tensors: int


def in_order(changes: Iterable[TensorChange]) -> list[TensorChange]:
    """Return the changes by layer, what is outside the layers first, else as they come."""
    return sorted(changes, key=lambda change: -1 if change.layer is None else change.layer)


def cells(changes: Sequence[TensorChange], measure: Measure) -> list[Cell]:
    """Return the map of a measure: of each layer and kind of tensor the worst, for those that were measured."""
    groups: dict[tuple[int, str], list[tuple[float, TensorChange]]] = {}
    for change in changes:
        value = measure.of(change)
        if change.layer is not None and value is not None:
            groups.setdefault((change.layer, kind_of(change.module)), []).append((value, change))
    found = []
    for (layer, kind), members in groups.items():
        worst = measure.worst(value for value, _ in members)
        change = next(change for value, change in members if value == worst)
        found.append(Cell(layer=layer, kind=kind, change=change, value=worst, num_tensors=len(members)))
    return found
