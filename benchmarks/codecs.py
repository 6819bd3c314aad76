"""Decoding and encoding speed of every encoding on one core, beside other libraries', in GB/s of 16-bit values.

Ours read the stored weight from a file in the page cache, tile by tile, and encode float32 tiles as a merge does;
the others work on tensors in memory. In turn, several rounds; prints the rounds as JSON.

    python benchmarks/codecs.py --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from encoded_weights import ENCODINGS, Call, EncodedWeight, plain_weight
from encoding_drive import TileFeeder
from loraweld.checkpoint.base import open_base
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.compute.codecs.encoder import open_encoder
from loraweld.compute.tiles import TileGrid
from loraweld.planning.merge_plan import Recipe

SESSION_ROWS = 2048


class OurCodec:
    """Our decoder and encoder of one stored weight."""

    def __init__(self, weight: EncodedWeight, folder: Path) -> None:
        """Store the weight and find it again."""
        tensors = {name: tensor.contiguous().clone() for name, tensor in weight.tensors.items()}
        save_file(tensors, str(folder / "model.safetensors"))
        config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": dict(weight.settings)}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        source = open_base(folder).tensors[weight.name]
        assert isinstance(source, EncodedTensor)
        self.source = source
        self._reader = Reader()

    @property
    def encoder(self) -> Call:
        """Return what encodes a plain weight as `--save-method preserve` does, with what the stored weight decides."""
        source = self.source
        recipe = Recipe(
            name=source.name, dtype=source.dtype, shape=source.shape, source=source, edits=(), kind="encode",
            encoding=source.encoding, form=source,
        )  # fmt: skip
        feeder = TileFeeder(plain_weight().view(source.shape), source.encoding)
        return lambda: feeder.encode(open_encoder(recipe, self._reader))

    def decode(self) -> None:
        """Decode the whole weight, tile by tile."""
        source, decoder = self.source, open_decoder(self.source, self._reader)
        grid = TileGrid(source.rows, source.cols)
        for start in range(0, source.rows, SESSION_ROWS):
            stop = min(source.rows, start + SESSION_ROWS)
            tiles = list(grid.tiles(start, stop))
            rows = decoder.rows(tiles[0][0], tiles[-1][1])
            for top, bottom in tiles:
                if top >= start:
                    rows.read(top, bottom)


def gb_per_s(call: Call, num_bytes: int) -> float:
    """Return how fast a call does so many bytes of 16-bit values."""
    gc.collect()
    start = time.perf_counter()
    call()
    return num_bytes / (time.perf_counter() - start) / 1e9


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Return the rounds of one encoding: decoding and encoding, ours and theirs."""
    weight = ENCODINGS[name]()
    with tempfile.TemporaryDirectory() as folder:
        ours = OurCodec(weight, Path(folder))
        calls = {
            "decode": (ours.decode, weight.decode),
            "encode": (ours.encoder, weight.encode),
        }
        num_bytes = ours.source.num_bytes
        found: dict[str, Any] = {"encoding": name, "library": weight.library}
        for what, pair in calls.items():
            found[what] = [[], []]
            for _ in range(rounds + 1):
                for speeds, call in zip(found[what], pair, strict=True):
                    if call is not None:
                        speeds.append(gb_per_s(call, num_bytes))
            found[what] = [speeds[1:] for speeds in found[what]]  # the first round loads and compiles
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Codec speeds on one core.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoding", nargs="+", choices=ENCODINGS, default=[*ENCODINGS])
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # whatever threads a library may start
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        print(json.dumps([measured(name, args.rounds) for name in args.encoding]))


if __name__ == "__main__":
    main()
