"""The safetensors header: against the format's own library, and against files that break the rules."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import strategies
from loraweld.checkpoint.header import MAX_HEADER_BYTES, PAGE_BYTES, Header, build_header, header_length, parse_header
from loraweld.checkpoint.stored import read_safetensors
from loraweld.dtypes import DTYPES, num_bytes
from loraweld.errors import CheckpointError
from strategies import Entry

TORCH_CODES = [code for code, dtype in DTYPES.items() if dtype.torch_name]


def parse(file: bytes) -> Header:
    """Parse the header of a whole file as the reader does: its length first."""
    length = header_length(file[:8], len(file))
    return parse_header(file[: 8 + length], len(file))


def payload(entries: list[Entry]) -> list[bytes]:
    """Bytes for each tensor, no two alike for long."""
    sizes = [num_bytes(code, math.prod(shape)) for _, code, shape in entries]
    return [bytes((7 * number + i) % 251 for i in range(size)) for number, size in enumerate(sizes)]


@given(entries=strategies.entries(), metadata=strategies.METADATA, align_to=st.integers(0, 3 * PAGE_BYTES))
def test_the_library_reads_what_is_built(entries: list[Entry], metadata: dict[str, str], align_to: int) -> None:
    """A built header has the tensors in order, the metadata, and data at `align_to` modulo a page."""
    header, data = build_header(entries, metadata, align_to=align_to), payload(entries)
    assert (len(header) - align_to) % PAGE_BYTES == 0
    assert json.loads(header[8:]).get("__metadata__", {}) == metadata
    assert [name for name in json.loads(header[8:]) if name != "__metadata__"] == [name for name, _, _ in entries]
    read = safetensors.deserialize(header + b"".join(data))
    found = {(name, t["dtype"], tuple(t["shape"])): bytes(t["data"]) for name, t in read}
    assert found == dict(zip(entries, data, strict=True))


def as_torch(code: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    dtype = getattr(torch, DTYPES[code].torch_name)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


@given(entries=strategies.entries(codes=TORCH_CODES), metadata=strategies.METADATA)
def test_what_the_library_writes_is_read(entries: list[Entry], metadata: dict[str, str]) -> None:
    """Names, shapes, dtypes, metadata and the place of every byte come back."""
    written = dict(zip(entries, payload(entries), strict=True))
    tensors = {name: as_torch(code, shape, data) for (name, code, shape), data in written.items()}
    file = save(tensors, metadata or None)  # the library's own file for {} and {} is not JSON
    header = parse(file)
    data = file[header.data_start :]
    assert header.metadata == metadata
    assert {(e.name, e.dtype, e.shape): data[e.start : e.end] for e in header.entries} == written
    assert sum(e.end - e.start for e in header.entries) == len(data)


@given(entries=strategies.entries(), metadata=strategies.METADATA, align_to=st.integers(0, PAGE_BYTES))
def test_build_and_parse_are_inverse(entries: list[Entry], metadata: dict[str, str], align_to: int) -> None:
    """Parsing a built header gives back what it was built from, and its very bytes."""
    raw = build_header(entries, metadata, align_to=align_to)
    header = parse(raw + b"".join(payload(entries)))
    assert [(e.name, e.dtype, e.shape) for e in header.entries] == entries
    assert (header.metadata, header.raw, header.data_start) == (metadata, raw, len(raw))


def file_of(body: object, *, data: bytes = b"", length: int | None = None) -> bytes:
    """A file whose header is `body`: JSON text as it stands, or a value to be written as JSON."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 2), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TEXT = json.dumps(entry()).encode()
TWO = b"ab"
HOSTILE = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "length of 2**64 - 1": file_of({}, length=2**64 - 1),
    "length past the end of the file": file_of({}, length=3),
    "no JSON": file_of(b"ceci n'est pas du JSON"),
    "nothing at all": file_of(b""),
    "spaces only": file_of(b"    "),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "byte order mark": file_of(b"\xef\xbb\xbf{}"),
    "a second value": file_of(b"{}{}"),
    "a list": file_of([]),
    "null": file_of(None),
    "nested arrays": file_of(b"[" * 100_000),
    "nested objects": file_of(b'{"a":' * 100_000),
    "a number of 5000 digits": file_of(b'{"a":' + b"9" * 5000 + b"}"),
    "a name twice": file_of(b'{"a":' + TEXT + b',"a":' + TEXT + b"}", data=TWO),
    "metadata twice": file_of(b'{"__metadata__":{},"__metadata__":{}}'),
    "a field twice": file_of(b'{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', data=TWO),
    "a name that is no text": file_of(b'{"\\ud800":' + TEXT + b"}", data=TWO),
    "metadata that is no text": file_of(b'{"__metadata__":{"a":"\\udfff"}}'),
    "a metadata name that is no text": file_of(b'{"__metadata__":{"\\udfff":"a"}}'),
    "overlapping": file_of({"a": entry(), "b": entry(offsets=[1, 3])}, data=b"abc"),
    "same place": file_of({"a": entry(), "b": entry()}, data=TWO),
    "empty tensor inside another": file_of({"a": entry(), "b": entry([0], [1, 1])}, data=TWO),
    "gap between": file_of({"a": entry(), "b": entry(offsets=[3, 5])}, data=b"abcde"),
    "gap before": file_of({"a": entry(offsets=[1, 3])}, data=b"abc"),
    "bytes after": file_of({"a": entry()}, data=b"abc"),
    "bytes without tensors": file_of({}, data=b"a"),
    "truncated": file_of({"a": entry()}, data=b"a"),
    "unknown dtype": file_of({"a": entry(dtype="F7")}, data=TWO),
    "dtype in another case": file_of({"a": entry(dtype="u8")}, data=TWO),
    "dtype is a list": file_of({"a": entry(dtype=["U8"])}, data=TWO),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 2]}}, data=TWO),
    "no shape": file_of({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, data=TWO),
    "no offsets": file_of({"a": {"dtype": "U8", "shape": [2]}}, data=TWO),
    "entry is a list": file_of({"a": [1]}),
    "entry is null": file_of({"a": None}),
    "shape is a number": file_of({"a": entry(2)}, data=TWO),
    "negative size": file_of({"a": entry([-1, -2])}, data=TWO),
    "size is a bool": file_of({"a": entry([True, 2])}, data=TWO),
    "size is a float": file_of({"a": entry([2.0])}, data=TWO),
    "size is NaN": file_of(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', data=TWO),
    "size is null": file_of({"a": entry([None])}, data=TWO),
    "size of 2**64": file_of({"a": entry([2**64])}, data=TWO),
    "size that wraps to 2": file_of({"a": entry([2**63, 2**63, 2])}, data=TWO),
    "size of 4000 digits": file_of({"a": entry([10**4000 - 1])}, data=TWO),
    "too few bytes for the shape": file_of({"a": entry([3])}, data=TWO),
    "too many bytes for the shape": file_of({"a": entry([1])}, data=TWO),
    "too many bytes for the dtype": file_of({"a": entry(dtype="F32")}, data=TWO),
    "end before start": file_of({"a": entry([0], [2, 0])}, data=TWO),
    "negative offsets": file_of({"a": entry(offsets=[-2, 0])}, data=TWO),
    "one offset": file_of({"a": entry(offsets=[0])}, data=TWO),
    "three offsets": file_of({"a": entry(offsets=[0, 1, 2])}, data=TWO),
    "offsets are bools": file_of({"a": entry([1], [False, True])}, data=b"a"),
    "offsets past everything": file_of({"a": entry([2**62], [0, 2**62])}, data=TWO),
    "metadata is a list": file_of({"__metadata__": []}),
    "metadata is text": file_of({"__metadata__": "pt"}),
    "metadata holds a number": file_of({"__metadata__": {"a": 1}}),
    "metadata holds an object": file_of({"__metadata__": {"a": {}}}),
}


@pytest.mark.parametrize("file", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_breaks_the_format_is_refused(file: bytes, tmp_path: Path) -> None:
    """Every broken rule is a CheckpointError that names the file, in few words whatever the file holds."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 500


def test_a_long_header_with_names_twice_is_refused() -> None:
    """Finding what occurs twice takes no longer than reading it: 100,000 names twice are no trap."""
    names = [f'"{number}":0' for number in range(100_000)] * 2
    with pytest.raises(CheckpointError, match="names '0' 2 times"):
        parse(file_of(("{" + ",".join(names) + "}").encode()))


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    """The format's limit holds even where the file is as long as its header says (here a hole of 100 MB)."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, 8 + MAX_HEADER_BYTES + 1)
    with pytest.raises(CheckpointError, match=rf"{path}.*{MAX_HEADER_BYTES + 1}.*limit"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    """A missing file or a folder in place of a file is a CheckpointError with its path."""
    path = tmp_path if kind == "folder" else tmp_path / "missing.safetensors"
    with pytest.raises(CheckpointError, match=str(path)):
        read_safetensors(path)


def check_parsed_or_refused(file: bytes) -> None:
    """Refused, or parsed to tensors that cover the data exactly, with names that can be written again."""
    try:
        header = parse(file)
    except CheckpointError:
        return
    ends = [0, *(e.end for e in header.entries)]
    assert [e.start for e in header.entries] == ends[:-1]
    assert header.data_start + ends[-1] == len(file)
    assert all(e.end - e.start == num_bytes(e.dtype, math.prod(e.shape)) for e in header.entries)
    assert build_header([(e.name, e.dtype, e.shape) for e in header.entries], header.metadata)


@given(file=st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(file: bytes) -> None:
    """Nothing but CheckpointError comes out, whatever goes in."""
    check_parsed_or_refused(file)


@given(body=st.binary(max_size=60) | strategies.json_values().map(lambda v: json.dumps(v).encode()))
def test_any_header_is_parsed_or_refused(body: bytes) -> None:
    """The same for any text or any JSON after a right length."""
    check_parsed_or_refused(file_of(body, data=b"abcd"))


@given(body=strategies.header_like_entries(), num_data=st.integers(0, 8))
def test_any_entries_are_parsed_or_refused(body: bytes, num_data: int) -> None:
    """The same for headers with the right fields and any values."""
    check_parsed_or_refused(file_of(body, data=bytes(num_data)))


@given(data=st.data(), entries=strategies.entries(), metadata=strategies.METADATA)
def test_damaged_files_are_parsed_or_refused(
    data: st.DataObject, entries: list[Entry], metadata: dict[str, str]
) -> None:
    """The same for valid files with a few bytes changed, put in or cut off."""
    file = build_header(entries, metadata)[8:].rstrip()
    whole = file_of(file, data=b"".join(payload(entries)))
    check_parsed_or_refused(data.draw(strategies.damaged(whole)))
    check_parsed_or_refused(file_of(data.draw(strategies.damaged(file)), data=b"".join(payload(entries))))
