"""Two checkpoints, tensor by tensor: what is equal, what differs and by how much."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.hub import locate_base
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor, same_bytes
from loraweld.compute.difference import tiles
from loraweld.dtypes import is_plain_float
from loraweld.request import PathLike

_SHOWN = 20
CHANGED = "values"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """One tensor that differs. `relative`: ‖B - A‖ / ‖A‖; `largest`: max |B - A|; None where there is no such number,
    and `what` says why."""

    tensor: str
    what: str
    relative: float | None = None
    largest: float | None = None
    cosine: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """The outcome of `loraweld.compare`: `missing` are only in the first model, `extra` only in the second."""

    first: str
    second: str
    equal: int
    differing: tuple[TensorDifference, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    relative: float
    seconds: float

    @property
    def is_equal(self) -> bool:
        return not (self.differing or self.missing or self.extra)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values: `loraweld compare --json`."""
        return {
            "first": self.first,
            "second": self.second,
            "is_equal": self.is_equal,
            "equal": self.equal,
            "differing": [asdict(one) for one in self.differing],
            "missing": list(self.missing),
            "extra": list(self.extra),
            "relative": self.relative,
            "seconds": round(self.seconds, 3),
        }

    def lines(self) -> list[str]:
        """Return the report for a person, the largest differences first."""
        worst = sorted(self.differing, key=lambda one: -(math.inf if one.relative is None else one.relative))
        return [
            f"{self.first} and {self.second}: {self.equal} tensors equal, {len(self.differing)} differ, "
            f"{len(self.missing)} missing, {len(self.extra)} extra; relative L2 {self.relative:.3g}",
            *_shown([_line(one) for one in worst]),
            *_shown([f"missing: {name}" for name in self.missing]),
            *_shown([f"extra: {name}" for name in self.extra]),
        ]


def _shown(lines: Sequence[str]) -> list[str]:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [*lines[:_SHOWN], *more]


def _line(one: TensorDifference) -> str:
    if one.relative is None:
        return f"{one.tensor}: {one.what}"
    return f"{one.tensor}: relative L2 {one.relative:.3g}, max abs {one.largest:.3g}, cosine {one.cosine:.6f}"


def compare(first: PathLike, second: PathLike) -> CompareReport:
    """Compare the decoded values of two models, folders, Hub ids or URLs, by the names of their tensors.

    Raises:
        LoraweldError: one of them is no model, or damaged.
    """
    started = time.monotonic()
    one, other = (_open(name) for name in (first, second))
    sums, reader = Sums(), Reader()
    try:
        common = [name for name in one.tensors if name in other.tensors]
        found = [difference(name, one.tensors[name], other.tensors[name], reader, sums) for name in common]
    finally:
        reader.close()
    differing = tuple(difference for difference in found if difference is not None)
    return CompareReport(
        first=one.label,
        second=other.label,
        equal=len(common) - len(differing),
        differing=differing,
        missing=tuple(name for name in one.tensors if name not in other.tensors),
        extra=tuple(name for name in other.tensors if name not in one.tensors),
        relative=sums.relative,
        seconds=time.monotonic() - started,
    )


def _open(name: PathLike) -> Base:
    located = locate_base(str(name))
    return open_base(located.folder, label=located.label, commit=located.commit, scratch=located.scratch)


@dataclass(slots=True)
class Sums:
    """Of squares: the first model, the second, their difference; and their products."""

    first: float = 0.0
    second: float = 0.0
    difference: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    @property
    def relative(self) -> float:
        """‖B - A‖ / ‖A‖, ‖B‖ where A is zero."""
        return math.sqrt(self.difference / self.first) if self.first else math.sqrt(self.difference)

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        self.first += float(one.square().sum())
        self.second += float(other.square().sum())
        self.difference += float((other - one).square().sum())
        self.product += float((one * other).sum())
        self.largest = max(self.largest, float((other - one).abs().max())) if one.numel() else self.largest


def difference(name: str, one: Source, other: Source, reader: Reader, total: Sums) -> TensorDifference | None:
    """Return how two weights differ, None if they do not; what is summed over their elements is added to `total`."""
    if one.shape != other.shape:
        return TensorDifference(tensor=name, what=f"shape {_sizes(one)} and {_sizes(other)}")
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        same = same_bytes(one, other)
        if same or not (is_plain_float(one.dtype) and is_plain_float(other.dtype)):
            return None if same else TensorDifference(tensor=name, what=f"other bytes ({one.dtype}, {other.dtype})")
    sums = Sums()
    for first, second in tiles(one, other, reader):
        sums.add(first, second)
    total.first += sums.first
    total.difference += sums.difference
    if not sums.difference and one.dtype == other.dtype:
        return None
    if not math.isfinite(sums.difference):
        return TensorDifference(tensor=name, what="not finite")
    if sums.difference and not sums.first:
        return TensorDifference(tensor=name, what="was zero")
    length = math.sqrt(sums.first * sums.second)
    return TensorDifference(
        tensor=name,
        what=CHANGED if sums.difference else f"dtype {one.dtype} and {other.dtype}, equal values",
        relative=math.sqrt(sums.difference / sums.first) if sums.first else 0.0,
        largest=sums.largest,
        cosine=sums.product / length if length else 0.0,
    )


def _sizes(source: Source) -> str:
    return " × ".join(map(str, source.shape))
