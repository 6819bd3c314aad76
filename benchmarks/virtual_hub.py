"""A Hub on this machine with a base that exists nowhere: its bytes are made when they are asked for.

    python benchmarks/virtual_hub.py SHAPE

Prints its address, then, for each line on standard input, what it has received so far as JSON. The server is that of
the tests; uploads are checked against their checksum and forgotten.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import dataclass, field

import numpy as np

from measuring import REPO

sys.path.insert(0, str(REPO / "tests"))

from hub_server import Hub, Repository, hub_server
from synthetic import (
    SHAPES,
    WEIGHT_STD,
    base_tensors,
    config_json,
    index_json,
    shard_tensors,
    to_bf16,
    write_header,
)

BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Virtual:
    """A weight file: a header, then the same block of random weights again and again."""

    header: bytes
    num_data: int
    block: bytes = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.header) + self.num_data

    @property
    def sha256(self) -> str:
        """A name for the content; nobody downloads the file whole to compare."""
        return hashlib.sha256(self.header).hexdigest()

    def read(self, start: int, count: int) -> bytes:
        end = min(start + count, self.size)
        found = [self.header[start:end]]
        place = max(start, len(self.header)) - len(self.header)
        while place < end - len(self.header):
            first = place % len(self.block)
            piece = self.block[first : first + end - len(self.header) - place]
            found.append(piece)
            place += len(piece)
        return b"".join(found)


def serve_base(hub: Hub, shape: str) -> None:
    """Put the base `org/base` on the Hub."""
    spec = SHAPES[shape]
    shards = shard_tensors(base_tensors(spec))
    values = np.random.default_rng(0).standard_normal(BLOCK_BYTES // 2, dtype=np.float32) * WEIGHT_STD
    block = to_bf16(values).tobytes()
    files: dict[str, object] = {
        "config.json": json.dumps(config_json(spec)).encode(),
        "model.safetensors.index.json": json.dumps(index_json(shards)).encode(),
    }
    for name, tensors in shards.items():
        head = io.BytesIO()
        write_header(head, tensors, sorted(tensors))
        files[name] = Virtual(head.getvalue(), sum(tensor.nbytes for tensor in tensors.values()), block)
    hub.repositories["org/base"] = Repository(branches={"main": files})


def main() -> None:
    """Serve until standard input ends."""
    with hub_server() as hub:
        hub.keeps_content = False
        serve_base(hub, sys.argv[1])
        print(hub.url, flush=True)
        for _ in sys.stdin:
            files = hub.repositories["me/model"].branches["main"] if "me/model" in hub.repositories else {}
            told = {
                "received": [size for _, size in hub.received],
                "sent_bytes": hub.sent_bytes,
                "files": sorted(files),
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
