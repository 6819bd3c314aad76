"""Plans of an output whose weight files have other names, or are pickles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweld.checkpoint.base import INDEX_NAME, PICKLE_INDEX_NAME
from loraweld.checkpoint.jsonfile import dump_json
from loraweld.planning.merge_plan import MERGED_FOLDER, RECORD_NAME, Export, MergePlan, OutputFile, SmallFile
from loraweld.sinks.folder import Complete


def with_variant(plan: MergePlan, variant: str | None) -> MergePlan:
    """Return the plan with the variant's infix in the names of its weight files and its index."""
    if variant is None:
        return plan
    names = {file.name: file.name.replace("model", f"model.{variant}", 1) for file in plan.weights}
    weights = tuple(replace(file, name=names[file.name]) for file in plan.weights)
    small = (_renamed_index(file, names, f"model.safetensors.index.{variant}.json") for file in plan.small)
    return replace(plan, weights=weights, small=tuple(small))


def _renamed_index(file: SmallFile, names: dict[str, str], name: str) -> SmallFile:
    if not file.name.startswith(INDEX_NAME.removesuffix(".json")):
        return file
    index = json.loads(file.text or "")
    index["weight_map"] = {tensor: names[place] for tensor, place in index["weight_map"].items()}
    return SmallFile(name=name, text=dump_json(index))


def as_pickles(plan: MergePlan, save: Callable[..., Any]) -> tuple[MergePlan, Complete]:
    """Return the plan of an output whose weights `save` writes, and what makes it of the merged model."""
    names = {file.name: _pickle_name(file.name) for file in plan.weights}
    pickled = [OutputFile(name=names[file.name], num_bytes=file.num_bytes, is_estimate=True) for file in plan.weights]
    small = [_pickle_index(file, names) for file in plan.small]
    beside = [OutputFile(name=file.name, num_bytes=file.num_bytes) for file in small]
    made = replace(
        plan,
        small=tuple(small),
        export=Export(name="pickle", types=("pickle",), files=(*pickled, *beside), keeps_merged=False, scratch_bytes=0),
    )

    def complete(output: Path) -> None:
        from safetensors.torch import load_file

        model = output / MERGED_FOLDER
        for name, pickle in names.items():
            save(load_file(model / name), str(output / pickle))
            with (output / pickle).open("rb+") as file:
                os.fsync(file.fileno())
            (model / name).unlink()
        for name in (*(file.name for file in small), RECORD_NAME):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).replace(output / name)
        shutil.rmtree(model)

    return made, complete


def _pickle_name(name: str) -> str:
    return f"pytorch_{name.removesuffix('.safetensors')}.bin"


def _pickle_index(file: SmallFile, names: dict[str, str]) -> SmallFile:
    stem = INDEX_NAME.removesuffix(".json")
    if not file.name.startswith(stem):
        return file
    ending = file.name.removeprefix(stem)
    return _renamed_index(file, names, PICKLE_INDEX_NAME.removesuffix(".json") + ending)
