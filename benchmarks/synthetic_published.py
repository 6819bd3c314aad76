"""Write the headers of the largest published models, and of adapters for them: enough to plan, with no weights at all.

Names, shapes, dtypes and configs are those of the published checkpoints; the weights are holes in the files, which take
no room on the disk (but count in `ls -l`: never read them through).

    python benchmarks/synthetic_published.py base DIR deepseek-v3
    python benchmarks/synthetic_published.py adapter DIR deepseek-v3 --base BASE --rank 16 [--experts]

Sources: config.json of meta-llama/Llama-3.1-405B, deepseek-ai/DeepSeek-V3 and moonshotai/Kimi-K2-Instruct on the Hub;
for FP8 and the layer that predicts a second token README_WEIGHTS.md of deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic import (
    Shape,
    Stored,
    Tensors,
    adapter_json,
    config_json,
    layer_projections,
    shard_tensors,
    write_header,
    write_json,
    write_small_files,
)
from synthetic import base_tensors as llama_tensors
from synthetic_fp8 import fp8, quantization_config

LLAMA_405B = Shape(
    hidden=16384, intermediate=53248, layers=126, heads=128, kv_heads=8, head_dim=128, vocab=128256, tied=False,
    rope_factor=8.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The sizes of a model of DeepSeek-V3's architecture: latent attention, dense layers first, then experts."""

    model_type: str
    vocab: int
    heads: int
    dense_layers: int
    experts: int
    predicting_layers: int  # after the others, each with an embedding and a head of its own in the file
    layers: int = 61
    hidden: int = 7168
    intermediate: int = 18432
    expert_intermediate: int = 2048
    q_rank: int = 1536
    kv_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128


DEEPSEEK_V3 = Mixture(
    model_type="deepseek_v3", vocab=129280, heads=128, dense_layers=3, experts=256, predicting_layers=1
)
KIMI_K2 = Mixture(model_type="kimi_k2", vocab=163840, heads=64, dense_layers=1, experts=384, predicting_layers=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is written of a model: its tensors in order, its config, and the linear layers that an adapter trains."""

    tensors: Callable[[], Tensors]
    config: Callable[[], dict[str, Any]]
    adapted: Callable[[], Iterator[tuple[str, tuple[int, int]]]]
    experts: Callable[[], Iterator[tuple[str, int, tuple[int, int]]]] = lambda: iter(())


def mixture_tensors(spec: Mixture) -> Tensors:
    """Return the tensors of a mixture, its linear layers in FP8 with a scale for each block of 128 × 128."""
    tensors = {"model.embed_tokens.weight": Stored("BF16", (spec.vocab, spec.hidden))}
    for layer in range(spec.layers + spec.predicting_layers):
        place = f"model.layers.{layer}"
        if layer >= spec.layers:
            tensors |= predicting_tensors(spec, place)
        for module, shape in mixture_linear(spec, layer):
            tensors |= fp8(f"{place}.{module}.weight", shape)
        for norm, size in (
            ("self_attn.q_a_layernorm", spec.q_rank), ("self_attn.kv_a_layernorm", spec.kv_rank),
            ("input_layernorm", spec.hidden), ("post_attention_layernorm", spec.hidden),
        ):  # fmt: skip
            tensors[f"{place}.{norm}.weight"] = Stored("BF16", (size,))
        if layer >= spec.dense_layers:
            tensors[f"{place}.mlp.gate.weight"] = Stored("BF16", (spec.experts, spec.hidden))
            tensors[f"{place}.mlp.gate.e_score_correction_bias"] = Stored("F32", (spec.experts,))
    tensors["model.norm.weight"] = Stored("BF16", (spec.hidden,))
    tensors["lm_head.weight"] = Stored("BF16", (spec.vocab, spec.hidden))
    return tensors


def predicting_tensors(spec: Mixture, place: str) -> dict[str, Stored]:
    """Return what a layer that predicts a second token has besides a layer."""
    vocabulary = Stored("BF16", (spec.vocab, spec.hidden))
    norms = {
        f"{place}.{name}.weight": Stored("BF16", (spec.hidden,)) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    return {
        f"{place}.embed_tokens.weight": vocabulary,
        f"{place}.eh_proj.weight": Stored("BF16", (spec.hidden, 2 * spec.hidden)),
        f"{place}.shared_head.head.weight": vocabulary,
        **norms,
    }


def attention(spec: Mixture) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path and (output, input) size of the projections of latent attention."""
    yield "self_attn.q_a_proj", (spec.q_rank, spec.hidden)
    yield "self_attn.q_b_proj", (spec.heads * (spec.nope_dim + spec.rope_dim), spec.q_rank)
    yield "self_attn.kv_a_proj_with_mqa", (spec.kv_rank + spec.rope_dim, spec.hidden)
    yield "self_attn.kv_b_proj", (spec.heads * (spec.nope_dim + spec.v_dim), spec.kv_rank)
    yield "self_attn.o_proj", (spec.hidden, spec.heads * spec.v_dim)


def mixture_linear(spec: Mixture, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path and size of all linear layers of a layer."""
    yield from attention(spec)
    places = [("mlp", spec.intermediate)]
    if layer >= spec.dense_layers:
        each = [f"mlp.experts.{expert}" for expert in range(spec.experts)]
        places = [(place, spec.expert_intermediate) for place in (*each, "mlp.shared_experts")]
    for place, size in places:
        yield f"{place}.gate_proj", (size, spec.hidden)
        yield f"{place}.up_proj", (size, spec.hidden)
        yield f"{place}.down_proj", (spec.hidden, size)


def mixture_config(spec: Mixture) -> dict[str, Any]:
    """Return config.json with what planning and runtimes read."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": spec.model_type, "torch_dtype": "bfloat16",
        "hidden_size": spec.hidden, "intermediate_size": spec.intermediate, "vocab_size": spec.vocab,
        "moe_intermediate_size": spec.expert_intermediate, "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads, "num_key_value_heads": spec.heads, "q_lora_rank": spec.q_rank,
        "kv_lora_rank": spec.kv_rank, "qk_nope_head_dim": spec.nope_dim, "qk_rope_head_dim": spec.rope_dim,
        "v_head_dim": spec.v_dim, "n_routed_experts": spec.experts, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": spec.dense_layers, "moe_layer_freq": 1, "hidden_act": "silu",
        "num_nextn_predict_layers": spec.predicting_layers, "tie_word_embeddings": False, "attention_bias": False,
        "quantization_config": quantization_config(),
    }  # fmt: skip


def mixture(spec: Mixture) -> Model:
    """Return a mixture; its adapters train the attention and, as `target_parameters`, all routed experts."""

    def adapted() -> Iterator[tuple[str, tuple[int, int]]]:
        for layer in range(spec.layers):
            for module, shape in attention(spec):
                yield f"model.layers.{layer}.{module}", shape

    def experts() -> Iterator[tuple[str, int, tuple[int, int]]]:
        for layer in range(spec.dense_layers, spec.layers):
            # Of two parameters of one module the first, gate_up_proj, is wrapped innermost.
            place, size = f"model.layers.{layer}.mlp.experts", spec.expert_intermediate
            yield f"{place}.base_layer", spec.experts, (2 * size, spec.hidden)
            yield place, spec.experts, (spec.hidden, size)

    return Model(
        tensors=lambda: mixture_tensors(spec), config=lambda: mixture_config(spec), adapted=adapted, experts=experts
    )


def llama(spec: Shape) -> Model:
    """Return a model of Llama's architecture; its adapters train all seven projections."""

    def adapted() -> Iterator[tuple[str, tuple[int, int]]]:
        for layer in range(spec.layers):
            for module, shape in layer_projections(spec):
                yield f"model.layers.{layer}.{module}", shape

    return Model(tensors=lambda: llama_tensors(spec), config=lambda: config_json(spec), adapted=adapted)


MODELS = {"llama-3.1-405b": llama(LLAMA_405B), "deepseek-v3": mixture(DEEPSEEK_V3), "kimi-k2": mixture(KIMI_K2)}


def num_parameters(tensors: Tensors) -> int:
    """Return how many numbers the tensors hold, the scales of their codes not counted."""
    return sum(math.prod(stored.shape) for name, stored in tensors.items() if not name.endswith("_scale_inv"))


def write_hollow(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file whose data is a hole."""
    with path.open("wb") as file:
        write_header(file, tensors, list(tensors))
        file.truncate(file.tell() + sum(stored.nbytes for stored in tensors.values()))


def write_base(folder: Path, model: Model) -> None:
    """Write headers, index and config of a model into a new folder."""
    folder.mkdir(parents=True)
    shards = shard_tensors(model.tensors())
    for name, tensors in shards.items():
        write_hollow(folder / name, tensors)
    write_small_files(folder, shards, model.config())


def write_adapter(folder: Path, model: Model, base: Path, rank: int, *, experts: bool) -> None:
    """Write the headers of a LoRA in float32 as PEFT names its tensors, on the experts too if asked for."""
    folder.mkdir(parents=True)
    tensors: dict[str, Stored] = {}
    for module, (rows, cols) in model.adapted():
        tensors[f"base_model.model.{module}.lora_A.weight"] = Stored("F32", (rank, cols))
        tensors[f"base_model.model.{module}.lora_B.weight"] = Stored("F32", (rows, rank))
    for module, count, (rows, cols) in model.experts() if experts else ():
        tensors[f"base_model.model.{module}.lora_A.weight"] = Stored("F32", (count * rank, cols))
        tensors[f"base_model.model.{module}.lora_B.weight"] = Stored("F32", (rows, count * rank))
    write_hollow(folder / "adapter_model.safetensors", tensors)
    targets: dict[str, Any] = {"target_modules": sorted({name.rpartition(".")[2] for name, _ in model.adapted()})}
    if experts:
        targets["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    write_json(folder / "adapter_config.json", {**adapter_json(base, rank), **targets})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write the headers of a published model, or of an adapter for it.")
    parser.add_argument("what", choices=["base", "adapter"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--base", type=Path, default=Path(), help="what the adapter says it was trained on")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default 16)")
    parser.add_argument("--experts", action="store_true", help="the adapter trains the routed experts too")
    args = parser.parse_args()
    if args.what == "base":
        write_base(args.folder, MODELS[args.model])
    else:
        write_adapter(args.folder, MODELS[args.model], args.base, args.rank, experts=args.experts)


if __name__ == "__main__":
    main()
