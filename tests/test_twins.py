"""A tied parameter that a base stores under both of its names: the two stay one, or come apart and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loraweld
from handmade import save_adapter, save_base

VOCABULARY, WIDTH = 24, 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def save_twins(folder: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator).bfloat16()
    tensors = {
        HEAD: table.clone(),
        EMBEDDING: table.clone(),
        f"{Q_PROJ}.weight": torch.randn(WIDTH, WIDTH, generator=generator).bfloat16(),
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY}
    save_base(folder, tensors, {**config, "tie_word_embeddings": True})
    return tensors


def merged(place: Path, tensors: dict[str, Tensor], **config: Any) -> tuple[dict[str, Tensor], bool]:
    """Return the merged tensors and the flag of the config."""
    adapter = save_adapter(place / "adapter", tensors, **config)
    loraweld.merge(adapter, output=place / "merged", base=place / "base")
    flag = json.loads((place / "merged" / "config.json").read_text())["tie_word_embeddings"]
    return load_file(place / "merged" / "model.safetensors"), flag


def factors(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(2, cols, generator=generator), torch.randn(rows, 2, generator=generator)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    return save_twins(tmp_path / "base")


def test_both_names_stay_where_neither_changes(tmp_path: Path, base: dict[str, Tensor]) -> None:
    """The layout is the base's: same header, same bytes of the two."""
    a, b = factors(WIDTH, WIDTH)
    result, flag = merged(tmp_path, {f"{Q_PROJ}.lora_A.weight": a, f"{Q_PROJ}.lora_B.weight": b}, r=2)
    assert list(result) == list(load_file(tmp_path / "base" / "model.safetensors"))
    assert flag and torch.equal(result[HEAD], base[HEAD]) and torch.equal(result[EMBEDDING], base[EMBEDDING])


def test_trained_token_rows_reach_both_names(tmp_path: Path, base: dict[str, Tensor]) -> None:
    """PEFT saves once what it trains on both sides of a tie."""
    rows = torch.randn(2, WIDTH)
    key = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    result, flag = merged(tmp_path, {key: rows}, trainable_token_indices=[3, 7], target_modules=None)
    expected = base[EMBEDDING].clone()
    expected[[3, 7]] = rows.bfloat16()
    assert flag and torch.equal(result[EMBEDDING], expected) and torch.equal(result[HEAD], expected)


def test_a_lora_on_one_side_takes_the_two_apart(tmp_path: Path, base: dict[str, Tensor]) -> None:
    """The head of the forward pass is the base's: the flag must not tie it to the changed table."""
    a, b = factors(WIDTH, VOCABULARY)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    result, flag = merged(tmp_path, tensors, target_modules=["embed_tokens"], r=2)
    assert not flag and torch.equal(result[HEAD], base[HEAD]) and not torch.equal(result[EMBEDDING], base[HEAD])


@pytest.mark.parametrize("family", ["distilbert", "electra"])
def test_masked_heads_with_names_of_their_own(family: str, tmp_path: Path) -> None:
    """DistilBERT's vocab_projector and ELECTRA's generator_lm_head share the embedding; a LoRA parts them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForMaskedLM

    sizes: dict[str, dict[str, int]] = {
        "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2},
        "electra": {"hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    }
    config = AutoConfig.for_model(family, vocab_size=50, **sizes[family])
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["word_embeddings"], init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "merged", base=tmp_path / "base", dtype="float32")
    again, found = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.allclose(again.eval()(tokens).logits, tuned(tokens).logits, atol=1e-5, rtol=0)
