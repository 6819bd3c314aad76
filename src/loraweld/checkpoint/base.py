"""A base model on disk, from its headers, index and config alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from loraweld.checkpoint.encodings.encoded import EncodedTensor, Source
from loraweld.checkpoint.encodings.recognise import recognise
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.checkpoint.mounted import exists, mounted_in
from loraweld.checkpoint.stored import PickledFile, SafetensorsFile, StoredFile, StoredTensor, read_safetensors
from loraweld.dtypes import is_plain_float
from loraweld.errors import CheckpointError, listing, shortened

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"
CONFIG_NAME = "config.json"
MAX_FILE_NAME = 255
_WEIGHT_ENDINGS = (".safetensors", ".bin")
_NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f\\:\ud800-\udfff]")
_CONFIG_TYPES: dict[str, type] = {
    "model_type": str,
    "architectures": list,
    "text_config": dict,
    "quantization_config": dict,
    "id2label": dict,
    "vocab_size": int,
    "num_hidden_layers": int,
    "tie_word_embeddings": bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model: its weight files in order, its tensors by name, its config.

    `tensors` are the weights that a model has, a quantised one grouped with its scales; `stored` are the tensors of
    the files; `aside` those of them that only a quantised runtime knows. `label` is what the user called it (a Hub
    id or a path); `commit` the Hub's commit, if it came from there. `scratch` keeps alive what they are read from.
    `origins`: where layers were replicated, the name in the files of each tensor that has another one here.
    """

    folder: Path
    label: str
    commit: str | None
    files: tuple[StoredFile, ...]
    index: Mapping[str, Any] | None
    config: Mapping[str, Any]
    tensors: Mapping[str, Source] = field(repr=False)
    stored: Mapping[str, StoredTensor] = field(repr=False)
    aside: tuple[str, ...]
    origins: Mapping[str, str] = field(default_factory=dict, repr=False)
    scratch: object = field(default=None, repr=False, compare=False)

    @property
    def model_type(self) -> str:
        """The config's model_type, or "" when there is none."""
        return str(self.config.get("model_type") or "")

    @property
    def is_quantised(self) -> bool:
        """Whether any weight is stored in an encoding."""
        return any(isinstance(tensor, EncodedTensor) for tensor in self.tensors.values())

    @property
    def has_layout(self) -> bool:
        """Whether the weights lie in safetensors files, whose layout an output can keep."""
        return not self.origins and all(isinstance(file, SafetensorsFile) for file in self.files)

    @property
    def is_pickled(self) -> bool:
        """Whether the weights lie in files of torch.save."""
        return any(isinstance(file, PickledFile) for file in self.files)

    @property
    def main_dtype(self) -> str:
        """The code of the float dtype that holds most of the bytes."""
        totals = Counter[str]()
        for tensor in self.tensors.values():
            totals[tensor.dtype] += tensor.num_bytes
        floats = [code for code in totals if is_plain_float(code)]
        return max(floats, key=lambda code: totals[code], default="F32")


def open_base(folder: Path, *, label: str | None = None, commit: str | None = None, scratch: object = None) -> Base:
    """Open the model in `folder`: its weights (an index decides which, if there is one) and config.json.

    Weights are `*.safetensors`, and pytorch_model.bin only where transformers finds no others.

    Raises:
        CheckpointError: no weights, a damaged file, an index that names a missing file or tensor or leaves
            the folder, a tensor stored twice, or a quantisation that is not read.
    """
    if not folder.is_dir():
        raise CheckpointError("is not a folder; --base takes a model folder or a Hub id", path=folder)
    config_path = folder / CONFIG_NAME
    config = read_json_object(config_path) if config_path.exists() else {}
    _check_config(config, config_path)
    index_path = _index_path(folder)
    is_whole = exists(folder / SINGLE_NAME)  # then transformers does not look at an index either
    index = read_json_object(index_path) if index_path.exists() and not is_whole else None
    names = _indexed_files(index, index_path) if index is not None else _weight_files(folder)
    files = _read_files(folder, names)
    stored = _by_name(files)
    if index is not None:
        _check_index(index["weight_map"], stored, index_path)
    try:
        weights = recognise(stored, config)
    except CheckpointError as error:
        raise error if error.path else CheckpointError(str(error), path=folder) from None
    return Base(
        folder=folder,
        label=label or str(folder),
        commit=commit,
        files=files,
        index=index,
        config=config,
        tensors=weights.tensors,
        stored=stored,
        aside=weights.aside,
        scratch=scratch,
    )


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """The keys that merging reads must be of the types that transformers writes; null means absent."""
    for key, kind in _CONFIG_TYPES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{key} is {shortened(value)}, expected a JSON {kind.__name__}", path=path)


def holds_pickles(folder: Path) -> bool:
    """Return whether transformers takes the weights in `folder` from pytorch_model.bin or its shards."""
    if any(exists(folder / name) for name in (SINGLE_NAME, INDEX_NAME)):
        return False
    return any((folder / name).exists() for name in (PICKLE_NAME, PICKLE_INDEX_NAME))


def _index_path(folder: Path) -> Path:
    """Where the index would be; beside a whole pytorch_model.bin transformers does not look at one."""
    is_sharded_pickle = holds_pickles(folder) and not (folder / PICKLE_NAME).exists()
    return folder / (PICKLE_INDEX_NAME if is_sharded_pickle else INDEX_NAME)


def _read_files(folder: Path, names: Sequence[str]) -> tuple[StoredFile, ...]:
    if not holds_pickles(folder):
        return tuple(read_safetensors(folder / name) for name in names)
    from loraweld.checkpoint.pickled import read_pickled  # torch is imported only when it is needed

    return tuple(read_pickled(folder / name) for name in names)


def _weight_files(folder: Path) -> list[str]:
    """File names as transformers finds them without an index; without its names, all safetensors there are."""
    if holds_pickles(folder):
        return [PICKLE_NAME]
    if exists(folder / SINGLE_NAME):
        return [SINGLE_NAME]
    paths = {*folder.glob("*.safetensors"), *mounted_in(folder)}
    names = sorted(path.name for path in paths)
    if not names:
        raise CheckpointError(
            f"holds neither *.safetensors nor {PICKLE_NAME} or {PICKLE_INDEX_NAME}; it has\n{_what_is_there(folder)}",
            path=folder,
        )
    if "adapter_model.safetensors" in names:
        raise CheckpointError("is an adapter, not a base model; give its base with --base", path=folder)
    return names


def _what_is_there(folder: Path) -> str:
    return listing((path.name for path in folder.iterdir()), limit=8) or "  nothing"


def _indexed_files(index: Mapping[str, Any], path: Path) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map; is it the index of a sharded model?", path=path)
    if not isinstance(index.get("metadata") or {}, dict):
        raise CheckpointError("has metadata that is not a JSON object", path=path)
    names = sorted({name if isinstance(name, str) else repr(name) for name in weight_map.values()})
    for name in names:
        if not _is_plain_name(name):
            raise CheckpointError(
                f"weight_map names the file {shortened(name)}; weights lie beside their index, as plain names that "
                f"end in {' or '.join(_WEIGHT_ENDINGS)}",
                path=path,
            )
        if not exists(path.parent / name):
            raise CheckpointError(
                f"weight_map names {shortened(name)}, which is missing; is the download complete?", path=path
            )
    return names


def _is_plain_name(name: str) -> bool:
    """A file name alone: no folder, nothing that leads out of the model's own or that has another file's name."""
    is_name = PurePosixPath(name).name == name and name.endswith(_WEIGHT_ENDINGS)
    return is_name and len(name.encode(errors="replace")) <= MAX_FILE_NAME and not _NOT_IN_NAMES.search(name)


def _by_name(files: Iterable[StoredFile]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in found:
                other = found[tensor.name].path.name
                raise CheckpointError(
                    f"tensor {tensor.name!r} is also in {other}; which one counts is not said", path=file.path
                )
            found[tensor.name] = tensor
    return found


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor], path: Path) -> None:
    wrong = [
        f"{name}: {file}" for name, file in weight_map.items() if name not in tensors or tensors[name].path.name != file
    ]
    if wrong:
        raise CheckpointError(f"names tensors that are not in the file it says:\n{listing(wrong)}", path=path)
