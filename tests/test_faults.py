"""For every call of a small merge, disturbed: what is on the disk is nothing, resumable or complete, and ends well."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loraweld
from fakes import contents, llama_shapes, random_factors, random_tensors, write_adapter, write_base
from faults import WAYS, Disturbed
from fork_server import ForkServer
from loraweld.checkpoint.reader import MAX_OPEN
from loraweld.errors import LoraweldError, OutputError
from loraweld.sinks.folder import FolderSink
from processes import PATIENCE_S, read_all, stalled_merge
from scenes import Scene

pytestmark = pytest.mark.skipif(os.name == "nt", reason="disturbs calls of POSIX")


def count_calls(scene: Scene) -> list[str]:
    """The calls of an undisturbed merge."""
    with pytest.MonkeyPatch.context() as patch:
        calls = Disturbed(patch, at=None)
        scene.merge(workers=1)
    scene.check_finished()
    shutil.rmtree(scene.out)
    return calls.made


def ends_well(scene: Scene) -> None:
    """The same command, undisturbed: the bytes are those of a merge that nothing ever disturbed."""
    scene.merge(workers=1)
    scene.check_finished()
    shutil.rmtree(scene.out)


@pytest.mark.parametrize("way", WAYS)
def test_whatever_call_is_disturbed_the_merge_can_be_finished(way: str, tiny_scene: Scene, small_items: None) -> None:
    """All calls of a small merge, one after the other: after each the state is absent or complete.

    An error is one message, never a traceback of another kind; short and slow calls are no errors.
    """
    scene = tiny_scene
    calls = count_calls(scene)
    assert {"preadv", "pwrite", "fsync", "fdatasync", "replace", "mkdir", "open", "ftruncate"} <= set(calls)
    failed = 0
    for number in range(len(calls)):
        with pytest.MonkeyPatch.context() as patch:
            disturbed = Disturbed(patch, at=number, way=WAYS[way])
            try:
                scene.merge(workers=1)
            except LoraweldError:
                failed += 1
            assert len(disturbed.made) > number
        assert scene.state() in (None, scene.files), (number, calls[number])
        ends_well(scene)
    assert (failed == 0) == (way in ("short", "slow"))
    assert failed > len(calls) / 2 or way in ("short", "slow")


@pytest.mark.parametrize("way", ["EIO", "ENOSPC"])
def test_a_fault_while_replacing_leaves_a_model(way: str, tiny_scene: Scene, small_items: None) -> None:
    """With --overwrite: the old model or the new one, whatever call fails."""
    scene = tiny_scene
    shutil.copytree(scene.base, scene.out)
    with pytest.MonkeyPatch.context() as patch:
        calls = Disturbed(patch, at=None)
        scene.merge(workers=1, overwrite=True)
    shutil.rmtree(scene.out)
    for number in range(len(calls.made)):
        shutil.copytree(scene.base, scene.out)
        with pytest.MonkeyPatch.context() as patch:
            Disturbed(patch, at=number, way=WAYS[way])
            try:
                scene.merge(workers=1, overwrite=True)
            except LoraweldError:
                assert scene.state() in (contents(scene.base), scene.files), (number, calls.made[number])
        scene.merge(workers=1, overwrite=True)
        scene.check_finished()
        shutil.rmtree(scene.out)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    started = ForkServer()
    yield started
    started.close()


def test_death_before_any_call_is_recovered_from(server: ForkServer, tiny_scene: Scene) -> None:
    """Every read, write, sync, rename and removal is once the last call of the process."""
    scene = tiny_scene
    options = {"adapter": scene.adapter, "base": scene.base, "output": scene.out, "workers": 1}
    sizes = {"item_bytes": 4096, "checkpoint_bytes": 8192}
    step, killed, resumed = 0, True, 0
    while killed:
        killed = server.merge(kill_at_step=step, counts_reads_and_writes=True, **sizes, **options).killed
        assert scene.state() in (None, scene.files)
        again = server.merge(**sizes, **options)
        assert again.error == ""
        scene.check_finished()
        resumed += again.report["resumed_bytes"] > 0
        shutil.rmtree(scene.out)
        step += 1
    assert step > 40
    assert resumed > 5


def clean_stop(scene: Scene, number: int) -> tuple[int, str]:
    """Start the command, send it a signal when part of the weights are written; return (exit code, stderr)."""
    arguments = [scene.adapter, "--base", scene.base, "-o", scene.out]
    with stalled_merge(arguments, scene.out) as (process, stderr):
        process.send_signal(number)
        shown = read_all(stderr)
        return process.wait(PATIENCE_S), shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(number: int, scene: Scene) -> None:
    """SIGTERM and SIGINT: exit code 130, one line, no traceback, and the same command continues."""
    code, shown = clean_stop(scene, number)
    assert code == 130
    assert "interrupted; the same command continues" in shown
    assert "Traceback" not in shown
    assert scene.state() is None
    scene.merge()
    scene.check_finished()


LIMITED = """
import resource, sys
import loraweld, loraweld.execute.fill
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
loraweld.merge(sys.argv[1], base=sys.argv[2], output=sys.argv[3])
"""


def test_few_descriptors_are_enough(tmp_path: Path) -> None:
    """A base of 64 files where a process may have 32 open."""
    pytest.importorskip("resource")
    shapes = llama_shapes(layers=10, hidden=16, intermediate=24, vocab=32)
    assert len(shapes) > 64 > 32 > MAX_OPEN
    base = write_base(tmp_path / "base", random_tensors(shapes, torch.bfloat16), num_files=64)
    adapter = write_adapter(tmp_path / "adapter", random_factors({n: s for n, s in shapes.items() if "proj" in n}))
    command = [sys.executable, "-c", LIMITED, adapter, base, tmp_path / "limited"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loraweld.merge(adapter, base=base, output=tmp_path / "out")
    assert contents(tmp_path / "limited") == contents(tmp_path / "out")


def test_a_journal_does_not_depend_on_clocks(scene: Scene, small_items: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps between a kill and the next run, and staged files are of any time: it continues all the same."""
    with monkeypatch.context() as patch:
        patch.setattr(FolderSink, "publish", lambda sink: (_ for _ in ()).throw(OSError(errno.EIO, "")))
        with pytest.raises(OutputError):
            scene.merge()
    for number, path in enumerate(sorted(scene.staging.rglob("*"))):
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    monkeypatch.setattr(time, "time", lambda: 1.0)
    monkeypatch.setattr(time, "time_ns", lambda: 10**9)
    assert scene.merge().resumed_bytes > 0
    scene.check_finished()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nothing can be written to."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: a read-only file system; only root where mounts are permitted can make one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_an_output_on_a_read_only_file_system_is_refused(read_only: Path, undisturbed: Scene) -> None:
    """The system's own EROFS is one message that names the output."""
    scene = replace(undisturbed, out=read_only / "model")
    with pytest.raises(OutputError, match=r"model: cannot be written: Read-only file system"):
        scene.merge()
    assert list(read_only.iterdir()) == []
