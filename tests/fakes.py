"""Models and adapters written by hand, without any class of transformers or PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Factors = Mapping[str, tuple[Tensor, Tensor]]  # module → (A, B)
PREFIX = "base_model.model."
INDEX_NAME = "model.safetensors.index.json"


def llama_shapes(*, hidden: int = 64, intermediate: int = 96, layers: int = 2, vocab: int = 100) -> Shapes:
    """Return the tensors of an untied Llama with as many key heads as query heads."""
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    linears |= {"mlp.down_proj": (hidden, intermediate)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def random_tensors(shapes: Shapes, dtype: torch.dtype, *, seed: int = 0, std: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * std).to(dtype) for name, shape in shapes.items()}


def random_factors(
    shapes: Shapes, *, rank: int = 4, seed: int = 1, std: float = 0.02
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return float32 factors for each 2-D tensor of `shapes`, whose product has about the deviation `std`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            a = torch.randn(rank, shape[1], generator=generator)
            b = torch.randn(shape[0], rank, generator=generator) * (std / math.sqrt(rank))
            factors[name.removesuffix(".weight")] = (a, b)
    return factors


def write_base(folder: Path, tensors: Mapping[str, Tensor], *, num_files: int = 1, model_type: str = "llama") -> Path:
    """Write a base model; with several files also its index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    names = names if num_files > 1 else ["model.safetensors"]
    weight_map = {name: names[i * num_files // len(tensors)] for i, name in enumerate(tensors)}
    for file in names:
        chosen = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(chosen, folder / file, metadata={"format": "pt"})
    if num_files > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def write_adapter(
    folder: Path,
    factors: Factors,
    *,
    alpha: float = 8,
    more: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write a LoRA in PEFT's format; `more` holds further tensors by their full keys, `config` further options."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(more or {})
    for module, (a, b) in factors.items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    ranks = {module: len(a) for module, (a, _) in factors.items()}
    written = {
        "peft_type": "LORA",
        "r": next(iter(ranks.values())),
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "target_modules": list(factors),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def load_folder(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below `folder` by relative name."""
    paths: Iterable[Path] = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
