"""Stored tensors → torch tensors, a few rows or columns at a time.

Shape letters: N = rows, C = columns of the matrix view.
"""

from __future__ import annotations

import torch

from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.dtypes import DTYPES


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code."""
    dtype = getattr(torch, DTYPES[code].torch_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def item_size(code: str) -> int:
    """Return the bytes of one element."""
    return DTYPES[code].bits // 8


def as_tensor(data: bytearray | memoryview, code: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor over the bytes of `data`, without a copy."""
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return torch.empty(shape, dtype=torch_dtype(code))
    return torch.frombuffer(data, dtype=torch_dtype(code), count=count).view(shape)


def read_rows(reader: Reader, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Return rows [start, stop) of the matrix view in float32, (stop - start, C)."""
    return read_stored_rows(reader, tensor, start, stop).float()


def read_stored_rows(reader: Reader, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Return rows [start, stop) of the matrix view in the stored dtype, (stop - start, C)."""
    width = tensor.cols * item_size(tensor.dtype)
    data = reader.read(tensor, start * width, (stop - start) * width)
    return as_tensor(data, tensor.dtype, (stop - start, tensor.cols))


def read_columns(reader: Reader, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Return columns [start, stop) of the matrix view, transposed and in float32, (stop - start, N)."""
    return read_block(reader, tensor, (0, tensor.rows), (start, stop)).T.to(torch.float32, copy=True).contiguous()


def read_block(reader: Reader, tensor: StoredTensor, rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
    """Return a block of the matrix view in the stored dtype; one read a row, into one buffer."""
    size = item_size(tensor.dtype)
    height, width = rows[1] - rows[0], (cols[1] - cols[0]) * size
    data = memoryview(bytearray(height * width))
    for row in range(height):
        start = ((rows[0] + row) * tensor.cols + cols[0]) * size
        reader.read_into(tensor.path, tensor.offset + start, data[row * width : (row + 1) * width])
    return as_tensor(data, tensor.dtype, (height, cols[1] - cols[0]))


def read_flat(reader: Reader, tensor: StoredTensor, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Return elements [first, last) in the stored dtype, flat."""
    last = tensor.rows * tensor.cols if last is None else last
    size = item_size(tensor.dtype)
    return as_tensor(reader.read(tensor, first * size, (last - first) * size), tensor.dtype, (last - first,))


def read_vector(reader: Reader, tensor: StoredTensor) -> torch.Tensor:
    """Return all elements in float32, flat."""
    return read_flat(reader, tensor).float()
