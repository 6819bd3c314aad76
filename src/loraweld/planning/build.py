"""Request → MergePlan: open everything by header, match, decide, lay out. Writes nothing, computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraweld.adapter.files import Adapter, open_adapter
from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.hub import locate_base
from loraweld.checkpoint.jsonfile import dump_json
from loraweld.errors import MatchError, RequestError, listing
from loraweld.naming.roles import is_task_head
from loraweld.naming.tied import Tie, find_ties
from loraweld.planning.changes import Change, Resolved, combine_claims, resolve_ties
from loraweld.planning.claims import Claim, ClaimFinder
from loraweld.planning.companions import companion_files, tokenizer_size
from loraweld.planning.completeness import check_completeness
from loraweld.planning.disk import free_bytes
from loraweld.planning.layout import index_file, keep_layout, repack
from loraweld.planning.memory import plan_memory
from loraweld.planning.merge_plan import MergePlan, ModuleLine, Recipe, SmallFile, WeightFile
from loraweld.planning.model_config import ConfigEdits, edited_config, task_head
from loraweld.planning.paths import check_output
from loraweld.planning.recipes import make_recipes, output_dtype
from loraweld.planning.vocabulary import grow_to_tokenizer, new_vocab_size
from loraweld.request import MergeRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a merge reads: opened by header and config alone."""

    base: Base
    adapters: tuple[Adapter, ...]
    ties: tuple[Tie, ...]


def gather_facts(request: MergeRequest) -> Facts:
    """Open base and adapters.

    Raises:
        LoraweldError: something is missing, damaged or of an unknown kind.
    """
    adapters = tuple(open_adapter(path) for path in request.adapters)
    base = _open_base(request, adapters)
    return Facts(base=base, adapters=adapters, ties=find_ties(base.tensors, base.config))


def build_plan(request: MergeRequest, facts: Facts) -> MergePlan:
    """Decide everything about the output.

    Raises:
        LoraweldError: adapter and base do not fit, or the output place cannot be used.
    """
    base, adapters = facts.base, facts.adapters
    check_output(request, [base.folder, *(adapter.folder for adapter in adapters)])
    claims = _claims(facts)
    resolved = resolve_ties(combine_claims(claims), facts.ties, base.tensors)
    notes = _tie_notes(resolved)
    tokenizers = [request.tokenizer] if request.tokenizer else [adapter.folder for adapter in adapters]
    grown = grow_to_tokenizer(base, resolved.changes, _tokens_needed(tokenizers))
    notes += [grown] if grown else []
    task, recipes, dtype = _recipes(request, facts, resolved)
    weights = repack(base, recipes, request.max_shard_bytes) if request.max_shard_bytes else keep_layout(base, recipes)
    config = _config_file(base, resolved, task, dtype)
    companions, left_out = companion_files(base.folder, tokenizers)
    memory = plan_memory(request, recipes)
    return MergePlan(
        base=base.label,
        adapters=tuple(adapter.label for adapter in adapters),
        output=request.output,
        save_method=request.save_method,
        dtype=dtype,
        weights=weights,
        small=(*config, *index_file(base, weights), *companions),
        modules=tuple(_line(claim) for claim in claims),
        notes=(*notes, *_more_notes(facts, left_out, base, weights)),
        inputs=(*(file.path for file in base.files), *(adapter.weights for adapter in adapters)),
        scratch=adapters,
        item_bytes=memory.item_bytes,
        workers=memory.workers,
        peak_memory_bytes=memory.peak_bytes,
        free_disk_bytes=free_bytes(request.output),
    )


def _open_base(request: MergeRequest, adapters: Sequence[Adapter]) -> Base:
    if request.base is not None:
        located = locate_base(request.base)
        return open_base(located.folder, label=located.label, commit=located.commit)
    named = {(a.config.base, a.config.revision) for a in adapters}
    if len(named) > 1:
        found = listing(f"{a.label}: {a.config.base} {a.config.revision or ''}" for a in adapters)
        raise RequestError(f"the adapters name different bases; say which with --base:\n{found}")
    name, revision = named.pop()
    if not name:
        raise RequestError(f"{adapters[0].config.path}: names no base model; give it with --base")
    located = locate_base(name, revision=revision)
    return open_base(located.folder, label=located.label, commit=located.commit)


def _claims(facts: Facts) -> list[Claim]:
    claims: list[Claim] = []
    problems: list[str] = []
    for adapter in facts.adapters:
        finder = ClaimFinder(facts.base, adapter, facts.ties)
        finder.find()
        claims += finder.claims
        problems += finder.problems or check_completeness(facts.base, adapter, finder.claims, facts.ties)
    if problems:
        raise MatchError(
            f"adapter and base {facts.base.label} do not fit; nothing was written:\n{listing(problems)}\n"
            "Was the adapter trained on another base? Give the right one with --base"
        )
    return claims


def _tie_notes(resolved: Resolved) -> list[str]:
    return [
        f"{tie.target} was tied to {tie.source}; the adapter gives them different values: both are written, untied"
        for tie in resolved.untied
    ]


def _tokens_needed(folders: Sequence[Path]) -> int | None:
    sizes = [tokenizer_size(folder) for folder in folders]
    return max((size for size in sizes if size is not None), default=None)


def _recipes(request: MergeRequest, facts: Facts, resolved: Resolved) -> tuple[str | None, list[Recipe], str]:
    dtype = output_dtype(facts.base, request.dtype)
    tasks = {task_head(adapter.config.task_type) for adapter in facts.adapters}
    task = tasks.pop() if len(tasks) == 1 and _head(resolved.changes) is not None else None
    recipes = make_recipes(
        facts.base,
        resolved.changes,
        {tie.target: tie for tie in facts.ties},
        dtype,
        drops_text_head=task is not None,
    )
    return task, recipes, dtype


def _head(changes: dict[str, Change]) -> Change | None:
    """The task head that the adapter brings, the weight of its last layer."""
    found = [
        change
        for name, change in changes.items()
        if name.endswith(".weight") and is_task_head(name) and change.replacement
    ]
    return found[-1] if found else None


def _config_file(base: Base, resolved: Resolved, task: str | None, dtype: str) -> list[SmallFile]:
    if not base.config:
        return []
    head = _head(resolved.changes)
    edits = ConfigEdits(
        dtype=dtype if dtype != base.main_dtype else None,
        vocab_size=new_vocab_size(base, resolved.changes),
        untie=any(tie.target.endswith(_HEAD_TARGETS) for tie in resolved.untied),
        task=task,
        num_labels=head.replacement.rows if task and head and head.replacement else None,
    )
    if edits == ConfigEdits():
        return [SmallFile(name="config.json", source=base.folder / "config.json")]
    return [SmallFile(name="config.json", text=dump_json(edited_config(base.config, edits)))]


_HEAD_TARGETS = ("lm_head.weight", "proj_out.weight", "decoder.weight")


def _line(claim: Claim) -> ModuleLine:
    return ModuleLine(adapter=claim.adapter, module=claim.module, tensor=claim.name, what=claim.what)


def _more_notes(facts: Facts, left_out: list[str], base: Base, weights: Sequence[WeightFile]) -> list[str]:
    written = {file.path.name for file in base.files} | {"model.safetensors.index.json"}
    skipped = [name for name in left_out if name not in written]
    notes = [f"not copied, other weights of the base: {', '.join(skipped)}"] if skipped else []
    for adapter in facts.adapters:
        if adapter.untrained:
            names = ", ".join(tensor.name for tensor in adapter.untrained)
            notes.append(f"{adapter.label}: untrained copies that PEFT keeps, not used: {names}")
        if adapter.config.init in ("pissa", "olora"):
            notes.append(f"{adapter.label}: {adapter.config.init} residual base derived again from the base's weights")
    return notes
