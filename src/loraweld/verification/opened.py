"""An output as it lies on the disk: what is wrong with its files becomes a finding, not an exception."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraweld.checkpoint.base import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, holds_pickles, open_base
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.encodings.recognise import recognise
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.checkpoint.mounted import exists, mounted_in
from loraweld.checkpoint.stored import StoredTensor, read_safetensors
from loraweld.dtypes import is_plain_float
from loraweld.errors import CheckpointError, listing
from loraweld.planning.merge_plan import RECORD_NAME
from loraweld.verification.findings import Finding


@dataclass(slots=True, kw_only=True)
class Opened:
    """The tensors of an output: `stored` as in its files, `tensors` as weights; `findings`: what is wrong so far.

    `record` is its loraweld.json, {} if another tool made it.
    """

    folder: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    tensors: Mapping[str, Source] = field(default_factory=dict)
    aside: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)

    @property
    def main_dtype(self) -> str:
        """The code of the float dtype that holds most of the bytes."""
        totals: dict[str, int] = {}
        for tensor in self.tensors.values():
            if is_plain_float(tensor.dtype):
                totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.num_bytes
        return max(totals, key=lambda code: totals[code]) if totals else "F32"

    def note(self, check: str, where: str, message: str) -> None:
        self.findings.append(Finding(check=check, where=where, message=message))


def open_output(folder: Path) -> Opened:
    """Read config, index and headers of the model in `folder`.

    Raises:
        CheckpointError: it holds no weights at all.
    """
    if not folder.is_dir():
        raise CheckpointError("is not a folder; verify takes the folder of a merged model", path=folder)
    opened = Opened(folder=folder, config={})
    opened.config = _read_json(opened, CONFIG_NAME)
    opened.record = _read_json(opened, RECORD_NAME)
    if holds_pickles(folder):
        base = open_base(folder)
        opened.stored, opened.tensors, opened.aside = dict(base.stored), base.tensors, base.aside
        return opened
    there = sorted(path.name for path in {*folder.glob("*.safetensors"), *mounted_in(folder)})
    if not there:
        raise CheckpointError("holds no *.safetensors; a .gguf cannot be verified, its merged model can", path=folder)
    index = _read_json(opened, INDEX_NAME) if SINGLE_NAME not in there else {}
    for name in _files(opened, index, there):
        _read_file(opened, folder / name)
    if index:
        _check_index(opened, index)
    _recognise(opened)
    return opened


def _read_json(opened: Opened, name: str) -> Mapping[str, Any]:
    path = opened.folder / name
    try:
        return read_json_object(path) if path.exists() else {}
    except CheckpointError as error:
        opened.note("file", name, f"cannot be read: {error}")
        return {}


def _files(opened: Opened, index: Mapping[str, Any], there: Sequence[str]) -> list[str]:
    """The files that hold the model; those the index names and those it does not name are findings."""
    if SINGLE_NAME in there:
        _note_others(opened, [name for name in there if name != SINGLE_NAME], f"lies beside a whole {SINGLE_NAME}")
        return [SINGLE_NAME]
    named = set(map(str, (index.get("weight_map") or {}).values()))
    if not named:
        return list(there)
    for name in sorted(named.difference(there)):
        opened.note("index", name, f"{INDEX_NAME} names this file, which is missing; was the copy complete?")
    _note_others(opened, [name for name in there if name not in named], f"is not named by {INDEX_NAME}")
    return list(there)


def _note_others(opened: Opened, names: Iterable[str], message: str) -> None:
    for name in names:
        opened.note("file", name, f"{message}; take it away, loaders ignore or mix it up")


def _read_file(opened: Opened, path: Path) -> None:
    try:
        file = read_safetensors(path)
    except CheckpointError as error:
        opened.note("file", path.name, f"is damaged or cut short: {error}")
        return
    for tensor in file.tensors:
        if tensor.name in opened.stored:
            other = opened.stored[tensor.name].path.name
            opened.note(
                "duplicate", tensor.name, f"is stored in {other} and in {path.name}; which one counts is not said"
            )
        opened.stored.setdefault(tensor.name, tensor)


def _check_index(opened: Opened, index: Mapping[str, Any]) -> None:
    weight_map = {str(name): str(file) for name, file in (index.get("weight_map") or {}).items()}
    for name, file in weight_map.items():
        found = opened.stored.get(name)
        if found is not None and found.path.name != file:
            opened.note("index", name, f"{INDEX_NAME} says {file}, it is in {found.path.name}; write the index again")
        elif found is None and exists(opened.folder / file):
            opened.note("index", name, f"{INDEX_NAME} says {file}, which does not have it")
    missing = [name for name in opened.stored if name not in weight_map]
    if missing:
        opened.note(
            "index", INDEX_NAME, f"does not name tensors of its files, which are never loaded:\n{listing(missing)}"
        )
    total = (index.get("metadata") or {}).get("total_size")
    actual = sum(tensor.num_bytes for tensor in opened.stored.values())
    unreadable = any(finding.check in ("file", "duplicate") for finding in opened.findings)
    if total is not None and total != actual and not unreadable:
        opened.note("total_size", INDEX_NAME, f"says {total} bytes, the tensors have {actual}; write the index again")


def _recognise(opened: Opened) -> None:
    try:
        weights = recognise(opened.stored, opened.config)
        opened.tensors, opened.aside = weights.tensors, weights.aside
    except CheckpointError as error:
        opened.note("encoding", CONFIG_NAME, f"quantization_config and tensors do not fit: {error}")
        opened.tensors = opened.stored
