"""LoRA on mixtures of experts: fused in memory, fused or one by one on disk, in either orientation."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraweld
from models import GATED, HIDDEN, logits, randomise_, token_ids

MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Build = Callable[[], tf.PreTrainedModel]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()


def qwen3_moe() -> tf.PreTrainedModel:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GATED, **MOE, mlp_only_layers=[], head_dim=8))


def qwen2_moe() -> tf.PreTrainedModel:
    shared = {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**GATED, **MOE, **shared))


def mixtral() -> tf.PreTrainedModel:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2))


def deepseek_v3() -> tf.PreTrainedModel:
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    lora = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    options = {**GATED, "num_key_value_heads": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**options, **sizes, **lora))


def gpt_oss() -> tf.PreTrainedModel:
    options = {**GATED, "intermediate_size": 40, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**options, layer_types=["full_attention"] * 2))


def square_gpt_oss() -> tf.PreTrainedModel:
    options = {**GATED, "intermediate_size": HIDDEN, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**options, layer_types=["full_attention"] * 2))


def llama4() -> tf.PreTrainedModel:
    options = {**GATED, "intermediate_size": 24, "intermediate_size_mlp": 40, "head_dim": 8, "num_local_experts": 4}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**options, num_experts_per_tok=1))


def granitemoe() -> tf.PreTrainedModel:
    return tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**GATED, num_local_experts=4, num_experts_per_tok=2))


def qwen3_vl_moe() -> tf.PreTrainedModel:
    text = {
        **GATED,
        **MOE,
        "head_dim": 8,
        "mlp_only_layers": [],
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": HIDDEN}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision))


LLAMA4 = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
GRANITE = ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]
MODELS: dict[str, tuple[Build, list[str]]] = {
    "qwen3_moe": (qwen3_moe, BOTH),
    "qwen2_moe": (qwen2_moe, BOTH),
    "mixtral": (mixtral, BOTH),
    "deepseek_v3": (deepseek_v3, BOTH),
    "gpt_oss": (gpt_oss, BOTH),
    "square_gpt_oss": (square_gpt_oss, BOTH),
    "llama4": (llama4, LLAMA4),
    "granitemoe": (granitemoe, GRANITE),
    "qwen3_vl_moe": (qwen3_vl_moe, BOTH),
}


def write_base(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(zlib.crc32(name.encode()))
    model = MODELS[name][0]().eval()
    randomise_(model)
    for parameter in model.parameters():  # three-dimensional: of experts
        if parameter.ndim == 3:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def auto_of(name: str) -> Any:
    return tf.AutoModelForImageTextToText if name == "qwen3_vl_moe" else tf.AutoModelForCausalLM


def trained(name: str, base: Path, folder: Path, **options: Any) -> PeftModel:
    """Return base + a random adapter, which is saved to `folder`."""
    model = auto_of(name).from_pretrained(base).eval()
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options})).eval()
    torch.manual_seed(5)
    for key, parameter in peft.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    peft.save_pretrained(folder)
    return peft


def inputs() -> dict[str, Tensor]:
    return {"input_ids": token_ids(96)}


def check(name: str, peft: PeftModel, base: Path, adapter: Path, out: Path, **options: Any) -> None:
    """Merged and reloaded, the model answers as the unmerged one."""
    expected = logits(peft, inputs())
    with peft.disable_adapter():
        assert (expected - logits(peft, inputs())).abs().max() > 1e-2, "the adapter does nothing"
    loraweld.merge(adapter, output=out, base=base, dtype="float32", **options)
    merged, info = auto_of(name).from_pretrained(out, output_loading_info=True)
    assert not {kind: keys for kind, keys in info.items() if keys}
    assert (logits(merged.eval(), inputs()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("which", ["both", "first", "second"])
@pytest.mark.parametrize("name", list(MODELS))
def test_parameters_of_experts(name: str, which: str, tmp_path: Path) -> None:
    """One parameter or both, which PEFT wraps one into the other."""
    targets = {"both": MODELS[name][1], "first": MODELS[name][1][:1], "second": MODELS[name][1][1:]}[which]
    base = write_base(name, tmp_path / "base")
    peft = trained(
        name,
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "o_proj"][:1] if name != "deepseek_v3" else ["o_proj"],
        target_parameters=targets,
    )
    check(name, peft, base, tmp_path / "adapter", tmp_path / "out")
