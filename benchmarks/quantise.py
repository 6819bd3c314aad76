"""Elements per second into NF4 with double quantisation: our encoder on two threads, bitsandbytes on two of its own.

Ours: a weight for each thread, as the engine works. bitsandbytes: `quantize_4bit` with two torch threads. The same
bfloat16 weight for both, in turn; prints the rounds as JSON.

    python benchmarks/quantise.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from bitsandbytes.functional import quantize_4bit

from encoding_drive import TileFeeder
from loraweld.checkpoint.encodings.bnb4 import NESTED_BLOCKSIZE, Bnb4, state_bytes
from loraweld.compute.codecs.bnb4_encode import Bnb4Encoder

SHAPE = (4096, 14336)
THREADS = 2
BLOCKSIZE = 64
ENCODING = Bnb4(
    quant_type="nf4", blocksize=BLOCKSIZE, nested_blocksize=NESTED_BLOCKSIZE, state_bytes=state_bytes(SHAPE)
)


def ours(weight: torch.Tensor, *, searches: bool) -> float:
    """Return the elements per second of two threads, each with a weight of its own."""
    torch.set_num_threads(1)
    feeders = [TileFeeder(weight, ENCODING) for _ in range(THREADS)]
    options = {"searches": searches, "decodes": False}  # as a weight that no adapter touches
    encoders = [Bnb4Encoder(ENCODING, SHAPE, "BF16", **options) for _ in feeders]
    with ThreadPoolExecutor(THREADS) as pool:
        start = time.perf_counter()
        list(pool.map(TileFeeder.encode, feeders, encoders))
        return THREADS * weight.numel() / (time.perf_counter() - start)


def theirs(weight: torch.Tensor) -> float:
    """Return the elements per second of bitsandbytes."""
    torch.set_num_threads(THREADS)
    start = time.perf_counter()
    quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4")
    return weight.numel() / (time.perf_counter() - start)


def one_round(weight: torch.Tensor) -> dict[str, float]:
    """Measure each once."""
    return {
        "absmax": ours(weight, searches=False),
        "bitsandbytes": theirs(weight),
        "mse": ours(weight, searches=True),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Elements per second into NF4.")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    weight = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    theirs(weight[:64])  # what is loaded at the first call is not their speed
    print(json.dumps([one_round(weight) for _ in range(args.rounds)]))


if __name__ == "__main__":
    main()
