"""A plan → a folder or a repository of the Hub: found finished, compared, written, or sent."""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraweld.checkpoint.origins import place_of
from loraweld.checkpoint.stored import IdentitiesNow, file_identity
from loraweld.checkpoint.url import shown
from loraweld.errors import CheckpointError, LoraweldError, OutputError
from loraweld.execute.background import begun
from loraweld.execute.run import RunResult, fidelity_of, run_plan
from loraweld.export.pipeline import beside_export
from loraweld.hub.card import CardFacts, card_text
from loraweld.hub.repository import CARD_NAME, Repository
from loraweld.hub.upload import HubBase, Upload
from loraweld.planning.facts import Facts
from loraweld.planning.merge_plan import RECORD_NAME, Input, MergePlan
from loraweld.planning.notes import base_difference_notes, no_change_notes, nonfinite_notes
from loraweld.record import is_record, make_record, record_text
from loraweld.report import (
    MergeReport,
    RunFacts,
    WeightFidelity,
    fidelity_lines,
    human_bytes,
    lost_change_notes,
)
from loraweld.request import WHOLE_METHODS, MergeRequest
from loraweld.sinks.existing import ExistingSink, RepeatedSink
from loraweld.sinks.folder import (
    TAKEN,
    Complete,
    FolderSink,
    discard_staging,
    finish_published,
    open_folder_sink,
    staging_folder,
)
from loraweld.sinks.hub import HubSink, sent_memory
from loraweld.sinks.journal import Noted

Progress = Callable[[int], None]


def deliver(
    request: MergeRequest,
    made: MergePlan,
    facts: Facts | None,
    *,
    progress: Progress,
    complete: Complete | None = None,
    started: float | None = None,
    repository: Repository | None = None,
    card: CardFacts | None = None,
) -> MergeReport:
    """Do what a plan says; `complete` ends an output with files that other programs make.

    With a `repository` the output goes to the Hub, with a `card` README.md is written.

    Raises:
        LoraweldError: something the user can fix; the output is as it was.
    """
    if card is not None:
        made = made.without(CARD_NAME)
        if complete is not None:
            made, complete = beside_export(made, complete, CARD_NAME, card_text(card))
            card = None
    work = Delivery.of(request, made, facts, progress=progress, complete=complete, started=started, card=card)
    try:
        if repository is None:
            return work.to_folder()
        repository.make()
        return work.to_hub(repository, _hub_base(facts)) if work.streams else _send(work, repository)
    except OSError as error:
        raise output_error(error, request) from None


def _copied(made: MergePlan) -> tuple[Input, ...]:
    """The small files that will be copied, as they are now."""
    sources = [file.source for file in made.small if file.source]
    try:
        return tuple(Input(path, file_identity(path)) for path in sources)
    except OSError as error:
        raise CheckpointError(f"{str(error.filename)[:200]}: cannot be read: {error.strerror}") from None


def _hub_base(facts: Facts | None) -> HubBase | None:
    if facts is None or facts.base.commit is None:
        return None
    return HubBase(name=facts.base.label, commit=facts.base.commit)


def _send(work: Delivery, repository: Repository) -> MergeReport:
    """Make the output in a folder and commit what is in it; the folder goes, unless it was asked for."""
    request = work.request
    report = work.to_folder()
    pushed = Upload(repository).commit(request.output, replaces_weights=request.save_method not in WHOLE_METHODS)
    if not request.keeps_output:
        shutil.rmtree(request.output.parent)
    return replace(report, pushed=pushed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A plan on its way to its output; `check` refuses a finished model that is not what was asked for.

    The adapters are hashed for the record while the merge begins: whoever needs the record waits.
    """

    request: MergeRequest
    made: MergePlan
    record: Callable[[], Mapping[str, Any]] | None
    card: CardFacts | None
    progress: Progress
    complete: Complete | None
    check: Complete | None
    started: float
    streams: bool
    copied: tuple[Input, ...]

    @classmethod
    def of(
        cls,
        request: MergeRequest,
        made: MergePlan,
        facts: Facts | None,
        *,
        progress: Progress,
        complete: Complete | None = None,
        started: float | None = None,
        card: CardFacts | None = None,
    ) -> Delivery:
        """Put together what a plan needs on its way; see `deliver`."""
        return cls(
            request=request,
            made=made,
            record=begun(partial(make_record, made, facts)) if facts else None,
            card=card,
            progress=progress,
            complete=complete,
            check=_check(request, made, facts) if request.verify else None,
            started=time.monotonic() if started is None else started,
            streams=request.streams_to_hub and complete is None,
            copied=_copied(made),
        )

    def to_folder(self) -> MergeReport:
        """Find the output finished, compare it, or write it."""
        request, made = self.request, self.made
        if (published := finish_published(request.output, identity=self.identity)) is not None:
            if self.check is not None:  # the run that was killed may not have been asked for it
                self.check(made.output)
            return self.report_published(published)
        was_there = self._is_taken()
        if was_there:
            self._check_record()
        if was_there and self.complete is None:
            result = self._run(ExistingSink(made.output))
            if self.check is not None:
                self.check(made.output)
            discard_staging(request.output)
            return self.report(result, was_there=True)
        self.check_disk(made.disk_bytes)
        with open_folder_sink(
            request.output,
            identity=self.identity,
            resume=request.resume,
            overwrite=request.overwrite,
            model_folder=made.model_folder,
            complete=self.completion(),
            kind=RepeatedSink if was_there else FolderSink,
        ) as sink:
            return self.report(self._fill(sink), was_there=was_there)

    def to_hub(self, repository: Repository, base: HubBase | None) -> MergeReport:
        """Send each file as soon as it is complete; on the disk there are never more than two."""
        request, made = self.request, self.made
        memory = sent_memory(request.output)
        largest = sorted((file.num_bytes for file in made.weights), reverse=True)
        self.check_disk(sum(largest[: HubSink.files_at_once]))

        def hub_sink(*place: Any, **options: Any) -> HubSink:
            return HubSink(*place, upload=Upload(repository, base=base, memory=memory), **options)

        with open_folder_sink(
            request.output,
            identity=self.identity,
            resume=request.resume,
            overwrite=False,
            kind=hub_sink,
            elsewhere=memory,
        ) as sink:
            assert isinstance(sink, HubSink)
            result = self._fill(sink)
            return replace(self.report(result), pushed=sink.pushed)

    def completion(self) -> Complete | None:
        """What ends an output before it appears: files of other programs, and the check."""
        steps = [step for step in (self.check, self.complete) if step is not None]

        def complete(folder: Path) -> None:
            for step in steps:
                step(folder)

        return complete if steps else None

    def _fill(self, sink: FolderSink) -> RunFacts:
        try:
            return self._run(sink)
        except OutputError:
            raise  # what is finished stays, for when the place is free
        except LoraweldError:
            sink.clean_up()  # it would fail again: there is nothing to continue
            raise

    def report_published(self, noted: Noted) -> MergeReport:
        """Report an output that a run has published which was killed before it could say so."""
        return self.report(RunFacts(resumed_bytes=self.made.merged_bytes, fidelity=_weights(self.made, noted)))

    def check_unchanged(self) -> None:
        """Raises:
        CheckpointError: a file has changed since it was opened, so that the output may be part of each.
        """
        now = IdentitiesNow()
        for one in (*self.made.inputs, *self.copied):
            try:
                found = now.of(one.path)
            except OSError as error:
                raise CheckpointError(f"{place_of(one.path)}: cannot be found any more: {error.strerror}") from None
            if found != one.identity:
                raise CheckpointError(
                    f"{place_of(one.path)}: has changed while it was read (size, time, inode or checksum); nothing was "
                    "written. Merge again when nobody writes to it"
                )

    def _is_taken(self) -> bool:
        """True if something is in the output place that may not be replaced."""
        output = self.request.output
        return not self.request.overwrite and output.is_dir() and any(output.iterdir())

    def _check_record(self) -> None:
        """An output that says it is the result of this merge will be compared with it, byte for byte.

        Raises:
            OutputError: it is something else.
        """
        if self.record is not None and not is_record(self.made.output / RECORD_NAME, self.record()):
            raise OutputError(TAKEN, path=self.made.output)

    def _run(self, sink: Any) -> RunFacts:
        return self.run_facts(run_plan(self.made, sink, closing=self.closing, progress=self.progress))

    def run_facts(self, result: RunResult) -> RunFacts:
        """Put what a run has found out into words."""
        outcome = result.outcome
        notes = no_change_notes(self.made) if result.is_whole and not outcome.any_change else []
        notes += [*base_difference_notes(outcome.base_difference), *nonfinite_notes(outcome.nonfinite)]
        return RunFacts(
            resumed_bytes=result.resumed_bytes, notes=tuple(notes), fidelity=_weights(self.made, result.noted)
        )

    def closing(self, result: RunResult) -> Mapping[str, str]:
        """What is written last: the card, which tells of the run, and the record.

        Raises:
            CheckpointError: what was read is not what is there now; nothing may appear.
        """
        self.check_unchanged()
        texts = {}
        if self.card is not None:
            texts[CARD_NAME] = card_text(self.card, fidelity_lines(_weights(self.made, result.noted)))
        if self.record is not None:
            # Those of tensors that are only on the way to another format would say nothing of the output.
            texts[RECORD_NAME] = record_text(self.record(), {} if self.made.export else result.checksums())
        return texts

    def check_disk(self, needed: int) -> None:
        """Raises:
        OutputError: the disk cannot hold what will lie on it; nothing was written.
        """
        output, free = self.made.output, self.made.free_disk_bytes
        staged = sum(file.stat().st_size for file in staging_folder(output).glob("model/**/*") if file.is_file())
        if needed > free + staged:
            raise OutputError(
                f"the disk has {human_bytes(free)} free, the output takes "
                f"{human_bytes(needed)}; free some space or choose another output",
                path=output,
            )

    def identity(self) -> str:
        """A hash of the merge, of the very files it reads (see `file_identity`), and of where it goes."""
        hub = self.request.hub
        place: object = (hub.repo_id, hub.revision, hub.create_pr) if hub is not None and self.streams else None
        place = self.request.store or place
        record = record_text(self.record(), {}) if self.record is not None else None
        digest = hashlib.sha256(f"{self.made.fingerprint}\0{record}\0{place}".encode())
        for one in (*self.made.inputs, *self.copied):
            digest.update(repr(one.identity).encode())
        return digest.hexdigest()

    def report(self, facts: RunFacts, *, was_there: bool = False) -> MergeReport:
        made = self.made
        files = tuple(file.name for file in made.files)
        return MergeReport(
            output=made.store or made.output,
            base=made.base,
            adapters=made.adapters,
            combination=made.combination,
            save_method=made.save_method,
            dtype=made.dtype,
            rounding_seed=made.rounding_seed,
            files=files,
            recipes=dict(made.recipes_by_kind),
            modules=made.modules,
            notes=(*made.notes, *facts.notes, *lost_change_notes(facts.fidelity)),
            fidelity=facts.fidelity,
            bytes_written=self._bytes_written(files),
            resumed_bytes=facts.resumed_bytes,
            was_there=was_there,
            seconds=time.monotonic() - self.started,
        )

    def _bytes_written(self, files: Sequence[str]) -> int:
        if not self.request.is_local:
            return self.made.bytes_written
        return sum((self.made.output / name).stat().st_size for name in files)


def _weights(made: MergePlan, noted: Noted) -> tuple[WeightFidelity, ...]:
    return tuple(
        WeightFidelity(tensor=name, relative_error=found.relative_error, kept=found.kept)
        for name, found in fidelity_of(made, noted).items()
    )


def _check(request: MergeRequest, made: MergePlan, facts: Facts | None) -> Complete:
    def check(folder: Path) -> None:
        from loraweld.verification.staged import check_staged  # torch is imported only once there is work

        assert facts is not None
        check_staged(folder, request, facts, dtype=made.dtype)

    return check


def output_error(error: OSError, request: MergeRequest) -> OutputError:
    """Return what to tell of an error of the system while an output is made."""
    if request.store is not None:
        said = error.strerror or error
        return OutputError(f"{shown(request.store)}: cannot be written: {said}; the same command continues")
    staging = staging_folder(request.output)
    kept = f"what is finished is kept in {staging}: the same command continues"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full; free some space, {kept}", path=request.output)
    return OutputError(f"cannot be written: {error.strerror or error}; {kept}", path=request.output)
