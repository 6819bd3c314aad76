"""The safetensors header: bytes to entries and back, with every check of the format. Opens nothing.

A file is `<u64 little-endian length N><N bytes of JSON><data>`; offsets in the JSON count from the first
data byte, tensors lie without gaps, and the JSON may be padded with spaces.

Source: https://huggingface.co/docs/safetensors/en/index#format and safetensors 0.8.0 (limit of 10**8 bytes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeGuard

from loraweld.checkpoint.parsing import parse_json
from loraweld.dtypes import DTYPES, num_bytes
from loraweld.errors import CheckpointError, shortened

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSION = 2**48
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a header: its bytes are `[start, end)` counted from the first data byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header: entries in the order of their bytes; `data_start` is an absolute file offset."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    data_start: int
    raw: bytes


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Return N, the length of the JSON, from the first 8 bytes of a file of `file_bytes` bytes.

    Raises:
        CheckpointError: the file is too short for its header, or the header is over the format's limit.
    """
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"holds {file_bytes} bytes, a safetensors file has at least 8; file truncated?")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"header says {length} bytes, limit is {MAX_HEADER_BYTES}; file damaged?")
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(
            f"header says {length} bytes, the file holds {file_bytes}; a download that did not finish?"
        )
    return length


def parse_header(raw: bytes, file_bytes: int) -> Header:
    """Parse the whole header (length field included) of a file of `file_bytes` bytes.

    Raises:
        CheckpointError: not JSON, an unknown dtype, a wrong shape, or offsets that overlap, leave gaps or
            pass the end of the file.
    """
    body = _json_object(raw[LENGTH_BYTES:])
    metadata = _metadata(body.pop("__metadata__", {}))
    entries = sorted((_entry(name, value) for name, value in body.items()), key=attrgetter("start", "end"))
    _check_contiguous(entries, file_bytes - len(raw))
    return Header(entries=tuple(entries), metadata=metadata, data_start=len(raw), raw=raw)


def build_header(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], *, align_to: int = 0
) -> bytes:
    """Return header bytes (length field included) for tensors (name, dtype, shape) laid out in this order.

    The JSON is padded with spaces so that the data starts at `align_to` modulo 4096: unchanged data then
    keeps its place relative to the file system's blocks, which reflinks and direct writes need.
    """
    body: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + num_bytes(dtype, math.prod(shape))
        body[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    padding = (align_to - LENGTH_BYTES - len(text)) % PAGE_BYTES
    text += b" " * padding
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        body = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"header is not valid JSON ({error}); file damaged?") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"header is a JSON {type(body).__name__}, expected an object")
    return body


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError("header's __metadata__ must map strings to strings")
    return value


def _entry(name: str, value: object) -> Entry:
    if not isinstance(value, dict):
        raise CheckpointError(f"tensor {shortened(name)}: header entry is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {shortened(name)}: unknown dtype {shortened(dtype)}; known are {', '.join(DTYPES)}"
        )
    if not _is_counts(shape):
        raise CheckpointError(f"tensor {shortened(name)}: shape {shortened(shape)} is not a list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"tensor {shortened(name)}: data_offsets {shortened(offsets)} are not [start, end]")
    expected = num_bytes(dtype, math.prod(shape))
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"tensor {shortened(name)}: {dtype} {shortened(shape)} takes {expected} bytes, "
            f"data_offsets hold {offsets[1] - offsets[0]}"
        )
    return Entry(name=name, dtype=DTYPES[dtype].code, shape=tuple(shape), start=offsets[0], end=offsets[1])


def _is_counts(value: object) -> TypeGuard[list[int]]:
    """True for a list of non-negative integers of sane size (a bool is not an integer here)."""
    return (
        isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in value)
    )


def _check_contiguous(entries: list[Entry], data_bytes: int) -> None:
    position = 0
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"tensor {shortened(entry.name)}: starts at {entry.start}, expected {position}: {kind}"
            )
        position = entry.end
    if position != data_bytes:
        raise CheckpointError(
            f"header describes {position} data bytes, the file holds {data_bytes}; truncated or damaged?"
        )
