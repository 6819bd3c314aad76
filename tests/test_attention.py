"""torch's own attention module, which keeps queries, keys and values in one parameter."""

from __future__ import annotations

from pathlib import Path

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
