"""The checksums in loraweld.json are those of the bytes in the files; verify tells a file that was changed since."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loraweld
from fakes import llama_shapes, random_factors, random_tensors, write_adapter, write_base
from loraweld.execute.checksums import joined
from loraweld.planning import memory

SHAPES = llama_shapes(hidden=64, intermediate=96, layers=2, vocab=100)
WAYS: dict[str, dict[str, Any]] = {
    "16 bit": {},
    "another dtype": {"dtype": "float16"},
    "stochastic rounding": {"rounding": "stochastic", "seed": 3},
    "4 bit": {"save_method": "merged_4bit"},
    "8 bit": {"save_method": "merged_8bit"},
    "FP8": {"save_method": "merged_fp8"},
}


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, read by the format's definition."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = data[start + begin : start + end]
    return found


def recorded(folder: Path) -> dict[str, int]:
    record = json.loads((folder / "loraweld.json").read_text())
    return {name: int(value, 16) for name, value in record["tensors_crc32"].items()}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A base in two files, and an adapter on one of its layers."""
    write_base(tmp_path / "base", random_tensors(SHAPES, torch.bfloat16), num_files=2)
    edited = {name: shape for name, shape in SHAPES.items() if "layers.0" in name and "proj" in name}
    write_adapter(tmp_path / "adapter", random_factors(edited, rank=4))
    return tmp_path


@pytest.mark.parametrize("item_bytes", [4096, 1 << 25])
@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_that_was_made_has_the_checksum_of_its_bytes(
    way: str, item_bytes: int, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that were kept the record has none; how the work was cut does not show."""
    monkeypatch.setattr(memory, "ITEM_BYTES", item_bytes)
    for name in ("BUFFER_BYTES", "MIN_BUFFER_BYTES"):
        monkeypatch.setattr(memory, name, min(item_bytes, getattr(memory, name)))
    loraweld.merge(inputs / "adapter", base=inputs / "base", output=inputs / "out", **WAYS[way])
    written, base = tensors_of(inputs / "out"), tensors_of(inputs / "base")
    found = recorded(inputs / "out")
    assert found == {name: zlib.crc32(written[name]) for name in found}
    assert {name for name, data in written.items() if data != base.get(name)} <= found.keys()
    if way == "16 bit":
        assert all("layers.0" in name and "proj" in name for name in found)


def test_a_repeated_merge_of_a_changed_file_is_not_taken_for_the_same(inputs: Path) -> None:
    """The record alone does not make an output ours; and a record with other checksums is not the record."""
    options: dict[str, Any] = {"base": inputs / "base", "output": inputs / "out"}
    loraweld.merge(inputs / "adapter", **options)
    record = inputs / "out" / "loraweld.json"
    text = record.read_text()
    assert loraweld.merge(inputs / "adapter", **options).was_there
    name, value = next(iter(json.loads(text)["tensors_crc32"].items()))
    record.write_text(text.replace(f'"{name}": "{value}"', f'"{name}": "00000000"'))
    with pytest.raises(loraweld.LoraweldError, match=r"first difference: loraweld\.json"):
        loraweld.merge(inputs / "adapter", **options)


@pytest.mark.parametrize("where", ["first byte", "last byte"])
def test_a_flipped_bit_is_told(where: str, inputs: Path) -> None:
    """Also the lowest bit of a number, which is within any tolerance."""
    loraweld.merge(inputs / "adapter", base=inputs / "base", output=inputs / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    data = tensors_of(inputs / "out")[name]
    (path,) = [path for path in (inputs / "out").glob("*.safetensors") if data in path.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(data) + (0 if where == "first byte" else len(data) - 2)] ^= 1
    path.write_bytes(content)
    report = loraweld.verify(inputs / "out", base=inputs / "base", adapter=inputs / "adapter")
    assert [(finding.check, finding.where) for finding in report.findings] == [("checksum", name)]


@pytest.mark.parametrize(
    "noted", [None, 3, ["a"], {"model.norm.weight": None}, {"gone": "00000000"}, {"lm_head.weight": "é" * 999}]
)
def test_a_strangers_record_ends_in_findings(noted: Any, inputs: Path) -> None:
    loraweld.merge(inputs / "adapter", base=inputs / "base", output=inputs / "out")
    path = inputs / "out" / "loraweld.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tensors_crc32": noted}))
    report = loraweld.verify(inputs / "out", base=inputs / "base", adapter=inputs / "adapter")
    stored = tensors_of(inputs / "out")
    wrong = [name for name in noted if name in stored] if isinstance(noted, dict) else []
    assert [(finding.check, finding.where) for finding in report.findings] == [("checksum", name) for name in wrong]


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_joined_checksums_are_those_of_the_whole(pieces: list[bytes]) -> None:
    value = 0
    for piece in pieces:
        value = joined(value, zlib.crc32(piece), len(piece))
    assert value == zlib.crc32(b"".join(pieces))


def test_lengths_beyond_32_bits_are_joined() -> None:
    """5 GiB of zeros after three bytes, against zlib's own, which goes on from a value."""
    zeros, count = bytes(1 << 26), 5 << 30
    expected, alone = zlib.crc32(b"abc"), 0
    for _ in range(count // len(zeros)):
        expected, alone = zlib.crc32(zeros, expected), zlib.crc32(zeros, alone)
    assert joined(zlib.crc32(b"abc"), alone, count) == expected
