"""The two factors of a low-rank delta: the right one whole, the left one for the rows at hand.

Shape letters: N = rows of the stored tensor, n = rows at hand, C = its columns, R = rank.
The delta of the stored tensor is L·R with L (N, R) and R (R, C): B and A, or for transposed tensors
A transposed and B transposed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from loraweld.adapter.edits import Columns, LowRank, Residual
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.compute.device import HOST
from loraweld.compute.tensors import read_columns, read_rows


class Left:
    """Rows [start, …) of the left factor."""

    def __init__(self, rows_nR: torch.Tensor, start: int) -> None:
        self._rows_nR = rows_nR
        self._start = start
        self._norms_n = torch.linalg.vector_norm(rows_nR, dim=1).numpy()

    def rows(self, top: int, count: int) -> torch.Tensor:
        """Return `count` rows from row `top` of the tensor on, (count, R)."""
        return self._rows_nR[top - self._start : top - self._start + count]

    def largest_norm(self, top: int, count: int) -> float:
        """Return the norm of the longest of these rows."""
        return float(self._norms_n[top - self._start : top - self._start + count].max())

    def pick(self, rows_K: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the rows with these numbers, (K, R)."""
        picked: npt.NDArray[np.float32] = self._rows_nR.numpy()[rows_K - self._start]
        return picked


class Factors:
    """Right factor in memory, left factor on demand."""

    def __init__(self, right_RC: torch.Tensor, left_rows: Callable[[int, int], torch.Tensor]) -> None:
        self.right_RC = right_RC
        self.right: npt.NDArray[np.float32] = right_RC.numpy()
        self.largest_norm = float(torch.linalg.vector_norm(right_RC, dim=0).max())
        self._left_rows = left_rows

    @classmethod
    def stored(cls, edit: LowRank, reader: Reader) -> Factors:
        """Return the factors of an adapter's tensors."""
        a, b = edit.a, edit.b
        if edit.transposed:
            right_RC = _columns(read_rows(reader, b, 0, b.rows), edit.b_columns).T.contiguous()
            first = edit.a_columns.start if edit.a_columns is not None else 0  # those of one part lie side by side
            return cls(right_RC, lambda start, stop: read_columns(reader, a, first + start, first + stop))
        right_RC = _columns(read_rows(reader, a, 0, a.rows), edit.a_columns).contiguous()
        return cls(right_RC, lambda start, stop: _columns(read_rows(reader, b, start, stop), edit.b_columns))

    def left(self, start: int, stop: int) -> Left:
        """Load rows [start, stop) of the left factor."""
        return Left(self._left_rows(start, stop), start)


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
