"""A small Llama and its adapters, tensor by tensor, and the arithmetic that a merge of them must agree with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fakes import PREFIX, llama_shapes, random_tensors, save_base

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 16, 24, 2, 40
SHAPES = llama_shapes(hidden=HIDDEN, intermediate=INTERMEDIATE, layers=LAYERS, vocab=VOCAB)
LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
MODULES = [f"model.layers.{layer}.{linear}" for layer in range(LAYERS) for linear in LINEARS]
Q_PROJ = MODULES[0]
EMBEDDING = "model.embed_tokens"
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11}


def llama_config(**more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **more,
    }


def llama_tensors(dtype: torch.dtype = torch.bfloat16, *, tied: bool = False, seed: int = 0) -> dict[str, Tensor]:
    tensors = random_tensors(SHAPES, dtype, seed=seed, std=0.5)
    if tied:
        del tensors["lm_head.weight"]
    return tensors


def save_llama(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tied: bool = False,
    num_files: int = 1,
    more: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random Llama; `more` adds tensors or takes the place of some, `config` options likewise."""
    tensors = {**llama_tensors(dtype, tied=tied, seed=seed), **(more or {})}
    options = {"tie_word_embeddings": tied, "dtype": DTYPE_NAMES[dtype], **config}
    return save_base(folder, tensors, llama_config(**options), num_files=num_files)


def lora(
    module: str, shape: Sequence[int] | None = None, *, rank: int = 4, seed: int = 1, std: float = 0.3
) -> dict[str, Tensor]:
    """Return float32 factors for a module of the Llama, or for any linear layer of `shape` (out, in)."""
    num_out, num_in = SHAPES[f"{module}.weight"] if shape is None else shape
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, num_in, generator=generator) * std,
        f"{module}.lora_B.weight": torch.randn(num_out, rank, generator=generator) * std,
    }


def loras(*modules: str, rank: int = 4) -> dict[str, Tensor]:
    return {
        name: tensor
        for seed, module in enumerate(modules, start=1)
        for name, tensor in lora(module, rank=rank, seed=seed).items()
    }


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], *, prefix: str = PREFIX, **config: Any) -> Path:
    """Write tensors, named without PEFT's prefix, and a config that targets every module with a lora_A."""
    folder.mkdir(parents=True)
    stored = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = [len(tensor) for name, tensor in tensors.items() if "lora_" in name and name.endswith("A.weight")]
    targets = [name.split(".lora_")[0] for name in tensors if ".lora_" in name]
    options = {
        "peft_type": "LORA",
        "r": ranks[0] if ranks else 8,
        "lora_alpha": 6,
        "target_modules": sorted({target.rpartition(".")[2] for target in targets}),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(options, indent=2))
    return folder


def delta(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Return B·A of a module in float64, not scaled."""
    a, b = (tensors[f"{module}.lora_{part}.weight"].double() for part in "AB")
    return b @ a


def assert_nearest(merged: Tensor, exact: Tensor) -> None:
    """Check that `merged` is `exact` (float64) rounded once to its dtype, but for the noise of a float32 sum.

    A second rounding would put some elements further than half a step away, and not by noise.
    """
    assert merged.shape == exact.shape
    error, noise = (merged.double() - exact).abs(), 4e-7 * exact.abs().max()
    if merged.dtype == torch.float32:
        assert error.max() <= noise
        return
    step = torch.exp2(torch.frexp(exact)[1].double() - SIGNIFICANT_BITS[merged.dtype]) + 1e-8
    assert (error <= step / 2 + noise).all()
    assert (error <= step * 1.001).all()
