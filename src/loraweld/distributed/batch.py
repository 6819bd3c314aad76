"""A merge in parts: prepared once, its parts made anywhere and in any order, published when all are there.

prepare ─▶ run(part) … run(part) ─▶ publish
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from loraweld.delivery import Delivery, Progress, output_error
from loraweld.errors import CheckpointError, LoraweldError, OutputError, RequestError
from loraweld.execute.items import Copies, Stretch, stretches
from loraweld.execute.outcome import Outcome, together
from loraweld.execute.parts import Part, missing_parts, part_of_name, shares
from loraweld.execute.run import RunResult, complete_output, make_weights
from loraweld.planning.facts import Facts
from loraweld.planning.merge_plan import MergePlan
from loraweld.report import MergeReport
from loraweld.request import WHOLE_METHODS, MergeRequest
from loraweld.sinks.folder import Complete
from loraweld.sinks.journal import PartRecord
from loraweld.sinks.shared_folder import SharedFolder
from loraweld.sinks.store import Store

_SHOWN = 20


class Place(Copies, Protocol):
    """An output that several processes fill: `SharedFolder` or `Store`."""

    def prepare(self, sizes: dict[str, int]) -> None: ...

    def part(self, name: str) -> AbstractContextManager[Any]: ...

    def records(self) -> dict[str, PartRecord]: ...

    def was_published(self) -> bool: ...

    def publisher(self, complete: Complete | None) -> AbstractContextManager[Any]: ...

    def is_prepared(self) -> bool: ...

    def discard(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A plan, the place that it fills, and its work in order."""

    delivery: Delivery
    place: Place
    work: list[Stretch]
    identity: str

    @classmethod
    def of(
        cls,
        request: MergeRequest,
        made: MergePlan,
        facts: Facts | None,
        *,
        progress: Progress = lambda count: None,
    ) -> Batch:
        """Cut a plan into its work.

        Raises:
            RequestError: it goes to the Hub, or is made by other programs.
        """
        if request.save_method in WHOLE_METHODS or request.hub is not None:
            what = "the Hub" if request.hub is not None else f"save_method {request.save_method}"
            raise RequestError(f"a merge in parts fills a folder, here or in an object store, not {what}")
        delivery = Delivery.of(request, made, facts, progress=progress)
        name = delivery.identity()
        work = stretches(made, place_of(request, name))
        identity = _identity(name, work)
        return cls(delivery=delivery, place=place_of(request, identity), work=work, identity=identity)

    def prepare(self) -> None:
        """Make the place ready for parts.

        Raises:
            OutputError: the output exists, another merge is running there, or the disk cannot hold it.
        """
        made, request = self.delivery.made, self.delivery.request
        with _told(request):
            if not request.resume:
                self.place.discard()
            if request.store is None:
                self.delivery.check_disk(made.disk_bytes)
            self.place.prepare({file.name: file.num_bytes for file in made.weights})

    def run(self, part: Part) -> RunResult:
        """Make one part; what it has made before is not made again.

        Raises:
            LoraweldError: as a merge does; what is finished stays noted.
        """
        with _told(self.delivery.request), self.place.part(part.name) as sink:
            share = shares(self.work, part.count)[part.number - 1]
            result = make_weights(self.delivery.made, sink, share, self.delivery.progress)
            try:
                self.delivery.check_unchanged()
            except CheckpointError:
                sink.journal.forget()  # nobody knows which of its bytes are of which input
                raise
            if result.is_whole:
                sink.journal.conclude(result.outcome.to_json())
            else:
                sink.journal.conclude(None if result.made_bytes else sink.journal.outcome)
        return result

    def publish(self) -> MergeReport:
        """Put beside the weights what belongs there, and let the output appear.

        Raises:
            OutputError: parts are missing; says which.
        """
        with _told(self.delivery.request):
            if self.place.was_published():
                return self.delivery.report_published({})
            result = self._all_parts()
            if result.is_whole:
                result.outcome.check_any_change()
            with self.place.publisher(self.delivery.completion()) as sink:
                complete_output(self.delivery.made, sink, self.delivery.closing(result))
        return self.delivery.report(self.delivery.run_facts(result))

    def _all_parts(self) -> RunResult:
        """Put together what the parts have noted."""
        found = {part: record for name, record in self.place.records().items() if (part := part_of_name(name))}
        if not found:
            raise OutputError("no part has been run yet; nothing to publish", path=self.delivery.made.output)
        done = {key: values for record in found.values() for key, values in record.done.items()}
        missing = missing_parts(self.work, done.keys(), (part.count for part in found))
        if missing:
            shown = ", ".join(map(str, missing[:_SHOWN])) + (" …" if len(missing) > _SHOWN else "")
            raise OutputError(
                f"{len(missing)} of {missing[0].count} parts are missing or not finished: {shown}; run them first",
                path=self.delivery.made.output,
            )
        known = [Outcome.from_json(dict(one.outcome)) for one in found.values() if one.outcome is not None]
        total = sum(file.num_bytes for file in self.delivery.made.weights)
        return RunResult(
            work=self.work,
            made_bytes=total,
            resumed_bytes=0 if len(known) == len(found) else total,
            noted=done,
            outcome=together(known),
        )


@contextmanager
def _told(request: MergeRequest) -> Iterator[None]:
    """Turn an error of the system into a message; what is finished stays noted."""
    try:
        yield
    except OSError as error:
        raise output_error(error, request) from None


def merge_in_parts(batch: Batch, run_parts: Callable[[Batch], None]) -> MergeReport:
    """Prepare, let `run_parts` run all parts, publish; what cannot be continued leaves nothing.

    Raises:
        LoraweldError: something the user can fix.
    """
    batch.prepare()
    try:
        run_parts(batch)
        return batch.publish()
    except OutputError:
        raise  # what is finished stays, for when the place can be written again
    except LoraweldError:
        batch.place.discard()
        raise


def run_here(batch: Batch) -> None:
    """Run all of a batch as one part, in this process."""
    batch.run(Part(count=1, number=1))


def _identity(merge: str, work: list[Stretch]) -> str:
    """A hash of a merge and of how it is cut: another version may cut it in another way."""
    digest = hashlib.sha256(merge.encode())
    for stretch in work:
        digest.update("\0".join(item.key for item in stretch).encode() + b"\n")
    return digest.hexdigest()


def place_of(request: MergeRequest, identity: str) -> Place:
    """Return the place that a request names, for the merge `identity`."""
    if request.store is not None:
        return Store(request.store, identity=identity, overwrite=request.overwrite)
    return SharedFolder(request.output, identity=identity, overwrite=request.overwrite)
