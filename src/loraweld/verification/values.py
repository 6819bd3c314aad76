"""One tensor of an output against what it should hold: bytes where nothing changes, else float64, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from loraweld.adapter.edits import PeftLayer, Residual, unwrapped
from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.encoded import EncodedTensor, RequantisedTensor, Source
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.dtypes import is_plain_float
from loraweld.planning.merge_plan import Recipe
from loraweld.verification.diagnosis import Candidate, Suspect, diagnose
from loraweld.verification.expected import Block, Expected, strips
from loraweld.verification.findings import ChangeSums, Finding, Retention, TensorResult
from loraweld.verification.numbers import nearest, quanta

_PIECE_BYTES = 4 << 20
_MISROUNDED = 1e-3  # what float32 arithmetic leaves, of 16-bit values
_MISROUNDED_OFTEN = 1e-2  # the rounded change is itself off by a step here and there
_SUSPECT_ROWS = 64
_DOUBT = 1 / 64  # of a step
_GAIN = 0.1  # the error of rounding to codes has hardly any component along the values


@dataclass(slots=True)
class Sums:
    """What is summed over the elements: W the base, E the exact value, S the stored one, Δ = E - W."""

    elements: int = 0
    weight: float = 0.0  # W²
    exact: float = 0.0  # E²
    change: float = 0.0  # Δ²
    error: float = 0.0  # (S - E)²
    stretch: float = 0.0  # (S - E)·E
    moved: float = 0.0  # (S - W)²
    along: float = 0.0  # (S - W)·Δ
    asked: int = 0  # elements with Δ ≠ 0 of which it is known what W alone would be stored as
    lost: int = 0  # of these, those with that value
    misrounded: int = 0
    steps: float = 0.0
    bad: int = 0
    bad_rows: list[int] = field(default_factory=list)

    def add(self, block: Block, stored: Tensor, unchanged: Tensor | None) -> None:
        """Count some rows; `unchanged` is what W alone would be stored as, where that is known."""
        change, moved, error = block.exact - block.base, stored - block.base, stored - block.exact
        self.elements += stored.numel()
        self.weight += _dot(block.base, block.base)
        self.exact += _dot(block.exact, block.exact)
        self.change += _dot(change, change)
        self.error += _dot(error, error)
        self.stretch += _dot(error, block.exact)
        self.moved += _dot(moved, moved)
        self.along += _dot(moved, change)
        if unchanged is not None:
            asked = change != 0
            self.asked += int(asked.sum())
            self.lost += int((asked & (stored == unchanged)).sum())

    def add_steps(self, stored: Tensor, block: Block, rounded: Tensor, dtype: str) -> None:
        """Count the distances from the exact values of a block, in steps of `dtype`; `rounded` are its values there."""
        exact, noise = block.exact, block.noise
        step = quanta(exact, dtype)
        error = (stored - exact).abs_()
        known = noise < _DOUBT * step  # elsewhere terms cancel, and float32 cannot tell the nearest value
        self.misrounded += int(((stored != rounded) & known).sum())
        bad = ~(error <= step + noise)
        # What float32 may be off by does not count as a distance.
        self.steps = max(self.steps, float(((error - noise).clamp_(min=0) / step).nan_to_num_(math.inf).max()))
        count = int(bad.sum())
        if count:
            self.bad += count
            self.bad_rows += (bad.any(1).nonzero().flatten()[:_SUSPECT_ROWS] + block.top).tolist()

    @property
    def share(self) -> float:
        return self.misrounded / max(1, self.elements)

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.exact) if self.exact else math.sqrt(self.error)

    @property
    def of_change(self) -> ChangeSums:
        return ChangeSums(**{one.name: getattr(self, one.name) for one in fields(ChangeSums)})

    @property
    def retention(self) -> Retention | None:
        return self.of_change.retention


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.reshape(-1), other.reshape(-1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checker:
    """Checks tensors; `others` finds what else a tensor may hold."""

    reader: Reader
    sample: float
    others: Callable[[Recipe], list[Candidate]]

    def check(self, recipe: Recipe, stored: Source) -> tuple[TensorResult | None, list[Finding]]:
        """Return what comparing gives, None if the bytes are the base's, and what is wrong."""
        if recipe.keeps_bytes and not recipe.edits and _has_form_of(stored, recipe.source):
            if self._same_bytes(stored, recipe.source):
                return None, []
        if isinstance(stored, StoredTensor) and not is_plain_float(stored.dtype):
            return None, [Finding(check="value", where=recipe.name, message="its bytes are not those of the base")]
        return self._compare(recipe, stored)

    def _same_bytes(self, stored: Source, source: Source) -> bool:
        pairs = zip(_parts(stored), _parts(source), strict=True)
        return all(self._same(one, other) for one, other in pairs)

    def _same(self, one: StoredTensor, other: StoredTensor) -> bool:
        size = _PIECE_BYTES if self.sample == 1 else max(1, min(_PIECE_BYTES, one.num_bytes // 64))
        for number, start in enumerate(range(0, one.num_bytes, size)):
            if number and math.floor((number + 1) * self.sample) == math.floor(number * self.sample):
                continue
            count = min(size, one.num_bytes - start)
            if self.reader.read(one, start, count) != self.reader.read(other, start, count):
                return False
        return True

    def _compare(self, recipe: Recipe, stored: Source) -> tuple[TensorResult, list[Finding]]:
        expected = Expected(recipe, self.reader)
        read = _rows(stored, expected, self.reader)
        sums = Sums()
        encoded = not isinstance(stored, StoredTensor)
        for top, bottom in strips(expected.rows, expected.cols, self.sample):
            block, values = expected.block(top, bottom), read(top, bottom)
            if not values.numel():
                continue
            sums.add(block, values, _unchanged(block.base, recipe.source, stored))
            if encoded:
                self._add_encoded(sums, block, values, stored)
            else:
                sums.add_steps(values, block, expected.rounded(block, stored.dtype), stored.dtype)
        if encoded:
            rounded, problem = "encoded", self._encoded_problem(sums, recipe, stored)
        else:
            rounded, problem = self._judge(sums, expected, stored, read)
        result = TensorResult(
            tensor=recipe.name,
            kind=recipe.kind,
            dtype=stored.dtype,
            rounded=rounded,
            elements=sums.elements,
            steps=sums.steps,
            misrounded=sums.share,
            relative_error=sums.relative_error,
            sums=sums.of_change,
            stored=stored.name,
        )
        if not problem:
            return result, []
        told = f"{problem}; {self._diagnosis(sums, expected, stored, read)}"
        return result, [Finding(check="value", where=recipe.name, message=told)]

    def _judge(
        self, sums: Sums, expected: Expected, stored: Source, read: Callable[[int, int], Tensor]
    ) -> tuple[str, str]:
        """How a plain tensor was rounded, and what is wrong with it."""
        dtype, recipe = stored.dtype, expected.recipe
        few = sums.misrounded <= max(3, _MISROUNDED * sums.elements)
        if not sums.bad:
            if dtype == "F32":
                return "float32", ""
            if few or _is_approximate(recipe):
                return "once" if recipe.draw is None else "stochastically", ""
        may_be_often = recipe.edits and recipe.draw is None and dtype != "F32"
        often = self._rounded_often(expected, dtype, read) if may_be_often else ""
        if often:
            return often, ""
        what = f"{sums.bad} of {sums.elements} elements are over 1 ulp from float64, the farthest {sums.steps:.4g} ulp"
        value = (
            f"the nearest {dtype} value" if recipe.draw is None else f"what seed {recipe.draw.seed} rounds to {dtype}"
        )
        return "wrong", what if sums.bad else f"{sums.share:.2%} of the elements are not {value}"

    def _rounded_often(self, expected: Expected, dtype: str, read: Callable[[int, int], Tensor]) -> str:
        """Name how PEFT has rounded the tensor more than once, "" if it is not so."""
        ways = {"after each adapter": False, "twice": True}
        for name, changes in ways.items():
            sums = Sums()
            for top, bottom in strips(expected.rows, expected.cols, self.sample):
                block = expected.rounded_often(top, bottom, dtype, changes=changes)
                sums.elements += block.exact.numel()
                sums.add_steps(read(top, bottom), block, nearest(block.exact, dtype), dtype)
            if not sums.bad and sums.misrounded <= max(3, _MISROUNDED_OFTEN * sums.elements):
                return name
        return ""

    def _add_encoded(self, sums: Sums, block: Block, values: Tensor, stored: Source) -> None:
        """Count what lies farther from the exact value than the codes are apart."""
        assert isinstance(stored, EncodedTensor)
        # What is decoded is rounded once more, to the dtype of the model.
        allowed = _half_step(stored, block) + quanta(block.exact, stored.dtype) + block.noise
        error = (values - block.exact).abs_()
        bad = ~(error <= allowed)
        sums.steps = max(sums.steps, float((error / (2 * allowed).clamp_(min=1e-300)).nan_to_num_(math.inf).max()))
        if bad.any():
            sums.bad += int(bad.sum())
            sums.bad_rows += (bad.any(1).nonzero().flatten()[:_SUSPECT_ROWS] + block.top).tolist()

    def _encoded_problem(self, sums: Sums, recipe: Recipe, stored: Source) -> str:
        assert isinstance(stored, EncodedTensor)
        kind = stored.encoding.kind
        if sums.bad > _MISROUNDED * sums.elements:
            return f"{sums.bad} of {sums.elements} values are farther from float64 than the steps of {kind} are wide"
        gain = 1 + sums.stretch / sums.exact if sums.exact else 1.0
        root = math.sqrt(max(1, sums.elements))
        has_gain = getattr(stored.encoding, "bits", 8) > 2  # one or two bits shrink what they round
        if has_gain and abs(gain - 1) > _GAIN + 4 * sums.relative_error / root:  # of few elements more by chance
            return f"its values are {gain:.3g} times those of float64: the scales of {kind} are off"
        retention = sums.retention
        if retention is None or isinstance(recipe.source, EncodedTensor | RequantisedTensor):
            return ""  # from codes to the same codes little of a change is left: that is reported, not refused
        # The error of rounding has no direction; by chance it has this much along the change.
        chance = 8 * retention.error / root + 0.2
        if abs(retention.kept - 1) > chance:
            return f"of the adapter's change the {kind} values have {retention.kept:.3g} times, expected about 1"
        return ""

    def _diagnosis(self, sums: Sums, expected: Expected, stored: Source, read: Callable[[int, int], Tensor]) -> str:
        rows = sorted(set(sums.bad_rows[:_SUSPECT_ROWS]) | _spread(expected.rows))
        blocks = [expected.block(row, row + 1) for row in rows]
        suspect = Suspect(
            expected=expected,
            rows=torch.tensor(rows),
            stored=torch.cat([read(row, row + 1) for row in rows]),
            base=torch.cat([block.base for block in blocks]),
            exact=torch.cat([block.exact for block in blocks]),
            noise=torch.cat([block.noise for block in blocks]),
            dtype=stored.dtype,
            is_encoded=not isinstance(stored, StoredTensor),
            bad=sums.bad,
            elements=sums.elements,
            bad_rows=tuple(sums.bad_rows),
        )
        return diagnose(suspect, self.others(expected.recipe), self.reader)


def _unchanged(base: Tensor, source: Source, stored: Source) -> Tensor | None:
    """Return what the base's rows alone would be stored as; None where codes would have to be made to know it."""
    if isinstance(stored, StoredTensor):
        return base if source.dtype == stored.dtype else nearest(base, stored.dtype)
    if isinstance(source, StoredTensor) or source.encoding.kind != stored.encoding.kind:
        return None
    return base


def _spread(rows: int) -> set[int]:
    return (
        {number * rows // _SUSPECT_ROWS for number in range(_SUSPECT_ROWS)}
        if rows > _SUSPECT_ROWS
        else set(range(rows))
    )


def _parts(source: Source) -> list[StoredTensor]:
    if isinstance(source, EncodedTensor):
        return [tensor for _, tensor in source.parts]
    assert isinstance(source, StoredTensor)
    return [source]


def _has_form_of(stored: Source, source: Source) -> bool:
    """Whether both are stored alike, so that their bytes can be compared."""
    if isinstance(stored, RequantisedTensor) or isinstance(source, RequantisedTensor):
        return False
    forms = [[(tensor.dtype, tensor.num_bytes) for tensor in _parts(one)] for one in (stored, source)]
    return type(stored) is type(source) and forms[0] == forms[1]


def _rows(stored: Source, expected: Expected, reader: Reader) -> Callable[[int, int], Tensor]:
    """Return a function that reads stored rows of the matrix view that is expected, in float64."""
    rows = open_decoder(stored, reader).rows(0, stored.rows)
    if stored.cols == expected.cols:
        return lambda top, bottom: rows.read(top, bottom).double()
    # A stack of matrices: one row of a view is several of the other.
    if stored.cols < expected.cols:
        many = expected.cols // max(1, stored.cols)
        return lambda top, bottom: rows.read(top * many, bottom * many).double().reshape(-1, expected.cols)
    each = max(1, stored.cols // expected.cols)

    def read(top: int, bottom: int) -> Tensor:
        first, last = top // each, -(-bottom // each)
        values = rows.read(first, last).double().reshape(-1, expected.cols)
        return values[top - first * each : bottom - first * each]

    return read


def _is_approximate(recipe: Recipe) -> bool:
    """Whether what is right hangs on float32 routines: a decomposition, or PEFT's own layer."""
    return any(isinstance(edit, Residual | PeftLayer) for edit in unwrapped(recipe.edits))


# Half the widest gap between neighbouring codes, as a share of the largest value of a block, with room for the
# rounding of scales and for encoders that clip the largest values to serve the others.
_HALF_STEPS = {"F8_E4M3": 0.07, "F8_E5M2": 0.14, "LLM.int8": 0.0055, "MXFP4": 0.3, "NVFP4": 0.25, "AWQ": 0.1}


def _half_step(stored: EncodedTensor, block: Block) -> Tensor:
    """Return how far a decoded value may be from the exact one, for each element."""
    encoding = stored.encoding
    largest = torch.maximum(block.exact.abs(), block.base.abs())
    if isinstance(encoding, Bnb4):
        return 0.3 * _block_maxima(largest, encoding.blocksize, block.top)
    bits: int = getattr(encoding, "bits", 8)
    kind = stored.codes.dtype if encoding.kind == "FP8" else encoding.kind
    share = _HALF_STEPS.get(kind, 1.5 / (2**bits - 1))
    allowed: Tensor = share * largest.max()
    return allowed.expand_as(largest)


def _block_maxima(values: Tensor, size: int, top: int) -> Tensor:
    """Return the largest value of each block of the flattened weight, at each of its elements that is at hand."""
    start = top * values.shape[1] % size
    flat = torch.cat([values.new_zeros(start), values.reshape(-1)])
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % size)])
    maxima = flat.view(-1, size).amax(1, keepdim=True).expand(-1, size).reshape(-1)
    if start or (start + values.numel()) % size:
        maxima = maxima.maximum(values.max())  # blocks that go on in other rows
    return maxima[start : start + values.numel()].view_as(values)
