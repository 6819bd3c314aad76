"""Two stored weights of one shape, in any encodings: are they equal, and what is between them.

Shape letters: N = rows, C = columns of the matrix view.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor, same_bytes
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.planning.memory import tile_height


def is_same_weight(base: Source, tuned: Source, reader: Reader) -> bool:
    """Return whether two weights of one shape hold the same numbers, whatever they are stored as."""
    if isinstance(base, StoredTensor) and isinstance(tuned, StoredTensor) and same_bytes(base, tuned):
        return True
    return all(torch.equal(one.double(), other.double()) for _, one, other in _tiles(base, tuned, reader))


def difference(base: Source, tuned: Source, reader: Reader, dtype: torch.dtype) -> torch.Tensor:
    """Return tuned - base, (N, C): float64 arithmetic on the decoded numbers, rounded once to `dtype`."""
    delta_NC = torch.empty(tuned.rows, tuned.cols, dtype=dtype)
    for top, one, other in _tiles(base, tuned, reader):
        delta_NC[top : top + len(other)] = other.double() - one.double()
    return delta_NC


def tiles(base: Source, tuned: Source, reader: Reader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the decoded numbers of both, flat and in float64, some rows at a time."""
    for _, one, other in _tiles(_rowwise(base), _rowwise(tuned), reader):
        yield one.double().view(-1), other.double().view(-1)


def _rowwise(source: Source) -> Source:
    """A stack of plain matrices as one of all their rows, so that a tile is less than a matrix."""
    return source.as_matrix() if isinstance(source, StoredTensor) else source


def read_tiles(source: Source, reader: Reader) -> Iterator[torch.Tensor]:
    """Yield the rows of a weight in its decoded dtype, some at a time; they are valid until the next step."""
    rows = open_decoder(source, reader).rows(0, source.rows)
    height = tile_height(source.cols)
    for top in range(0, source.rows, height):
        yield rows.read(top, min(top + height, source.rows))


def _tiles(base: Source, tuned: Source, reader: Reader) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (first row, rows of the base, rows of the tuned weight).

    Of a stack of matrices the plain form has a row for each matrix, an encoded one as many as all have together: then
    both are read by whole matrices.
    """
    sides = (base, tuned)
    rows = [open_decoder(side, reader).rows(0, side.rows) for side in sides]
    common = max(1, min(side.rows for side in sides))
    height = tile_height(max(side.rows // common * side.cols for side in sides))
    for top in range(0, min(side.rows for side in sides), height):
        bottom = min(top + height, common)
        one, other = (
            read.read(*(row * side.rows // common for row in (top, bottom)))
            for read, side in zip(rows, sides, strict=True)
        )
        yield top, one.reshape(bottom - top, -1), other.reshape(bottom - top, -1)
