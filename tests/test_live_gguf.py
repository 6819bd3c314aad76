"""A model in memory as .gguf files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers as tf
from peft import PeftModel

import loraweld
from gguf_models import arguments_of, needs_converter
from hub_server import hub_server
from live_models import live_llama
from test_live_hub import point_at
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
            found = hub.repositories[f"me/{name}"].branches["main"]
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


@needs_converter
@pytest.mark.filterwarnings("ignore:tokenizer is None")
def test_what_the_converter_cannot_read_is_passed_on(live: PeftModel) -> None:
    """Without a tokenizer there is no .gguf file."""
    with pytest.raises(loraweld.LoraweldError, match="tokenizer"):
        live.save_pretrained_gguf("model", quantization_method="q8_0")
    assert names() == []
