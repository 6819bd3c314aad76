"""Write a mixture of experts with many small tensors and no values, and a LoRA of random numbers on all of it.

python benchmarks/synthetic_experts.py DIR 130 200     layers, shards; DIR/base and DIR/adapter
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from synthetic import Stored, Tensors, write_header, write_json, write_small_files

WIDTH, EXPERTS, RANK = 64, 256, 4


def write_base(folder: Path, layers: int, num_shards: int) -> int:
    """Write headers, index and config, the weights a hole in the file; return the number of tensors."""
    folder.mkdir(parents=True)
    names = list(base_names(layers))
    size = -(-len(names) // num_shards)
    shards: dict[str, Tensors] = {
        f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors": {
            name: Stored("BF16", (WIDTH, WIDTH)) for name in names[number * size : (number + 1) * size]
        }
        for number in range(num_shards)
    }
    for name, tensors in shards.items():
        with (folder / name).open("wb") as file:
            write_header(file, tensors, sorted(tensors))
            file.truncate(file.tell() + sum(tensor.nbytes for tensor in tensors.values()))
    config = {"model_type": "qwen3_moe", "dtype": "bfloat16", "tie_word_embeddings": False, "vocab_size": WIDTH}
    write_small_files(folder, shards, config)
    return len(names)


def base_names(layers: int) -> Iterator[str]:
    """Yield the names of all weights, each a matrix of the same size."""
    for layer in range(layers):
        for expert in range(EXPERTS):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        for projection in "qkvo":
            yield f"model.layers.{layer}.self_attn.{projection}_proj.weight"
    yield from ("model.embed_tokens.weight", "lm_head.weight")


def write_adapter(folder: Path, layers: int) -> None:
    """Write a LoRA on the attention and, as PEFT does with `target_parameters`, on all experts."""
    folder.mkdir(parents=True)
    tensors: dict[str, Stored] = {}
    for layer in range(layers):
        place = f"base_model.model.model.layers.{layer}"
        for module, rank, outputs in (
            ("self_attn.q_proj", RANK, WIDTH),
            ("self_attn.v_proj", RANK, WIDTH),
            ("mlp.experts.base_layer", RANK * EXPERTS, 2 * WIDTH),  # gate_up_proj, inside of what follows
            ("mlp.experts", RANK * EXPERTS, WIDTH),
        ):
            tensors[f"{place}.{module}.lora_A.weight"] = Stored("F32", (rank, WIDTH))
            tensors[f"{place}.{module}.lora_B.weight"] = Stored("F32", (outputs, rank))
    with (folder / "adapter_model.safetensors").open("wb") as file:
        write_header(file, tensors, list(tensors))
        generator = np.random.default_rng(0)
        for tensor in tensors.values():
            file.write(generator.standard_normal(tensor.shape, dtype=np.float32).tobytes())
    config = {"peft_type": "LORA", "peft_version": "0.21.2", "r": RANK, "lora_alpha": RANK}
    targets = {"target_modules": ["q_proj", "v_proj"]}
    parameters = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    write_json(folder / "adapter_config.json", {**config, **targets, **parameters})


def main() -> None:
    """Run the command line."""
    folder, layers, num_shards = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    print(write_base(folder / "base", layers, num_shards))
    write_adapter(folder / "adapter", layers)


if __name__ == "__main__":
    main()
