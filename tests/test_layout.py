"""Which tensors lie in which output file, at which offset, under which header and index."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loraweld
import strategies
from fakes import llama_shapes, load_folder, random_factors, random_tensors, write_adapter, write_base
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.header import PAGE_BYTES, build_header, parse_header
from loraweld.checkpoint.stored import SafetensorsFile, StoredTensor
from loraweld.dtypes import num_bytes
from loraweld.errors import CheckpointError
from loraweld.planning.layout import index_file, keep_layout, repack
from loraweld.planning.merge_plan import Recipe, WeightFile
from strategies import Entry

FOLDER = Path("base")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
PT = {"format": "pt"}


def size_of(entry: Entry) -> int:
    return num_bytes(entry[1], math.prod(entry[2]))


def stored_file(name: str, entries: Sequence[Entry], metadata: Mapping[str, str], align_to: int) -> SafetensorsFile:
    """A file that only exists as a value."""
    raw = build_header(entries, metadata, align_to=align_to)
    header = parse_header(raw, len(raw) + sum(map(size_of, entries)))
    tensors = tuple(
        StoredTensor(name=e.name, dtype=e.dtype, shape=e.shape, path=FOLDER / name, offset=len(raw) + e.start)
        for e in header.entries
    )
    file_bytes = len(raw) + header.entries[-1].end
    return SafetensorsFile(
        path=FOLDER / name, file_bytes=file_bytes, tensors=tensors, description=raw, metadata=header.metadata
    )


def base_of(files: Sequence[SafetensorsFile], index: Mapping[str, object] | None = None) -> Base:
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    return Base(
        folder=FOLDER,
        label="base",
        commit=None,
        files=tuple(files),
        index=index,
        config={},
        tensors=tensors,
        stored=tensors,
        aside=(),
    )


@st.composite
def bases(draw: st.DrawFn, *, metadata: st.SearchStrategy[dict[str, str]] = strategies.METADATA) -> Base:
    """One to three files of one or more tensors each; headers of any length modulo a page."""
    entries = draw(strategies.entries(min_size=1))
    ends = sorted({*draw(st.sets(st.integers(1, len(entries)), max_size=2)), len(entries)})
    files = []
    for start, end in pairwise([0, *ends]):
        chosen = draw(metadata)
        align_to = draw(st.integers(0, PAGE_BYTES - 1))
        files.append(stored_file(f"{start}.safetensors", entries[start:end], chosen, align_to))
    return base_of(files)


def copies(base: Base) -> list[Recipe]:
    """Each tensor of the base as it is."""
    return [
        Recipe(name=name, dtype=t.dtype, shape=t.shape, source=t, edits=(), kind="copy")
        for name, t in base.tensors.items()
    ]


def new_recipe(name: str = "a new tensor", num_rows: int = 3) -> Recipe:
    source = StoredTensor(name="x", dtype="F32", shape=(num_rows,), path=Path("adapter"), offset=0)
    return Recipe(name=name, dtype="F32", shape=(num_rows,), source=source, edits=(), kind="new")


def check_files(files: Sequence[WeightFile], recipes: Sequence[Recipe]) -> None:
    """Each header, parsed again, describes exactly what is placed; all recipes are there, each once."""
    assert len({file.name for file in files}) == len(files)
    for file in files:
        header = parse_header(file.header, file.num_bytes)
        assert [(e.name, e.dtype, e.shape, header.data_start + e.start) for e in header.entries] == [
            (p.recipe.name, p.recipe.dtype, p.recipe.shape, p.offset) for p in file.placed
        ]
        assert "format" in header.metadata  # transformers refuses a file without it
    assert sorted(placed_names(files)) == sorted(recipe.name for recipe in recipes)


def placed_names(files: Sequence[WeightFile]) -> list[str]:
    return [placed.recipe.name for file in files for placed in file.placed]


def payload_bytes(file: WeightFile) -> int:
    return sum(placed.recipe.num_bytes for placed in file.placed)


@given(base=bases(), limit=st.integers(1, 400))
def test_shards_hold_each_tensor_once_in_order(base: Base, limit: int) -> None:
    """Nothing is lost, repeated or reordered; only a lone tensor may pass the limit; data starts on a page."""
    recipes = copies(base)
    files = repack(base, recipes, limit)
    check_files(files, recipes)
    assert placed_names(files) == list(base.tensors)
    assert all(payload_bytes(file) <= limit or len(file.placed) == 1 for file in files)
    assert all(len(file.header) % PAGE_BYTES == 0 for file in files)
    count = len(files)
    numbered = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [file.name for file in files] == (numbered if count > 1 else ["model.safetensors"])


@given(base=bases(), limit=st.integers(1, 400))
def test_shards_are_as_few_as_their_order_allows(base: Base, limit: int) -> None:
    """The first tensor of a file would not have fitted into the file before it."""
    files = repack(base, copies(base), limit)
    for before, after in pairwise(files):
        assert payload_bytes(before) + after.placed[0].recipe.num_bytes > limit


@given(base=bases(), limit=st.integers(1, 400))
def test_the_index_tells_where_each_tensor_is(base: Base, limit: int) -> None:
    """Several files have an index with every tensor and their total size; a single file has none."""
    recipes = copies(base)
    files = repack(base, recipes, limit)
    found = index_file(base, files)
    if len(files) == 1:
        assert found == []
        return
    (index,) = found
    content = json.loads(index.text or "")
    assert index.name == "model.safetensors.index.json"
    assert content["weight_map"] == {p.recipe.name: file.name for file in files for p in file.placed}
    assert content["metadata"]["total_size"] == sum(recipe.num_bytes for recipe in recipes)


@given(base=bases(metadata=st.just(PT)))
def test_an_unchanged_layout_keeps_every_header_byte(base: Base) -> None:
    """Names, order, padding and offsets are the base's; a file of which nothing changes is the base's file."""
    files = keep_layout(base, copies(base))
    check_files(files, copies(base))
    assert [file.header for file in files] == [file.description for file in base.files]
    assert [file.name for file in files] == [file.path.name for file in base.files]
    assert [file.same_as for file in files] == [file.path for file in base.files]


@given(base=bases(metadata=st.just(PT)), data=st.data())
def test_an_edit_keeps_the_header_but_not_the_file(base: Base, data: st.DataObject) -> None:
    """A tensor edited in its own dtype leaves the header as it is; only its file is written."""
    recipes = copies(base)
    chosen = data.draw(st.sampled_from(range(len(recipes))))
    recipes[chosen] = replace(recipes[chosen], kind="edit")
    files = keep_layout(base, recipes)
    assert [file.header for file in files] == [file.description for file in base.files]
    path = recipes[chosen].source.path
    assert [file.same_as for file in files] == [None if f.path == path else f.path for f in base.files]


@given(base=bases(), num_rows=st.integers(0, 2000))
def test_a_new_tensor_comes_last_and_data_keeps_its_alignment(base: Base, num_rows: int) -> None:
    """What was there keeps its file, its order and its offset modulo a page; the new tensor ends the last file."""
    recipes = [*copies(base), new_recipe(num_rows=num_rows)]
    files = keep_layout(base, recipes)
    check_files(files, recipes)
    assert placed_names(files) == [*base.tensors, "a new tensor"]
    for file, old in zip(files, base.files, strict=True):
        assert file.name == old.path.name
        pairs = zip(file.placed, old.tensors, strict=False)
        assert all((placed.offset - tensor.offset) % PAGE_BYTES == 0 for placed, tensor in pairs)
        assert {**PT, **old.metadata} == parse_header(file.header, file.num_bytes).metadata


@given(base=bases(), data=st.data())
def test_dropped_tensors_leave_the_others_in_order(base: Base, data: st.DataObject) -> None:
    """A file keeps its name and the order of what is left; a file of which nothing is left disappears."""
    recipes = copies(base)
    kept = data.draw(st.lists(st.sampled_from(recipes), unique_by=lambda r: r.name, min_size=1))
    chosen = [recipe for recipe in recipes if recipe in kept]
    files = keep_layout(base, chosen)
    check_files(files, chosen)
    assert placed_names(files) == [recipe.name for recipe in chosen]
    paths = {recipe.source.path.name for recipe in chosen}
    assert [file.name for file in files] == [file.path.name for file in base.files if file.path.name in paths]


def two_files(index: Mapping[str, object] | None) -> Base:
    files = [stored_file(f"{n}.safetensors", [(n, "F32", (2,)), (n + n, "F32", (3,))], PT, 8) for n in "ab"]
    return base_of(files, index)


WEIGHT_MAP = {"a": "a.safetensors", "aa": "a.safetensors", "b": "b.safetensors", "bb": "b.safetensors"}


def test_an_index_that_is_still_true_is_copied() -> None:
    """The index is the base's file as long as names, places and total are the same."""
    base = two_files({"metadata": {"total_size": 40}, "weight_map": WEIGHT_MAP})
    (index,) = index_file(base, keep_layout(base, copies(base)))
    assert index.source == FOLDER / "model.safetensors.index.json"


@pytest.mark.parametrize("total", [None, 41, "40"])
def test_a_wrong_total_is_corrected(total: object) -> None:
    """total_size is what the tensors take, whatever the base's index says; other metadata stays."""
    base = two_files({"metadata": {"total_size": total, "made_by": "x"}, "weight_map": WEIGHT_MAP})
    (index,) = index_file(base, keep_layout(base, copies(base)))
    assert json.loads(index.text or "")["metadata"] == {"total_size": 40, "made_by": "x"}


def test_a_new_tensor_is_indexed_and_counted() -> None:
    """total_size and total_parameters count the new tensor, the weight map names its file."""
    metadata = {"total_size": 40, "total_parameters": 10}
    base = two_files({"metadata": metadata, "weight_map": WEIGHT_MAP})
    (index,) = index_file(base, keep_layout(base, [*copies(base), new_recipe(num_rows=3)]))
    content = json.loads(index.text or "")
    assert content["metadata"] == {"total_size": 52, "total_parameters": 13}
    assert content["weight_map"] == {**WEIGHT_MAP, "a new tensor": "b.safetensors"}


def test_a_sharded_model_is_one_for_the_library(tmp_path: Path) -> None:
    """Merged into small shards, every tensor reads as it does from the base's own layout."""
    shapes = llama_shapes()
    base = write_base(tmp_path / "base", random_tensors(shapes, torch.bfloat16), num_files=2)
    adapter = write_adapter(tmp_path / "adapter", random_factors(shapes))
    report = loraweld.merge(adapter, output=tmp_path / "small", base=base, max_shard_size="30KB")
    loraweld.merge(adapter, output=tmp_path / "kept", base=base)
    small, kept = load_folder(tmp_path / "small"), load_folder(tmp_path / "kept")
    assert small.keys() == kept.keys() == shapes.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in small.items())
    files = sorted(path.name for path in (tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in small.values())
    assert {*files, "model.safetensors.index.json"} <= set(report.files)


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"max_shard_size": 1}, {"max_shard_size": "1KB"}])
def test_scalars_and_empty_tensors_come_through(options: dict[str, str | int], tmp_path: Path) -> None:
    """Tensors of no elements or no dimensions, first, last and between others, in any layout."""
    tensors = {
        "a": torch.empty(0, 5),
        "b": torch.tensor(2.5, dtype=torch.bfloat16),
        "c": torch.tensor([True, False, True]),
        "d": torch.empty(3, 0, dtype=torch.bfloat16),
        **random_tensors({Q_PROJ: (7, 9)}, torch.bfloat16),
        "x": torch.arange(5),
        "y": torch.empty(0, dtype=torch.int64),
    }
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", random_factors({Q_PROJ: (7, 9)}))
    loraweld.merge(adapter, output=tmp_path / "out", base=base, verify=True, **options)
    merged = load_folder(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in tensors.items()}
    assert [n for n, t in tensors.items() if not torch.equal(merged[n].double(), t.double())] == [Q_PROJ]


def test_weight_files_in_folders_keep_apart(tmp_path: Path) -> None:
    """Two files of one name in two folders of the base are refused, or stay two files that the index finds."""
    shapes = llama_shapes(layers=1)
    tensors = random_tensors(shapes, torch.bfloat16)
    weight_map = {name: f"{'ab'[n % 2]}/model.safetensors" for n, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        path = tmp_path / "base" / file
        path.parent.mkdir(parents=True)
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, path, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = write_adapter(tmp_path / "adapter", random_factors({Q_PROJ: shapes[Q_PROJ]}))
    try:
        loraweld.merge(adapter, output=tmp_path / "out", base=tmp_path / "base")
    except CheckpointError:
        assert not (tmp_path / "out").exists()
        return
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in tensors.items():
        found = load_file(tmp_path / "out" / written[name])[name]
        assert torch.equal(found, tensor) == (name != Q_PROJ)
