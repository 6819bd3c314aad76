"""Recipes → output files: which tensors lie in which file, at which offset, under which header."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraweld.checkpoint.base import INDEX_NAME, SINGLE_NAME, Base
from loraweld.checkpoint.encodings.encoded import CODES
from loraweld.checkpoint.header import PAGE_BYTES, build_header
from loraweld.checkpoint.jsonfile import dump_json
from loraweld.checkpoint.stored import SafetensorsFile, StoredFile
from loraweld.planning.merge_plan import Part, PlacedPart, Recipe, SmallFile, WeightFile

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of the output, before it has its place."""

    recipe: Recipe
    part: Part


def keep_layout(base: Base, recipes: Sequence[Recipe]) -> tuple[WeightFile, ...]:
    """Files as the base has them: same names, same order; tensors the base does not have come last."""
    outputs = [_outputs(recipe) for recipe in recipes]
    by_name = {output.part.name: output for group in outputs for output in group}
    groups = [[o for t in file.tensors if t.name in by_name for o in _at(by_name[t.name])] for file in base.files]
    groups[-1] += [output for group in outputs if group[0].part.name not in base.stored for output in group]
    return tuple(_like(file, group) for file, group in zip(base.files, groups, strict=True) if group)


def repack(base: Base, recipes: Sequence[Recipe], max_shard_bytes: int) -> tuple[WeightFile, ...]:
    """Files of at most `max_shard_bytes` tensor bytes (a larger tensor has a file of its own), in order."""
    groups: list[list[_Output]] = []
    free = 0
    for recipe in recipes:
        if not groups or recipe.num_bytes > free:
            groups.append([])
            free = max_shard_bytes
        groups[-1] += _outputs(recipe)
        free -= recipe.num_bytes
    metadata = {"format": "pt", **base.files[0].metadata}
    return tuple(
        _weight_file(_shard_name(number, len(groups)), group, metadata, align_to=0)
        for number, group in enumerate(groups, start=1)
    )


def index_file(base: Base, files: Sequence[WeightFile]) -> list[SmallFile]:
    """The index of `files`: none for a single file that needs none, the base's own where it is still true."""
    if len(files) == 1 and (base.index is None or files[0].name == SINGLE_NAME):
        return []
    if base.index is None and all(file.name == old.path.name for file, old in zip(files, base.files, strict=False)):
        return []  # several files without an index, as the base has them
    weight_map = {placed.part.name: file.name for file in files for placed in file.placed}
    total = sum(placed.part.num_bytes for file in files for placed in file.placed)
    old = base.index or {}
    metadata = dict(old.get("metadata") or {})
    if dict(old.get("weight_map") or {}) == weight_map and metadata.get("total_size") == total:
        return [SmallFile(name=INDEX_NAME, source=base.folder / INDEX_NAME)]
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(
            math.prod(p.recipe.shape) for f in files for p in f.placed if p.part.role == CODES
        )
    metadata["total_size"] = total
    return [SmallFile(name=INDEX_NAME, text=dump_json({"metadata": metadata, "weight_map": weight_map}))]


def _shard_name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _outputs(recipe: Recipe) -> list[_Output]:
    return [_Output(recipe, part) for part in recipe.parts]


def _at(output: _Output) -> list[_Output]:
    """What takes the place of a tensor of the base; the parts of a weight that is encoded anew stay together."""
    if not output.recipe.is_encoded:
        return [output]
    return _outputs(output.recipe) if output.part.role == CODES else []


def _like(file: StoredFile, outputs: Sequence[_Output]) -> WeightFile:
    """A file with the name, the metadata and the data alignment of `file`."""
    assert isinstance(file, SafetensorsFile)
    same_entries = [(o.part.name, o.part.dtype, o.part.shape) for o in outputs] == [
        (t.name, t.dtype, t.shape) for t in file.tensors
    ]
    if same_entries and "format" in file.metadata:
        placed = _place(outputs, file.data_start)
        stays = all(not p.recipe.keeps_bytes or (p.kept.path, p.kept.offset) == (file.path, p.offset) for p in placed)
        untouched = stays and all(piece.recipe.keeps_bytes for piece in placed)
        return WeightFile(
            name=file.path.name,
            header=file.description,
            placed=placed,
            same_as=file.path if untouched else None,
            like=file.path if stays and placed[-1].end == file.file_bytes else None,
        )
    metadata = {"format": "pt", **file.metadata}
    return _weight_file(file.path.name, outputs, metadata, align_to=file.data_start % PAGE_BYTES)


def _weight_file(name: str, outputs: Sequence[_Output], metadata: dict[str, str], *, align_to: int) -> WeightFile:
    entries = ((o.part.name, o.part.dtype, o.part.shape) for o in outputs)
    header = build_header(entries, metadata, align_to=align_to)
    return WeightFile(name=name, header=header, placed=_place(outputs, len(header)), same_as=None)


def _place(outputs: Iterable[_Output], offset: int) -> tuple[PlacedPart, ...]:
    placed = []
    for output in outputs:
        placed.append(PlacedPart(recipe=output.recipe, part=output.part, offset=offset))
        offset += output.part.num_bytes
    return tuple(placed)
