"""Whether two stored tensors hold the same values, read in bounded pieces."""

from __future__ import annotations

import numpy as np

from loraweld.checkpoint.mounted import open_stored
from loraweld.checkpoint.stored import StoredTensor

_PIECE_BYTES = 1 << 24


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors of one dtype and shape hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        _read(one, start, _PIECE_BYTES) == _read(other, start, _PIECE_BYTES)
        for start in range(0, one.num_bytes, _PIECE_BYTES)
    )


def same_values_transposed(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether `other` (C, N) holds the transpose of `one` (N, C); for adapter factors, which are small."""
    if one.dtype != other.dtype or one.shape != other.shape[::-1]:
        return False
    return bool(np.array_equal(_matrix(one), _matrix(other).T))


def _matrix(tensor: StoredTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.void]]:
    item = tensor.num_bytes // max(1, tensor.rows * tensor.cols)
    return np.frombuffer(_read(tensor, 0, tensor.num_bytes), dtype=f"u{item}").reshape(tensor.shape)


def _read(tensor: StoredTensor, start: int, count: int) -> bytes:
    count = min(count, tensor.num_bytes - start)
    with open_stored(tensor.path) as file:
        file.seek(tensor.offset + start)
        return file.read(count)
