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
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.dtypes import is_plain_float
from loraweld.request import PathLike
from loraweld.verification.expected import strips

_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """One tensor that differs. `relative`: ‖B - A‖ / ‖A‖; `largest`: max |B - A|; None where the shapes differ."""

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
    sums, reader = _Sums(), Reader()
    try:
        common = [name for name in one.tensors if name in other.tensors]
        found = [_difference(name, one.tensors[name], other.tensors[name], reader, sums) for name in common]
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
        relative=math.sqrt(sums.difference / sums.first) if sums.first else math.sqrt(sums.difference),
        seconds=time.monotonic() - started,
    )


def _open(name: PathLike) -> Base:
    located = locate_base(str(name))
    return open_base(located.folder, label=located.label, commit=located.commit, scratch=located.scratch)


@dataclass(slots=True)
class _Sums:
    """Of squares: the first model, the second, their difference; and their products."""

    first: float = 0.0
    second: float = 0.0
    difference: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        self.first += float(one.square().sum())
        self.second += float(other.square().sum())
        self.difference += float((other - one).square().sum())
        self.product += float((one * other).sum())
        self.largest = max(self.largest, float((other - one).abs().max()))


def _difference(name: str, one: Source, other: Source, reader: Reader, total: _Sums) -> TensorDifference | None:
    if one.shape != other.shape:
        return TensorDifference(tensor=name, what=f"shape {one.shape} and {other.shape}")
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        same = same_bytes(one, other)
        if same or not (is_plain_float(one.dtype) and is_plain_float(other.dtype)):
            return None if same else TensorDifference(tensor=name, what=f"other bytes ({one.dtype}, {other.dtype})")
    sums = _values(one, other, reader)
    total.first += sums.first
    total.difference += sums.difference
    if not sums.difference and one.dtype == other.dtype:
        return None
    length = math.sqrt(sums.first * sums.second)
    return TensorDifference(
        tensor=name,
        what="values" if sums.difference else f"dtype {one.dtype} and {other.dtype}, equal values",
        relative=math.sqrt(sums.difference / sums.first) if sums.first else math.sqrt(sums.difference),
        largest=sums.largest,
        cosine=sums.product / length if length else 0.0,
    )


def _values(one: Source, other: Source, reader: Reader) -> _Sums:
    """Return the sums over all elements, read by the rows of the side that has fewer of them."""
    sums, sides = _Sums(), (one, other)
    common = max(1, min(side.rows for side in sides))
    each = [side.rows // common for side in sides]
    rows = [open_decoder(side, reader).rows(0, side.rows) for side in sides]
    for top, bottom in strips(common, max(1, math.prod(one.shape) // common)):
        first, second = (
            read.read(top * n, bottom * n).double().reshape(-1) for read, n in zip(rows, each, strict=True)
        )
        sums.add(first, second)
    return sums
