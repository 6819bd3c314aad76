"""The bytes of an item that are the base's own: read in as few reads as possible, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraweld.checkpoint.reader import Reader
from loraweld.execute.items import Item


@dataclass(frozen=True, slots=True)
class Piece:
    """The first `count` bytes of a buffer belong at `offset` of the output file."""

    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring output bytes that lie side by side in one source file."""

    path: Path
    offset: int
    start: int
    end: int


def kept_pieces(item: Item, buffer: memoryview, reader: Reader) -> Iterator[Piece]:
    """Yield the bytes of an item of which none is computed in order, each time in the start of `buffer`."""
    for window in item.windows(len(buffer)):
        fill_kept(window, buffer, reader)
        yield Piece(window.start, window.end - window.start)


def fill_kept(item: Item, buffer: memoryview, reader: Reader) -> None:
    """Write what an item has of its file's header and of tensors kept as they are to their place in `buffer`."""
    header = item.file.header[item.start : item.end]
    buffer[: len(header)] = header
    for run in _runs(item):
        reader.read_into(run.path, run.offset, buffer[run.start - item.start : run.end - item.start])


def _runs(item: Item) -> Iterator[_Run]:
    run: _Run | None = None
    for piece in item.placed:
        if not piece.recipe.keeps_bytes:
            continue
        start, end = max(item.start, piece.offset), min(item.end, piece.end)
        source = piece.kept
        offset = source.offset + start - piece.offset
        if run and (run.path, run.end, run.offset + run.end - run.start) == (source.path, start, offset):
            run = _Run(run.path, run.offset, run.start, end)
            continue
        if run:
            yield run
        run = _Run(source.path, offset, start, end)
    if run:
        yield run
