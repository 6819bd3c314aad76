"""Play a merge on many machines, item by item, and compare the time with what `loraweld plan --machines` says on paper.

Each machine has its run of items, threads that take them in order, one link in and one out. A thread reads an item,
computes it, writes it, and takes the next. Links and the store serve requests in the order in which they come; what
an item costs is what was measured by its kind (`benchmarks/RESULTS.md`, "Work by its kind"), with a random spread.
Nothing here adds up or takes the largest of anything: what is slowest comes out by itself.

    python benchmarks/simulation.py my-adapter --base my-base --machines 1 8 64 --store-bandwidth 25GB
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import loraweld
from loraweld.execute.items import work_items
from loraweld.execute.sizing import (
    CHECKSUM_BYTES_PER_SECOND,
    Anywhere,
    Machines,
    Work,
    item_work,
    make_machines,
    size_plan,
    split,
    start_seconds,
)
from loraweld.planning.collector import collector_paused
from loraweld.planning.merge_plan import MergePlan

SPREAD = 0.2  # of what computing an item takes, the standard deviation of its logarithm
READING, COMPUTING, WRITING, FREE = range(4)


@dataclass(slots=True)
class Server:
    """A link, a disk or the store: it serves one request after the other at its rate, None at once."""

    rate: float | None
    free_at: float = 0.0

    def serve(self, now: float, num_bytes: float) -> float:
        """Return when a request that comes now is done."""
        if self.rate is None:
            return now
        self.free_at = max(now, self.free_at) + num_bytes / self.rate
        return self.free_at


@dataclass(slots=True)
class Machine:
    """A machine: its items in order, its link in and its link out or disk."""

    items: deque[Work]
    incoming: Server
    outgoing: Server


@dataclass(slots=True)
class Simulation:
    """Machines and their store at work; `latency` seconds pass before a request is served."""

    machines: Machines
    parts: Sequence[Sequence[Work]]
    threads: int
    latency: float = 0.0
    spread: float = SPREAD
    seed: int = 0
    _events: list[tuple[float, int, int, int, Work | None]] = field(default_factory=list)
    _count: int = 0

    def seconds(self) -> float:
        """Return when the last item is written."""
        given, rng, store, last = self.machines, random.Random(self.seed), Server(self.machines.store), 0.0
        fleet = [Machine(deque(part), Server(given.network), Server(given.output)) for part in self.parts]
        for number in range(len(fleet)):
            for _ in range(self.threads):
                self._at(0.0, FREE, number, None)
        while self._events:
            now, _, done, number, work = heapq.heappop(self._events)
            machine, last = fleet[number], max(last, now)
            if done in (FREE, WRITING):
                if machine.items:
                    work = machine.items.popleft()
                    asked = now + self.latency
                    read = max(machine.incoming.serve(asked, work.read), store.serve(asked, work.read))
                    self._at(read, READING, number, work)
            elif done == READING:
                self._at(now + work.seconds * rng.lognormvariate(0, self.spread), COMPUTING, number, work)
            else:
                asked = now + self.latency
                written = machine.outgoing.serve(asked, work.written)
                if given.disk is None:
                    written = max(written, store.serve(asked, work.written))
                self._at(written, WRITING, number, None)
        return last

    def _at(self, time: float, done: int, number: int, work: Work | None) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, done, number, work))


def played(plan: MergePlan, machines: Machines, counts: Sequence[int], *, latency: float = 0.0) -> dict[int, float]:
    """Return how many seconds so many machines take, from their start to the adapters' checksum."""
    items = list(work_items(plan, Anywhere()))
    adapters = plan.bytes_read - sum(recipe.source.stored_bytes for recipe in plan.recipes)
    times = {}
    for count in counts:
        parts = [[item_work(item) for item in part] for part in split(items, count)]
        middle = Simulation(machines, parts, plan.workers, latency).seconds()
        times[count] = start_seconds(plan) + middle + adapters / CHECKSUM_BYTES_PER_SECOND
    return times


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Play a merge on many machines.")
    parser.add_argument("adapter")
    parser.add_argument("--base", required=True)
    parser.add_argument("--save-method", default="merged_16bit")
    parser.add_argument("--max-memory", default="512MB")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--network-bandwidth", default="10Gbit")
    parser.add_argument("--disk-bandwidth")
    parser.add_argument("--store-bandwidth")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before a request is served (default 0)")
    args = parser.parse_args()
    machines = make_machines(
        network_bandwidth=args.network_bandwidth,
        disk_bandwidth=args.disk_bandwidth,
        store_bandwidth=args.store_bandwidth,
    )
    with collector_paused():
        options = {"save_method": args.save_method, "max_memory": args.max_memory}
        plan = loraweld.plan(args.adapter, base=args.base, output="out", **options)
        paper = {one.machines: one for one in size_plan(plan, machines, args.machines).estimates}
        times = played(plan, machines, args.machines, latency=args.latency)
    print(f"{'machines':>8} {'on paper s':>11} {'played s':>9} {'efficiency':>10}  slowest")
    for count, seconds in times.items():
        efficiency = times[args.machines[0]] * args.machines[0] / (seconds * count)
        print(f"{count:8} {paper[count].total:11.1f} {seconds:9.1f} {efficiency:10.2f}  {paper[count].slowest}")


if __name__ == "__main__":
    main()
