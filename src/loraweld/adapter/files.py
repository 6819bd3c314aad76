"""An adapter folder: its config, its tensors grouped by module, its companion files."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from loraweld.adapter.config import CONFIG_NAME, AdapterConfig, read_adapter_config
from loraweld.adapter.keys import parse_key
from loraweld.adapter.tuners import Tuner
from loraweld.adapter.values import same_values
from loraweld.checkpoint.mounted import exists, mounted, open_stored
from loraweld.checkpoint.opening import check_stays_inside
from loraweld.checkpoint.origins import origin_of, stand_for
from loraweld.checkpoint.stored import Identity, SafetensorsFile, StoredTensor, file_identity, read_safetensors
from loraweld.errors import AdapterError, CheckpointError, listing

SAFE_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_NOT_PEFT = {
    "adapters.safetensors": "an MLX adapter",
    "lora.safetensors": "not in PEFT's format",
    "adapter.safetensors": "not in PEFT's format",
    "pytorch_lora_weights.safetensors": "a diffusers LoRA",
}


class Scratch:
    """A temporary folder that lives as long as this object."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="loraweld-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter: `modules` maps module path → part → tensor; `parameters` maps parameter name → tensor.

    `shared` maps the names of tensors that all modules use (projections, vector banks) to them.
    `weights` is the file as found, `safetensors` its form that is read. `untrained` are the tensors that play
    no part in the result (see `keys`). `weight` is the factor of what it changes. `identity` is that of `weights`.
    `scratch` and `place` keep alive the folders for the time being that `safetensors` and `folder` are in, if they are.
    """

    folder: Path
    weights: Path
    safetensors: Path
    config: AdapterConfig
    modules: Mapping[str, Mapping[str, StoredTensor]]
    parameters: Mapping[str, StoredTensor]
    untrained: tuple[StoredTensor, ...]
    scratch: Scratch | None = field(repr=False, compare=False)
    place: object = field(default=None, repr=False, compare=False)
    shared: Mapping[str, StoredTensor] = field(default_factory=dict)
    name: str | None = None
    weight: float = 1.0
    identity: Identity = field(default=(), compare=False)

    @property
    def label(self) -> str:
        """The name by which reports call the adapter: its own on the Hub, else the folder's."""
        return self.name or self.folder.name or str(self.folder)

    @property
    def keys(self) -> list[str]:
        """The names of all tensors that a merge has to use, each once."""
        parts = [tensor for module in self.modules.values() for tensor in module.values()]
        return [tensor.name for tensor in (*parts, *self.parameters.values(), *self.shared.values())]


def open_adapter(folder: Path, *, label: str | None = None, place: object = None) -> Adapter:
    """Open the PEFT adapter in `folder`, or in its only subfolder that holds one; `label` is its name on the Hub.

    `place` keeps the folder alive, if it is one for the time being.

    Raises:
        AdapterError: no adapter there, not PEFT's format, damaged, or of a kind that cannot be merged.
    """
    folder = _locate(folder)
    config = read_adapter_config(folder)
    weights, file, scratch, identity = _open_weights(folder)
    grouped = _group(file, config.tuner)
    if not (grouped.modules or grouped.parameters or grouped.shared):
        raise AdapterError("holds no tensors; was the adapter saved?", path=weights)
    return Adapter(
        folder=folder,
        weights=weights,
        safetensors=file.path,
        config=config,
        modules=grouped.modules,
        parameters=grouped.parameters,
        untrained=tuple(grouped.untrained),
        scratch=scratch,
        place=place,
        shared=grouped.shared,
        name=label,
        identity=identity,
    )


def in_file(adapter: Adapter) -> Adapter:
    """Return the adapter with its weights in a file of this machine: copied to a folder of its own if they are in none.

    Raises:
        CheckpointError: they cannot be read.
    """
    origin = origin_of(adapter.safetensors)
    if origin is None or mounted(adapter.safetensors) is None:
        return adapter
    scratch = Scratch()
    copy = scratch.folder / SAFE_NAME
    with open_stored(adapter.safetensors) as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)
    stand_for(scratch, copy, origin)
    return replace(adapter, safetensors=copy, scratch=scratch)


def _locate(folder: Path) -> Path:
    if not folder.is_dir():
        raise AdapterError(f"is not a folder; expected a PEFT adapter ({CONFIG_NAME} and weights)", path=folder)
    if (folder / CONFIG_NAME).exists():
        return folder
    nested = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if len(nested) == 1:
        try:
            check_stays_inside(nested[0], folder)
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        return nested[0]
    if nested:
        names = listing(str(path) for path in nested)
        raise AdapterError(f"holds several adapters; name the one to merge:\n{names}", path=folder)
    for name, what in _NOT_PEFT.items():
        if (folder / name).exists():
            raise AdapterError(f"has {name} but no {CONFIG_NAME}: it is {what}; convert it to PEFT", path=folder)
    raise AdapterError(f"has no {CONFIG_NAME}; is it a PEFT adapter?", path=folder)


def _open_weights(folder: Path) -> tuple[Path, SafetensorsFile, Scratch | None, Identity]:
    if exists(folder / SAFE_NAME):
        file = _read(folder / SAFE_NAME)
        return file.path, file, None, file.identity
    if (folder / PICKLE_NAME).exists():
        weights = folder / PICKLE_NAME
        scratch, identity = Scratch(), file_identity(weights)
        return weights, _read(_unpickle(weights, scratch.folder)), scratch, identity
    raise AdapterError(f"has neither {SAFE_NAME} nor {PICKLE_NAME}", path=folder)


def _read(path: Path) -> SafetensorsFile:
    try:
        return read_safetensors(path)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None


def _unpickle(path: Path, scratch: Path) -> Path:
    """Rewrite a pickled adapter as safetensors in `scratch`; only tensors are ever unpickled."""
    from loraweld.adapter.pickled import convert_pickle  # torch is imported only when it is needed

    return convert_pickle(path, scratch / SAFE_NAME)


@dataclass(slots=True)
class _Grouped:
    modules: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    parameters: dict[str, StoredTensor] = field(default_factory=dict)
    shared: dict[str, StoredTensor] = field(default_factory=dict)
    untrained: list[StoredTensor] = field(default_factory=list)


def _group(file: SafetensorsFile, tuner: Tuner) -> _Grouped:
    grouped = _Grouped()
    for tensor in file.tensors:
        key = parse_key(tensor.name, tuner)
        if key.part == "untrained":
            grouped.untrained.append(tensor)
        elif key.part == "shared":
            _file_once(grouped.shared, key.module, tensor)
        elif key.part == "parameter":
            _file_once(grouped.parameters, key.module, tensor)
        else:
            _file_once(grouped.modules.setdefault(key.module, {}), key.part, tensor)
    return grouped


def _file_once(place: dict[str, StoredTensor], part: str, tensor: StoredTensor) -> None:
    """Keep `tensor`; a second spelling of the same part must hold the same values."""
    if part in place and not same_values(place[part], tensor):
        raise AdapterError(f"{tensor.name!r} and {place[part].name!r} both claim {part!r} and differ")
    place.setdefault(part, tensor)
