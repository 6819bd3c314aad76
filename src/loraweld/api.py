"""The Python interface: `merge` and `plan`, the same as the commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweld.delivery import Progress, deliver
from loraweld.distributed.batch import Batch, merge_in_parts, run_here
from loraweld.distributed.plan_file import (
    everywhere,
    load_document,
    open_batch,
    plan_document,
    save_document,
    saved_place,
)
from loraweld.errors import OutputError
from loraweld.execute.parts import parse_part
from loraweld.export.pipeline import completion
from loraweld.hub.card import CardFacts
from loraweld.hub.repository import Repository, look_at_repository
from loraweld.planning.facts import Facts
from loraweld.planning.merge_plan import MergePlan
from loraweld.preparation import plan_request
from loraweld.report import MergeReport
from loraweld.request import AS_GIVEN, CPU, MergeRequest, PathLike, make_request


def plan(adapter: PathLike | Sequence[PathLike], *, output: PathLike | None = None, **options: Any) -> MergePlan:
    """Return what `merge` with the same arguments would do; reads headers only, writes nothing.

    Raises:
        LoraweldError: the merge would be refused.
    """
    request = make_request(adapter, output=output, **options)
    return plan_request(request)[0]


def merge(
    adapter: PathLike | Sequence[PathLike],
    *,
    output: PathLike | None = None,
    base: PathLike | None = None,
    save_method: str = "merged_16bit",
    dtype: str = "auto",
    rounding: str = "nearest",
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
    expert_layout: str = "auto",
    allow_nonfinite: bool = False,
    stream_base: bool = False,
    token: str | bool | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    weights: Sequence[float] | None = None,
    combine: str | None = None,
    density: float | None = None,
    seed: int | None = None,
    svd_rank: int | None = None,
    majority_sign_method: str | None = None,
    scale: float | None = None,
    verify: bool = False,
    executor: str = "local",
    ray_address: str | None = None,
    device: str = CPU,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge one or more adapters into their base and write one standalone model to the folder `output`.

    Args:
        adapter: a PEFT folder, Hub id or URL, or several; their deltas are summed before the only rounding.
        output: the folder that will hold the model; it appears when it is complete. It may be the URL of one in an
            object store (s3://bucket/model). None with `push_to_hub`: nothing
            stays on this disk, and each file is sent as soon as it is complete.
        base: a folder, a Hub id or a URL; None takes the one that the adapter's config names.
        save_method: "merged_16bit"; "merged_4bit" and "merged_8bit" (bitsandbytes), "merged_fp8" (compressed-tensors);
            "preserve" for the encoding that the base has; "gguf" for .gguf files and a Modelfile; "lora" for the
            adapter alone.
        dtype: of the weights the base stores in its main dtype: "auto" keeps a 16-bit type and writes
            bfloat16 for a float32 base; "bfloat16", "float16", "float32".
        rounding: "nearest", or "stochastic": what the adapter changes goes up or down by chance, so that changes below
            a step of `dtype` are kept in the mean.
        max_shard_size: repack into files of at most this size ("5GB", or bytes); None keeps the base's files.
        max_memory: what the merge may allocate, on top of about 250 MB for Python and torch.
        workers: threads; None takes four.
        overwrite: replace an output that exists.
        resume: continue an interrupted merge of the same inputs.
        tokenizer: folder or URL of the tokenizer to ship, instead of the adapter's or the base's.
        merge_base: "as-given", or "quantized-from", with ":" and a checkpoint if need be: fold onto what a 4-bit model
            computes with in the modules that the checkpoint has in 4 bit.
        quant_type: codes of merged_4bit, "nf4" or "fp4".
        double_quant: whether its block scales are quantised too; None: they are.
        blocksize: weights that share a scale; None: 64.
        quantizer: "mse" for block scales of least squared error, "absmax" for those of bitsandbytes; None: "mse".
        skip_modules: modules that stay in 16 bit besides embeddings and head: ends or beginnings of their paths.
        gguf_type: with "gguf", one or more of its types; None takes "q8_0".
        keep_merged: with "gguf", keep the merged model too, in the folder "merged" of the output.
        expert_layout: "standard" or "swapped": how the factors of square experts lie, where no peft_version tells.
        allow_nonfinite: write weights that are not finite as they are, and say which, instead of refusing them.
        stream_base: read the base from the Hub by ranges, as it is needed; nothing of it is stored.
        token: of the Hub, to read and to write; True: the stored login; None: the stored login, if there is one.
        push_to_hub: repository to upload to, in one commit: "owner/name", or "name" under the token's user.
        private: visibility of a new repository; None: the account's default.
        revision: branch to commit to, made if it is missing; "refs/pr/N" adds to a pull request.
        create_pr: upload as a pull request.
        commit_message: first line of the commit.
        weights: factor of what each adapter changes, one for each, in order; None: 1 for all.
        combine: "sum" adds what they change, exactly, and takes adapters of any kind; None: "sum". The names of PEFT's
            `add_weighted_adapter` ("linear", "cat", "svd", "ties", …) combine LoRA adapters into one LoRA first.
        density: share of values that "ties", "dare_…" and "magnitude_prune" keep, more than 0, at most 1.
        seed: of stochastic rounding, and of the random choice of "dare_…"; None: 0.
        svd_rank: rank of the combined adapter of "svd" and "…_svd"; None: the largest of the adapters.
        majority_sign_method: how "ties" and "dare_ties" elect a sign, "total" or "frequency"; None: "total".
        scale: strength: a factor of all weights; negative subtracts. None: 1.
        verify: read the staged output again before it appears, compare all of it with base + adapter in float64, and
            refuse to publish what does not hold.
        executor: "local" for this process, "ray" for the tasks of a Ray cluster; the bytes are the same.
        ray_address: of the cluster; None takes the one of RAY_ADDRESS, or starts one on this machine.
        device: where weights are quantised and decomposed: "cpu", "cuda", "cuda:N", "mps" or "xpu"; all else, rows in
            16 bit too, is computed on the CPU.
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
        rounding=rounding,
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
        expert_layout=expert_layout,
        allow_nonfinite=allow_nonfinite,
        stream_base=stream_base,
        token=token,
        push_to_hub=push_to_hub,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        weights=weights,
        combine=combine,
        density=density,
        seed=seed,
        svd_rank=svd_rank,
        majority_sign_method=majority_sign_method,
        scale=scale,
        verify=verify,
        executor=executor,
        ray_address=ray_address,
        device=device,
    )
    return merge_request(request, progress=progress or (lambda count: None))


def merge_request(
    request: MergeRequest,
    *,
    progress: Progress,
    on_plan: Callable[[MergePlan], None] | None = None,
    on_export: Callable[[str], None] = lambda text: None,
) -> MergeReport:
    """Plan, run and report; `on_plan` is called before the first byte is written, `on_export` before a conversion."""
    started = time.monotonic()
    if request.is_in_parts:
        return _merge_in_parts(request, progress=progress, on_plan=on_plan)
    repository = look_at_repository(request.hub) if request.hub is not None else None
    made, facts = plan_request(request)
    if on_plan:
        on_plan(made)
    return deliver(
        request,
        made,
        facts,
        progress=progress,
        complete=completion(made, on_export),
        started=started,
        repository=repository,
        card=_card(made, facts, repository) if repository is not None else None,
    )


def save_plan(request: MergeRequest, path: Path) -> MergePlan:
    """Prepare the output for the parts of a merge, and write to `path` what `run_part` and `publish` need.

    Raises:
        LoraweldError: the merge would be refused, or the output cannot be prepared.
    """
    batch = _batch(request)
    batch.prepare()
    save_document(plan_document(batch), path)
    return batch.delivery.made


def run_part(
    path: PathLike,
    part: str,
    *,
    progress: Progress = lambda count: None,
    on_plan: Callable[[MergePlan], None] | None = None,
) -> None:
    """Make part `part`, such as "3/64", of the plan saved at `path`: in any order, anywhere, again if need be.

    Raises:
        LoraweldError: something the user can fix; what is finished stays.
    """
    chosen = parse_part(part)
    batch = open_batch(load_document(Path(path)), progress=progress)
    if on_plan:
        on_plan(batch.delivery.made)
    batch.run(chosen)


def publish(path: PathLike) -> MergeReport:
    """Let the output of a saved plan appear, once all its parts are made.

    Raises:
        OutputError: parts are missing; says which.
    """
    return open_batch(load_document(Path(path))).publish()


def discard(path: PathLike) -> str:
    """Remove what was made of a saved plan and is not published; return where.

    Raises:
        LoraweldError: the place cannot be reached, or somebody writes to it.
    """
    place, name = saved_place(load_document(Path(path)))
    if not place.is_prepared():
        raise OutputError(f"{name}: nothing of this plan is there to be removed")
    place.discard()
    return name


def _batch(
    request: MergeRequest,
    progress: Progress = lambda count: None,
    on_plan: Callable[[MergePlan], None] | None = None,
) -> Batch:
    """Plan for processes that may have other working directories."""
    request = everywhere(request)
    made, facts = plan_request(request)
    if facts is not None and request.base is None and Path(facts.base.label).exists():  # as the adapter names it
        request = everywhere(replace(request, base=facts.base.label))
        made, facts = plan_request(request)
    if on_plan:
        on_plan(made)
    return Batch.of(request, made, facts, progress=progress)


def _merge_in_parts(
    request: MergeRequest, *, progress: Progress, on_plan: Callable[[MergePlan], None] | None
) -> MergeReport:
    batch = _batch(request, progress, on_plan)
    if request.executor != "ray":
        return merge_in_parts(batch, run_here)
    from loraweld.distributed.on_ray import run_on_ray  # only where it is asked for

    document = plan_document(batch)
    return merge_in_parts(batch, lambda batch: run_on_ray(batch, document, address=request.ray_address))


def _card(made: MergePlan, facts: Facts | None, repository: Repository) -> CardFacts:
    config = facts.base.config if facts is not None else {}
    return CardFacts(
        name=repository.name,
        base=made.base,
        base_folder=facts.base.folder if facts is not None else None,
        adapters=made.adapters,
        architecture=str(next(iter(config.get("architectures") or ()), "")),
        method=made.save_method,
        tags=repository.target.tags,
        datasets=repository.target.datasets,
        existing=repository.card,
    )
