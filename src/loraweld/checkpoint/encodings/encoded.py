"""A quantised weight as one value: the tensors it is stored in, and the encoding that ties them together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from loraweld.checkpoint.stored import StoredTensor
from loraweld.dtypes import num_bytes
from loraweld.errors import CheckpointError

CODES = "codes"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLayout:
    """What one part of an encoded weight must be: its tensor's name, its dtype (one of these), its shape.

    `packed`: only the number of bytes counts (bitsandbytes stores 4-bit codes as any dtype). `required`: may be absent.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    packed: bool = False
    required: bool = True


class Encoding(Protocol):
    """The parameters of one stored form of a weight; a frozen dataclass."""

    @property
    def kind(self) -> str:
        """The encoding's name in messages and reports."""

    @property
    def streams(self) -> bool:
        """Whether the codes of one row after the other lie one after the other."""

    def layout(self, name: str, shape: tuple[int, ...]) -> Mapping[str, PartLayout]:
        """Return the parts by role of a weight `name` with decoded `shape`; the codes come first."""

    def unit_rows(self, shape: tuple[int, ...]) -> int:
        """Return the number of rows whose codes share a byte or a scale: they are encoded together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor:
    """A weight `name` of decoded `dtype` and `shape`, stored as `parts` (role, tensor), the codes first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: Encoding
    parts: tuple[tuple[str, StoredTensor], ...]

    @property
    def rows(self) -> int:
        """Rows of the matrix view: all sizes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Columns of the matrix view: the last size."""
        return self.shape[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded values."""
        return num_bytes(self.dtype, math.prod(self.shape))

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files, of codes and scales."""
        return sum(part.num_bytes for _, part in self.parts)

    @property
    def codes(self) -> StoredTensor:
        """The part that holds the codes; the weight has its place in the file."""
        return self.parts[0][1]

    def part(self, role: str) -> StoredTensor | None:
        """Return the tensor of a role, None if it is not stored."""
        return next((tensor for name, tensor in self.parts if name == role), None)

    def need(self, role: str) -> StoredTensor:
        """Return the tensor of a role that `encoded` has made sure of."""
        tensor = self.part(role)
        assert tensor is not None
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RequantisedTensor:
    """A plain weight as a model that holds it in an encoding computes with it: quantised and decoded again."""

    plain: StoredTensor
    encoding: Encoding

    @property
    def name(self) -> str:
        return self.plain.name

    @property
    def dtype(self) -> str:
        return self.plain.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plain.shape

    @property
    def rows(self) -> int:
        return self.plain.rows

    @property
    def cols(self) -> int:
        return self.plain.cols

    @property
    def num_bytes(self) -> int:
        return self.plain.num_bytes

    @property
    def stored_bytes(self) -> int:
        return self.plain.num_bytes


Source = StoredTensor | EncodedTensor | RequantisedTensor


def encoded(
    name: str, dtype: str, shape: tuple[int, ...], encoding: Encoding, tensors: Mapping[str, StoredTensor]
) -> EncodedTensor:
    """Return weight `name`, its parts found among `tensors` and checked against the encoding's layout.

    Raises:
        CheckpointError: a part is missing, or of another dtype or size than the encoding has; a weight of no elements.
    """
    if not all(shape):
        raise CheckpointError(f"{encoding.kind} weight {name!r} is {shape}; a quantised weight has elements")
    parts = []
    for role, layout in encoding.layout(name, shape).items():
        stored = tensors.get(layout.name)
        if stored is None:
            if layout.required:
                raise CheckpointError(f"{encoding.kind} weight {name!r} lacks its {role}, tensor {layout.name!r}")
            continue
        _check(stored, layout, f"{encoding.kind} weight {name!r} of shape {shape}")
        parts.append((role, stored))
    return EncodedTensor(name=name, dtype=dtype, shape=shape, encoding=encoding, parts=tuple(parts))


def _check(stored: StoredTensor, layout: PartLayout, weight: str) -> None:
    if stored.dtype not in layout.dtypes:
        expected = " or ".join(layout.dtypes)
        raise CheckpointError(
            f"tensor {stored.name!r} is {stored.dtype}, expected {expected} for {weight}", path=stored.path
        )
    expected_bytes = num_bytes(layout.dtypes[0], math.prod(layout.shape))
    fits = stored.num_bytes == expected_bytes if layout.packed else stored.shape == layout.shape
    if not fits:
        found, wanted = (
            (f"{stored.num_bytes} bytes", f"{expected_bytes}") if layout.packed else (stored.shape, layout.shape)
        )
        raise CheckpointError(f"tensor {stored.name!r} is {found}, expected {wanted} for {weight}", path=stored.path)
