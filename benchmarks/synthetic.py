"""Write Llama-shaped checkpoints and LoRA adapters of random numbers, for benchmarks.

The bytes are as incompressible as trained weights and the files are those of a real model (names, shapes,
shards, configs), so that reading, merging and writing cost the same. Needs numpy only, and 300 MiB whatever
the shape.

    python benchmarks/synthetic.py base DIR 1B
    python benchmarks/synthetic.py adapter DIR BASE 1B 16
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK_ELEMENTS = 16 << 20
MAX_SHARD_BYTES = 5_000_000_000
WEIGHT_STD = 0.02
DELTA_RMS = 5e-4  # what fine-tuning leaves is about 2e-4 to 1e-3
BF16_ONE = 0x3F80
ITEM_BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Stored(NamedTuple):
    """What the header of a file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return how many bytes it takes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Tensors = Mapping[str, Stored]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    rope_factor: float | None = None  # of Llama 3's rope scaling


# Layers of Llama-3.1-8B with a small vocabulary: what one more layer costs is the difference of two.
LAYERS = {
    f"{layers} layers": Shape(
        hidden=4096, intermediate=14336, layers=layers, heads=32, kv_heads=8, head_dim=128, vocab=4096,
        tied=False, rope_factor=8.0,
    )
    for layers in (1, 5)
}  # fmt: skip
SHAPES = {
    "0.1B": Shape(
        hidden=768, intermediate=2048, layers=12, heads=12, kv_heads=4, head_dim=64, vocab=32000, tied=False
    ),
    "1B": Shape(  # Llama-3.2-1B
        hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, head_dim=64, vocab=128256, tied=True,
        rope_factor=32.0,
    ),
    "5B": Shape(  # 18 layers of Llama-3.1-8B: 10 GB
        hidden=4096, intermediate=14336, layers=18, heads=32, kv_heads=8, head_dim=128, vocab=128256,
        tied=False, rope_factor=8.0,
    ),
    "8B": Shape(  # Llama-3.1-8B
        hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab=128256,
        tied=False, rope_factor=8.0,
    ),
    "30B": Shape(  # LLaMA-30B
        hidden=6656, intermediate=17920, layers=60, heads=52, kv_heads=52, head_dim=128, vocab=32000,
        tied=False,
    ),
    **LAYERS,
}  # fmt: skip


def write_base(folder: Path, shape: str, *, hollow: bool = False) -> None:
    """Write the checkpoint of a shape into a new folder.

    Args:
        folder: created; must not exist.
        shape: a key of `SHAPES`.
        hollow: write headers and configs, and leave the weights a hole in the file; enough for planning.
    """
    folder.mkdir(parents=True)
    spec = SHAPES[shape]
    shards = shard_tensors(base_tensors(spec))
    weights = RandomWeights(seed=0)
    for name, tensors in shards.items():
        with (folder / name).open("wb") as file:
            write_header(file, tensors, sorted(tensors))
            if hollow:
                file.truncate(file.tell() + sum(t.nbytes for t in tensors.values()))
                continue
            for key in sorted(tensors):
                weights.write(file, math.prod(tensors[key].shape), constant=key.endswith("norm.weight"))
    write_small_files(folder, shards, config_json(spec))


def write_small_files(folder: Path, shards: Mapping[str, Tensors], config: Mapping[str, Any]) -> None:
    """Write what lies beside the weights of a checkpoint."""
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", index_json(shards))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def write_adapter(
    folder: Path, base: Path, shape: str, rank: int, *, dtype: str = "F32", only: Sequence[str] = PROJECTIONS
) -> None:
    """Write a LoRA on all seven projections, or some of them, into a new folder, as PEFT saves it.

    Args:
        folder: created; must not exist.
        base: what the adapter says it was trained on.
        shape: a key of `SHAPES`.
        rank: of every A and B; alpha is twice that.
        dtype: "F32", as PEFT trains, or "BF16".
        only: the projections that it trains.
    """
    folder.mkdir(parents=True)
    tensors = {
        key: stored for key, stored in adapter_tensors(SHAPES[shape], rank, dtype).items() if key.split(".")[-3] in only
    }
    rng = np.random.default_rng(1)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        write_header(file, tensors, sorted(tensors))
        for key in sorted(tensors):
            values = rng.standard_normal(math.prod(tensors[key].shape), dtype=np.float32)
            values *= adapter_std(key, tensors, rank)
            file.write((values if dtype == "F32" else to_bf16(values)).data)
    write_json(folder / "adapter_config.json", {**adapter_json(base, rank), "target_modules": list(only)})


class RandomWeights:
    """An endless supply of bf16 normals: pieces of one random block, each from another random offset."""

    def __init__(self, seed: int) -> None:
        """Draw the block."""
        self._rng = np.random.default_rng(seed)
        values = self._rng.standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
        values *= WEIGHT_STD
        self._block = to_bf16(values)

    def write(self, file: BinaryIO, num_elements: int, *, constant: bool) -> None:
        """Append one tensor to a file: random numbers, or ones if `constant`."""
        if constant:
            file.write(np.full(num_elements, BF16_ONE, dtype=np.uint16).data)
            return
        while num_elements:
            start = int(self._rng.integers(BLOCK_ELEMENTS))
            piece = self._block[start : start + num_elements]
            file.write(piece.data)
            num_elements -= len(piece)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return finite float32 numbers as the bits of bf16, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def base_tensors(spec: Shape) -> Tensors:
    """Return the tensors of a model, in the order of its state dict."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab, spec.hidden)}
    for layer in range(spec.layers):
        for module, size in layer_projections(spec):
            shapes[f"model.layers.{layer}.{module}.weight"] = size
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (spec.hidden,)
    shapes["model.norm.weight"] = (spec.hidden,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab, spec.hidden)
    return {key: Stored("BF16", shape) for key, shape in shapes.items()}


def adapter_tensors(spec: Shape, rank: int, dtype: str) -> Tensors:
    """Return the tensors of an adapter, under PEFT's names."""
    tensors: dict[str, Stored] = {}
    for layer in range(spec.layers):
        for module, (num_out, num_in) in layer_projections(spec):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = Stored(dtype, (rank, num_in))
            tensors[f"{prefix}.lora_B.weight"] = Stored(dtype, (num_out, rank))
    return tensors


def layer_projections(spec: Shape) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path and (output, input) size of the seven projections of a layer."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield "self_attn.q_proj", (queries, spec.hidden)
    yield "self_attn.k_proj", (keys, spec.hidden)
    yield "self_attn.v_proj", (keys, spec.hidden)
    yield "self_attn.o_proj", (spec.hidden, queries)
    yield "mlp.gate_proj", (spec.intermediate, spec.hidden)
    yield "mlp.up_proj", (spec.intermediate, spec.hidden)
    yield "mlp.down_proj", (spec.hidden, spec.intermediate)


def adapter_std(key: str, tensors: Tensors, rank: int) -> float:
    """Return the spread that A has in PEFT, and for B the one that gives the delta `DELTA_RMS`."""
    num_in = tensors[key.replace("lora_B", "lora_A")].shape[1]
    a_std = 1 / math.sqrt(3 * num_in)
    scale = 2.0
    return a_std if "lora_A" in key else DELTA_RMS / (scale * math.sqrt(rank) * a_std)


def shard_tensors(tensors: Tensors) -> dict[str, Tensors]:
    """Pack tensors greedily into shards under the names that transformers gives them."""
    groups: list[dict[str, Stored]] = [{}]
    free = MAX_SHARD_BYTES
    for key, stored in tensors.items():
        if groups[-1] and stored.nbytes > free:
            groups.append({})
            free = MAX_SHARD_BYTES
        groups[-1][key] = stored
        free -= stored.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": g for n, g in enumerate(groups, start=1)}


def write_header(file: BinaryIO, tensors: Tensors, order: Sequence[str]) -> None:
    """Write the head of a safetensors file whose data follows in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        start, end = end, end + tensors[key].nbytes
        header[key] = {"dtype": tensors[key].dtype, "shape": tensors[key].shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file the way Hugging Face libraries do."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def index_json(shards: Mapping[str, Tensors]) -> dict[str, Any]:
    """Return the index of a sharded checkpoint."""
    stored = [tensor for tensors in shards.values() for tensor in tensors.values()]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in stored),
        "total_size": sum(tensor.nbytes for tensor in stored),
    }
    return {
        "metadata": metadata,
        "weight_map": {key: name for name, tensors in shards.items() for key in tensors},
    }


def config_json(spec: Shape) -> dict[str, Any]:
    """Return config.json as transformers 5 writes it."""
    rope: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}
    if spec.rope_factor is not None:
        rope = {
            "rope_theta": 500000.0, "rope_type": "llama3", "factor": spec.rope_factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": spec.hidden, "intermediate_size": spec.intermediate, "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim,
        "vocab_size": spec.vocab, "tie_word_embeddings": spec.tied, "rope_parameters": rope,
        "max_position_embeddings": 2048 if spec.rope_factor is None else 131072, "rms_norm_eps": 1e-05,
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False,
        "initializer_range": WEIGHT_STD, "pretraining_tp": 1, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "transformers_version": "5.0.0",
    }  # fmt: skip


def adapter_json(base: Path, rank: int) -> dict[str, Any]:
    """Return adapter_config.json as PEFT 0.21 writes it."""
    unset = (
        "alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config",
        "exclude_modules", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform",
        "lora_ga_config", "megatron_config", "modules_to_save", "monteclora_config", "revision",
        "target_parameters", "trainable_token_indices", "use_bdlora", "velora_config",
    )  # fmt: skip
    return {
        **dict.fromkeys(unset),
        "peft_type": "LORA", "peft_version": "0.21.2", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": str(base), "target_modules": list(PROJECTIONS), "bias": "none",
        "r": rank, "lora_alpha": 2 * rank, "alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {},
        "lora_bias": False, "lora_dropout": 0.0, "init_lora_weights": True, "fan_in_fan_out": False,
        "ensure_weight_tying": False, "megatron_core": "megatron.core", "qalora_group_size": 16,
        "use_dora": False, "use_qalora": False, "use_rslora": False,
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint or adapter.")
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="a Llama-shaped bf16 checkpoint")
    base.add_argument("folder", type=Path)
    base.add_argument("shape", choices=SHAPES)
    base.add_argument("--hollow", action="store_true", help="headers and configs only, the weights a hole")
    adapter = commands.add_parser("adapter", help="a LoRA on all seven projections")
    adapter.add_argument("folder", type=Path)
    adapter.add_argument("base", type=Path)
    adapter.add_argument("shape", choices=SHAPES)
    adapter.add_argument("rank", type=int)
    adapter.add_argument("--dtype", choices=["F32", "BF16"], default="F32", help="default F32")
    adapter.add_argument("--only", nargs="+", choices=PROJECTIONS, default=PROJECTIONS, help="default: all seven")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    if args.command == "base":
        write_base(args.folder, args.shape, hollow=args.hollow)
    else:
        write_adapter(args.folder, args.base, args.shape, args.rank, dtype=args.dtype, only=args.only)


if __name__ == "__main__":
    main()
