"""Everything loraweld raises on purpose.

LoraweldError            something the user can fix; the CLI prints it without a traceback
├── RequestError         the options contradict each other or the paths
├── CheckpointError      a base model's files are damaged or of an unknown kind
├── AdapterError         an adapter's files are damaged, incomplete or of a kind that cannot be merged
├── MatchError           adapter and base do not fit each other
├── OutputError          the output place is taken, locked, too small or not writable
├── NumericsError        a result does not exist in the output dtype
└── VerificationError    what was written is not base + adapters
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class LoraweldError(Exception):
    """Something the user can fix: says where, what was found, what was expected and what to do next."""

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message if path is None else f"{path}: {message}")
        self.path = path


class RequestError(LoraweldError):
    """The options contradict each other or the paths they name."""


class CheckpointError(LoraweldError):
    """A base model's files are damaged or of a kind that is not read."""


class AdapterError(LoraweldError):
    """An adapter's files are damaged, incomplete or of a kind that cannot be merged."""


class MatchError(LoraweldError):
    """Adapter and base do not fit each other."""


class OutputError(LoraweldError):
    """The output place is taken, locked, too small or not writable."""


class NumericsError(LoraweldError):
    """A result does not exist in the output dtype."""


class VerificationError(LoraweldError):
    """What was written is not base + adapters; it was not published."""


def listing(items: Iterable[str], *, limit: int | None = None) -> str:
    """Return the sorted items, one indented line each; of more than `limit` the tail is only counted."""
    lines = sorted(items)
    shown = [f"  {line}" for line in lines[:limit]]
    if limit is not None and len(lines) > limit:
        shown.append(f"  … and {len(lines) - limit} more")
    return "\n".join(shown)
