"""An output and its record → what the page says, as values. Reads headers and small files only; no weight, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraweld.adapter.config import CONFIG_NAME
from loraweld.adapter.files import open_adapter
from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.hub import Located, known_config, locate_base
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.checkpoint.url import shown
from loraweld.errors import CheckpointError, LoraweldError, RequestError
from loraweld.naming.places import places
from loraweld.page.changes import TensorChange
from loraweld.planning.merge_plan import MERGED_FOLDER, RECORD_NAME
from loraweld.record import file_sha256

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
    read (GGUF files). `found` is the base where it was found, `base` the same unless it cannot be compared as it is;
    `reason` says why nothing is. `adapters` are the folders of those that were merged, where they were found.
    """

    heading: str
    record: Mapping[str, Any]
    files: tuple[ListedFile, ...]
    model: Base | None
    base: Base | None
    reason: str
    warnings: tuple[str, ...] = ()
    found: Base | None = None
    adapters: tuple[Path, ...] = ()
    is_comparison: bool = False


def gather_page_facts(output: str, *, base: str | None, token: str | bool | None = None) -> PageFacts:
    """Open an output, its record and, where they are to be found, its base and adapters.

    Raises:
        CheckpointError: neither a model nor a merge's output, or damaged; `base` was given and is not to be had.
        RequestError: the folder holds an adapter.
    """
    folder, record, model = _open(output, token)
    found, reason, warnings = _find_base(folder, record, base, token)
    if model is None:
        reason = "The output holds no weights that are read here."
    elif found is not None and _num_layers(found) != _num_layers(model):
        counts = f"The base has {_num_layers(found)} layers, the output {_num_layers(model)}"
        reason = f"{counts}: layer by layer they are not the same ones."
    return PageFacts(
        heading=f"{folder.resolve().name}: what the merge changed",
        record=record,
        files=tuple(_files(folder)),
        model=model,
        base=None if reason else found,
        reason=reason,
        warnings=warnings,
        found=found,
        adapters=_find_adapters(folder, record),
    )


def gather_compared(first: str, second: str) -> PageFacts:
    """Open two models that are compared; the second takes the place of the output.

    Raises:
        CheckpointError: one of them is no model, or damaged.
    """
    base, (folder, record, model) = _open(first, None)[2], _open(second, None)
    missing = next((name for name, side in ((first, base), (second, model)) if side is None), None)
    return PageFacts(
        heading=f"{_shown(second)} compared with {_shown(first)}",
        record=record,
        files=tuple(_files(folder)),
        model=model,
        base=base,
        reason="" if missing is None else f"{missing} holds no weights that are read here.",
        is_comparison=True,
    )


def _shown(name: str) -> str:
    """A local folder by its last part, since pages are sent around."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else shown(name)


def base_name(base: Base) -> str:
    """Return what a page calls a base."""
    return _shown(base.label)


def _open(name: str, token: str | bool | None) -> tuple[Path, Mapping[str, Any], Base | None]:
    """Return the folder of a model, its record and its weights."""
    located = locate_base(name, token=token)
    folder = located.folder
    if (folder / CONFIG_NAME).exists():
        raise RequestError(f"{folder} is an adapter; a report is of a model, and compares it with its base")
    record_path = folder / RECORD_NAME
    record = read_json_object(record_path) if record_path.exists() else {}
    _check_record(record, record_path)
    return folder, record, _open_model(located, record)


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


def _find_adapters(folder: Path, record: Mapping[str, Any]) -> tuple[Path, ...]:
    """The adapters of the record, each known by its hash, beside the output or in the current folder; () if one is
    not there."""
    found = [_find_adapter(folder, named) for named in record.get("adapters") or ()]
    return tuple(path for path in found if path is not None) if None not in found else ()


def _find_adapter(folder: Path, named: Mapping[str, Any]) -> Path | None:
    name = str(named.get("name") or "")
    if Path(name).name != name:
        return None
    for place in _likely_places(folder, name, None):
        try:
            if file_sha256(open_adapter(place).weights) == named.get("sha256"):
                return place
        except (LoraweldError, OSError):  # a folder of that name may be anything
            continue
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
