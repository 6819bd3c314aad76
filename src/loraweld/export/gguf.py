"""A merged model folder as GGUF files, for llama.cpp and what is built on it, with a Modelfile for Ollama.

    output/NAME-Q8_0.gguf     written by llama.cpp's converter, for K- and IQ-types then by its quantiser
    output/Modelfile          FROM that file, the chat format where it can be proven, the stop tokens

Both tools run as processes of their own, in a hidden folder inside the output; finished files are renamed into place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.jsonfile import read_json_if_there
from loraweld.errors import CheckpointError, OutputError, RequestError, listing
from loraweld.export.modelfile import modelfile
from loraweld.export.tools import Maker, check_tools
from loraweld.gguf_types import known_types, parse_quantization, stored_type
from loraweld.planning.gguf_output import gguf_names, gguf_notes, has_own_code
from loraweld.sinks import system

_STAGING = ".loraweld-gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport:
    """What an export wrote, in the order of the types; `notes` are what a user should know about the files."""

    files: tuple[Path, ...]
    modelfiles: tuple[Path, ...]
    notes: tuple[str, ...]


def convert_folder(
    model: Path,
    output: Path,
    *,
    quantization: str | Sequence[str] = "fast_quantized",
    name: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> GgufExport:
    """Write the model folder `model` as one .gguf file per type, and their Modelfiles, into the folder `output`.

    Args:
        model: a Hugging Face folder with unquantised safetensors and a tokenizer; left unchanged.
        output: made if it is missing; the files appear in it complete or not at all.
        quantization: types or aliases, see `parse_quantization`.
        name: the model's name in the files and their names; None: that of the folder.
        overwrite: whether files of the same names are replaced.
        trust_remote_code: whether the converter may run a tokenizer's own code, as it does if there is any.

    Returns:
        The files. The first type's Modelfile is called Modelfile, a further one Modelfile-TYPE.

    Raises:
        RequestError: an unknown type, a missing tool, or a tokenizer that brings its own code.
        CheckpointError: the folder cannot be read or is quantised.
        OutputError: a file exists, or the place is locked or not writable.
        LoraweldError: a tool failed (says what it said), or a weight does not exist in f16.
    """
    wanted = parse_quantization(quantization)
    check_tools(wanted)
    base = _open(model, trust_remote_code)
    types = known_types(wanted, stored_type(base.main_dtype))
    label = name or model.resolve().name
    names = gguf_names(label, types)
    paths = [output / name for name, _ in names], [output / name for _, name in names]
    _refuse_existing([*paths[0], *paths[1]], overwrite)
    with _staging(output) as staging:
        files = make_files(model, staging, name=label, types=types, dtype=base.main_dtype, about=model)
        publish_files(files, output.absolute())
    notes = gguf_notes(base.config, types, stored_type(base.main_dtype))
    return GgufExport(files=tuple(paths[0]), modelfiles=tuple(paths[1]), notes=tuple(notes))


def make_files(model: Path, work: Path, *, name: str, types: Sequence[str], dtype: str, about: Path) -> dict[str, Path]:
    """Make the .gguf file and the Modelfile of each type in the empty folder `work`; return them by the names to give.

    Args:
        model: the folder of a model that is known to be fit for the converter.
        work: may hold other files besides them afterwards.
        name: the model's name.
        types: known types, no `not_quantized`.
        dtype: the code of the weights in the folder.
        about: the folder that errors name.

    Raises:
        LoraweldError: a tool failed (says what it said), or a weight does not exist in f16.
    """
    maker = Maker(model=model.absolute(), name=name, stored=stored_type(dtype), folder=work, about=about)
    names = gguf_names(name, types)
    modelfiles = {}
    for gguf, named in names:
        modelfiles[named] = work / named
        modelfiles[named].write_text(modelfile(model, gguf), encoding="utf-8")
    files = {gguf: maker.make(item) for item, (gguf, _) in zip(types, names, strict=True)}
    return {**files, **modelfiles}


def publish_files(files: Mapping[str, Path], folder: Path) -> None:
    """Rename finished files into `folder`, durably and in order: the Modelfiles last, which name the others."""
    for path in files.values():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for name, path in files.items():
        path.replace(folder / name)
    system.sync_folder(folder)


def _open(model: Path, trust_remote_code: bool) -> Base:
    base = open_base(model)
    if base.is_quantised:
        raise CheckpointError("is quantised; a GGUF file is made from 16- or 32-bit weights", path=model)
    if not base.config:
        raise CheckpointError("has no config.json; expected the folder of a merged model", path=model)
    if not trust_remote_code and has_own_code(base.config, read_json_if_there(model / "tokenizer_config.json")):
        raise RequestError(
            f"{model}: the tokenizer brings its own Python code, which the converter would run; "
            "set trust_remote_code if you trust the model's authors"
        )
    return base


def _refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    taken = [path.name for path in paths if path.exists()]
    if taken and not overwrite:
        raise OutputError(
            f"holds files of these names; overwrite them or choose another output:\n{listing(taken)}",
            path=paths[0].parent,
        )


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """Yield an empty folder inside `output`, ours alone; afterwards it is gone, and `output` too if it is empty."""
    staging = output.absolute() / _STAGING
    is_new = not output.exists()
    try:
        with system.file_lock(staging / "lock") as locked:
            if not locked:
                raise OutputError("another export into this folder is running", path=output)
            work = staging / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=output) from None
    finally:
        if is_new:
            with suppress(OSError):
                output.rmdir()
