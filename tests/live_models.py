"""Models in memory with trained adapters, and the folders that they could have come from."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import loraweld
from cases import train_
from models import GATED, HIDDEN, randomise_

MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [], "head_dim": 8}


def qwen3_moe() -> tf.PreTrainedModel:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GATED, **MOE))


def gemma3() -> tf.PreTrainedModel:
    vision = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = tf.Gemma3Config(
        text_config={**GATED, "head_dim": 8, "query_pre_attn_scalar": 8},
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        **{f"{name}_token_index": token for name, token in (("boi", 90), ("eoi", 91), ("image", 92))},
    )
    return tf.Gemma3ForConditionalGeneration(config)


def gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, vocab_size=96))


def llama() -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GATED, tie_word_embeddings=False))


def t5() -> tf.PreTrainedModel:
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0))


def wide_llama() -> tf.PreTrainedModel:
    """Of a width that bitsandbytes repacks on the CPU."""
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**GATED, "hidden_size": 128, "intermediate_size": 128}))


BUILDERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": llama,
    "qwen3-moe": qwen3_moe,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "t5": t5,
}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"]}


def auto_of(name: str) -> Any:
    special = {"gemma3": tf.AutoModelForImageTextToText, "t5": tf.AutoModelForSeq2SeqLM}
    return special.get(name, tf.AutoModelForCausalLM)


def write_base(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the model, the same weights at every call."""
    torch.manual_seed(zlib.crc32(name.encode()))
    model = {**BUILDERS, "wide-llama": wide_llama}[name]().eval()
    randomise_(model)
    model.to(dtype).save_pretrained(folder)
    return folder


def with_adapter(model: Any, name: str, **options: Any) -> PeftModel:
    """Return the model with a random adapter."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS.get(name, ["q_proj", "v_proj"]), **options}
    peft = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(7)
    train_(peft)
    return peft.eval()


def live_llama(folder: Path, **options: Any) -> PeftModel:
    """Write a Llama and return it in memory, with an adapter and the saving methods."""
    write_base("llama", folder)
    peft = with_adapter(tf.AutoModelForCausalLM.from_pretrained(folder), "llama", **options)
    return loraweld.attach(peft)


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of everything that saving might change in a model."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
