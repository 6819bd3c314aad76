"""Why a tensor is wrong: hypotheses, each tested in float64 on some of its rows. The first that fits is told.

W = the base, E = what the tensor should be, Δ = E - W, S = what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraweld.adapter.edits import AddVector, Dora, Edit, LowRank, OnRows, ReplaceRows, SingularValues, unwrapped
from loraweld.checkpoint.reader import Reader
from loraweld.planning.merge_plan import Recipe
from loraweld.verification.expected import Expected
from loraweld.verification.numbers import drawn_variance, nearest, quanta

_FEW = 1e-3
_ALIKE = 0.98
_UNLIKE = 0.3
_NEAR_ONE = 0.004
_SIGMAS = 4
_SPREAD = 0.2
_TIGHT, _LOOSE = 0.02, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Another tensor of the output's model, whose values may be in the wrong place."""

    recipe: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """Some rows of a tensor that is wrong; `bad` of its `elements` are too far off, some of them in `bad_rows`."""

    expected: Expected
    rows: Tensor
    stored: Tensor
    base: Tensor
    exact: Tensor
    noise: Tensor
    dtype: str
    is_encoded: bool
    bad: int
    elements: int
    bad_rows: tuple[int, ...]

    @property
    def edits(self) -> tuple[Edit, ...]:
        return self.expected.recipe.edits

    @property
    def change(self) -> Tensor:
        return self.exact - self.base

    @property
    def moved(self) -> Tensor:
        return self.stored - self.base

    def is_(self, values: Tensor) -> bool:
        """Whether the stored rows are these values, rounded."""
        if self.is_encoded:
            return float((self.stored - values).norm()) < 0.15 * float(values.norm())
        return bool(((self.stored - values).abs() <= quanta(values, self.dtype) + self.noise).all())


Hypothesis = Callable[[Suspect], str]


def diagnose(suspect: Suspect, others: Sequence[Candidate], reader: Reader) -> str:
    """Return what the tensor holds instead, as far as can be told."""
    if not bool(torch.isfinite(suspect.stored).all()):
        return "it holds values that are not finite"
    tests: list[Hypothesis] = [_no_token_rows, _few_elements, _no_change, lambda s: _swapped(s, others, reader)]
    tests += [lambda s: _no_magnitude(s, reader), _other_rounding, _scaled, _transposed, _foreign]
    for test in tests:
        told = test(suspect)
        if told:
            return told
    return "what it holds is neither the base nor this change at any scale"


def _leaves(edits: Sequence[Edit]) -> list[Edit]:
    return [edit.edit if isinstance(edit, OnRows) else edit for edit in unwrapped(edits)]


def _no_token_rows(suspect: Suspect) -> str:
    tokens = [edit for edit in _leaves(suspect.edits) if isinstance(edit, ReplaceRows)]
    trained = {index for edit in tokens for index in edit.indices}
    if not trained or not set(suspect.bad_rows) <= trained:
        return ""
    here = torch.tensor([int(row) in trained for row in suspect.rows])
    if not torch.equal(suspect.stored[here], suspect.base[here]):
        return ""
    return "the rows of the trained tokens (trainable_token_indices) are those of the base: they were not replaced"


def _few_elements(suspect: Suspect) -> str:
    if not suspect.bad or suspect.bad > max(1, _FEW * suspect.elements):
        return ""
    error = (suspect.stored - suspect.exact).abs() - quanta(suspect.exact, suspect.dtype)
    row, col = divmod(int(error.argmax()), error.shape[1])
    return (
        f"a few elements are corrupt, among them [{int(suspect.rows[row])}, {col}]: stored "
        f"{float(suspect.stored[row, col]):.6g}, expected {float(suspect.exact[row, col]):.6g}; copy or merge again"
    )


def _no_change(suspect: Suspect) -> str:
    if not suspect.edits or suspect.is_encoded or not torch.equal(suspect.stored, suspect.base):
        return ""
    if all(isinstance(edit, AddVector) for edit in _leaves(suspect.edits)):
        return "it equals the base: the bias of the adapter (lora_bias) was not added"
    return "it equals the base: the adapter's change is missing"


def _swapped(suspect: Suspect, others: Sequence[Candidate], reader: Reader) -> str:
    for other in others:
        expected = Expected(other.recipe, reader)
        if (expected.rows, expected.cols) != (suspect.expected.rows, suspect.expected.cols):
            continue
        values = torch.cat([expected.block(row, row + 1).exact for row in suspect.rows.tolist()])
        if suspect.is_(values):
            return f"it holds the values of {other.recipe.name}: the two were swapped, or one was written twice"
    return ""


def _no_magnitude(suspect: Suspect, reader: Reader) -> str:
    if not any(isinstance(edit, Dora) for edit in suspect.edits):
        return ""
    plain = tuple(edit.delta if isinstance(edit, Dora) else edit for edit in suspect.edits)
    expected = Expected(replace(suspect.expected.recipe, edits=plain), reader)
    values = torch.cat([expected.block(row, row + 1).exact for row in suspect.rows.tolist()])
    return "it holds W + B·A: the magnitudes of DoRA were ignored" if suspect.is_(values) else ""


def _other_rounding(suspect: Suspect) -> str:
    """Tell values beside the right ones that are the nearest, or that another seed has drawn: neither has a bias."""
    if suspect.bad or suspect.is_encoded or suspect.dtype == "F32":
        return ""
    is_drawn = suspect.expected.recipe.draw is not None
    if is_drawn and float((suspect.stored != nearest(suspect.exact, suspect.dtype)).double().mean()) < _FEW:
        return "base + adapter is there, rounded to nearest"
    error, variance = suspect.stored - suspect.exact, drawn_variance(suspect.exact, suspect.dtype)
    is_biased = abs(float((error * suspect.change).sum())) > _SIGMAS * _chance(suspect)
    if is_biased or abs(float(error.square().sum()) / (float(variance.sum()) or 1.0) - 1) > _SPREAD:
        return ""
    return "base + adapter is there, rounded by chance: give --rounding stochastic, and the --seed of the merge"


def _scaled(suspect: Suspect) -> str:
    """Fit S - W = c·Δ by least squares, and name what makes such a factor."""
    length = float(suspect.change.square().sum())
    if not length:
        return ""
    factor = float((suspect.moved * suspect.change).sum()) / length
    moved = float(suspect.moved.norm())
    cosine = factor * math.sqrt(length) / moved if moved else 0.0
    if abs(factor - 1) < _NEAR_ONE:
        return "the change is there, but imprecise: computed or stored in fewer bits?"
    noisy = abs(factor) < 4 if suspect.is_encoded else _is_rounding_of(suspect, factor)
    if abs(cosine) < _ALIKE and not noisy:
        return ""
    tolerance = _LOOSE if suspect.is_encoded else min(_LOOSE, max(_TIGHT, _SIGMAS * _chance(suspect) / length))
    return f"the change is there {factor:.3g} times{_name_of(factor, suspect.edits, tolerance)}"


def _is_rounding_of(suspect: Suspect, factor: float) -> bool:
    """Whether what is stored is off base + factor · change by no more than rounding by chance makes it."""
    rest = suspect.moved - factor * suspect.change
    variance = drawn_variance(suspect.base + factor * suspect.change, suspect.dtype)
    return float(rest.square().sum()) <= (1 + _SPREAD) * float(variance.sum())


def _chance(suspect: Suspect) -> float:
    """Return the deviation that rounding by chance gives to the stored values along the change."""
    variance = drawn_variance(suspect.exact, suspect.dtype)
    return math.sqrt(float((variance * suspect.change.square()).sum()))


def _name_of(factor: float, edits: Sequence[Edit], tolerance: float) -> str:
    names = {2.0: "it was merged twice", -1.0: "it was subtracted", 0.0: "it is missing"}
    for edit in _leaves(edits):
        delta = edit.delta if isinstance(edit, Dora | SingularValues) else edit
        if isinstance(delta, LowRank) and delta.scaling:
            root = math.sqrt(delta.rank)
            names.setdefault(round(1 / delta.scaling, 12), "alpha / rank was ignored")
            names.setdefault(1 / root, "alpha / r in place of alpha / √r: use_rslora was ignored")
            names.setdefault(root, "alpha / √r in place of alpha / r, or use_rslora counted twice")
            names.setdefault(float(delta.rank), "alpha was not divided by the rank")
    for expected, name in names.items():
        if abs(factor - expected) <= tolerance * max(1.0, abs(expected)):
            return f": {name}"
    return ": another scale, weight or alpha than the adapter's config has"


def _transposed(suspect: Suspect) -> str:
    expected = suspect.expected
    if expected.rows != expected.cols or not suspect.edits:
        return ""
    change = torch.stack([expected.column(int(row)) for row in suspect.rows[:8]])
    moved = suspect.moved[:8]
    length = float(change.norm()) * float(moved.norm())
    if not length or float((change * moved).sum()) / length < _ALIKE:
        return ""
    return "the change is there transposed (fan_in_fan_out?)"


def _foreign(suspect: Suspect) -> str:
    change, moved = suspect.change, suspect.moved
    far = float(moved.norm()) / (float(suspect.base.norm()) or 1.0)
    if not suspect.edits:
        return f"it differs from the base by {far:.2%} of its norm: another base, or trained further?"
    length = float(change.norm()) * float(moved.norm())
    cosine = float((change * moved).sum()) / length if length else 0.0
    if abs(cosine) > _UNLIKE:
        return ""
    return (
        f"what was added, {far:.2%} of the base's norm, is not this adapter's change (cosine {cosine:.2f}): another "
        "adapter, or another base"
    )
