"""Write Llama-shaped checkpoints in NF4 with double quantisation, as transformers saves them with bitsandbytes.

The codes are random, the block scales those of weights with the spread of `synthetic.py`; names, shapes, shards and
configs are those of a real model. Embeddings, head and norms stay in bf16. Needs numpy only, and 300 MiB whatever the
shape.

    python benchmarks/synthetic_nf4.py DIR 1B
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

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

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
RANDOM_BYTES = 16 << 20
# Of blocks of 64 normals with the spread of `synthetic.py`: their mean, and how far they stray from it.
ABSMAX_MEAN, ABSMAX_REACH = 0.05, 0.03
STATE = ".quant_state.bitsandbytes__nf4"
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def write_base(folder: Path, shape: str) -> None:
    """Write the checkpoint of a shape into a new folder."""
    folder.mkdir(parents=True)
    spec = SHAPES[shape]
    plain = base_tensors(spec)
    shards = shard_tensors(quantised(plain))
    parts = RandomParts(plain)
    for name, tensors in shards.items():
        # safetensors puts large dtypes first.
        order = sorted(tensors, key=lambda key: (tensors[key].dtype == "U8", tensors[key].dtype == "BF16", key))
        with (folder / name).open("wb") as file:
            write_header(file, tensors, order)
            for key in order:
                parts.write(file, key, tensors[key])
    write_small_files(folder, shards, {**config_json(spec), "quantization_config": quantization_config()})


def is_quantised(key: str) -> bool:
    """Whether a tensor is the weight of one of the seven projections."""
    return key.split(".")[-2] in PROJECTIONS


def quantised(plain: Tensors) -> Tensors:
    """Return the tensors that the weights of a model become."""
    tensors: dict[str, Stored] = {}
    for key, stored in plain.items():
        if not is_quantised(key):
            tensors[key] = stored
            continue
        count = math.prod(stored.shape)
        blocks = -(-count // BLOCKSIZE)
        tensors |= {
            key: Stored("U8", ((count + 1) // 2, 1)),
            f"{key}.absmax": Stored("U8", (blocks,)),
            f"{key}.nested_absmax": Stored("F32", (-(-blocks // NESTED_BLOCKSIZE),)),
            f"{key}.nested_quant_map": Stored("F32", (256,)),
            f"{key}.quant_map": Stored("F32", (16,)),
            f"{key}{STATE}": Stored("U8", (len(state(stored.shape)),)),
        }
    return tensors


def state(shape: tuple[int, ...]) -> bytes:
    """Return the JSON beside the codes of a weight."""
    values = {
        "quant_type": "nf4", "blocksize": BLOCKSIZE, "dtype": "bfloat16", "shape": shape,
        "nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": ABSMAX_MEAN,
    }  # fmt: skip
    return json.dumps(values).encode()


class RandomParts:
    """Content for every tensor."""

    def __init__(self, plain: Tensors) -> None:
        """Draw the random bytes; `plain` are the weights before quantisation."""
        self._plain = plain
        self._weights = RandomWeights(seed=0)
        self._rng = np.random.default_rng(2)
        self._bytes = self._rng.integers(0, 256, RANDOM_BYTES, dtype=np.uint8)

    def write(self, file: BinaryIO, key: str, stored: Stored) -> None:
        """Append one tensor to a file."""
        count = math.prod(stored.shape)
        if stored.dtype == "BF16":
            self._weights.write(file, count, constant=key.endswith("norm.weight"))
        elif key.endswith(STATE):
            file.write(state(self._plain[key.removesuffix(STATE)].shape))
        elif stored.dtype == "U8":
            self._write_bytes(file, count)
        else:
            file.write(scale_part(key, count).data)

    def _write_bytes(self, file: BinaryIO, count: int) -> None:
        while count:
            start = int(self._rng.integers(RANDOM_BYTES))
            piece = self._bytes[start : start + count]
            file.write(piece.data)
            count -= len(piece)


def scale_part(key: str, count: int) -> npt.NDArray[np.float32]:
    """Return one of the parts in float32."""
    if key.endswith(".nested_quant_map"):
        return dynamic_codebook()
    if key.endswith(".quant_map"):
        return np.array(NF4, dtype=np.float32)
    return np.full(count, ABSMAX_REACH, dtype=np.float32)


def dynamic_codebook() -> npt.NDArray[np.float32]:
    """Return bitsandbytes' signed dynamic 8-bit floats: seven decades, each with twice the values of the one below."""
    values = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * (borders[:-1] + borders[1:]) / 2
        values += [*means, *-means]
    return np.array(sorted(values), dtype=np.float32)


def quantization_config() -> dict[str, Any]:
    """Return what transformers 5 writes of a `BitsAndBytesConfig`."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0,
    }  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint in NF4.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", choices=SHAPES)
    args = parser.parse_args()
    write_base(args.folder, args.shape)


if __name__ == "__main__":
    main()
