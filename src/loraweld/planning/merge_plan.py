"""The plan of a merge: values only, known in full before the first weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loraweld.adapter.edits import Edit
from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, Encoding, RequantisedTensor, Source
from loraweld.checkpoint.stored import Identity, StoredTensor
from loraweld.combine.methods import Combination
from loraweld.dtypes import num_bytes
from loraweld.request import CPU, STOCHASTIC

RECORD_NAME = "loraweld.json"
MERGED_FOLDER = "merged"


def _key(tensor: Source) -> tuple[object, ...]:
    if isinstance(tensor, RequantisedTensor):
        return repr(tensor.encoding), *_key(tensor.plain)
    if isinstance(tensor, EncodedTensor):
        return tensor.name, tensor.dtype, tensor.shape, repr(tensor.encoding), *(_key(part) for _, part in tensor.parts)
    return tensor.name, tensor.dtype, tensor.shape, tensor.offset, tensor.path.name


def _edit_key(edit: Edit) -> tuple[object, ...]:
    return edit.kind, *(_value_key(getattr(edit, item.name)) for item in fields(edit))


def _value_key(value: object) -> object:
    if isinstance(value, StoredTensor | EncodedTensor | RequantisedTensor):
        return _key(value)
    if isinstance(value, Edit):
        return _edit_key(value)
    return tuple(map(_value_key, value)) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of an output file: a weight as it is (role "codes"), or what an encoded weight consists of."""

    role: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class Draw:
    """What the random bits of a rounding follow from: a seed, and the name of a tensor."""

    seed: int
    tensor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one output weight is made: the values of `source`, `edits` in order, rounded to `dtype`.

    They are rounded to nearest, with a `draw` up or down by chance.

    With an `encoding` the values are stored in it, as `encoded_parts`, and `dtype` is what they decode to; without,
    as they are. `form` is the base's weight in that encoding, from which comes what the values do not decide; if it is
    the source too, its scales are kept. `searches`: the encoder looks for the block scales of least squared error.

    `kind` is "copy" (the source's bytes), "convert" (another dtype), "decode" (of a quantised weight), "requantise"
    (a plain weight as a quantised model has it), "encode" (in another form), "edit", "replace" (the source is the
    adapter's tensor) or "new" (the base does not store it).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source
    edits: tuple[Edit, ...]
    kind: str
    encoding: Encoding | None = None
    encoded_parts: tuple[Part, ...] = ()
    form: EncodedTensor | None = None
    searches: bool = False
    draw: Draw | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors that the weight is written as, the codes or the values themselves first."""
        return self.encoded_parts or (Part(role=CODES, name=self.name, dtype=self.dtype, shape=self.shape),)

    @property
    def rows(self) -> int:
        """Rows of the matrix view that the source has."""
        cols = self.source.cols
        return math.prod(self.shape) // cols if cols else self.source.rows

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def edits_key(self) -> tuple[object, ...]:
        """The edits as values that do not depend on where the adapter lies."""
        return tuple(_edit_key(edit) for edit in self.edits)

    @property
    def keeps_bytes(self) -> bool:
        """True if the output holds the base's bytes as they are; what an adapter brings is looked at."""
        return self.kind == "copy"

    @property
    def is_encoded(self) -> bool:
        """True if values are put into an encoding: one weight, codes and scales, is then one piece of work."""
        return self.encoding is not None and not self.keeps_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPart:
    """A part of a recipe's output and the absolute offset of its first byte in the output file."""

    recipe: Recipe
    part: Part
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.part.num_bytes

    @property
    def kept(self) -> StoredTensor:
        """The tensor whose bytes are kept."""
        assert self.recipe.keeps_bytes
        source = self.recipe.source
        assert not isinstance(source, RequantisedTensor)
        return source.need(self.part.role) if isinstance(source, EncodedTensor) else source


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One output file of weights.

    `like` is the base's file if it has this header and these tensors at these places; then a part that is kept is where
    it was. `same_as` is that file if nothing of it changes.
    """

    name: str
    header: bytes
    placed: tuple[PlacedPart, ...]
    same_as: Path | None
    like: Path | None = None

    @property
    def has_encoded(self) -> bool:
        """True if a weight of the file is encoded anew: its pieces do not begin on block borders."""
        return any(placed.recipe.is_encoded for placed in self.placed)

    @property
    def num_bytes(self) -> int:
        return self.placed[-1].end if self.placed else len(self.header)


@dataclass(frozen=True, slots=True)
class Input:
    """A file that is read, and what identified its content when it was opened (see `file_identity`)."""

    path: Path
    identity: Identity = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallFile:
    """A file beside the weights: a copy of `source`, or `text` written new."""

    name: str
    source: Path | None = None
    text: str | None = None

    @property
    def num_bytes(self) -> int:
        return self.source.stat().st_size if self.source else len((self.text or "").encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file of the finished output. If another program makes it, its size is an estimate; None: unknown, but small."""

    name: str
    num_bytes: int | None
    is_estimate: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.num_bytes} | ({"estimated": True} if self.is_estimate else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What other programs make of the merged model before the output appears.

    With `keeps_merged` the model is part of the output, in `MERGED_FOLDER`. `scratch_bytes` is what the disk has to
    hold meanwhile besides the model and the files.
    """

    name: str
    types: tuple[str, ...]
    files: tuple[OutputFile, ...]
    keeps_merged: bool
    scratch_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLine:
    """What one adapter does to one tensor, for the report."""

    adapter: str
    module: str
    tensor: str
    what: str


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything a merge does: output files and their recipes, in order.

    `combination` says how the adapters act together, None if each acts as it was trained and all are added.
    `rounding_seed` is that of stochastic rounding, None if what is changed is rounded to nearest.
    `inputs` are the weight files that are read; it is checked that they are the same when the output is complete, and
    when a run is resumed. With a `store` the output goes to that URL, and `output` is only its name. `scratch` keeps
    alive what recipes read from beside them (an unpickled adapter), and nothing else. `device` is where weights are
    quantised and decomposed.
    """

    base: str
    adapters: tuple[str, ...]
    output: Path
    save_method: str
    dtype: str
    weights: tuple[WeightFile, ...]
    small: tuple[SmallFile, ...]
    modules: tuple[ModuleLine, ...]
    notes: tuple[str, ...]
    inputs: tuple[Input, ...]
    scratch: tuple[object, ...] = field(repr=False, compare=False)
    item_bytes: int
    buffer_bytes: int
    workers: int
    peak_memory_bytes: int
    free_disk_bytes: int
    export: Export | None = None
    combination: Combination | None = None
    allow_nonfinite: bool = False
    rounding_seed: int | None = None
    store: str | None = None
    device: str = CPU

    @property
    def place(self) -> str:
        """Where the output goes: a folder, or the URL of one."""
        return self.store or str(self.output)

    @property
    def recipes(self) -> Iterator[Recipe]:
        return (placed.recipe for file in self.weights for placed in file.placed if placed.part.role == CODES)

    def without(self, name: str) -> MergePlan:
        """Return the plan without the small file `name`, which is made anew."""
        return replace(self, small=tuple(file for file in self.small if file.name != name))

    @property
    def model_folder(self) -> str:
        """The folder of the merged model inside the output; "" if it is the output."""
        return MERGED_FOLDER if self.export else ""

    @cached_property
    def merged_files(self) -> tuple[OutputFile, ...]:
        """The files of the merged model."""
        return (
            *(OutputFile(name=file.name, num_bytes=file.num_bytes) for file in self.weights),
            *(OutputFile(name=file.name, num_bytes=file.num_bytes) for file in self.small),
        )

    @cached_property
    def files(self) -> tuple[OutputFile, ...]:
        """The files of the finished output, without the record."""
        if self.export is None:
            return self.merged_files
        kept = self.merged_files if self.export.keeps_merged else ()
        return *self.export.files, *(replace(file, name=f"{MERGED_FOLDER}/{file.name}") for file in kept)

    @cached_property
    def merged_bytes(self) -> int:
        """Bytes of the merged model."""
        return _total(self.merged_files)

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of the finished output, small files included."""
        return _total(self.files)

    @cached_property
    def disk_bytes(self) -> int:
        """What the disk must hold at the same time while the output is made."""
        if self.export is None:
            return self.bytes_written
        return self.merged_bytes + _total(self.export.files) + self.export.scratch_bytes

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of sources and edits, each counted once."""
        refs = {(ref.path, ref.offset): ref for recipe in self.recipes for edit in recipe.edits for ref in edit.refs}
        sources = sum(recipe.source.stored_bytes for recipe in self.recipes)
        return sources + sum(ref.num_bytes for ref in refs.values())

    @cached_property
    def recipes_by_kind(self) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        for recipe in self.recipes:
            counts[recipe.kind] = counts.get(recipe.kind, 0) + 1
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the output follows from: names, shapes, options; not the contents of the inputs.

        It is the same wherever the inputs lie: folders play no part in it.
        """
        digest = hashlib.sha256()
        for file in self.weights:
            digest.update(f"{file.name}\0".encode() + file.header)
            for placed in file.placed:
                recipe = placed.recipe
                form = recipe.form and _key(recipe.form)
                values = _key(recipe.source), recipe.edits_key, recipe.encoding, form, recipe.searches
                digest.update(repr(values).encode())
                if recipe.draw is not None:
                    digest.update(repr(recipe.draw).encode())
        for small in self.small:
            digest.update(repr((small.name, small.text)).encode())
        if self.combination is not None:
            digest.update(repr(self.combination.to_json()).encode())
        if self.device != CPU:  # its last bits are others: a run that is continued must not mix them
            digest.update(f"device {self.device}".encode())
        if self.export is not None:
            digest.update(repr((self.export.name, self.export.types, self.export.keeps_merged)).encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values: `loraweld plan --json`."""
        return {
            "base": self.base,
            "adapters": list(self.adapters),
            "combination": self.combination.to_json() if self.combination else None,
            "output": self.place,
            "save_method": self.save_method,
            "dtype": self.dtype,
            "rounding": rounding_json(self.rounding_seed),
            "device": self.device,
            "files": [file.to_json() for file in self.files],
            "recipes": dict(self.recipes_by_kind),
            "modules": [
                {"adapter": m.adapter, "module": m.module, "tensor": m.tensor, "what": m.what} for m in self.modules
            ],
            "notes": list(self.notes),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "disk_bytes": self.disk_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "fingerprint": self.fingerprint,
        }

    def __str__(self) -> str:
        return json.dumps(self.to_json(), indent=2)


def rounding_json(seed: int | None) -> dict[str, Any] | None:
    """Return what records and reports say of a rounding that is not to nearest, None of one that is."""
    return None if seed is None else {"method": STOCHASTIC, "seed": seed}


def _total(files: Iterable[OutputFile]) -> int:
    return sum(file.num_bytes or 0 for file in files)
