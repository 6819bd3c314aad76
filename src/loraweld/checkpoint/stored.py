"""Where a stored tensor lies: a file, an absolute offset, a dtype and a shape."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from loraweld.checkpoint.header import LENGTH_BYTES, Header, header_length, parse_header
from loraweld.checkpoint.mounted import mounted, open_stored
from loraweld.checkpoint.origins import Look, origin_of
from loraweld.dtypes import num_bytes
from loraweld.errors import CheckpointError, shortened

_PIECE_BYTES = 1 << 20
MAX_NAME = 1000  # characters of a tensor's name; the longest known have about 120
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
Identity = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """`num_bytes` bytes at `offset` of `path`, row-major; `name` is its name in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def rows(self) -> int:
        """Rows of the matrix view: the first size (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """Columns of the matrix view: the product of the other sizes."""
        return math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, math.prod(self.shape))

    def part(self, start: int, stop: int) -> StoredTensor:
        """Return rows [start, stop) as a tensor of their own."""
        offset = self.offset + num_bytes(self.dtype, start * self.cols)
        shape = (stop - start, *self.shape[1:])
        return StoredTensor(name=self.name, dtype=self.dtype, shape=shape, path=self.path, offset=offset)

    def as_matrix(self) -> StoredTensor:
        """Return a stack of matrices as one of all their rows."""
        return replace(self, shape=(math.prod(self.shape[:-1]), self.shape[-1])) if len(self.shape) > 2 else self

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return self.num_bytes

    @property
    def place(self) -> tuple[object, ...]:
        """All but the name: equal for two names of the same values, as pickles have them."""
        return self.path, self.offset, self.dtype, self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """One safetensors file; `description` is its header, which names and places its tensors.

    `identity` is that of what was read (see `file_identity`).
    """

    path: Path
    file_bytes: int
    tensors: tuple[StoredTensor, ...]
    description: bytes = field(repr=False)
    metadata: Mapping[str, str]
    identity: Identity = ()

    @property
    def data_start(self) -> int:
        """The absolute offset of the first tensor's first byte."""
        return len(self.description)


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledFile:
    """One file of torch.save; `description` is the pickle in it, which names and places its tensors."""

    path: Path
    file_bytes: int
    tensors: tuple[StoredTensor, ...]
    description: bytes = field(repr=False)
    identity: Identity = ()

    @property
    def metadata(self) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFile:
    """The tensors of a model in memory as one file; `path` is where they are mounted."""

    path: Path
    file_bytes: int
    tensors: tuple[StoredTensor, ...]
    description: bytes = field(repr=False)

    @property
    def metadata(self) -> Mapping[str, str]:
        return {}


StoredFile = SafetensorsFile | PickledFile | MemoryFile


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read the header of `path`.

    Raises:
        CheckpointError: not a regular file, not readable, or a header that breaks the format.
    """
    try:
        with open_stored(path) as file:
            file_bytes, identity = stored_bytes(path, file), identity_of(path, file)
            length = header_length(file.read(LENGTH_BYTES), file_bytes)
            file.seek(0)
            header = parse_header(file.read(LENGTH_BYTES + length), file_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None
    except CheckpointError as error:
        raise error if error.path else CheckpointError(str(error), path=path) from None
    check_names((entry.name for entry in header.entries), path)
    return SafetensorsFile(
        path=path,
        file_bytes=file_bytes,
        tensors=tuple(_tensors(path, header)),
        description=header.raw,
        metadata=header.metadata,
        identity=identity,
    )


def check_names(names: Iterable[str], path: Path) -> None:
    """Check that names of tensors are of this world.

    Raises:
        CheckpointError: one holds control characters, or is longer than any module's path.
    """
    for name in names:
        if len(name) > MAX_NAME or _CONTROL.search(name):
            raise CheckpointError(
                f"tensor {shortened(name)}: a name of {len(name)} characters, expected at most {MAX_NAME} and no "
                "control characters; file damaged?",
                path=path,
            )


def stored_bytes(path: Path, file: BinaryIO) -> int:
    """Return the size of what `open_stored` has opened."""
    served = mounted(path)
    return os.fstat(file.fileno()).st_size if served is None else served.size


def file_identity(path: Path) -> Identity:
    """Return what tells `path` and its content from others without reading it: the same in every process.

    Of a file that stands for another one it is that of the other, as it was when it was taken from there.
    """
    return _lasting(path) or _identity(path, path.stat())


def identity_of(path: Path, file: BinaryIO) -> Identity:
    """The same of what is open already, whatever has its name by now; () of values in memory, where none lasts."""
    is_served = mounted(path) is not None
    return _lasting(path) or (() if is_served else _identity(path, os.fstat(file.fileno())))


def _lasting(path: Path) -> Identity:
    origin = origin_of(path)
    return (origin.name, origin.identity) if origin is not None else ()


def _identity(path: Path, info: os.stat_result) -> Identity:
    return str(path), info.st_size, info.st_mtime_ns, info.st_ino


class IdentitiesNow:
    """What `file_identity` would be of files that were opened now; a place far away is asked once for all its files."""

    def __init__(self) -> None:
        self._seen: dict[Look, Mapping[str, str]] = {}

    def of(self, path: Path) -> Identity:
        """Return that of `path`.

        Raises:
            OSError: it is not there any more.
            CheckpointError: the place far away cannot be asked.
        """
        origin = origin_of(path)
        if origin is None:
            return file_identity(path)
        if origin.look not in self._seen:
            self._seen[origin.look] = origin.look()
        found = self._seen[origin.look]
        if origin.name not in found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), origin.name)
        return origin.name, found[origin.name]


def _tensors(path: Path, header: Header) -> list[StoredTensor]:
    return [
        StoredTensor(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            path=path,
            offset=header.data_start + entry.start,
        )
        for entry in header.entries
    ]


def read_bytes(tensor: StoredTensor) -> bytes:
    """Return all bytes of a small tensor.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with open_stored(tensor.path) as file:
            file.seek(tensor.offset)
            return file.read(tensor.num_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=tensor.path) from None


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors of one dtype and shape hold the same bytes; reads them up to the first difference.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with open_stored(one.path) as left, open_stored(other.path) as right:
            left.seek(one.offset)
            right.seek(other.offset)
            sizes = (min(_PIECE_BYTES, one.num_bytes - done) for done in range(0, one.num_bytes, _PIECE_BYTES))
            return all(left.read(size) == right.read(size) for size in sizes)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=one.path) from None
