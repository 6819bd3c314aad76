"""Run a plan into a sink: the only place with threads.

Items are done in any order by a few threads, each with one aligned buffer that it fills and writes. After every
`CHECKPOINT_BYTES` one of them makes the finished items durable and journals them, and the others go on. What needs no
arithmetic comes first: it is copied while one of the threads imports torch.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loraweld.adapter.edits import PeftLayer
from loraweld.checkpoint.reader import Reader
from loraweld.execute.buffer import Buffer
from loraweld.execute.checksums import ItemChecksums, made_parts, tensor_checksums
from loraweld.execute.items import Copies, Item, Stretch, encoded_items, stretches
from loraweld.execute.kept import Piece, kept_pieces
from loraweld.execute.outcome import Outcome
from loraweld.planning.merge_plan import MergePlan, WeightFile
from loraweld.request import CPU

if TYPE_CHECKING:  # what imports torch is imported when there is work for it
    from loraweld.compute.editor import Scratch
    from loraweld.compute.fidelity import Fidelity
    from loraweld.execute.fill import Filler

CHECKPOINT_BYTES = 256 << 20
_LOOK_SECONDS = 0.5
Progress = Callable[[int], None]
# The items of a journal, by key, with the checksums of what each has made, and then the sums of its fidelity.
Noted = Mapping[str, Sequence[float]]


class JournalLike(Protocol):
    """What a run needs of a journal: the items of an earlier run, and a way to note more."""

    @property
    def done(self) -> Noted: ...

    def append(self, items: Noted) -> None: ...


class Publisher(Protocol):
    """Takes the small files of an output whose weights are made, and lets all of it appear."""

    def copy(self, name: str, source: Path) -> None: ...

    def write_text(self, name: str, text: str) -> None: ...

    def publish(self) -> None: ...


class WeightSink(Protocol):
    """Where weights go: files of known size, written in any order; `aligned`: at block borders.

    A thread writes a stretch from its start to its end, and says when it ends.
    """

    @property
    def journal(self) -> JournalLike: ...

    @property
    def files_at_once(self) -> int | None: ...

    def create(self, name: str, size: int, *, aligned: bool) -> None: ...

    def write_at(self, name: str, offset: int, buffer: memoryview, count: int) -> None: ...

    def end_stretch(self, name: str) -> None: ...

    def copy(self, name: str, source: Path) -> None: ...

    def make_durable(self, names: Iterable[str]) -> None: ...

    def finish(self, name: str, size: int) -> None: ...


class Sink(WeightSink, Publisher, Copies, Protocol):
    """Where a whole output goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Bytes of weights that this run made, and those it found finished by an earlier one.

    `work`: what it was asked for. `noted`: of the finished items, by their keys. `outcome`: of what this run made.
    """

    work: Sequence[Stretch]
    made_bytes: int
    resumed_bytes: int
    noted: Noted
    outcome: Outcome

    @property
    def is_whole(self) -> bool:
        """Whether this run made everything."""
        return not self.resumed_bytes

    def checksums(self) -> dict[str, int]:
        """Return the CRC-32 of each tensor that was made, if all of the merge was asked for."""
        return tensor_checksums(itertools.chain.from_iterable(self.work), self.noted)


Closing = Callable[[RunResult], Mapping[str, str]]


def run_plan(plan: MergePlan, sink: Sink, *, closing: Closing, progress: Progress) -> RunResult:
    """Make every file of `plan` in `sink` and publish it; `closing` says what is written last, by what a run has found.

    Raises:
        LoraweldError: a source is damaged, a value does not exist in the output dtype.
        OSError: the sink cannot be written; what is finished stays journalled.
    """
    result = make_weights(plan, sink, stretches(plan, sink), progress)
    if result.is_whole:
        result.outcome.check_any_change()
    complete_output(plan, sink, closing(result))
    return result


def make_weights(plan: MergePlan, sink: WeightSink, work: Sequence[Stretch], progress: Progress) -> RunResult:
    """Make some of the weights, those in `work`; what the sink's journal has is not made again.

    Raises:
        LoraweldError, OSError: as `run_plan`.
    """
    reader = Reader()
    try:
        _rehearse(plan, reader)
        return _Run(plan, sink, work, reader, progress).weights()
    finally:
        reader.close()


def complete_output(plan: MergePlan, sink: Publisher, texts: Mapping[str, str]) -> None:
    """Write the small files beside finished weights, `texts` last, and publish."""
    for small in plan.small:
        if small.source is not None:
            sink.copy(small.name, small.source)
        else:
            sink.write_text(small.name, small.text or "")
    for name, text in texts.items():
        sink.write_text(name, text)
    sink.publish()


def fidelity_of(plan: MergePlan, noted: Noted) -> dict[str, Fidelity]:
    """Return how true each weight is that was edited and encoded, by its name."""
    from loraweld.compute.fidelity import Fidelity

    return {
        item.encoded.name: Fidelity(*sums)
        for item in encoded_items(plan)
        if item.encoded is not None and (sums := noted.get(item.key, ())[len(made_parts(item)) :])
    }


def _rehearse(plan: MergePlan, reader: Reader) -> None:
    """Let the device and PEFT refuse what they must before a byte is written."""
    if plan.device != CPU:
        from loraweld.compute.device import open_device
        from loraweld.compute.device_trial import try_device

        try_device(open_device(plan.device), plan.recipes, reader)
    layers = [(edit, recipe.source) for recipe in plan.recipes for edit in recipe.edits if isinstance(edit, PeftLayer)]
    if layers:
        from loraweld.compute.peft_layer import rehearse  # PEFT takes seconds to import

        rehearse(layers, reader)


class _Stopped(Exception):
    """Another thread has failed: this item is not finished."""


class _Run:
    def __init__(
        self, plan: MergePlan, sink: WeightSink, work: Sequence[Stretch], reader: Reader, progress: Progress
    ) -> None:
        self._plan = plan
        self._sink = sink
        self._stretches = work
        self._reader = reader
        self._progress = progress
        self._local = threading.local()
        self._stop = threading.Event()
        # One thread per core computes, the others wait for the disk: more would only wait for each other.
        self._computing = threading.Semaphore(os.cpu_count() or 1)
        self._files = _OpenFiles(work, sink, self._stop)
        self._checkpoint = _Checkpoint(sink)
        self._noted: dict[str, Sequence[float]] = {}
        self._filler: Future[Filler]
        self._settings = ExitStack()

    def weights(self) -> RunResult:
        journal = self._sink.journal.done
        left: list[Stretch] = []
        done: list[Item] = []
        for stretch in self._stretches:
            if all(item.key in journal for item in stretch):
                done += stretch
            else:
                left.append(stretch)
        resumed = sum(item.end - item.start for item in done)
        self._progress(resumed)
        for item in done:
            self._files.item_done(item)
        self._noted = {item.key: journal[item.key] for item in done}
        self._work(left if self._sink.files_at_once else sorted(left, key=lambda one: not one[0].is_kept))
        return RunResult(
            work=self._stretches,
            made_bytes=sum(item.end - item.start for one in left for item in one),
            resumed_bytes=resumed,
            noted=self._noted,
            outcome=self._filler.result().outcome(),
        )

    def _work(self, work: Iterable[Stretch]) -> None:
        with ThreadPoolExecutor(self._plan.workers, thread_name_prefix="loraweld") as pool:
            self._filler = pool.submit(self._ready_filler)
            futures: list[Future[Any]] = [self._filler, *(pool.submit(self._one, stretch) for stretch in work)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._settings.close()
                try:
                    self._checkpoint.note_all()
                finally:
                    _raise_first(futures)

    def _ready_filler(self) -> Filler:
        """Import what computes: a second or two, in which the other threads copy."""
        import torch

        from loraweld.execute.fill import Filler
        from loraweld.torch_settings import plain_arithmetic

        self._settings.enter_context(plain_arithmetic())  # and the threads here are the parallelism
        return Filler(
            self._reader,
            device=torch.device(self._plan.device),
            allow_nonfinite=self._plan.allow_nonfinite,
        )

    def _one(self, stretch: Stretch) -> None:
        if self._stop.is_set():
            return
        try:
            self._write(stretch)
        except BaseException:
            self._stop.set()  # before this thread takes the next
            raise
        for item in stretch:
            self._checkpoint.add(item, self._noted[item.key])
            self._files.item_done(item, finish=self._checkpoint.note_all)
            self._progress(item.end - item.start)

    def _write(self, stretch: Stretch) -> None:
        for item in stretch:
            self._noted[item.key] = ()
            if item.whole is not None:
                self._sink.copy(item.file.name, item.whole)
            else:
                self._files.open(item.file)
                self._make(item)
        self._sink.end_stretch(stretch[0].file.name)

    def _make(self, item: Item) -> None:
        """Compute and write the pieces of an item, one after the other."""
        buffer, checksums = self._buffer(), ItemChecksums(item)
        pieces = kept_pieces(item, buffer.body, self._reader) if item.is_kept else self._computed(item, buffer)
        while not self._stop.is_set():
            with self._computing:
                piece = next(pieces, None)
            if piece is None:
                self._noted[item.key] = (*checksums.values, *self._noted[item.key])
                return
            checksums.add(piece.offset, buffer.body[: piece.count])
            self._sink.write_at(item.file.name, piece.offset, buffer.body, piece.count)
        raise _Stopped

    def _computed(self, item: Item, buffer: Buffer) -> Iterator[Piece]:
        filler = self._filler.result()
        yield from filler.pieces(item, buffer, self._scratch())
        self._noted[item.key] = filler.measured(item)

    def _buffer(self) -> Buffer:
        """This thread's buffer, made once: fresh memory costs more than the arithmetic."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = Buffer(self._plan.buffer_bytes)
        buffer: Buffer = self._local.buffer
        return buffer

    def _scratch(self) -> Scratch:
        """This thread's scratch, made once."""
        if not hasattr(self._local, "scratch"):
            from loraweld.compute.editor import Scratch

            self._local.scratch = Scratch()
        scratch: Scratch = self._local.scratch
        return scratch


class _OpenFiles:
    """Opens an output file at its first item and finishes it after its last; no more at once than the sink takes."""

    def __init__(self, work: Iterable[Stretch], sink: WeightSink, stop: threading.Event) -> None:
        self._sink = sink
        self._stop = stop
        self._changed = threading.Condition()
        self._open: set[str] = set()
        self._finished: set[str] = set()
        self._left: dict[str, int] = {}
        for item in itertools.chain.from_iterable(work):
            self._left[item.file.name] = self._left.get(item.file.name, 0) + 1

    def open(self, file: WeightFile) -> None:
        """Open a file if it is not, once there is room for it.

        Raises:
            _Stopped: another thread has failed meanwhile.
        """
        with self._changed:
            while file.name not in self._open and self._is_full():
                if self._stop.is_set():
                    raise _Stopped
                self._changed.wait(_LOOK_SECONDS)
            if file.name not in self._open:
                self._sink.create(file.name, file.num_bytes, aligned=not file.has_encoded)
                self._open.add(file.name)

    def _is_full(self) -> bool:
        return len(self._open) - len(self._finished) >= (self._sink.files_at_once or len(self._left) + 1)

    def item_done(self, item: Item, finish: Callable[[], None] | None = None) -> None:
        """Count an item; with the last one of a file, journal what is pending and close the file."""
        with self._changed:
            self._left[item.file.name] -= 1
            last = self._left[item.file.name] == 0
        if last and item.whole is None:
            self.open(item.file)
            if finish:
                finish()
            self._sink.finish(item.file.name, item.file.num_bytes)
            with self._changed:
                self._finished.add(item.file.name)
                self._changed.notify_all()


class _Checkpoint:
    """Collects finished items; notes them in the journal once their bytes are durable."""

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._noting = threading.Lock()
        self._pending: list[tuple[Item, Sequence[float]]] = []
        self._bytes = 0

    def add(self, item: Item, noted: Sequence[float]) -> None:
        with self._lock:
            self._pending.append((item, noted))
            self._bytes += item.end - item.start
            full = self._bytes >= CHECKPOINT_BYTES
        if full and self._noting.acquire(blocking=False):  # nobody waits while another one notes
            try:
                self._note()
            finally:
                self._noting.release()

    def note_all(self) -> None:
        with self._noting:
            self._note()

    def _note(self) -> None:
        with self._lock:
            items, self._pending, self._bytes = self._pending, [], 0
        if items:
            self._sink.make_durable({item.file.name for item, _ in items if item.whole is None})
            self._sink.journal.append({item.key: noted for item, noted in items})


def _raise_first(futures: Iterable[Future[Any]]) -> None:
    """Raise what went wrong first, not that others were stopped by it."""
    errors = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, _Stopped):
            raise error
