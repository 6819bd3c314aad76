"""Facts + options → MergePlan, step by step. Writes nothing, computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.stored import MemoryFile
from loraweld.checkpoint.url import shown
from loraweld.naming.roles import is_output_embedding
from loraweld.naming.tied import flag_is_free
from loraweld.planning.changes import Resolved, combine_claims, resolve_ties
from loraweld.planning.claims import Claim
from loraweld.planning.companions import companion_files, tokenizer_size
from loraweld.planning.device_work import device_notes
from loraweld.planning.disk import free_bytes
from loraweld.planning.encode import EncodedOutput, encode_output
from loraweld.planning.facts import Facts, input_folders
from loraweld.planning.fit import fitting_claims
from loraweld.planning.layout import SHARD_BYTES, index_file, keep_layout, repack
from loraweld.planning.memory import plan_memory
from loraweld.planning.merge_plan import Input, MergePlan, ModuleLine, WeightFile
from loraweld.planning.model_config import ConfigEdits, config_file
from loraweld.planning.notes import (
    adapter_notes,
    base_notes,
    encoding_notes,
    left_out_notes,
    missing_layer_notes,
    runtime_notes,
    tie_notes,
)
from loraweld.planning.paths import check_output
from loraweld.planning.recipes import make_recipes, output_dtype
from loraweld.planning.task import Task, find_task, missing_layers
from loraweld.planning.vocabulary import check_shared_known, check_ties_known, grow_to_tokenizer, new_vocab_size
from loraweld.request import MergeRequest


def build_plan(request: MergeRequest, facts: Facts) -> MergePlan:
    """Decide everything about the output.

    Raises:
        LoraweldError: adapter and base do not fit, or the output place cannot be used.
    """
    base = facts.base
    adapters = [adapter for adapter in facts.given if adapter.weight]
    check_output(request, input_folders(base, facts.given, facts.tokenizer))
    resolved, modules = _resolved(request, facts)
    check_ties_known(base, resolved.changes)
    check_shared_known(base, resolved.changes)
    tokenizers = _tokenizers(facts, adapters)
    grown = grow_to_tokenizer(base, resolved.changes, _tokens_needed(tokenizers))
    dtype, task = output_dtype(base, request), find_task(adapters, resolved.changes)
    seed = request.rounding_seed
    plain = make_recipes(facts, resolved.changes, dtype, drops_text_head=task is not None, rounding_seed=seed)
    output = encode_output(request, base, plain, facts.ties)
    recipes = output.recipes
    weights = _weights(request, base, output)
    config = config_file(base, _config_edits(facts, resolved, dtype, task, output))
    loses_form = base.is_quantised and not output.keeps_settings
    companions, left_out = companion_files(base.folder, tokenizers, was_quantised=loses_form)
    memory = plan_memory(request, recipes)
    return MergePlan(
        base=base.label,
        adapters=tuple(adapter.label for adapter in facts.given),
        combination=None if request.combination.is_plain else request.combination,
        output=request.output,
        save_method=request.save_method,
        dtype=dtype,
        weights=weights,
        small=(*config, *index_file(base, weights), *companions),
        modules=modules,
        notes=(
            *facts.notes,
            *tie_notes(resolved.untied),
            *grown,
            *left_out_notes(base, left_out),
            *encoding_notes(recipes),
            *device_notes(request.device, recipes),
            *runtime_notes(base, output.keeps_settings),
            *base_notes(base, adapters),
            *adapter_notes(adapters),
            *missing_layer_notes(missing_layers(adapters, base.model_type, [recipe.name for recipe in recipes])),
        ),
        inputs=(
            *(Input(file.path, file.identity) for file in base.files if not isinstance(file, MemoryFile)),
            *(Input(adapter.weights, adapter.identity) for adapter in facts.given),
        ),
        scratch=(*facts.adapters, *facts.given, facts.tokenizer, base.scratch),
        item_bytes=memory.item_bytes,
        buffer_bytes=memory.buffer_bytes,
        workers=memory.workers,
        peak_memory_bytes=memory.peak_bytes,
        free_disk_bytes=free_bytes(request.output),
        allow_nonfinite=request.allow_nonfinite,
        rounding_seed=seed,
        store=request.store and shown(request.store),
        device=request.device,
    )


def _resolved(request: MergeRequest, facts: Facts) -> tuple[Resolved, tuple[ModuleLine, ...]]:
    """What changes in which tensor, and what the report says of it."""
    base = facts.base
    claims = fitting_claims(base, facts.adapters, facts.ties, expert_layout=request.expert_layout)
    by_flag = flag_is_free(base.config)
    resolved = resolve_ties(combine_claims(claims), facts.ties, base.tensors, by_flag=by_flag)
    return resolved, tuple(_line(claim) for claim in claims)


def _weights(request: MergeRequest, base: Base, output: EncodedOutput) -> tuple[WeightFile, ...]:
    """Files as the base has them, unless another size was asked for, weights come in another form, or files do.

    A pickle has no header to keep, a model in memory neither.
    """
    changes_form = output.settings is not None or (base.is_quantised and not output.keeps_settings)
    if request.max_shard_bytes or changes_form or not base.has_layout:
        return repack(base, output.recipes, request.max_shard_bytes or SHARD_BYTES)
    return keep_layout(base, output.recipes)


def _tokenizers(facts: Facts, adapters: Sequence[Adapter]) -> list[Path]:
    """The folders whose tokenizer files take the place of the base's."""
    return [facts.tokenizer.folder] if facts.tokenizer else [adapter.folder for adapter in adapters]


def _config_edits(
    facts: Facts, resolved: Resolved, dtype: str, task: Task | None, output: EncodedOutput
) -> ConfigEdits:
    loses_form = facts.base.is_quantised and not output.keeps_settings
    return ConfigEdits(
        dtype=dtype if loses_form or dtype != facts.base.main_dtype else None,
        drop_quantization=loses_form,
        quantization=output.settings,
        vocab_size=new_vocab_size(facts.base, resolved.changes),
        untie=any(is_output_embedding(tie.target) for tie in resolved.untied),
        is_derived=bool(facts.base.origins),
        task=task,
    )


def _tokens_needed(folders: Sequence[Path]) -> int | None:
    sizes = [tokenizer_size(folder) for folder in folders]
    return max((size for size in sizes if size is not None), default=None)


def _line(claim: Claim) -> ModuleLine:
    return ModuleLine(adapter=claim.adapter, module=claim.module, tensor=claim.name, what=claim.what)
