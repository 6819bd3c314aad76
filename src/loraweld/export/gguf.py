"""A merged model folder as GGUF files, for llama.cpp and what is built on it, with a Modelfile for Ollama.

    output/NAME-Q8_0.gguf     written by llama.cpp's converter, for K- and IQ-types then by its quantiser
    output/Modelfile          FROM that file, the chat format where it can be proven, the stop tokens

Both tools run as processes of their own, in a hidden folder inside the output; finished files are renamed into place.
"""

from __future__ import annotations

import os
import re
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
from loraweld.gguf_types import NOT_QUANTIZED, parse_quantization
from loraweld.sinks import system

_TYPE_OF_DTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
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
    stored = _TYPE_OF_DTYPE.get(base.main_dtype, "f32")
    types = tuple(dict.fromkeys(stored if item == NOT_QUANTIZED else item for item in wanted))
    label = name or model.resolve().name
    paths = [output / f"{_file_stem(label)}-{item.upper()}.gguf" for item in types]
    modelfiles = [output / ("Modelfile" if i == 0 else f"Modelfile-{item.upper()}") for i, item in enumerate(types)]
    _refuse_existing([*paths, *modelfiles], overwrite)
    with _staging(output) as staging:
        maker = Maker(model=model.absolute(), name=label, stored=stored, folder=staging)
        texts = [modelfile(model, path.name) for path in paths]
        made = [maker.make(item) for item in types]
        for path, text in zip(modelfiles, texts, strict=True):
            (staging / path.name).write_text(text, encoding="utf-8")
        _publish([*made, *(staging / path.name for path in modelfiles)], [*paths, *modelfiles])
    return GgufExport(files=tuple(paths), modelfiles=tuple(modelfiles), notes=tuple(_notes(base, types, stored)))


def _open(model: Path, trust_remote_code: bool) -> Base:
    base = open_base(model)
    if base.is_quantised:
        raise CheckpointError("is quantised; a GGUF file is made from 16- or 32-bit weights", path=model)
    if not base.config:
        raise CheckpointError("has no config.json; expected the folder of a merged model", path=model)
    if not trust_remote_code:
        for name in ("config.json", "tokenizer_config.json"):
            own_code = read_json_if_there(model / name).get("auto_map")
            if isinstance(own_code, Mapping) and "AutoTokenizer" in own_code:
                raise RequestError(
                    f"{model / name}: the tokenizer brings its own Python code, which the converter would run; "
                    "set trust_remote_code if you trust the model's authors"
                )
    return base


def _notes(base: Base, types: Sequence[str], stored: str) -> Iterator[str]:
    if "f16" in types and stored != "f16":
        yield f"f16 rounds weights that are stored as {base.main_dtype}; {stored} keeps them"
    if {"vision_config", "audio_config"} & set(base.config):
        yield (
            "the .gguf holds the language model; llama.cpp keeps image and audio encoders in a second file (mmproj), "
            "which is not made"
        )


def _file_stem(name: str) -> str:
    """A name without what a shell, a Modelfile or a file system could take for something else."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"


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
        with system.exclusive_lock(staging / "lock") as locked:
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


def _publish(made: Sequence[Path], targets: Sequence[Path]) -> None:
    """Rename finished files into place, durably; the Modelfiles last, which name the others."""
    for path in made:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for path, target in zip(made, targets, strict=True):
        path.replace(target)
    system.sync_folder(targets[0].absolute().parent)
