"""The values that a weight should have, in float64: one small function for each kind of edit, and nothing clever.

Shape letters: N = rows of the tensor, n = rows at hand, C = columns, R = rank.

This is a second implementation on purpose. It shares with the first the decoders of stored weights, the random bits of
stochastic rounding, the decomposition of PiSSA and OLoRA (by definition what PEFT's float32 routine gives), and, for
tuners that PEFT's own layer merges, that layer's float32 result: there is no formula of them here either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraweld.adapter.edits import (
    AddVector,
    Columns,
    Dora,
    Edit,
    GrowRows,
    Hadamard,
    Kronecker,
    LowRank,
    OnRows,
    PeftLayer,
    ReplaceAll,
    ReplaceRows,
    Residual,
    Scale,
    SingularValues,
    Weighted,
)
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.compute.factors import decompose
from loraweld.compute.random_bits import RandomBits
from loraweld.compute.tensors import read_flat
from loraweld.planning.merge_plan import Recipe
from loraweld.verification.numbers import drawn, nearest, quanta

BLOCK_ELEMENTS = 1 << 18
# float32 sums of R products differ from the exact one by less than this share of sqrt(R) times the two norms.
_FLOAT32 = 2.0**-22

# (values before the edit, values as stored in the base, first row) → values after it
Apply = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One edit of float64 rows; `noise` bounds what float32 arithmetic may be off by in any element.

    `noise_of` says it of a range of rows, where the edit is one of many on the same tensor.
    """

    apply: Apply
    noise: float = 0.0
    noise_of: Callable[[int, int], float] | None = None

    def bound(self, top: int, bottom: int) -> float:
        return self.noise if self.noise_of is None else self.noise_of(top, bottom)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows from `top` on: as the base has them, as they should be, and what float32 may be off by, (n, 1)."""

    top: int
    base: Tensor
    exact: Tensor
    noise: Tensor


class Expected:
    """The rows that a recipe should come to; `cols` columns, `rows` rows."""

    def __init__(self, recipe: Recipe, reader: Reader) -> None:
        self.recipe = recipe
        self.rows = recipe.rows
        self.cols = recipe.source.cols
        self._base_rows = recipe.source.rows
        self._read = open_decoder(recipe.source, reader).rows(0, recipe.source.rows).read
        self.steps = [_step(edit, recipe.source, reader) for edit in recipe.edits]
        self._random = RandomBits(recipe.draw) if recipe.draw is not None else None

    def base(self, top: int, bottom: int) -> Tensor:
        """Return stored rows [top, bottom), 0 where the base has none."""
        stored = self._read(min(top, self._base_rows), min(bottom, self._base_rows)).double()
        grown = stored.new_zeros(bottom - top - len(stored), self.cols)
        return torch.cat([stored, grown]) if len(grown) else stored

    def block(self, top: int, bottom: int) -> Block:
        """Return rows [top, bottom)."""
        base = self.base(top, bottom)
        values = base
        noise = sum(step.bound(top, bottom) for step in self.steps)
        for step in self.steps:
            values = step.apply(values, base, top)
        return Block(top, base, values, _largest(values, base) * _FLOAT32 + noise)

    def rounded(self, block: Block, dtype: str) -> Tensor:
        """Return the exact values of a block in `dtype`: the nearest, or what the recipe's draw makes of them."""
        if self._random is None or dtype not in ("BF16", "F16"):
            return nearest(block.exact, dtype)
        first = block.top * self.cols
        random = self._random.at(np.arange(first, first + block.exact.numel()))
        return drawn(block.exact, dtype, torch.from_numpy(random.astype(np.int32)).view_as(block.exact))

    def rounded_often(self, top: int, bottom: int, dtype: str, *, changes: bool) -> Block:
        """Return rows as PEFT makes them: rounded to `dtype` after each edit and, with `changes`, each change before.

        Float32 may take either neighbour each time: that is noise here.
        """
        exact = self.block(top, bottom)
        chain = _Chain(self, exact, dtype, changes)
        for number in range(len(self.steps)):
            chain.merge(number)
        return Block(top, exact.base, chain.values, chain.noise)

    def column(self, col: int) -> Tensor:
        """Return exact - base of one column, (N,)."""
        blocks = (self.block(top, bottom) for top, bottom in strips(self.rows, self.cols))
        return torch.cat([(block.exact - block.base)[:, col] for block in blocks])


class _Chain:
    """Rows as PEFT merges adapters into them, one after the other.

    The norms of DoRA are of the unedited weight. PEFT holds only the edited one, so that before a DoRA it takes all
    earlier adapters off again, and puts them back on afterwards: each time rounded, and it goes on with what comes of
    it. DoRA's own change is never rounded by itself.
    """

    def __init__(self, expected: Expected, exact: Block, dtype: str, changes: bool) -> None:
        self.values, self.noise = exact.base, exact.noise
        self._edits, self._steps = expected.recipe.edits, expected.steps
        self._top, self._dtype, self._changes = exact.top, dtype, changes
        self._bases: dict[int, Tensor] = {}  # what the norms of a merged adapter are of
        self._last: Tensor | float = 0.0  # the steps of the last rounding, which is no noise yet

    def merge(self, number: int) -> None:
        """Apply an edit."""
        has_norms = isinstance(self._edits[number], Dora)
        self._apply(number, self._unmerged(number) if has_norms else self.values)

    def _unmerged(self, number: int) -> Tensor:
        """Return the weight without its earlier edits, as PEFT recovers it."""
        for earlier in reversed(range(number)):
            self._round(self._without(earlier))
        base = self.values
        for earlier in range(number):
            self._apply(earlier, base)
        return base

    def _apply(self, number: int, base: Tensor) -> None:
        change = self._steps[number].apply(self.values, base, self._top) - self.values
        if self._changes and not isinstance(self._edits[number], Dora):
            self.noise = self.noise + quanta(change, self._dtype)
            change = nearest(change, self._dtype)
        self._bases[number] = base
        self._round(self.values + change)

    def _without(self, number: int) -> Tensor:
        """Return the values before an edit v → f·v + c of each row, whose change PEFT rounds if f is 1."""
        step, base = self._steps[number], self._bases[number]
        at_0, at_1 = (step.apply(torch.full_like(self.values, v), base, self._top) for v in (0.0, 1.0))
        if isinstance(self._edits[number], Dora):
            return (self.values - at_0) / (at_1 - at_0)
        return self.values - nearest(at_0, self._dtype)

    def _round(self, values: Tensor) -> None:
        self.noise = self.noise + self._last
        self.values = nearest(values, self._dtype)
        self._last = quanta(self.values, self._dtype)


def _largest(values: Tensor, base: Tensor) -> Tensor:
    """Return the largest magnitude of each row, (n, 1)."""
    if not values.numel():
        return values[:, :1]
    return values.abs().amax(1, keepdim=True).maximum(base.abs().amax(1, keepdim=True))


def strips(rows: int, cols: int, sample: float = 1.0) -> Iterator[tuple[int, int]]:
    """Yield row ranges of few elements: all, or a deterministic share of them, the first always."""
    height = max(1, min(rows, BLOCK_ELEMENTS // max(1, cols)))
    if sample < 1:
        height = max(1, min(height, rows // 64))
    for number, top in enumerate(range(0, rows, height)):
        if number == 0 or math.floor((number + 1) * sample) > math.floor(number * sample):
            yield top, min(rows, top + height)


def _step(edit: Edit, source: Source, reader: Reader) -> Step:
    """Return the evaluation of an edit of `source`."""
    match edit:
        case LowRank():
            return _low_rank(edit, reader)
        case SingularValues():
            return _singular_values(edit, reader)
        case Dora():
            return _dora(edit, source, reader)
        case Residual():
            return _residual(edit, source, reader)
        case AddVector():
            return _add_vector(edit, reader)
        case ReplaceRows():
            return _replace_rows(edit, reader)
        case ReplaceAll():
            return _replace_all(edit, reader)
        case GrowRows():
            return _grow_rows(source, reader)
        case OnRows():
            return _on_rows(edit, source, reader)
        case Weighted():
            return _weighted(edit, source, reader)
        case Hadamard():
            return _hadamard(edit, reader)
        case Kronecker():
            return _kronecker(edit, reader)
        case Scale():
            return _scale(edit, source, reader)
        case PeftLayer():
            return _peft_layer(edit, source, reader)


def _matrix(tensor: StoredTensor, reader: Reader, columns: Columns | None = None) -> Tensor:
    """Return a factor as a float64 matrix, or some of its columns."""
    values = read_flat(reader, tensor).double().view(tensor.rows, tensor.cols)
    return values if columns is None else values[:, columns.start : columns.stop : columns.step]


def _factors(edit: LowRank, reader: Reader) -> tuple[Tensor, Tensor]:
    """Return L (N, R) and R (R, C) with L·R the change of the stored matrix, not scaled."""
    a, b = _matrix(edit.a, reader, edit.a_columns), _matrix(edit.b, reader, edit.b_columns)
    return (a.T.contiguous(), b.T.contiguous()) if edit.transposed else (b, a)


def _product_noise(left: Tensor, right: Tensor, scaling: float) -> float:
    if not left.numel() or not right.numel():
        return 0.0
    norms = float(left.norm(dim=1).max()) * float(right.norm(dim=0).max())
    return abs(scaling) * norms * math.sqrt(left.shape[1]) * _FLOAT32


def _low_rank(edit: LowRank, reader: Reader) -> Step:
    left, right = _factors(edit, reader)

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        return torch.addmm(values, left[top : top + len(values)], right, alpha=edit.scaling)

    return Step(apply, _product_noise(left, right, edit.scaling))


def _singular_values(edit: SingularValues, reader: Reader) -> Step:
    left, right = _factors(edit.delta, reader)
    left = left * _matrix(edit.values, reader).flatten()

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        return torch.addmm(values, left[top : top + len(values)], right, alpha=edit.delta.scaling)

    return Step(apply, 2 * _product_noise(left, right, edit.delta.scaling))


def _dora(edit: Dora, source: Source, reader: Reader) -> Step:
    delta = _low_rank(edit.delta, reader)
    magnitude = _matrix(edit.magnitude, reader).flatten()
    read = open_decoder(source, reader).rows(0, source.rows).read
    factor = magnitude[:, None]
    if edit.delta.transposed:
        squares = torch.zeros(source.cols, dtype=torch.float64)
        for top, bottom in strips(source.rows, source.cols):
            stored = read(top, bottom).double()
            squares += delta.apply(stored, stored, top).square().sum(0)
        factor = magnitude / squares.sqrt()

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        changed = delta.apply(values, base, top)
        if edit.delta.transposed:
            return changed * factor
        norms: Tensor = torch.linalg.vector_norm(delta.apply(base, base, top), dim=1, keepdim=True)
        scaled: Tensor = changed * (factor[top : top + len(values)] / norms)
        return scaled

    return Step(apply, 4 * delta.noise)


def _residual(edit: Residual, source: Source, reader: Reader) -> Step:
    factors = decompose(edit, source, reader)
    left, right = factors.left(source.rows).rows(0, source.rows).double(), factors.right_RC.double()
    # The residual is rounded to the weight's own dtype: where float32 decides otherwise, that is a whole step.
    bits = {"BF16": 8, "F16": 11}.get(source.dtype, 24)
    largest = 0.0

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        residual = torch.addmm(values, left[top : top + len(values)], right, alpha=-edit.scaling)
        return nearest(residual, source.dtype)

    for top, bottom in strips(source.rows, source.cols):
        stored = open_decoder(source, reader).rows(top, bottom).read(top, bottom)
        largest = max(largest, float(stored.abs().max()))
    return Step(apply, largest * 2.0 ** (1 - bits) + _product_noise(left, right, edit.scaling))


def _add_vector(edit: AddVector, reader: Reader) -> Step:
    added = _matrix(edit.values, reader).reshape(-1, 1) * edit.scaling
    return Step(lambda values, base, top: values + added[top : top + len(values)])


def _replace_rows(edit: ReplaceRows, reader: Reader) -> Step:
    rows, indices = _matrix(edit.rows, reader), torch.tensor(edit.indices)

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        here = (indices >= top) & (indices < top + len(values))
        replaced = values.clone()
        replaced[indices[here] - top] = rows[here]
        return replaced

    return Step(apply)


def _replace_all(edit: ReplaceAll, reader: Reader) -> Step:
    read = open_decoder(edit.values, reader).rows(0, edit.values.rows).read
    return Step(lambda values, base, top: read(top, top + len(values)).double())


def _grow_rows(source: Source, reader: Reader) -> Step:
    read = open_decoder(source, reader).rows(0, source.rows).read
    total = torch.zeros(source.cols, dtype=torch.float64)
    for top, bottom in strips(source.rows, source.cols):
        total += read(top, bottom).double().sum(0)

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        grown = values.clone()
        grown[max(0, source.rows - top) :] = total / source.rows
        return grown

    return Step(apply)


def _on_rows(edit: OnRows, source: Source, reader: Reader) -> Step:
    """The step of the rows is made when they come, and given up after them: a tensor may hold hundreds of experts."""
    part = source.part(edit.start, edit.stop) if isinstance(source, StoredTensor) else source
    made: list[Step] = []

    def overlaps(top: int, bottom: int) -> bool:
        return max(top, edit.start) < min(bottom, edit.stop)

    def step() -> Step:
        if not made:
            made.append(_step(edit.edit, part, reader))
        return made[0]

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        if not overlaps(top, top + len(values)):
            made.clear()
            return values
        first, last = max(top, edit.start), min(top + len(values), edit.stop)
        here, changed = slice(first - top, last - top), values.clone()
        changed[here] = step().apply(values[here], base[here], first - edit.start)
        return changed

    return Step(apply, noise_of=lambda top, bottom: step().noise if overlaps(top, bottom) else 0.0)


def _weighted(edit: Weighted, source: Source, reader: Reader) -> Step:
    steps = [_step(inner, source, reader) for inner in edit.edits]

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        changed = values
        for step in steps:
            changed = step.apply(changed, base, top)
        return values + edit.weight * (changed - values)

    def noise_of(top: int, bottom: int) -> float:
        return (1 + abs(edit.weight)) * sum(step.bound(top, bottom) for step in steps)

    return Step(apply, noise_of=noise_of)


def _hadamard(edit: Hadamard, reader: Reader) -> Step:
    (left1, right1), (left2, right2) = ((_matrix(one, reader), _matrix(other, reader)) for one, other in edit.pairs)

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        here = slice(top, top + len(values))
        return values + edit.scaling * (left1[here] @ right1) * (left2[here] @ right2)

    terms = [
        float(one.norm(dim=1).max()) * float(two.norm(dim=0).max()) for one, two in ((left1, right1), (left2, right2))
    ]
    return Step(apply, abs(edit.scaling) * math.prod(terms) * 2 * math.sqrt(left1.shape[1]) * _FLOAT32)


def _kronecker(edit: Kronecker, reader: Reader) -> Step:
    first, second = (_chain([_matrix(part, reader) for part in factor]) for factor in (edit.first, edit.second))

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        row = torch.arange(top, top + len(values))
        outer = first[row // len(second)][:, :, None] * second[row % len(second)][:, None, :]
        return values + edit.scaling * outer.reshape(len(values), -1)

    largest = float(first.abs().max()) * float(second.abs().max())
    return Step(apply, abs(edit.scaling) * largest * 4 * _FLOAT32)


def _chain(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else matrices[0] @ _chain(matrices[1:])


def _scale(edit: Scale, source: Source, reader: Reader) -> Step:
    factors = _matrix(edit.factors, reader).flatten()
    if edit.by_column:
        factors = factors.repeat_interleave(source.cols // len(factors))
        return Step(lambda values, base, top: values * factors)
    return Step(lambda values, base, top: values * factors[top : top + len(values), None])


def _peft_layer(edit: PeftLayer, source: Source, reader: Reader) -> Step:
    """PEFT's own float32 result: the one kind of edit that has no second implementation."""
    from loraweld.compute.peft_layer import PeftLayerKernel  # PEFT takes seconds to import

    kernel = PeftLayerKernel(edit, source, reader)
    largest = 0.0

    def apply(values: Tensor, base: Tensor, top: int) -> Tensor:
        tile = values.float()
        kernel.apply(tile, base.float(), top, 0.0)
        return tile.double()

    for top, bottom in strips(source.rows, source.cols):
        stored = open_decoder(source, reader).rows(top, bottom).read(top, bottom).double()
        largest = max(largest, float(apply(stored, stored, top).abs().max()))
    return Step(apply, largest * 4 * _FLOAT32)
