"""The Python interface: `merge` and `plan`, the same as the commands."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from loraweld.errors import LoraweldError, OutputError, RequestError
from loraweld.export.pipeline import completion, plan_export
from loraweld.planning.build import build_plan
from loraweld.planning.facts import Facts, gather_facts
from loraweld.planning.lora_output import plan_lora
from loraweld.planning.merge_plan import RECORD_NAME, MergePlan
from loraweld.planning.notes import base_difference_notes, no_change_notes
from loraweld.record import record_text
from loraweld.report import MergeReport, RunFacts, WeightFidelity, human_bytes, lost_change_notes
from loraweld.request import AS_GIVEN, MergeRequest, PathLike, make_request
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

Progress = Callable[[int], None]


def plan(adapter: PathLike | Sequence[PathLike], *, output: PathLike, **options: Any) -> MergePlan:
    """Return what `merge` with the same arguments would do; reads headers only, writes nothing.

    Raises:
        LoraweldError: the merge would be refused.
    """
    request = make_request(adapter, output=output, **options)
    return plan_request(request)[0]


def merge(
    adapter: PathLike | Sequence[PathLike],
    *,
    output: PathLike,
    base: PathLike | None = None,
    save_method: str = "merged_16bit",
    dtype: str = "auto",
    max_shard_size: int | str | None = None,
    max_memory: int | str = "512MB",
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    tokenizer: PathLike | None = None,
    merge_base: str = AS_GIVEN,
    quant_type: str | None = None,
    double_quant: bool | None = None,
    blocksize: int | None = None,
    quantizer: str | None = None,
    skip_modules: Sequence[str] | None = None,
    gguf_type: str | Sequence[str] | None = None,
    keep_merged: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge one or more adapters into their base and write one standalone model to the folder `output`.

    Args:
        adapter: a PEFT folder, or several; their deltas are summed before the only rounding.
        output: the folder that will hold the model; it appears when it is complete.
        base: a folder or a Hub id; None takes the one that the adapter's config names.
        save_method: "merged_16bit"; "merged_4bit" and "merged_8bit" (bitsandbytes), "merged_fp8" (compressed-tensors);
            "preserve" for the encoding that the base has; "gguf" for .gguf files and a Modelfile; "lora" for the
            adapter alone.
        dtype: of the weights the base stores in its main dtype: "auto" keeps a 16-bit type and writes
            bfloat16 for a float32 base; "bfloat16", "float16", "float32".
        max_shard_size: repack into files of at most this size ("5GB", or bytes); None keeps the base's files.
        max_memory: what the merge may allocate, on top of about 250 MB for Python and torch.
        workers: threads; None takes four.
        overwrite: replace an output that exists.
        resume: continue an interrupted merge of the same inputs.
        tokenizer: folder of the tokenizer to ship, instead of the adapter's or the base's.
        merge_base: "as-given", or "quantized-from", with ":" and a checkpoint if need be: fold onto what a 4-bit model
            computes with in the modules that the checkpoint has in 4 bit.
        quant_type: codes of merged_4bit, "nf4" or "fp4".
        double_quant: whether its block scales are quantised too; None: they are.
        blocksize: weights that share a scale; None: 64.
        quantizer: "mse" for block scales of least squared error, "absmax" for those of bitsandbytes; None: "mse".
        skip_modules: modules that stay in 16 bit besides embeddings and head: ends or beginnings of their paths.
        gguf_type: with "gguf", one or more of its types; None takes "q8_0".
        keep_merged: with "gguf", keep the merged model too, in the folder "merged" of the output.
        progress: called from any thread with the number of weight bytes that became ready.

    Raises:
        LoraweldError: something the user can fix; `output` is as it was.
    """
    request = make_request(
        adapter,
        output=output,
        base=base,
        save_method=save_method,
        dtype=dtype,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        workers=workers,
        overwrite=overwrite,
        resume=resume,
        tokenizer=tokenizer,
        merge_base=merge_base,
        quant_type=quant_type,
        double_quant=double_quant,
        blocksize=blocksize,
        quantizer=quantizer,
        skip_modules=skip_modules,
        gguf_type=gguf_type,
        keep_merged=keep_merged,
    )
    return merge_request(request, progress=progress or (lambda count: None))


def plan_request(request: MergeRequest, facts: Facts | None = None) -> tuple[MergePlan, Facts | None]:
    """Open the inputs, if `facts` are not what is in them, and plan; an adapter written alone has no facts of a base.

    Raises:
        LoraweldError: the merge would be refused.
    """
    try:
        if request.save_method == "lora":
            return plan_lora(request), None
        if request.save_method == "gguf":
            return plan_export(request, facts)
        facts = facts or gather_facts(request)
        return build_plan(request, facts), facts
    except OSError as error:  # a name too long, a folder that may not be read
        raise RequestError(f"{str(error.filename)[:200]}: {error.strerror}") from None


def merge_request(
    request: MergeRequest,
    *,
    progress: Progress,
    on_plan: Callable[[MergePlan], None] | None = None,
    on_export: Callable[[str], None] = lambda text: None,
) -> MergeReport:
    """Plan, run and report; `on_plan` is called before the first byte is written, `on_export` before a conversion."""
    started = time.monotonic()
    made, facts = plan_request(request)
    if on_plan:
        on_plan(made)
    return fulfil(request, made, facts, progress=progress, complete=completion(made, on_export), started=started)


def fulfil(
    request: MergeRequest,
    made: MergePlan,
    facts: Facts | None,
    *,
    progress: Progress,
    complete: Complete | None = None,
    started: float | None = None,
) -> MergeReport:
    """Do what a plan says; `complete` ends an output with files that other programs make.

    Raises:
        LoraweldError: something the user can fix; the output is as it was.
    """
    started = time.monotonic() if started is None else started
    record = record_text(made, facts) if facts else None
    try:
        return _fulfil(request, made, record, progress=progress, complete=complete, started=started)
    except OSError as error:
        raise _output_error(error, request) from None


def _fulfil(
    request: MergeRequest,
    made: MergePlan,
    record: str | None,
    *,
    progress: Progress,
    complete: Complete | None,
    started: float,
) -> MergeReport:
    """Find the output finished, compare it, or write it."""
    identity = _identity(made, record)
    if finish_published(request.output, identity=identity):
        return _report(made, RunFacts(resumed_bytes=made.merged_bytes), started=started)
    was_there = _is_taken(request)
    if was_there:
        _check_record(made, record)
    if was_there and complete is None:
        result = _run(made, ExistingSink(made.output), record, progress)
        discard_staging(request.output)
        return _report(made, result, started=started, was_there=True)
    _check_disk(made)
    with open_folder_sink(
        request.output,
        identity=identity,
        resume=request.resume,
        overwrite=request.overwrite,
        model_folder=made.model_folder,
        complete=complete,
        kind=RepeatedSink if was_there else FolderSink,
    ) as sink:
        try:
            result = _run(made, sink, record, progress)
        except OutputError:
            raise  # what is finished stays, for when the place is free
        except LoraweldError:
            sink.clean_up()  # it would fail again: there is nothing to continue
            raise
    return _report(made, result, started=started, was_there=was_there)


def _is_taken(request: MergeRequest) -> bool:
    """True if something is in the output place that may not be replaced."""
    return not request.overwrite and request.output.is_dir() and any(request.output.iterdir())


def _check_record(made: MergePlan, record: str | None) -> None:
    """An output that says it is the result of this merge will be compared with it, byte for byte.

    Raises:
        OutputError: it is something else.
    """
    path = made.output / RECORD_NAME
    if record is not None and (not path.is_file() or path.read_bytes() != record.encode()):
        raise OutputError(TAKEN, path=made.output)


def _run(made: MergePlan, sink: Any, record: str | None, progress: Progress) -> RunFacts:
    """Run a plan and return what only the run could tell."""
    from loraweld.execute.run import run_plan  # torch is imported only once there is work

    result = run_plan(made, sink, record=record, progress=progress)
    fidelity = tuple(
        WeightFidelity(tensor=name, relative_error=found.relative_error, kept=found.kept)
        for name, found in result.fidelity.items()
    )
    notes = no_change_notes(made) if result.saw_no_change else []
    notes += base_difference_notes(result.base_difference)
    return RunFacts(resumed_bytes=result.resumed_bytes, notes=tuple(notes), fidelity=fidelity)


def _check_disk(made: MergePlan) -> None:
    """Raises:
    OutputError: the disk cannot hold the output; nothing was written.
    """
    staged = sum(file.stat().st_size for file in staging_folder(made.output).glob("model/**/*") if file.is_file())
    if made.disk_bytes > made.free_disk_bytes + staged:
        raise OutputError(
            f"the disk has {human_bytes(made.free_disk_bytes)} free, the output takes "
            f"{human_bytes(made.disk_bytes)}; free some space or choose another output",
            path=made.output,
        )


def _identity(made: MergePlan, record: str | None) -> str:
    """A hash of the merge and of the very files it reads: sizes, times and inodes included."""
    digest = hashlib.sha256(f"{made.fingerprint}\0{record}".encode())
    sources = (*made.inputs, *(file.source for file in made.small if file.source))
    for path in sources:
        info = path.stat()
        digest.update(repr((str(path), info.st_size, info.st_mtime_ns, info.st_ino)).encode())
    return digest.hexdigest()


def _output_error(error: OSError, request: MergeRequest) -> OutputError:
    staging = staging_folder(request.output)
    kept = f"what is finished is kept in {staging}: the same command continues"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full; free some space, {kept}", path=request.output)
    return OutputError(f"cannot be written: {error.strerror or error}; {kept}", path=request.output)


def _report(made: MergePlan, facts: RunFacts, *, started: float, was_there: bool = False) -> MergeReport:
    files = tuple(file.name for file in made.files)
    return MergeReport(
        output=made.output,
        base=made.base,
        adapters=made.adapters,
        save_method=made.save_method,
        dtype=made.dtype,
        files=files,
        recipes=dict(made.recipes_by_kind),
        modules=made.modules,
        notes=(*made.notes, *facts.notes, *lost_change_notes(facts.fidelity)),
        fidelity=facts.fidelity,
        bytes_written=sum((made.output / name).stat().st_size for name in files),
        resumed_bytes=facts.resumed_bytes,
        was_there=was_there,
        seconds=time.monotonic() - started,
    )
