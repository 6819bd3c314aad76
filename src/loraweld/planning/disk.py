"""The disk that an output will fill."""

from __future__ import annotations

import shutil
from pathlib import Path


def free_bytes(output: Path) -> int:
    """Return the free bytes where `output` is, or will be once its missing parents are made."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
