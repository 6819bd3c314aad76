"""Write a folder with one file of so many bytes from a buffer that is used again and again: the least a write costs.

python benchmarks/writer.py DIR BYTES
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PIECE_BYTES = 16 << 20


def write(folder: Path, num_bytes: int) -> None:
    """Write `num_bytes` through the page cache; the caller syncs."""
    folder.mkdir()
    piece = memoryview(os.urandom(PIECE_BYTES))
    with (folder / "bytes").open("wb", buffering=0) as file:
        while num_bytes:
            num_bytes -= file.write(piece[:num_bytes])


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
