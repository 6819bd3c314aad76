"""Which output weights are stored in an encoding, and in which; what the config then says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraweld.checkpoint.base import Base
from loraweld.checkpoint.encodings.bnb4 import NESTED_BLOCKSIZE, Bnb4, state_bytes
from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, Encoding
from loraweld.checkpoint.encodings.scaled import fp8_rows, llm_int8
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import RequestError, listing
from loraweld.naming.linear import is_expert, is_linear, is_named
from loraweld.naming.tied import Tie
from loraweld.planning.merge_plan import Part, Recipe
from loraweld.planning.quantization_config import EXPERTS, SETTINGS
from loraweld.request import MergeRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedOutput:
    """Recipes with their encodings; `settings` is the output's quantization_config, None if it has none.

    `keeps_settings`: it is the base's own.
    """

    recipes: list[Recipe]
    settings: dict[str, Any] | None = None
    keeps_settings: bool = False


def encode_output(request: MergeRequest, base: Base, recipes: list[Recipe], ties: Sequence[Tie]) -> EncodedOutput:
    """Give each recipe the encoding that the save method asks for.

    Raises:
        RequestError: there is nothing to encode, a module to skip that is not there, or an encoded weight that grows.
    """
    if request.save_method == "merged_16bit":
        return EncodedOutput(recipes=recipes)
    if request.save_method == "preserve":
        _check_sizes(recipes, base)
        kept = [_preserved(recipe, base, request) for recipe in recipes]
        return EncodedOutput(recipes=[*kept, *_of_runtime(base)], keeps_settings=True)
    chosen = [recipe for recipe in recipes if _is_chosen(recipe, request, base)]
    if not chosen:
        raise RequestError(
            f"save_method {request.save_method} would encode nothing: no weight of the base is that of a linear "
            f"layer{' that is not skipped' if request.skip_modules else ''}; give merged_16bit"
        )
    names = {recipe.name for recipe in chosen}
    made = [_encoded(recipe, request) if recipe.name in names else recipe for recipe in recipes]
    skipped = _skipped(request, recipes, names, ties)
    return EncodedOutput(recipes=made, settings=SETTINGS[request.save_method](request, chosen[0].dtype, skipped))


def _is_chosen(recipe: Recipe, request: MergeRequest, base: Base) -> bool:
    return (
        recipe.dtype in ("BF16", "F16", "F32")
        and is_linear(recipe.name, recipe.shape, base.model_type, base.tensors)
        and (request.save_method == "merged_fp8" or not is_expert(recipe.name))
        and not is_named(recipe.name, request.skip_modules)
    )


def _encoded(recipe: Recipe, request: MergeRequest) -> Recipe:
    rows, cols = recipe.shape
    encoding: Encoding
    if request.save_method == "merged_4bit":
        encoding = Bnb4(
            quant_type=request.quant_type,
            blocksize=request.blocksize,
            nested_blocksize=NESTED_BLOCKSIZE if request.double_quant else 0,
            state_bytes=state_bytes(recipe.shape),
        )
    else:
        encoding = llm_int8((rows, cols)) if request.save_method == "merged_8bit" else fp8_rows((rows, cols))
    return _with_encoding(recipe, encoding, request)


def _check_sizes(recipes: Sequence[Recipe], base: Base) -> None:
    """Scales are laid out for the base's sizes; blocks of the flattened weight fit any.

    Raises:
        RequestError: an encoded weight comes out larger or smaller than it is stored.
    """
    other = [
        f"{recipe.name}: {stored.encoding.kind} of {stored.shape}, will be {recipe.shape}"
        for recipe in recipes
        if isinstance(stored := base.tensors.get(recipe.name), EncodedTensor)
        and recipe.shape != stored.shape
        and not isinstance(stored.encoding, Bnb4)
    ]
    if other:
        raise RequestError(
            f"weights of another size than the base's cannot go back to its encoding:\n{listing(other)}\n"
            "Give --save-method merged_16bit"
        )


def _preserved(recipe: Recipe, base: Base, request: MergeRequest) -> Recipe:
    """A weight that the base stores in an encoding goes back to it."""
    stored = base.tensors.get(recipe.name)
    if not isinstance(stored, EncodedTensor):
        return recipe
    encoding = stored.encoding
    if isinstance(encoding, Bnb4) and recipe.kind != "decode":
        encoding = replace(encoding, state_bytes=state_bytes(stored.shape))
    return _with_encoding(replace(recipe, dtype=stored.dtype), encoding, request, stored)


def _of_runtime(base: Base) -> list[Recipe]:
    """The scales of activations and caches, as they are."""
    return [
        Recipe(name=name, dtype=stored.dtype, shape=stored.shape, source=stored, edits=(), kind="copy")
        for name, stored in ((name, base.stored[name]) for name in base.aside)
    ]


def _with_encoding(
    recipe: Recipe, encoding: Encoding, request: MergeRequest, stored: EncodedTensor | None = None
) -> Recipe:
    """Return the recipe with its parts; codes of the base that are in this encoding already are copied.

    `stored` is the base's weight of this name, if it goes back to its encoding.
    """
    source = recipe.source
    is_same = isinstance(source, EncodedTensor) and _is_same(source.encoding, encoding) and source.dtype == recipe.dtype
    if isinstance(source, EncodedTensor) and is_same and not recipe.edits:
        parts = tuple(Part(role=role, name=t.name, dtype=t.dtype, shape=t.shape) for role, t in source.parts)
        return replace(recipe, kind="copy", encoding=source.encoding, encoded_parts=parts)
    kind = recipe.kind if recipe.kind in ("edit", "replace", "new") else "encode"
    form = source if isinstance(source, EncodedTensor) and is_same else stored
    parts = _parts(recipe, encoding, form)
    searches = isinstance(encoding, Bnb4) and request.quantizer == "mse"
    return replace(
        recipe,
        source=source.as_matrix() if isinstance(source, StoredTensor) else source,
        kind=kind,
        encoding=encoding,
        encoded_parts=parts,
        form=form,
        searches=searches,
    )


def _is_same(one: Encoding, other: Encoding) -> bool:
    if isinstance(one, Bnb4) and isinstance(other, Bnb4):
        one, other = (replace(encoding, state_bytes=0, nested_offset=0.0) for encoding in (one, other))
    return one == other


def _parts(recipe: Recipe, encoding: Encoding, like: EncodedTensor | None) -> tuple[Part, ...]:
    """The tensors of a weight, stored as those of `like` where they have its size."""
    parts = []
    for role, layout in encoding.layout(recipe.name, recipe.shape).items():
        stored = like.part(role) if like else None
        if stored is None and not layout.required:
            continue
        part = Part(role=role, name=layout.name, dtype=layout.dtypes[0], shape=layout.shape)
        if (stored is not None and stored.num_bytes == part.num_bytes) or (stored is not None and role != "state"):
            part = replace(part, dtype=stored.dtype, shape=stored.shape)
        parts.append(part)
    assert parts[0].role == CODES
    return tuple(parts)


def _skipped(request: MergeRequest, recipes: Sequence[Recipe], chosen: set[str], ties: Sequence[Tie]) -> list[str]:
    """Return the modules with a matrix that stays plain, as few names as say it: the ends of their paths.

    Raises:
        RequestError: a module to skip that is not there.
    """
    plain = [r.name for r in recipes if r.name not in chosen and r.name.endswith(".weight") and len(r.shape) == 2]
    modules = [_module(name) for name in [*plain, *(tie.target for tie in ties)]]
    missing = [pattern for pattern in request.skip_modules if not any(is_named(m, [pattern]) for m in modules)]
    if missing:
        raise RequestError(f"skip_modules names what no module of the base ends or begins with:\n{listing(missing)}")
    encoded = [_module(name) for name in chosen]
    ends = {module: _end(module) for module in modules}
    taken = {end for end in set(ends.values()) if any(module.endswith(end) for module in encoded)}
    names = (module if end in taken else end for module, end in ends.items())
    return list(dict.fromkeys([*request.skip_modules, *names]))


def _end(module: str) -> str:
    """The end of a path that modules of its kind share in all layers."""
    if is_expert(f"{module}."):
        return EXPERTS
    return ".".join(module.split(".")[-2:] if "." in module and _has_number(module) else module.split(".")[-1:])


def _has_number(module: str) -> bool:
    return any(part.isdigit() for part in module.split("."))


def _module(name: str) -> str:
    return name.removesuffix(".weight")
