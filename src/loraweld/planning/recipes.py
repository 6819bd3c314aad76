"""Changes + base → one recipe per output tensor, with its dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loraweld.adapter.edits import Edit, GrowRows, OnRows, unwrapped
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.encodings.encoded import EncodedTensor, RequantisedTensor, Source
from loraweld.checkpoint.stored import StoredTensor
from loraweld.dtypes import FLOAT_CODE_BY_NAME
from loraweld.errors import CheckpointError
from loraweld.planning.changes import Change
from loraweld.planning.facts import Facts
from loraweld.planning.merge_plan import Draw, Recipe
from loraweld.request import MergeRequest

# Heads of language models: a model that gets the head of another task has no place for them.
_TEXT_HEADS = ("lm_head.", "embed_out.", "cls.", "proj_out.")


def output_dtype(base: Base, request: MergeRequest) -> str:
    """Return the code in which the base's main weights are written: its own 16-bit type, else bfloat16."""
    if request.dtype != "auto":
        return FLOAT_CODE_BY_NAME[request.dtype]
    main = base.main_dtype
    return main if main in ("BF16", "F16") or request.save_method == "preserve" else "BF16"


def make_recipes(
    facts: Facts, changes: Mapping[str, Change], dtype: str, *, drops_text_head: bool, rounding_seed: int | None
) -> list[Recipe]:
    """Return the recipes of all output tensors: the base's in their order, then the new ones.

    `dtype` is for weights in the base's main dtype; the few kept in another one keep it. With a `rounding_seed` those
    that an adapter changes are rounded stochastically.
    """
    base, main = facts.base, facts.base.main_dtype
    sources = {tie.target: base.tensors[tie.source] for tie in facts.ties}
    recipes = []
    for name, stored in base.tensors.items():
        if drops_text_head and name.startswith(_TEXT_HEADS) and name not in changes:
            continue
        code = dtype if stored.dtype == main else stored.dtype
        recipes.append(_recipe(name, stored, changes.get(name), code))
    for name, change in changes.items():
        if name not in base.tensors:
            source = sources.get(name)
            code = dtype if source is None or source.dtype == main else source.dtype
            recipes.append(_new_recipe(name, source, change, code))
    if rounding_seed is not None:
        recipes = [_drawn(recipe, rounding_seed) for recipe in recipes]
    return [*recipes, *_twins(facts, recipes)]


def _drawn(recipe: Recipe, seed: int) -> Recipe:
    """A conversion loses no change: what no adapter changes is rounded to nearest as ever."""
    if recipe.kind not in ("edit", "replace", "new") or recipe.dtype not in ("BF16", "F16"):
        return recipe
    return replace(recipe, draw=Draw(seed, recipe.name))


def _twins(facts: Facts, recipes: Sequence[Recipe]) -> Iterator[Recipe]:
    """Write a tied parameter under both of its names, where the base does and the two are still one."""
    by_name = {recipe.name: recipe for recipe in recipes}
    for tie in facts.twins:
        if tie.target not in by_name:
            recipe = by_name[tie.source]
            source = facts.base.stored[tie.target] if recipe.keeps_bytes else recipe.source
            yield replace(recipe, name=tie.target, source=source)


def _recipe(name: str, stored: Source, change: Change | None, dtype: str) -> Recipe:
    if change is None:
        kind = _kind(stored, dtype)
        rows = stored.as_matrix() if kind == "convert" and isinstance(stored, StoredTensor) else stored
        return Recipe(name=name, dtype=dtype, shape=stored.shape, source=rows, edits=(), kind=kind)
    source: Source = change.replacement or stored
    return Recipe(
        name=name,
        dtype=dtype,
        shape=_shape(source, change),
        source=_as_edited(source, change.edits),
        edits=tuple(change.edits),
        kind="edit" if change.edits else "replace",
    )


def _as_edited(source: Source, edits: Sequence[Edit]) -> Source:
    """A stack of experts is edited as one matrix of all their rows; a convolution's rows are its outputs."""
    on_rows = any(isinstance(edit, OnRows) for edit in unwrapped(edits))
    return source.as_matrix() if isinstance(source, StoredTensor) and on_rows else source


def _kind(stored: Source, dtype: str) -> str:
    match stored:
        case EncodedTensor():
            return "decode"
        case RequantisedTensor():
            return "requantise"
        case _:
            return "copy" if stored.dtype == dtype else "convert"


def _new_recipe(name: str, source: Source | None, change: Change, dtype: str) -> Recipe:
    source = change.replacement or source
    if source is None:
        raise CheckpointError(f"tensor {name!r} is new, but the adapter does not hold its values")
    return Recipe(
        name=name,
        dtype=dtype,
        shape=_shape(source, change),
        source=source,
        edits=tuple(change.edits),
        kind="new",
    )


def _shape(source: Source, change: Change) -> tuple[int, ...]:
    rows = [edit.num_rows for edit in change.edits if isinstance(edit, GrowRows)]
    return (rows[0], *source.shape[1:]) if rows else source.shape
