"""The tensors of a model as the bytes of one file: nothing is copied until a range of it is read."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from loraweld.checkpoint.header import build_header
from loraweld.checkpoint.mounted import mount
from loraweld.checkpoint.stored import MemoryFile, StoredTensor
from loraweld.dtypes import CODE_BY_TORCH_NAME, DTYPES
from loraweld.errors import CheckpointError

_numbers = itertools.count()
# Files of safetensors hold the types in this order, the widest first, and the names of a type in theirs.
_ORDER = {code: -place for place, code in enumerate(DTYPES)}
_ALIGNMENT = 4096
_BLOCK_ROWS = 32
_PIECE_BYTES = 1 << 20


class TensorBytes:
    """Serves tensors of any layout and device as row-major bytes, one after the other."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], repacked: Mapping[int, int]) -> None:
        self._repacked = repacked
        self._tensors: list[torch.Tensor] = []
        self.offsets: list[int] = []
        self.size = 0
        for tensor in tensors.values():
            self._tensors.append(tensor.detach().as_subclass(torch.Tensor))
            self.offsets.append(self.size)
            # With a gap, no range of one tensor can be taken for the beginning of the next.
            self.size += tensor.numel() * tensor.element_size() // _ALIGNMENT * _ALIGNMENT + _ALIGNMENT

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`, all of one tensor; only what is asked for is copied."""
        if not len(buffer):
            return
        place = bisect_right(self.offsets, offset) - 1
        start = offset - self.offsets[place]
        tensor = self._tensors[place]
        row_bytes = self._repacked.get(tensor.data_ptr())
        if row_bytes is None:
            _copy_bytes(tensor, start, buffer)
        else:
            _copy_unpacked(tensor.reshape(-1), start, buffer, row_bytes)


def _copy_bytes(tensor: torch.Tensor, start: int, buffer: memoryview) -> None:
    stop = start + len(buffer)
    if tensor.is_contiguous():
        flat = tensor.reshape(-1).view(torch.uint8)
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat[start:stop])
        return
    # A view, say transposed: the rows that the range touches, one block at a time.
    row = math.prod(tensor.shape[1:]) * tensor.element_size()
    first, last = start // row, -(-stop // row)
    if last - first == 1 and tensor.dim() > 1:
        _copy_bytes(tensor[first], start - first * row, buffer)
        return
    flat = tensor[first:last].contiguous().reshape(-1).view(torch.uint8)
    torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat[start - first * row : stop - first * row])


def _copy_unpacked(flat: torch.Tensor, start: int, buffer: memoryview, row_bytes: int) -> None:
    """A few blocks at a time: unpacking takes several times their memory."""
    block = _BLOCK_ROWS * row_bytes
    stop, step = start + len(buffer), max(1, _PIECE_BYTES // block) * block
    target = torch.frombuffer(buffer, dtype=torch.uint8)
    for first in range(start // block * block, stop, step):
        codes = unpacked(flat[first : first + step], row_bytes).reshape(-1)
        low, high = max(first, start), min(first + step, stop)
        target[low - start : high - start] = codes[low - first : high - first]


def unpacked(flat: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """Return the codes of whole blocks of rows as bitsandbytes stores them, (rows, row_bytes).

    Repacked, a byte has the same element of two rows, 16 apart; stored, it has two elements of a row.

    Source: `_convert_weight_packed_for_cpu` of bitsandbytes 0.50.2.
    """
    pairs = flat.view(-1, row_bytes, _BLOCK_ROWS // 2, 2)
    rows = torch.cat([pairs & 15, pairs >> 4], dim=2).transpose(1, 2)
    return ((rows[..., 0] << 4) | rows[..., 1]).reshape(-1, row_bytes)


@contextmanager
def tensors_as_file(
    tensors: Mapping[str, torch.Tensor], *, repacked: Mapping[int, int] | None = None
) -> Iterator[MemoryFile]:
    """Yield `tensors` as a file that can be read within the block.

    `repacked`: bytes of a row of those that hold 4-bit codes in another order, by where they are.

    Raises:
        CheckpointError: a tensor of a type that safetensors does not have, or without data.
    """
    named = {name: tensors[name] for name in sorted(tensors, key=lambda name: (_ORDER[_code(name, tensors)], name))}
    data = TensorBytes(named, repacked or {})
    path = Path(f"<memory {next(_numbers)}>") / "model"  # the number is no part of the name: records hold that
    stored = tuple(
        StoredTensor(name=name, dtype=_code(name, tensors), shape=tuple(tensor.shape), path=path, offset=offset)
        for (name, tensor), offset in zip(named.items(), data.offsets, strict=True)
    )
    description = build_header(((t.name, t.dtype, t.shape) for t in stored), {})
    with mount(path, data):
        yield MemoryFile(path=path, file_bytes=data.size, tensors=stored, description=description)


def _code(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    tensor = tensors[name]
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        what = tensor.layout if tensor.layout is not torch.strided else "on the device meta, without values"
        raise CheckpointError(f"tensor {name!r} of the model is {what}; expected plain tensors with values")
    code = CODE_BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise CheckpointError(f"tensor {name!r} of the model is {tensor.dtype}, which safetensors does not have")
    return code
