"""torch's own attention module, which keeps queries, keys and values in one parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import loraweld
from models import randomise_


def tower() -> tf.SiglipVisionModel:
    """A vision model that pools with `nn.MultiheadAttention`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**sizes, image_size=16, patch_size=4))


def pooled(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))).pooler_output


@pytest.mark.parametrize("more", [[], ["mlp.fc1"]])
def test_merged_it_answers_as_the_unmerged_model(more: list[str], tmp_path: Path) -> None:
    """PEFT adds the delta of the output projection twice, in its forward pass too: that is what was trained."""
    torch.manual_seed(0)
    model = tower().eval()
    randomise_(model)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["head.attention", *more])
    peft = get_peft_model(tf.SiglipVisionModel.from_pretrained(tmp_path / "base"), config).eval()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    peft.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any("attention.base_layer.out_proj.lora_A" in name for name in names)
    again = PeftModel.from_pretrained(tf.SiglipVisionModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected = pooled(again.eval())
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base", dtype="float32")
    merged = tf.SiglipVisionModel.from_pretrained(tmp_path / "out").eval()
    plain = tf.SiglipVisionModel.from_pretrained(tmp_path / "base").eval()
    assert (pooled(plain) - expected).abs().max() > 1e-2
    assert (pooled(merged) - expected).abs().max() <= 1e-5


def nomic() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.NomicBertModel(tf.NomicBertConfig(**sizes, vocab_size=96))


def gated_dinov2() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    return tf.Dinov2Model(tf.Dinov2Config(**sizes, use_swiglu_ffn=True))


def last_hidden(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    is_text = "embeddings.word_embeddings.weight" in model.state_dict() or any(
        name.endswith("word_embeddings.weight") for name in model.state_dict()
    )
    inputs = (
        {"input_ids": torch.randint(3, 96, (2, 9), generator=generator)}
        if is_text
        else {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    )
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "lora-bias"])
@pytest.mark.parametrize(
    ("build", "targets", "fused"),
    [
        (nomic, ["q_proj", "k_proj"], "Wqkv"),
        (nomic, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], "Wqkv"),
        (gated_dinov2, ["gate_proj", "up_proj"], "weights_in"),
        (gated_dinov2, ["up_proj"], "weights_in"),
    ],
)
def test_projections_that_are_one_tensor_on_disk(
    build: Callable[[], tf.PreTrainedModel],
    targets: list[str],
    fused: str,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Each changes its own rows."""
    torch.manual_seed(0)
    model = build().eval()
    randomise_(model)
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert any(fused in name for name in stored)
    if "lora_bias" in options and not any(fused in name and name.endswith("bias") for name in stored):
        return  # PEFT has nothing to add a bias to
    base = tf.AutoModel.from_pretrained(tmp_path / "base").eval()
    plain = last_hidden(base)
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)).eval()
    for name, parameter in peft.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    peft.save_pretrained(tmp_path / "adapter")
    expected = last_hidden(peft)
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base", dtype="float32")
    merged, info = tf.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not {kind: keys for kind, keys in info.items() if keys}
    assert (plain - expected).abs().max() > 1e-2
    assert (last_hidden(merged.eval()) - expected).abs().max() <= 1e-5
