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

import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

MAX_MESSAGE = 200_000  # characters: room for a line on each of a large model's modules
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 150
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 16


class LoraweldError(Exception):
    """Something the user can fix: says where, what was found, what was expected and what to do next."""

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(printable(message if path is None else f"{path}: {message}"))
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
    """The output cannot be made now: its place is taken, locked, too small or not writable, or a device is full.

    What is finished stays, and the same command continues.
    """


class NumericsError(LoraweldError):
    """A result does not exist in the output dtype."""


class VerificationError(LoraweldError):
    """What was written is not base + adapters; it was not published."""


def printable(text: str) -> str:
    """Return `text`, of which strangers may have chosen parts, without what steers a terminal, and cut if long."""
    shown = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text[:MAX_MESSAGE])
    return shown if len(text) <= MAX_MESSAGE else f"{shown}…"


def shortened(value: object) -> str:
    """Return a stranger's value as a message shows it: quoted, and cut."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def listing(items: Iterable[str], *, limit: int | None = None) -> str:
    """Return the sorted items, one indented line each; of more than `limit` the tail is only counted."""
    lines = sorted(items)
    shown = [f"  {line}" for line in lines[:limit]]
    if limit is not None and len(lines) > limit:
        shown.append(f"  … and {len(lines) - limit} more")
    return "\n".join(shown)
