"""pytorch_model.bin → where its tensors lie, through `torch.load(weights_only=True)` and nothing else.

Such a file is a zip archive: a pickle that describes the tensors, and one record per storage with its bytes as they
are. torch gets a skeleton of it, in memory, with the pickle and empty records; on the device "meta" it wants no data,
but notes on each storage where it found the record of that name. So torch says which record a tensor is in, and
Python's `zipfile` where the record lies. (Of the file itself torch would say both, but since format version 1 it
computes the second from the order in which the pickle names the records, whatever the archive's directory says.)

Source: `torch.serialization._load` of torch 2.13.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from loraweld.checkpoint.mounted import open_stored
from loraweld.checkpoint.stored import PickledFile, StoredTensor, check_names, identity_of, stored_bytes
from loraweld.dtypes import CODE_BY_TORCH_NAME
from loraweld.errors import CheckpointError, listing

MAX_PICKLE_BYTES = 100_000_000  # a model of 10,000 tensors takes about 1 MB
SAVE_AGAIN = "load it with torch and save it again as safetensors"
_LOCAL_HEADER_BYTES = 30
_LOCAL_MAGIC = b"PK\3\4"
_OF_UNPICKLING = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, struct.error),
    *(LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
)
_OF_ARCHIVES = (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, LookupError, struct.error, zlib.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """One record of the archive: `size` bytes at `start` of the file, as they are if `is_plain`."""

    name: str
    start: int
    size: int
    is_plain: bool


def read_pickled(path: Path) -> PickledFile:
    """Find the tensors of the state dict that torch.save wrote to `path`; their bytes are not read.

    Raises:
        CheckpointError: not such an archive, a pickle of anything but plain tensors, or a tensor whose bytes do not
            lie in the file as safetensors would have them.
    """
    try:
        with open_stored(path) as file:
            file_bytes, identity = stored_bytes(path, file), identity_of(path, file)
            description, records = _read_archive(file, file_bytes)
            tensors = _find_tensors(description, records, path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path=path) from None
    except CheckpointError as error:
        raise error if error.path else CheckpointError(str(error), path=path) from None
    check_names((tensor.name for tensor in tensors), path)
    return PickledFile(path=path, file_bytes=file_bytes, tensors=tensors, description=description, identity=identity)


def load_tensors(source: Path | BinaryIO, *, device: str) -> dict[str, torch.Tensor]:
    """Unpickle a mapping of names to tensors, and nothing but that.

    Raises:
        CheckpointError: torch refuses the pickle, or there is something else in it.
    """
    try:
        state = torch.load(source, map_location=device, weights_only=True, mmap=False)
    except _OF_UNPICKLING as error:
        raise CheckpointError(
            f"cannot be loaded safely (torch.load with weights_only): {_reason(error)}. "
            "Nothing but tensors is unpickled; get the weights as safetensors, from someone you trust"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"holds a {type(state).__name__}, expected a mapping of names to tensors")
    strange = [
        f"{name!r}: {type(value).__name__}"
        for name, value in state.items()
        if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]
    if strange:
        raise CheckpointError(
            f"holds more than a mapping of names to tensors; load it and save only its tensors:\n{listing(strange)}"
        )
    return state


def _reason(error: BaseException) -> str:
    """What torch found, without its advice to load the pickle unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line for line in lines if "unsupported" in line.lower()), lines[0])
    return line.split(". ")[0][:200].rstrip(".")


def _read_archive(file: BinaryIO, file_bytes: int) -> tuple[bytes, dict[str, _Record]]:
    """Return the pickle and the records of storages by name, without the archive's own name."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = _by_name(archive.infolist())
            _check_byte_order(archive, infos)
            description = _read_small(archive, infos, "data.pkl", MAX_PICKLE_BYTES)
    except _OF_ARCHIVES as error:
        raise CheckpointError(
            f"is not the zip archive that torch.save writes ({error}). A download: is it complete? "
            f"Written by torch before 1.6: {SAVE_AGAIN}"
        ) from None
    records = {name: _record(name, info, file) for name, info in infos.items() if name.startswith("data/")}
    for record in records.values():
        if record.start + record.size > file_bytes:
            raise CheckpointError(
                f"record {record.name!r} ends at byte {record.start + record.size}, the file at {file_bytes}; damaged?"
            )
    return description, records


def _by_name(infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The entries without the folder they are all in."""
    folder = infos[0].filename.partition("/")[0] + "/" if infos else ""
    found = {info.filename.removeprefix(folder): info for info in infos}
    if len(found) != len(infos):
        raise CheckpointError("names a record twice; which one counts is not said")
    return found


def _check_byte_order(archive: zipfile.ZipFile, infos: Mapping[str, zipfile.ZipInfo]) -> None:
    if "byteorder" in infos:
        order = _read_small(archive, infos, "byteorder", 16)
        if order != b"little":
            raise CheckpointError(f"its numbers are in the byte order {order!r}, expected b'little'; {SAVE_AGAIN}")


def _read_small(archive: zipfile.ZipFile, infos: Mapping[str, zipfile.ZipInfo], name: str, limit: int) -> bytes:
    info = infos.get(name)
    if info is None:
        raise CheckpointError(f"has no record {name!r}; torch.save writes one")
    if info.file_size > limit:
        raise CheckpointError(f"record {name!r} holds {info.file_size} bytes, limit is {limit}; damaged?")
    return archive.read(info)


def _record(name: str, info: zipfile.ZipInfo, file: BinaryIO) -> _Record:
    is_encrypted = info.flag_bits & 1
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    return _Record(name=name, start=_data_start(info, file), size=info.file_size, is_plain=stored and not is_encrypted)


def _data_start(info: zipfile.ZipInfo, file: BinaryIO) -> int:
    """The data lie behind the local header, whose name and extra field may be longer than the directory's."""
    file.seek(info.header_offset)
    local = file.read(_LOCAL_HEADER_BYTES)
    if len(local) < _LOCAL_HEADER_BYTES or not local.startswith(_LOCAL_MAGIC):
        raise CheckpointError(f"record {info.filename!r} is not at byte {info.header_offset} as listed; damaged?")
    name_bytes, extra_bytes = struct.unpack("<HH", local[-4:])
    return info.header_offset + _LOCAL_HEADER_BYTES + int(name_bytes) + int(extra_bytes)


def _find_tensors(description: bytes, records: Mapping[str, _Record], path: Path) -> tuple[StoredTensor, ...]:
    skeleton, names = _skeleton(description, records)
    state = load_tensors(skeleton, device="meta")
    found: list[StoredTensor] = []
    problems: list[str] = []
    for name, tensor in state.items():
        record = _record_of(tensor, names, records)
        problem = _problem(name, tensor, record)
        if problem or record is None:
            problems.append(f"{name!r} {problem}")
        else:
            found.append(_stored(name, tensor, record, path))
    if problems:
        raise CheckpointError(f"holds tensors that cannot be read as they lie; {SAVE_AGAIN}:\n{listing(problems)}")
    return tuple(found)


def _skeleton(description: bytes, names: Iterable[str]) -> tuple[BinaryIO, dict[int, str]]:
    """An archive with the pickle and empty records, and the records' names by the offsets that torch will note."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"data.pkl": description, "version": b"3", **dict.fromkeys(names, b"")}.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    places = {_data_start(info, buffer): info.filename.removeprefix("archive/") for info in archive.infolist()}
    buffer.seek(0)
    return buffer, places


def _record_of(tensor: torch.Tensor, names: Mapping[int, str], records: Mapping[str, _Record]) -> _Record | None:
    if tensor.layout is not torch.strided:
        return None
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return None if place is None else records[names[place]]


def _problem(name: str, tensor: torch.Tensor, record: _Record | None) -> str:
    """Why the tensor is not `shape` elements of `dtype`, row-major, in its record; "" if it is."""
    if not _is_writable_name(name):
        return "has a name that a safetensors file cannot hold"
    if _code(tensor) is None:
        return f"is {tensor.dtype}, a type that is not read"
    if record is None:
        return f"is {tensor.layout} and has no bytes in the file that torch {torch.__version__} tells of"
    if tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        return f"is a view (shape {tuple(tensor.shape)}, strides {tensor.stride()}), expected contiguous elements"
    if not record.is_plain:
        return f"lies in record {record.name!r}, which is compressed or encrypted"
    end = (tensor.storage_offset() + math.prod(tensor.shape)) * tensor.element_size()
    return f"ends at byte {end} of record {record.name!r}, which has {record.size}" if end > record.size else ""


def _is_writable_name(name: str) -> bool:
    return name != "__metadata__" and not any("\ud800" <= letter <= "\udfff" for letter in name)


def _code(tensor: torch.Tensor) -> str | None:
    return CODE_BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))


def _stored(name: str, tensor: torch.Tensor, record: _Record, path: Path) -> StoredTensor:
    code = _code(tensor)
    assert code is not None
    offset = record.start + int(tensor.storage_offset()) * tensor.element_size()
    return StoredTensor(name=name, dtype=code, shape=tuple(tensor.shape), path=path, offset=offset)
