"""A plan's weight files → work items: page-aligned ranges, each done in any order by any thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraweld.planning.merge_plan import MergePlan, WeightFile


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes [start, end) of output file `file`; a whole file that equals one of the base's is one item."""

    file: WeightFile
    start: int
    end: int

    @property
    def key(self) -> str:
        """The item's name in the journal."""
        return f"{self.file.name}:{self.start}:{self.end}"


def work_items(plan: MergePlan) -> Iterator[Item]:
    """Yield the items of all weight files in order."""
    for file in plan.weights:
        step = file.num_bytes if file.same_as is not None else plan.item_bytes
        for start in range(0, file.num_bytes, max(1, step)):
            yield Item(file, start, min(start + step, file.num_bytes))
