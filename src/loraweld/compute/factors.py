"""The two factors of a low-rank delta: the right one whole, the left one a stretch of rows at a time.

Shape letters: N = rows of the stored tensor, n = rows at hand, C = its columns, R = rank.
The delta of the stored tensor is L·R with L (N, R) and R (R, C): B and A, or for transposed tensors
A transposed and B transposed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from loraweld.adapter.edits import Columns, LowRank, Residual
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.compute.bfloat16 import multiplies_bfloat16
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.compute.device import HOST
from loraweld.compute.tensors import read_columns, read_rows, read_stored_rows
from loraweld.planning.memory import HELD_STRETCHES, stretch_rows

_STRIP_COLUMNS = 1024  # whose norms are taken at a time
_LEAST_SQUARE = 2.0**-100
Ints = npt.NDArray[np.int64]


class Left:
    """The left factor's rows before `stop`, for one thread: the last stretches of them are in memory.

    They are all of a buffer of the output; elements in doubt are repaired before the next one is begun.
    """

    def __init__(self, load: Callable[[int, int], torch.Tensor], stop: int, stretch: int) -> None:
        self._load = load
        self._stop = stop
        self._stretch = stretch
        self._held: deque[_Stretch] = deque(maxlen=HELD_STRETCHES)

    def rows(self, top: int, count: int) -> torch.Tensor:
        """Return `count` rows from row `top` of the tensor on, (count, R)."""
        held = self._holding(top, count)
        return torch.from_numpy(held.rows_nR[top - held.start : top - held.start + count])

    def pick(self, rows_K: Ints) -> npt.NDArray[np.float32]:
        """Return the rows with these numbers, ascending and at least one, (K, R)."""
        pieces: list[npt.NDArray[np.float32]] = []
        while len(rows_K):
            held = self._holding(int(rows_K[0]), 1)
            here = int(np.searchsorted(rows_K, held.stop))
            pieces.append(held.rows_nR[rows_K[:here] - held.start])
            rows_K = rows_K[here:]
        return np.concatenate(pieces)

    def _holding(self, start: int, count: int) -> _Stretch:
        """Return what holds these rows: a stretch that is in memory, or one that begins with them."""
        for held in self._held:
            if held.start <= start and start + count <= held.stop:
                return held
        stop = max(start + count, min(start + self._stretch, self._stop))
        stop += self._stop - stop == 1  # a single last row belongs to the tile before it
        self._held.append(_Stretch(self._load(start, stop).numpy(), start))
        return self._held[-1]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring rows (n, R) of a left factor, from row `start` on."""

    rows_nR: npt.NDArray[np.float32]
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.rows_nR)


class Factors:
    """Right factor in memory, left factor on demand.

    `narrow_RC`: the right factor in bfloat16, if both factors are so and products of that are as good.
    """

    def __init__(self, right_RC: torch.Tensor, left_rows: Callable[[int, int], torch.Tensor]) -> None:
        """Take the right factor (R, C) in float32 or, only if the left one is in it too, bfloat16."""
        self._held_RC = right_RC
        self.rank = len(right_RC)
        self.narrow_RC = right_RC if right_RC.dtype == torch.bfloat16 else None
        self.largest_norm = max(
            (largest_norm(strip.float().T) for strip in torch.split(right_RC, _STRIP_COLUMNS, dim=1)), default=0.0
        )
        self._left_rows = left_rows
        self._stretch = stretch_rows(right_RC.shape[1])

    @classmethod
    def stored(cls, edit: LowRank, reader: Reader) -> Factors:
        """Return the factors of an adapter's tensors."""
        a, b = edit.a, edit.b
        are_narrow = a.dtype == b.dtype == "BF16" and multiplies_bfloat16()
        read = read_stored_rows if are_narrow else read_rows
        if edit.transposed:
            right_RC = _columns(read(reader, b, 0, b.rows), edit.b_columns).T.contiguous()
            first = edit.a_columns.start if edit.a_columns is not None else 0  # those of one part lie side by side
            return cls(right_RC, lambda start, stop: read_columns(reader, a, first + start, first + stop))
        right_RC = _columns(read(reader, a, 0, a.rows), edit.a_columns).contiguous()
        return cls(right_RC, lambda start, stop: _columns(read_rows(reader, b, start, stop), edit.b_columns))

    @cached_property
    def right_RC(self) -> torch.Tensor:
        """The right factor in float32."""
        return self._held_RC.float()

    def columns(self, cols_K: Ints) -> npt.NDArray[np.float64]:
        """Return these columns of the right factor, (K, R)."""
        held_RC = (self._held_RC if self.narrow_RC is None else self.narrow_RC.view(torch.int16)).numpy()
        columns_RK = np.take(held_RC, cols_K, axis=1, mode="clip")  # row by row; an index would go column by column
        if self.narrow_RC is not None:
            columns_RK = (columns_RK.astype(np.int32) << 16).view(np.float32)
        return columns_RK.T.astype(np.float64, order="C")

    def left(self, stop: int) -> Left:
        """Return the left factor's rows before `stop`."""
        return Left(self._left_rows, stop, self._stretch)


def largest_norm(rows_nR: torch.Tensor) -> float:
    """Return the norm of the longest of some float32 rows, 0 of none."""
    rows = rows_nR.numpy()  # which takes a tenth of torch's time for rows that lie as columns
    square = np.einsum("nr,nr->n", rows, rows).max(initial=0)
    if not _LEAST_SQUARE < square < math.inf:  # squares of very small or large numbers are not in float32
        square = np.einsum("nr,nr->n", rows, rows, dtype=np.float64).max(initial=0)
    return math.sqrt(square)


def _columns(rows_NC: torch.Tensor, columns: Columns | None) -> torch.Tensor:
    return rows_NC if columns is None else rows_NC[:, columns.start : columns.stop : columns.step].contiguous()


def decompose(edit: Residual, source: Source, reader: Reader, device: torch.device = HOST) -> Factors:
    """Derive the initial factors of PiSSA or OLoRA from the stored weight, as PEFT does when it attaches them.

    The weight is decomposed on `device`, the factors lie on the CPU.

    PiSSA: B₀ = V·√(S/s), A₀ = √(S/s)·Uᵀ of the SVD of W (O, I); OLoRA: B₀ = Q, A₀ = R of its QR decomposition,
    leading `rank` columns and rows.
    """
    weight = open_decoder(source, reader).rows(0, source.rows).read(0, source.rows).float().to(device)
    weight = weight.T if edit.transposed else weight
    if edit.method == "olora":
        q, r = torch.linalg.qr(weight)
        b_OR, a_RI = q[:, : edit.rank], r[: edit.rank]
    else:
        v, s, uh = torch.linalg.svd(weight, full_matrices=False)
        root = torch.sqrt(s[: edit.rank] / edit.scaling)
        b_OR, a_RI = v[:, : edit.rank] * root, root[:, None] * uh[: edit.rank]
    left, right = (a_RI.T, b_OR.T) if edit.transposed else (b_OR, a_RI)
    left, right = left.contiguous().cpu(), right.contiguous().cpu()
    return Factors(right, lambda start, stop: left[start:stop])
