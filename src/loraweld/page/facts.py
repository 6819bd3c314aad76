"""An output and its record → what the page says, as values. Reads headers and small files only; no weight, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraweld.adapter.config import CONFIG_NAME
from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.hub import Located, known_config, locate_base
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.errors import CheckpointError, RequestError
from loraweld.page.changes import TensorChange, places
from loraweld.planning.merge_plan import MERGED_FOLDER, RECORD_NAME

# What a record holds, as far as the page reads it; elements of the lists in the second table are objects.
_RECORD_TYPES: dict[str, type] = {
    "base": dict,
    "adapters": list,
    "combination": dict,
    "modules": list,
    "notes": list,
    "recipes": dict,
    "gguf_types": list,
}
_LISTS_OF_OBJECTS = ("adapters", "modules")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFile:
    """A file of the output, by its name below the folder."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    """Everything that the page shows, but for the numbers of the tensors.

    `record` is loraweld.json, empty if the folder has none. `model` is None where the output holds no weights that are
    read (GGUF files); `base` is None where it was not found, and `reason` says why nothing is compared.
    """

    title: str
    record: Mapping[str, Any]
    files: tuple[ListedFile, ...]
    model: Base | None
    base: Base | None
    reason: str
    warnings: tuple[str, ...]


def gather_page_facts(output: str, *, base: str | None, token: str | bool | None = None) -> PageFacts:
    """Open an output, its record and, where it is to be found, its base.

    Raises:
        CheckpointError: neither a model nor a merge's output, or damaged; `base` was given and is not to be had.
        RequestError: the folder holds an adapter.
    """
    located = locate_base(output, token=token)
    folder = located.folder
    if (folder / CONFIG_NAME).exists():
        raise RequestError(f"{folder} is an adapter; a report is of a model, and compares it with its base")
    record_path = folder / RECORD_NAME
    record = read_json_object(record_path) if record_path.exists() else {}
    _check_record(record, record_path)
    model = _open_model(located, record)
    found, reason, warnings = _compared(folder, model, record, base, token)
    return PageFacts(
        title=folder.resolve().name,
        record=record,
        files=tuple(_files(folder)),
        model=model,
        base=found,
        reason=reason,
        warnings=warnings,
    )


def unmeasured(model: Base) -> tuple[TensorChange, ...]:
    """Return the tensors of an output without numbers: there is nothing to compare them with."""
    where = places(list(model.tensors))
    return tuple(
        TensorChange(tensor=name, layer=where[name].layer, module=where[name].module, shape=source.shape)
        for name, source in model.tensors.items()
    )


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    """A record that something else wrote, or that was damaged, ends in a message."""
    wrong = [key for key, kind in _RECORD_TYPES.items() if not isinstance(record.get(key, kind()), kind)]
    wrong += [
        key
        for key in _LISTS_OF_OBJECTS
        if key not in wrong and not all(isinstance(item, dict) for item in record.get(key, ()))
    ]
    if "base" not in wrong and not isinstance(record.get("base", {}).get("headers_sha256", {}), dict):
        wrong.append("base.headers_sha256")
    if wrong:
        raise CheckpointError(f"is no record that loraweld wrote: wrong types of {', '.join(wrong)}", path=path)


def _open_model(located: Located, record: Mapping[str, Any]) -> Base | None:
    """The merged model, beside GGUF files too; None if the output is these files alone."""
    if record.get("save_method") != "gguf":
        return open_base(located.folder, scratch=located.scratch)
    merged = located.folder / MERGED_FOLDER
    return open_base(merged, scratch=located.scratch) if merged.is_dir() else None


def _compared(
    folder: Path, model: Base | None, record: Mapping[str, Any], given: str | None, token: str | bool | None
) -> tuple[Base | None, str, tuple[str, ...]]:
    """The base that the output can be compared with, or why there is none; and what has to be said of it."""
    if model is None:
        return None, "The output holds no weights that are read here.", ()
    base, reason, warnings = _find_base(folder, record, given, token)
    if base is None or _num_layers(base) == _num_layers(model):
        return base, reason, warnings
    counts = f"The base has {_num_layers(base)} layers, the output {_num_layers(model)}"
    return None, f"{counts}: layer by layer they are not the same ones.", warnings


def _find_base(
    folder: Path, record: Mapping[str, Any], given: str | None, token: str | bool | None
) -> tuple[Base | None, str, tuple[str, ...]]:
    """The base, or why there is none; and what has to be said of it."""
    named: Mapping[str, Any] = record.get("base") or {}
    if given is not None:
        located = locate_base(given, token=token)
        base = open_base(located.folder, label=located.label, commit=located.commit, scratch=located.scratch)
        if named and not _has_headers(base, named):
            return base, "", ("The base given here has other files than the one that was merged.",)
        return base, "", ()
    name = str(named.get("name") or "")
    for place in _likely_places(folder, name, named.get("commit")):
        found = _open_if_there(place, label=name)
        if found is not None and _has_headers(found, named):
            return found, "", ()
    known = f"The base, {name}, is not on this machine" if name else "The base is not known"
    return None, f"{known}; give it with --base.", ()


def _likely_places(folder: Path, name: str, commit: object) -> Iterator[Path]:
    """Where a base of that name may be: the Hub's cache, beside the output, in the current folder."""
    if not name:
        return
    if isinstance(commit, str):
        config = known_config(name, revision=commit)
        if config is not None:
            yield config.parent
    elif Path(name).name == name:
        yield from (folder.resolve().parent / name, Path(name))


def _open_if_there(place: Path, *, label: str) -> Base | None:
    """A folder of that name may be anything; what is no model is not the base."""
    try:
        return open_base(place, label=label) if place.is_dir() else None
    except CheckpointError:
        return None


def _has_headers(base: Base, named: Mapping[str, Any]) -> bool:
    found = {file.path.name: hashlib.sha256(file.description).hexdigest() for file in base.files}
    return bool(found == named.get("headers_sha256"))


def _num_layers(model: Base) -> int:
    layers = [place.layer for place in places(list(model.tensors)).values() if place.layer is not None]
    return 1 + max(layers, default=-1)


def _files(folder: Path) -> Iterator[ListedFile]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield ListedFile(name=name.as_posix(), num_bytes=path.stat().st_size)
