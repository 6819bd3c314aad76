"""How files are cut into items: at tiles, of which none is computed twice if the item behind the border is first."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loraweld
from fakes import PREFIX, random_factors, random_tensors, write_adapter, write_base
from loraweld.checkpoint.reader import Reader
from loraweld.compute.editor import EditSession, Scratch
from loraweld.execute.buffer import Buffer
from loraweld.execute.fill import Filler
from loraweld.execute.items import Item, work_items
from loraweld.execute.sizing import Anywhere
from loraweld.planning import memory
from loraweld.planning.memory import tile_height
from loraweld.planning.merge_plan import MergePlan
from loraweld.preparation import plan_request
from loraweld.request import make_request

BLOCK = 4096
MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
# Rows longer than a block and shorter, some that blocks and tiles cut anywhere, and single numbers.
WIDTHS = {"long rows": (96, 4096), "short rows": (1500, 256), "odd rows": (331, 1001), "one column": (1 << 18, 1)}


@pytest.fixture(autouse=True, params=[1 << 15, 3 << 15], ids=["buffers below tiles", "buffers above tiles"])
def small_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of 128 KiB, tiles of up to 64, buffers of 32 or 96."""
    for name, value in {
        "TILE_ELEMENTS": 1 << 15,
        "ITEM_BYTES": 1 << 17,
        "BUFFER_BYTES": request.param,
        "MIN_BUFFER_BYTES": 1 << 15,
    }.items():
        monkeypatch.setattr(memory, name, value)


@pytest.fixture(params=WIDTHS)
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> MergePlan:
    shapes = {"model.embed_tokens.weight": (333, 64), NAME: WIDTHS[request.param]}
    base = write_base(tmp_path / "base", random_tensors(shapes, torch.bfloat16))
    adapter = write_adapter(tmp_path / "adapter", random_factors({NAME: shapes[NAME]}))
    plan, _ = plan_request(make_request(adapter, base=base, output=tmp_path / "out"))
    return plan


def items_of(plan: MergePlan) -> list[Item]:
    return list(work_items(plan, Anywhere()))


def made(plan: MergePlan, items: Iterable[Item]) -> dict[int, bytes]:
    """The bytes of items by their place in the file, made in this order by one filler."""
    filler = Filler(Reader(), device=torch.device("cpu"), allow_nonfinite=plan.allow_nonfinite)
    scratch, found = Scratch(), {}
    buffer = Buffer(plan.buffer_bytes)
    for item in items:
        for piece in filler.pieces(item, buffer, scratch):
            found[piece.offset] = bytes(buffer.body[: piece.count])
    return found


def test_items_are_the_file_in_blocks(plan: MergePlan) -> None:
    (file,) = plan.weights
    items = items_of(plan)
    assert [item.start for item in items] == [0, *(item.end for item in items[:-1])]
    assert items[-1].end == file.num_bytes
    assert all(item.start % BLOCK == 0 and 0 < item.end - item.start <= plan.item_bytes for item in items)
    assert len(items) > 4


def test_an_item_ends_in_the_first_block_of_a_tile(plan: MergePlan) -> None:
    (placed,) = [one for one in plan.weights[0].placed if one.recipe.edits]
    cols = placed.recipe.shape[1]
    tile_bytes = 2 * cols * tile_height(cols)
    borders = [item.end for item in items_of(plan) if placed.offset + tile_bytes < item.end < placed.end]
    assert borders
    assert all((border - placed.offset) % tile_bytes < BLOCK for border in borders)


def test_a_window_ends_in_the_last_block_of_a_tile(plan: MergePlan) -> None:
    """So that a tile has its place in the buffer, but for less than a block."""
    (placed,) = [one for one in plan.weights[0].placed if one.recipe.edits]
    cols = placed.recipe.shape[1]
    tile_bytes = 2 * cols * tile_height(cols)
    borders = []
    for item in items_of(plan):
        windows = list(item.windows(3 << 15))
        assert [one.start for one in windows] == [item.start, *(one.end for one in windows[:-1])]
        assert windows[-1].end == item.end
        assert all(one.start % BLOCK == 0 and 0 < one.end - one.start <= 3 << 15 for one in windows)
        borders += [one.end for one in windows[:-1] if one.end > placed.offset]
    assert borders
    assert all((placed.offset - border) % tile_bytes < BLOCK for border in borders)


def test_a_tile_is_computed_in_its_place(plan: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where items are made as threads do it, and buffers are larger than tiles."""

    def refused(self: Scratch, count: int) -> memoryview:
        raise AssertionError(f"{count} bytes beside the buffer")

    monkeypatch.setattr(Scratch, "out", refused)
    made(replace(plan, buffer_bytes=3 << 15), reversed(items_of(plan)))


def test_no_tile_is_computed_twice_where_items_are_made_from_behind(
    plan: MergePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As threads do it: an item is begun before the one before it ends. The bytes are those of the other order."""
    computed: list[int] = []
    compute = EditSession.compute

    def counted(self: EditSession, top: int, bottom: int, out: memoryview) -> None:
        computed.append(top)
        compute(self, top, bottom, out)

    monkeypatch.setattr(EditSession, "compute", counted)
    items = items_of(plan)
    in_order = made(plan, items)
    assert len(computed) > len(set(computed)), "no tile is cut: this shows nothing"
    computed.clear()
    assert made(plan, reversed(items)) == in_order
    assert len(computed) == len(set(computed))


def test_the_bytes_are_those_of_one_item(plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(plan, items_of(plan))
    monkeypatch.setattr(memory, "ITEM_BYTES", 1 << 26)
    loraweld.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "one", workers=1)
    assert b"".join(found[place] for place in sorted(found)) == (tmp_path / "one" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "not finite"])
def test_the_order_of_items_does_not_show(kind: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Base and delta cancel, so that many elements are in doubt; which ones, a row of the same tile may decide."""
    rows, cols = 3000, 256
    ((a, b),) = random_factors({NAME: (rows, cols)}, rank=16).values()
    a, b = a.to(stored), b.to(stored)
    base = (-(b.double() @ a.double())).bfloat16()
    magnitudes = torch.full((rows,), 0.3)
    magnitudes[40::64] *= 10
    if kind == "not finite":
        base[40::64] = math.inf
    more = {f"{PREFIX}{MODULE}.lora_magnitude_vector": magnitudes} if kind == "DoRA" else {}
    options = {"use_dora": True} if kind == "DoRA" else {}
    folder = write_base(tmp_path / "base", {"model.embed_tokens.weight": torch.zeros(333, 64).bfloat16(), NAME: base})
    adapter = write_adapter(tmp_path / "adapter", {MODULE: (a, b)}, alpha=16, more=more, **options)
    request = make_request(adapter, base=folder, output=tmp_path / "out", allow_nonfinite=kind == "not finite")
    plan, _ = plan_request(request)
    items = items_of(plan)
    assert len(items) > 4
    assert made(plan, items) == made(plan, reversed(items))
