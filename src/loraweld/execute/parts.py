"""A merge in n parts of about equal size, each a row of neighbouring stretches, whoever makes them and when."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from loraweld.errors import RequestError
from loraweld.execute.items import Stretch

MAX_PARTS = 100_000
_PART = re.compile(r"(\d{1,6})/(\d{1,6})")
_NAME = re.compile(r"part-(\d{1,6})-of-(\d{1,6})")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Part `number` of `count`, from 1."""

    count: int
    number: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """How its journal is called."""
        return f"part-{self.number}-of-{self.count}"


def parse_part(text: str) -> Part:
    """Return the part that "3/64" stands for.

    Raises:
        RequestError: it stands for none.
    """
    match = _PART.fullmatch(text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_PARTS:
        raise RequestError(f"part is {text[:50]!r}, expected I/N such as 3/64: I from 1 to N, N up to {MAX_PARTS}")
    return Part(count=int(match[2]), number=int(match[1]))


def part_of_name(name: str) -> Part | None:
    """Return the part whose journal has this name, None if it is none."""
    match = _NAME.fullmatch(name)
    return Part(count=int(match[2]), number=int(match[1])) if match else None


def shares(work: Sequence[Stretch], count: int) -> list[list[Stretch]]:
    """Return the work of each of `count` parts: what begins within its share of all bytes, which may be nothing."""
    total = sum(map(_num_bytes, work))
    found: list[list[Stretch]] = [[] for _ in range(count)]
    begins = 0
    for stretch in work:
        found[begins * count // max(1, total)].append(stretch)
        begins += _num_bytes(stretch)
    return found


def missing_parts(work: Sequence[Stretch], done: Collection[str], counts: Iterable[int]) -> list[Part]:
    """Return the parts that would have to be run, by the way the merge was cut of which the least is missing."""
    missing = [
        [
            Part(count=count, number=number)
            for number, share in enumerate(shares(work, count), 1)
            if any(item.key not in done for stretch in share for item in stretch)
        ]
        for count in sorted(set(counts))
    ]
    return min(missing, key=len, default=[])


def _num_bytes(stretch: Stretch) -> int:
    return stretch[-1].end - stretch[0].start
