"""`--save-method gguf`: which files llama.cpp's converter makes of a merged model, and what it could not read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.errors import CheckpointError, RequestError
from loraweld.gguf_types import BITS_PER_WEIGHT, QUANTISER_TYPES, known_types, stored_type
from loraweld.planning.merge_plan import Export, MergePlan, OutputFile
from loraweld.request import MergeRequest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def plan_gguf(merge: MergePlan, request: MergeRequest) -> MergePlan:
    """Return the plan of a merge with what is made of the merged model.

    Raises:
        CheckpointError: the converter needs a config and a tokenizer, and there is none.
        RequestError: the tokenizer brings its own code.
    """
    names = [file.name for file in merge.small]
    _check_complete(names, merge)
    config = _json(merge, "config.json")
    if has_own_code(config, _json(merge, "tokenizer_config.json")):
        raise RequestError(
            f"the tokenizer of {merge.base} brings its own Python code, which the converter would run; if you trust "
            "its authors, merge with save_method merged_16bit and run convert_hf_to_gguf on the result"
        )
    stored = stored_type(merge.dtype)
    types = known_types(request.gguf_types, stored)
    export = _export(merge, types, stored, name=merge.output.resolve().name, keeps_merged=request.keep_merged)
    notes = (*merge.notes, *gguf_notes(config, types, stored))
    return replace(merge, save_method=request.save_method, notes=notes, export=export)


def gguf_names(name: str, types: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names of the .gguf file and of its Modelfile for each type; the first Modelfile has no suffix."""
    stem = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"  # nothing that a shell or a Modelfile would read
    return [
        (f"{stem}-{item.upper()}.gguf", "Modelfile" if i == 0 else f"Modelfile-{item.upper()}")
        for i, item in enumerate(types)
    ]


def gguf_notes(config: Mapping[str, Any], types: Collection[str], stored: str) -> Iterator[str]:
    """Say what the files do not hold of a model whose weights have the type `stored`."""
    if "f16" in types and stored != "f16":
        yield f"f16 rounds weights that are stored as {stored}; {stored} keeps them"
    if {"vision_config", "audio_config"} & set(config):
        yield (
            "the .gguf holds the language model; llama.cpp keeps image and audio encoders in a second file (mmproj), "
            "which is not made"
        )


def has_own_code(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool:
    """Return whether the model's authors wrote a tokenizer class of their own."""
    maps = (config.get("auto_map"), tokenizer_config.get("auto_map"))
    return any(isinstance(found, Mapping) and "AutoTokenizer" in found for found in maps)


def _check_complete(names: Collection[str], merge: MergePlan) -> None:
    if "config.json" not in names:
        raise CheckpointError(f"{merge.base}: has no config.json; a GGUF file needs one")
    if not set(TOKENIZER_FILES) & set(names):
        raise CheckpointError(
            f"neither {merge.base} nor the adapter has a tokenizer, and a GGUF file needs one; "
            "give its folder with --tokenizer"
        )


def _export(merge: MergePlan, types: Sequence[str], stored: str, *, name: str, keeps_merged: bool) -> Export:
    weights = sum(math.prod(recipe.shape) for recipe in merge.recipes)
    size = {item: int(weights * BITS_PER_WEIGHT[item] / 8) for item in (*types, stored)}
    files = []
    for item, (gguf, modelfile) in zip(types, gguf_names(name, types), strict=True):
        files.append(OutputFile(name=gguf, num_bytes=size[item], is_estimate=True))
        files.append(OutputFile(name=modelfile, num_bytes=None))
    needs_source = stored not in types and any(item in QUANTISER_TYPES for item in types)
    return Export(
        name=name,
        types=tuple(types),
        files=tuple(files),
        keeps_merged=keeps_merged,
        scratch_bytes=size[stored] if needs_source else 0,
    )


def _json(merge: MergePlan, name: str) -> dict[str, Any]:
    """Return what a small file of the merged model will hold, {} if there is none of this name."""
    file = next((file for file in merge.small if file.name == name), None)
    if file is None:
        return {}
    return read_json_object(file.source) if file.source else dict(json.loads(file.text or "{}"))
