"""Write Llama-shaped checkpoints in FP8 with a scale for each block of 128 × 128, as DeepSeek-V3 has them.

The codes are random; embeddings, head and norms stay in bf16. Needs numpy only.

    python benchmarks/synthetic_fp8.py DIR 1B
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from synthetic import (
    PROJECTIONS,
    SHAPES,
    RandomWeights,
    Stored,
    Tensors,
    base_tensors,
    config_json,
    shard_tensors,
    write_header,
    write_small_files,
)

FP8_BLOCK = 128
RANDOM_BYTES = 16 << 20
SCALE = 2e-4  # largest code 448: weights of up to 0.09
NOT_A_NUMBER, SIGN = 0x7F, 0x80


def fp8(name: str, shape: tuple[int, ...]) -> dict[str, Stored]:
    """Return the codes of a weight and their scales."""
    blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
    return {name: Stored("F8_E4M3", shape), f"{name}_scale_inv": Stored("F32", blocks)}


def quantization_config() -> dict[str, Any]:
    """Return what DeepSeek-V3's config says of its weights."""
    return {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }  # fmt: skip


def quantised(plain: Tensors) -> Tensors:
    """Return the tensors that the weights of a model become."""
    tensors: dict[str, Stored] = {}
    for key, stored in plain.items():
        tensors |= fp8(key, stored.shape) if key.split(".")[-2] in PROJECTIONS else {key: stored}
    return tensors


def write_base(folder: Path, shape: str) -> None:
    """Write the checkpoint of a shape into a new folder."""
    folder.mkdir(parents=True)
    spec = SHAPES[shape]
    shards = shard_tensors(quantised(base_tensors(spec)))
    weights, codes = RandomWeights(seed=0), random_codes()
    for name, tensors in shards.items():
        with (folder / name).open("wb") as file:
            write_header(file, tensors, list(tensors))
            for key, stored in tensors.items():
                count = math.prod(stored.shape)
                if stored.dtype == "BF16":
                    weights.write(file, count, constant=key.endswith("norm.weight"))
                elif stored.dtype == "F32":
                    file.write(np.full(count, SCALE, dtype=np.float32).data)
                else:
                    write_codes(file, codes, count)
    write_small_files(folder, shards, {**config_json(spec), "quantization_config": quantization_config()})


def random_codes() -> bytes:
    """Return random codes, all of them numbers."""
    codes = np.random.default_rng(2).integers(0, 256, RANDOM_BYTES, dtype=np.uint8)
    codes[(codes & NOT_A_NUMBER) == NOT_A_NUMBER] &= SIGN
    return codes.tobytes()


def write_codes(file: BinaryIO, codes: bytes, count: int) -> None:
    """Append so many codes to a file."""
    for start in range(0, count, len(codes)):
        file.write(memoryview(codes)[: min(len(codes), count - start)])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint in FP8.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", choices=SHAPES)
    args = parser.parse_args()
    write_base(args.folder, args.shape)


if __name__ == "__main__":
    main()
