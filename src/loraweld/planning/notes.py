"""What a user should know about a merge besides what it was asked to do, in plain words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import INDEX_NAME, PICKLE_INDEX_NAME, Base
from loraweld.checkpoint.encodings.encoded import EncodedTensor, Source
from loraweld.checkpoint.stored import StoredTensor
from loraweld.naming.tied import Tie
from loraweld.planning.merge_plan import MergePlan, Recipe


def tie_notes(untied: Sequence[Tie]) -> list[str]:
    """Say which parameters no longer share a tensor."""
    return [
        f"{tie.target} was tied to {tie.source}; the adapter gives them different values: both are written, untied"
        for tie in untied
    ]


def base_notes(base: Base, adapters: Sequence[Adapter]) -> list[str]:
    """Say which adapters name another base than the one they are merged into, or another revision of it.

    Of a folder the last part counts: where it lies plays no part in a result.
    """
    given = _model_name(base.label if base.commit else str(base.folder))
    notes = []
    for adapter in adapters:
        config = adapter.config
        named = _model_name(config.base or "")
        if named and _last_part(named) != _last_part(given):
            notes.append(f"{adapter.label} names the base {named}, it is merged into {given}")
        elif base.commit and _COMMIT.fullmatch(config.revision or "") and config.revision != base.commit:
            notes.append(
                f"{adapter.label} names revision {config.revision} of its base, it is merged into {base.commit}"
            )
    return notes


def _model_name(label: str) -> str:
    """A Hub id as it is, of a folder its last part; a snapshot of the Hub's cache has the name of its repository."""
    cached = _CACHED.search(label)
    if cached:
        return cached[1].replace("--", "/")
    parts = label.replace("\\", "/").rstrip("/").split("/")
    return label if len(parts) == 2 and all(parts) and "." not in parts else parts[-1]


def _last_part(name: str) -> str:
    return name.rpartition("/")[2].lower()


_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]*$")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def adapter_notes(adapters: Sequence[Adapter]) -> list[str]:
    """Say what of the adapters was left aside or derived."""
    notes = []
    for adapter in adapters:
        if adapter.untrained:
            names = ", ".join(tensor.name for tensor in adapter.untrained)
            notes.append(f"{adapter.label}: play no part in the result (untrained copies, state of training): {names}")
        if adapter.config.init in ("pissa", "olora"):
            notes.append(f"{adapter.label}: {adapter.config.init} residual base derived again from the base's weights")
    return notes


def missing_layer_notes(layers: Sequence[str]) -> list[str]:
    """Say which layers a model of the adapter's task needs, but nothing holds."""
    if not layers:
        return []
    return [
        f"neither base nor adapter holds {', '.join(layers)}, which the model class of the adapter's task has: "
        "transformers fills in random values at every load, as it did in training. modules_to_save would have kept them"
    ]


def no_change_notes(plan: MergePlan) -> list[str]:
    """Say, of a plan whose edits were seen to change no tensor, that the adapters change nothing, if so."""
    recipes = list(plan.recipes)
    adapter_files = {ref.path for recipe in recipes for edit in recipe.edits for ref in edit.refs}
    replaces = any(
        recipe.kind in ("replace", "new")
        or (isinstance(recipe.source, StoredTensor) and recipe.source.path in adapter_files)
        for recipe in recipes
    )
    if replaces or not adapter_files:
        return []
    names = ", ".join(plan.adapters)
    return [
        f"{names}: changes nothing, every weight is what it is without it. Was it trained? "
        "A new LoRA has only zeros in lora_B"
    ]


def base_difference_notes(difference: float | None) -> list[str]:
    """Say how far the base that was folded onto is from the one that was given."""
    return (
        []
        if difference is None
        else [f"the 4-bit form differs from the given weights by {difference:.2%} of their norm"]
    )


def nonfinite_notes(names: Sequence[str]) -> list[str]:
    """Say which weights were written with values that are not finite, as was asked for."""
    if not names:
        return []
    shown = f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
    return [f"WARNING: {len(names)} weights hold values that are not finite (--allow-nonfinite): {shown}"]


def encoding_notes(recipes: Sequence[Recipe]) -> list[str]:
    """Say which weights change the form in which they are stored."""
    kinds = Counter(
        (_kind(recipe.source), "plain" if recipe.encoding is None else recipe.encoding.kind)
        for recipe in recipes
        if not recipe.keeps_bytes
    )
    return [f"{count} weights: {old} → {new}" for (old, new), count in sorted(kinds.items()) if (old, new) != _PLAIN]


_PLAIN = ("plain", "plain")


def _kind(source: Source) -> str:
    return source.encoding.kind if isinstance(source, EncodedTensor) else "plain"


def runtime_notes(base: Base, keeps_form: bool) -> list[str]:
    """Say what of a quantised runtime has no place in the output."""
    if not base.aside or keeps_form:
        return []
    return [f"scales of the quantised runtime, not part of a plain model: {len(base.aside)} tensors left out"]


def left_out_notes(base: Base, left_out: Sequence[str]) -> list[str]:
    """Say which files of the base's folder were not copied."""
    read = {file.path.name for file in base.files} | {PICKLE_INDEX_NAME if base.is_pickled else INDEX_NAME}
    skipped = [name for name in left_out if name not in read]
    return [f"not copied, other weights of the base: {', '.join(skipped)}"] if skipped else []
