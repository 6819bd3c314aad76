"""On a file system that shares blocks between files, a merge writes only the blocks that change."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import loraweld
from fakes import contents, llama_shapes, random_factors, random_tensors, write_adapter, write_base

IMAGE_BYTES = 400 << 20


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An XFS on a loop device: needs root and xfsprogs."""
    folder = tmp_path_factory.mktemp("xfs")
    image, place = folder / "image", folder / "mounted"
    place.mkdir()
    if shutil.which("mkfs.xfs") is None or os.geteuid() != 0:
        pytest.skip("NO REFLINK IS TESTED: it takes root and mkfs.xfs (package xfsprogs)")
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, place], check=False).returncode != 0:
        pytest.skip("NO REFLINK IS TESTED: this machine mounts no images")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def used_bytes(place: Path) -> int:
    subprocess.run(["sync", "-f", place], check=True)
    info = os.statvfs(place)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj",)])
def test_only_what_changes_takes_room(targets: tuple[str, ...], xfs: Path, tmp_path: Path) -> None:
    """Attention alone, on two files; the result is that of a merge where nothing is shared."""
    shapes = llama_shapes(layers=4, hidden=512, intermediate=2048, vocab=8192)
    base = write_base(xfs / "base", random_tensors(shapes, torch.bfloat16), num_files=2)
    changed = {name: shape for name, shape in shapes.items() if any(target in name for target in targets)}
    adapter = write_adapter(xfs / "adapter", random_factors(changed))
    before = used_bytes(xfs)
    loraweld.merge(adapter, output=xfs / "out", base=base)
    grown = used_bytes(xfs) - before
    whole = sum(len(data) for data in contents(base).values())
    least = sum(2 * torch.Size(shape).numel() for shape in changed.values())
    assert least <= grown <= 1.2 * least + (1 << 20) < whole / 3
    loraweld.merge(adapter, output=tmp_path / "out", base=base)
    assert contents(xfs / "out") == contents(tmp_path / "out")
    assert loraweld.merge(adapter, output=xfs / "out", base=base).was_there
    for name in ("base", "adapter", "out"):
        shutil.rmtree(xfs / name)


def test_a_killed_merge_of_a_clone_continues(xfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before is known to lie in a clone."""
    from loraweld.execute import run
    from loraweld.planning import memory
    from loraweld.sinks.folder import FolderSink

    monkeypatch.setattr(run, "CHECKPOINT_BYTES", 1 << 20)
    monkeypatch.setattr(memory, "ITEM_BYTES", 1 << 16)
    monkeypatch.setattr(memory, "BUFFER_BYTES", 1 << 14)
    monkeypatch.setattr(memory, "MIN_BUFFER_BYTES", 1 << 14)
    shapes = llama_shapes(layers=4, hidden=512, intermediate=512, vocab=512)
    base = write_base(xfs / "base", random_tensors(shapes, torch.bfloat16), num_files=1)
    adapter = write_adapter(xfs / "adapter", random_factors({n: s for n, s in shapes.items() if "q_proj" in n}))
    write_at, count = FolderSink.write_at, [0]

    def failing(self: FolderSink, *place: object) -> None:
        count[0] += 1
        if count[0] == 20:
            raise OSError(5, "Input/output error")
        write_at(self, *place)

    monkeypatch.setattr(FolderSink, "write_at", failing)
    with pytest.raises(loraweld.OutputError):
        loraweld.merge(adapter, output=xfs / "out", base=base, workers=1)
    report = loraweld.merge(adapter, output=xfs / "out", base=base, workers=1)
    loraweld.merge(adapter, output=tmp_path / "out", base=base)
    assert contents(xfs / "out") == contents(tmp_path / "out") and report.resumed_bytes > 0
    for name in ("base", "adapter", "out"):
        shutil.rmtree(xfs / name)
