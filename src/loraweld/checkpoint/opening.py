"""Files in the folders of strangers: regular ones, which do not lead out of their folder, opened without waiting.

A link is followed within its own folder, and from a snapshot of the Hub's cache to the blobs beside it. Any other could
make a merge copy what its user can read and the model's author cannot.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from loraweld.errors import CheckpointError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a file of a model's folder for reading.

    Raises:
        OSError: as `open` does.
        CheckpointError: not a regular file, or a link that leads out of the folder.
    """
    check_stays_inside(path, path.parent)
    _check_regular(path, path.stat().st_mode)  # before it is opened: to open a device may do something
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_stays_inside(path: Path, folder: Path) -> None:
    """Check that what `path` leads to is in `folder`, or in the blobs of the Hub's cache that it is a snapshot of.

    Raises:
        CheckpointError: it is somewhere else.
    """
    root = folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # Python before 3.13 raises RuntimeError for links in a circle
        raise CheckpointError("is a link that leads nowhere", path=path) from None
    blobs = [outer.parent.parent / "blobs" for outer in (root, *root.parents) if outer.parent.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (root, *blobs)):
        raise CheckpointError(
            f"is a link to {target}, outside of its folder; put a copy of the file there if it is meant", path=path
        )


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise CheckpointError(f"is {kind}, expected a regular file", path=path)
