"""A model in memory as .gguf files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

import loraweld
from gguf_models import arguments_of, gguf_tensors, needs_converter, needs_smollm, save_smollm, source_tensor
from hub_client import point_at
from hub_server import hub_server
from live_models import live_llama
from test_live_parameters import names, tokenizer


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PeftModel]:
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield live_llama(tmp_path / "base")


def test_one_file_for_each_type(live: PeftModel, converter: Path) -> None:
    """By types and by their other names, through both methods; the converter gets the merged model."""
    live.save_pretrained_gguf("model", tokenizer(), quantization_method=["bf16", "q8_0"])
    assert {"model-BF16.gguf", "model-Q8_0.gguf", "Modelfile", "loraweld.json"} <= set(names("model"))
    assert "q8_0" in arguments_of(Path("model/model-Q8_0.gguf"))
    live.save_pretrained_gguf("fast", tokenizer(), quantization_method="fast_quantized")
    assert "fast-Q8_0.gguf" in names("fast")
    live.save_pretrained_gguf("same", tokenizer(), quantization_method="not_quantized")
    assert "same-BF16.gguf" in names("same")
    live.save_pretrained_merged("merged", tokenizer(), save_method="gguf")
    assert "merged-Q8_0.gguf" in names("merged")


def test_to_the_hub(live: PeftModel, converter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and a card, in one commit."""
    with hub_server() as hub, point_at(hub, monkeypatch):
        live.push_to_hub_gguf("me/model", tokenizer(), "q8_0", token="hf_writer", tags=["a"])
        live.save_pretrained_gguf("me/other", tokenizer(), "q8_0", push_to_hub=True, token="hf_writer")
        for name in ("model", "other"):
            found = hub.content(f"me/{name}")
            assert {f"{name}-Q8_0.gguf", "Modelfile", "README.md"} <= found.keys()
    assert names() == []


@pytest.mark.parametrize("method", ["q9_z", 5, [], None])
def test_unknown_types_are_rejected(live: PeftModel, converter: Path, method: object) -> None:
    """By name, before anything is written."""
    with pytest.raises(loraweld.RequestError, match=r"q9_z|quantization_method is"):
        live.save_pretrained_gguf("model", tokenizer(), quantization_method=method)
    assert names() == []


def test_a_type_whose_tool_is_missing_is_rejected(live: PeftModel, converter: Path) -> None:
    with pytest.raises(loraweld.LoraweldError, match="llama"):
        live.save_pretrained_gguf("model", tokenizer(), quantization_method="q4_k_m")
    assert names() == []


@pytest.mark.slow
@needs_converter
@needs_smollm
def test_a_real_model_with_the_real_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 loaded in 4 bit, with an adapter, to a file and to the Hub: its tensors are those of the merged model."""
    monkeypatch.chdir(tmp_path)
    save_smollm(tmp_path / "smollm2")
    model, words = loraweld.FastLanguageModel.from_pretrained("smollm2", load_in_4bit=True)
    model = loraweld.FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)
    model.save_pretrained_gguf("file", words, quantization_method="bf16")
    model.save_pretrained_merged("merged", words)
    merged = load_file("merged/model.safetensors")
    plain = 0
    for name, kind, _, values in gguf_tensors(Path("file/file-BF16.gguf")):
        if kind == "BF16" and "attn_q" not in name and "attn_k" not in name:  # the converter reorders these for RoPE
            assert values.tobytes() == source_tensor(merged, name).bfloat16().view(torch.uint8).numpy().tobytes(), name
            plain += 1
    assert plain > 100
    with hub_server() as hub, point_at(hub, monkeypatch):
        model.push_to_hub_gguf("me/model", words, quantization_method="bf16", token="hf_writer")
        pushed = hub.content("me/model")["model-BF16.gguf"]
    assert len(pushed) == Path("file/file-BF16.gguf").stat().st_size


@needs_converter
@pytest.mark.filterwarnings("ignore:tokenizer is None")
def test_what_the_converter_cannot_read_is_passed_on(live: PeftModel) -> None:
    """Without a tokenizer there is no .gguf file."""
    with pytest.raises(loraweld.LoraweldError, match="tokenizer"):
        live.save_pretrained_gguf("model", quantization_method="q8_0")
    assert names() == []
