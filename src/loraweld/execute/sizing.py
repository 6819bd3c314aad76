"""How long a merge takes on many machines, on paper: its plan, bandwidths, and what work costs by its kind.

Each machine takes a run of neighbouring items of about equal bytes. It reads, computes and writes at the same time, so
that it takes as long as the slowest of the three; but each of its threads does so in turn, and while it waits for the
network it computes nothing. All together take no less than the store does, and than the largest single item. What
each machine does at its beginning, and one of them at the end, is the same for any number of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraweld.adapter.edits import Dora, Edit, Hadamard, LowRank, OnRows, Residual, SingularValues, unwrapped
from loraweld.checkpoint.encodings.encoded import EncodedTensor, Encoding, RequantisedTensor
from loraweld.checkpoint.encodings.scaled import Scaled
from loraweld.errors import RequestError
from loraweld.execute.items import Item, work_items
from loraweld.execute.parts import shares
from loraweld.planning.merge_plan import MergePlan, Recipe
from loraweld.request import parse_size

# Nanoseconds of one core for each element, `benchmarks/RESULTS.md`, "Work by its kind": all are moved; what is computed
# becomes float32 and is rounded; the other steps come on top of that. Of an edited weight it is also measured what
# encoding has done to it. Codes of 8 bit count as FP8, all others as NF4.
MOVE_NS, VALUE_NS = 0.2, 0.8
DECODE_NS = {"FP8": 4.0, "NF4": 0.85}
EDIT_NS, EDIT_NS_PER_RANK = 0.1, 0.025
ENCODE_NS = {"FP8": 3.5, "NF4": 6.6}
ENCODE_EDITED_NS = {"FP8": 9.7, "NF4": 10.4}
MOVE_SECONDS_PER_BYTE = MOVE_NS * 1e-9 / 2
# Of every machine before its first item: Python and torch, and the plan, by the number of tensors.
START_SECONDS = 2.0
PLAN_SECONDS_PER_TENSOR = 5e-5
# Of one machine after the last item: the adapters' checksum.
CHECKSUM_BYTES_PER_SECOND = 1.8e9
MAX_MACHINES = 100_000
_STEPS = ("reading", "computing", "writing", "threads", "store", "item", "serial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Machines of one kind, in bytes a second: `network` each way, `disk` of their own (None: they write to the store).

    `store` is what all of them together read from it and write to it, None without a limit.
    """

    network: float
    disk: float | None = None
    store: float | None = None

    @property
    def output(self) -> float:
        """Where a machine writes to."""
        return self.network if self.disk is None else self.disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Bytes to read and to write, and seconds of one core."""

    read: float
    written: float
    seconds: float

    def alone(self, machines: Machines) -> float:
        """Return how long one thread of a machine takes that has it to itself: one step after the other."""
        return self.read / machines.network + self.seconds + self.written / machines.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds that a number of machines needs: for each of what happens at the same time, then for what does not.

    `reading`, `computing` and `writing` are those of the machine that has most of it, `threads` the three one after the
    other on its threads, `store` those of all together, `item` those of the largest item; `serial` is what comes before
    and after.
    """

    machines: int
    reading: float
    computing: float
    writing: float
    threads: float
    store: float
    item: float
    serial: float

    @property
    def slowest(self) -> str:
        """What the time hangs on."""
        return max(_STEPS, key=lambda name: float(getattr(self, name)))

    @property
    def total(self) -> float:
        return max(float(getattr(self, name)) for name in _STEPS if name != "serial") + self.serial


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The estimates of a plan for some numbers of machines, with what they were made of."""

    machines: Machines
    threads: int
    whole: Work
    items: int
    estimates: tuple[Estimate, ...]

    def lines(self) -> list[str]:
        """Return the sizing for a person: a row for each number of machines."""
        machines, whole = self.machines, self.whole
        output = "" if machines.disk is None else f", disk {machines.disk / 1e9:.2f} GB/s"
        store = "" if machines.store is None else f", store {machines.store / 1e9:.2f} GB/s in all"
        rows = [["machines", *(f"{step} s" for step in _STEPS), "total s", "slowest"]]
        for one in self.estimates:
            seconds = (*(float(getattr(one, step)) for step in _STEPS), one.total)
            rows.append([str(one.machines), *(f"{value:.1f}" for value in seconds), one.slowest])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            f"on paper: {whole.read / 1e9:.1f} GB to read, {whole.written / 1e9:.1f} GB to write, "
            f"{whole.seconds:.0f} s of one core, {self.items} items; each machine {self.threads} threads, "
            f"network {machines.network / 1e9:.2f} GB/s each way{output}{store}",
            *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the sizing as plain JSON values: `loraweld plan --machines … --json`."""
        return {
            **asdict(self.machines),
            "threads": self.threads,
            **asdict(self.whole),
            "items": self.items,
            "estimates": [asdict(one) | {"slowest": one.slowest, "total": one.total} for one in self.estimates],
        }


class Anywhere:
    """A place that cannot copy or clone files of the base."""

    def copies(self, source: Path) -> bool:
        return False

    def starts_from(self, name: str, source: Path) -> bool:
        return False

    def least_bytes(self, size: int) -> int:
        return 0


def make_machines(
    *, network_bandwidth: str = "10Gbit", disk_bandwidth: str | None = None, store_bandwidth: str | None = None
) -> Machines:
    """Return machines with these bandwidths, such as "2GB" (a second) or "10Gbit".

    Raises:
        RequestError: not a bandwidth.
    """
    return Machines(
        network=parse_rate("network_bandwidth", network_bandwidth),
        disk=None if disk_bandwidth is None else parse_rate("disk_bandwidth", disk_bandwidth),
        store=None if store_bandwidth is None else parse_rate("store_bandwidth", store_bandwidth),
    )


def parse_rate(option: str, value: str) -> float:
    """Return `value` in bytes a second: "2GB", "2GB/s" or "10Gbit".

    Raises:
        RequestError: not a bandwidth.
    """
    text = value.strip().removesuffix("/s")
    bits = text.lower().endswith("bit")
    try:
        size = parse_size(option, f"{text[:-3]}B" if bits else text.replace("b", "?"))  # "10Gb" could be either
    except RequestError:
        raise RequestError(f"{option} is {value!r}, expected bytes or bits a second, such as 2GB or 10Gbit") from None
    return size / 8 if bits else float(size)


def size_plan(plan: MergePlan, machines: Machines, counts: Sequence[int]) -> Sizing:
    """Return how long `plan` takes on each number of machines in `counts`.

    Raises:
        RequestError: a number of machines that is none, or a plan without weights.
    """
    for count in counts:
        if not 1 <= count <= MAX_MACHINES:
            raise RequestError(f"machines is {count}, expected 1 to {MAX_MACHINES}")
    if not plan.weights:
        raise RequestError(f"machines has no effect with save_method {plan.save_method}, which writes no weights")
    items = list(work_items(plan, Anywhere()))
    work = [item_work(item) for item in items]
    whole = _sum(work)
    parts = {count: [_sum(map(item_work, part)) for part in split(items, count)] for count in counts}
    longest = max((one.alone(machines) for one in work), default=0.0)
    return Sizing(
        machines=machines,
        threads=plan.workers,
        whole=whole,
        items=len(items),
        estimates=tuple(_estimate(plan, machines, whole, parts[count], longest) for count in counts),
    )


def _estimate(plan: MergePlan, machines: Machines, whole: Work, parts: Sequence[Work], longest: float) -> Estimate:
    from_store = whole.read + (whole.written if machines.disk is None else 0)
    return Estimate(
        machines=len(parts),
        reading=max(part.read for part in parts) / machines.network,
        computing=max(part.seconds for part in parts) / plan.workers,
        writing=max(part.written for part in parts) / machines.output,
        threads=max(part.alone(machines) for part in parts) / plan.workers,
        store=from_store / machines.store if machines.store else 0.0,
        item=longest,
        serial=serial_seconds(plan),
    )


def serial_seconds(plan: MergePlan) -> float:
    """Return what does not become less with the number of machines."""
    adapters = plan.bytes_read - sum(recipe.source.stored_bytes for recipe in plan.recipes)
    return start_seconds(plan) + adapters / CHECKSUM_BYTES_PER_SECOND


def start_seconds(plan: MergePlan) -> float:
    """Return what passes on a machine before its first item."""
    return START_SECONDS + PLAN_SECONDS_PER_TENSOR * sum(len(file.placed) for file in plan.weights)


def split(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Return the items of each of `count` parts, as `shares` cuts them."""
    return [[item for (item,) in share] for share in shares([(item,) for item in items], count)]


def item_work(item: Item) -> Work:
    """Return what an item takes; of a tensor that it holds in part, that share."""
    if item.encoded is not None:
        return _recipe_work(item.encoded, 1.0)
    work = []
    for piece in item.placed:
        count = min(item.end, piece.end) - max(item.start, piece.offset)
        if count > 0 and piece.recipe.keeps_bytes:
            work.append(Work(read=count, written=count, seconds=MOVE_SECONDS_PER_BYTE * count))
        elif count > 0:
            work.append(_recipe_work(piece.recipe, count / piece.recipe.num_bytes))
    return _sum(work)


def _recipe_work(recipe: Recipe, share: float) -> Work:
    """A factor that experts share is fetched once, but gone through for each of them."""
    fetched = gone_through = 0.0
    for edit in unwrapped(recipe.edits):
        inner = edit.edit if isinstance(edit, OnRows) else edit
        columns = inner.b_columns if isinstance(inner, LowRank) else None
        for ref in inner.refs:
            gone_through += ref.num_bytes
            fetched += ref.num_bytes / (
                columns.step if columns and isinstance(inner, LowRank) and ref is inner.b else 1
            )
    seconds = 1e-9 * sum(_nanoseconds(recipe)) + MOVE_SECONDS_PER_BYTE * gone_through
    return Work(
        read=share * (recipe.source.stored_bytes + fetched), written=share * recipe.num_bytes, seconds=share * seconds
    )


def _nanoseconds(recipe: Recipe) -> Iterator[float]:
    """Yield what each step of a weight costs one core."""
    elements = math.prod(recipe.shape)
    yield elements * (MOVE_NS + VALUE_NS)
    match recipe.source:
        case EncodedTensor(encoding=encoding):
            yield elements * DECODE_NS[_family(encoding)]
        case RequantisedTensor(encoding=encoding):
            yield elements * (ENCODE_NS[_family(encoding)] + DECODE_NS[_family(encoding)])
    if recipe.encoding is not None and recipe.is_encoded:
        steps = ENCODE_EDITED_NS if recipe.edits else ENCODE_NS
        yield elements * steps[_family(recipe.encoding)]
    for edit in unwrapped(recipe.edits):
        touched = (edit.stop - edit.start) * recipe.source.cols if isinstance(edit, OnRows) else elements
        yield touched * (EDIT_NS + EDIT_NS_PER_RANK * _rank(edit.edit if isinstance(edit, OnRows) else edit))


def _family(encoding: Encoding) -> str:
    return "FP8" if isinstance(encoding, Scaled) else "NF4"


def _rank(edit: Edit) -> int:
    return edit.rank if isinstance(edit, LowRank | Dora | Residual | SingularValues | Hadamard) else 0


def _sum(work: Sequence[Work] | Iterator[Work]) -> Work:
    read = written = seconds = 0.0
    for one in work:
        read, written, seconds = read + one.read, written + one.written, seconds + one.seconds
    return Work(read=read, written=written, seconds=seconds)
