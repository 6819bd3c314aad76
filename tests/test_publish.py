"""The output appears complete or not at all: whatever is in its place, whatever the system refuses or lacks."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes import Event, Recorder, contents, fail_at_call
from loraweld import record
from loraweld.errors import CheckpointError, OutputError
from loraweld.sinks import system
from loraweld.sinks.folder import FolderSink
from scenes import Scene

pytestmark = pytest.mark.skipif(os.name == "nt", reason="takes POSIX locks, modes and limits")


LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock_holder(scene: Scene) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of the output place."""
    scene.staging.mkdir()
    lock = scene.staging / "lock"
    with subprocess.Popen([sys.executable, "-c", LOCK, lock], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_merge_into_one_place_is_refused(scene: Scene, lock_holder: subprocess.Popen[str]) -> None:
    """While another process merges into the place nothing of it is touched; afterwards it is free."""
    work = scene.staging / "model" / "model-00001-of-00003.safetensors"
    work.parent.mkdir()
    work.write_bytes(b"of the other merge")
    before = contents(scene.staging)
    for options in ({}, {"overwrite": True}, {"resume": False}):
        with pytest.raises(OutputError, match=r"another merge.*running"):
            scene.merge(**options)
        assert scene.state() is None
        assert contents(scene.staging) == before
    lock_holder.kill()
    lock_holder.wait()
    scene.merge()
    scene.check_finished()


WAITING_MERGE = """
import sys, loraweld

def wait(count):
    print("at work", flush=True)
    sys.stdin.readline()

adapter, base, output = sys.argv[1:]
loraweld.merge(adapter, base=base, output=output, progress=wait)
"""


def test_two_merges_at_once_make_one_model(scene: Scene) -> None:
    """A merge started while another is at work on the same place is refused, and the other ends well."""
    command = [sys.executable, "-c", WAITING_MERGE, scene.adapter, scene.base, scene.out]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "at work\n"
        with pytest.raises(OutputError, match=r"another merge.*running"):
            scene.merge(overwrite=True)
        assert scene.state() is None
        process.communicate()
    assert process.returncode == 0
    scene.check_finished()


def test_the_lock_of_a_dead_process_does_not_block(scene: Scene, lock_holder: subprocess.Popen[str]) -> None:
    """The lock file stays when its process is killed; the lock does not."""
    lock_holder.send_signal(signal.SIGKILL)
    lock_holder.wait()
    assert (scene.staging / "lock").exists()
    scene.merge()
    scene.check_finished()


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        *[("write_at", call) for call in (0, 5, 17)],
        *[("open_for_writing", call) for call in (0, 1)],
        *[("make_durable", call) for call in (0, 4)],
        *[("copy_file", call) for call in (0, 1)],
        *[("finish", call) for call in (0, 1)],
    ],
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_can_be_continued(
    verb: str, call: int, code: int, scene: Scene, small_items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a quota or a failing one ends in an OutputError that says so; nothing is published.

    With room again, the same call makes the same bytes, and what had become durable is not made again.
    """
    with monkeypatch.context() as patch:
        failing = fail_at_call(getattr(system, verb), call, OSError(code, os.strerror(code)))
        patch.setattr(system, verb, failing)
        with pytest.raises(OutputError, match="cannot be written" if code == errno.EIO else "disk is full"):
            scene.merge(workers=1)
    assert scene.state() is None
    again = scene.merge()
    scene.check_finished()
    assert again.resumed_bytes > 0 or (verb, call) not in {("write_at", 17), ("make_durable", 4), ("finish", 1)}


def test_weights_are_written_while_the_adapter_is_hashed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of a large adapter takes seconds; only what notes or compares it waits."""
    writing, file_sha256, write_at = threading.Event(), record.file_sha256, FolderSink.write_at

    def slow(path: Path) -> str:
        assert writing.wait(60)
        return file_sha256(path)

    def tell(sink: FolderSink, *place: Any) -> None:
        writing.set()
        write_at(sink, *place)

    monkeypatch.setattr(record, "file_sha256", slow)
    monkeypatch.setattr(FolderSink, "write_at", tell)
    scene.merge()
    scene.check_finished()


def test_an_adapter_that_cannot_be_hashed_ends_the_merge(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though weights are written by then: nothing appears, nothing is left."""

    def failing(path: Path) -> str:
        raise CheckpointError("cannot be read: Input/output error", path=path)

    with monkeypatch.context() as patch:
        patch.setattr(record, "file_sha256", failing)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read"):
            scene.merge()
    assert list(scene.out.parent.iterdir()) == []
    scene.merge()
    scene.check_finished()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: a disk that is really full; only root where mounts are permitted can make one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Path, undisturbed: Scene, small_items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own ENOSPC, after a plan that still saw room; with a larger disk the merge continues."""
    scene = replace(undisturbed, out=small_disk / "model")
    assert sum(map(len, scene.files.values())) > 300_000
    with monkeypatch.context() as patch:
        patch.setattr("loraweld.planning.build.free_bytes", lambda output: 10**9)
        with pytest.raises(OutputError, match=r"disk is full.*the same command continues"):
            scene.merge(workers=1)
    assert scene.state() is None
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert scene.merge().resumed_bytes > 0
    scene.check_finished()


def test_a_limit_on_file_sizes(scene: Scene) -> None:
    """Another real refusal of the system, without a special disk: files may not grow beyond 64 KiB."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            scene.merge()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert scene.state() is None
    scene.merge()
    scene.check_finished()


def test_a_disk_too_small_for_the_plan_is_refused_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan knows the size of the output: without room not even a hidden folder is made."""
    needed = sum(map(len, scene.files.values()))
    monkeypatch.setattr("loraweld.planning.build.free_bytes", lambda output: needed // 2)
    with pytest.raises(OutputError, match="free"):
        scene.merge()
    assert list(scene.out.parent.iterdir()) == []


def test_what_is_there_needs_no_room(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished merge run again only compares: a full disk does not matter."""
    scene.merge()
    monkeypatch.setattr("loraweld.planning.build.free_bytes", lambda output: 0)
    assert scene.merge().was_there
    scene.check_finished()


def test_what_is_staged_counts_as_room(scene: Scene, small_items: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a killed run has its room already: a resumed merge asks only for what is missing."""
    with monkeypatch.context() as patch:
        patch.setattr(FolderSink, "publish", fail_at_call(FolderSink.publish, 0, OSError(errno.EIO, "")))
        with pytest.raises(OutputError):
            scene.merge()
    staged = sum(map(len, contents(scene.staging).values()))
    free = sum(map(len, scene.files.values())) - staged + (64 << 10)
    monkeypatch.setattr("loraweld.planning.build.free_bytes", lambda output: free)
    assert scene.merge().resumed_bytes > 0
    scene.check_finished()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_in_the_output_place_meanwhile_is_kept(overwrite: bool, scene: Scene) -> None:
    """Without --overwrite nothing is ever replaced, not even what was not there when the merge began."""

    def somebody_else_writes(count: int) -> None:
        scene.out.mkdir(exist_ok=True)
        (scene.out / "thesis.txt").write_text("the only copy")

    if overwrite:
        scene.merge(overwrite=True, progress=somebody_else_writes)
        scene.check_finished()
        return
    with pytest.raises(OutputError, match="--overwrite"):
        scene.merge(progress=somebody_else_writes)
    assert scene.state() == {"thesis.txt": b"the only copy"}
    shutil.rmtree(scene.out)
    scene.merge()
    scene.check_finished()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_taken_is_left_alone(overwrite: bool, scene: Scene) -> None:
    """Files in the output place are replaced with --overwrite only; an empty folder is no obstacle."""
    scene.out.mkdir()
    (scene.out / "notes.txt").write_text("old")
    if overwrite:
        scene.merge(overwrite=True)
    else:
        with pytest.raises(OutputError, match="--overwrite"):
            scene.merge()
        assert scene.state() == {"notes.txt": b"old"}
        (scene.out / "notes.txt").unlink()
        scene.merge()
    scene.check_finished()


def short_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reads, writes and copies less than it is asked to."""
    pwrite, preadv, copy = os.pwrite, os.preadv, os.copy_file_range
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:4096], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:1001]], offset))
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *offsets: copy(a, b, min(count, 999), *offsets))


def no_direct_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system has no O_DIRECT."""
    monkeypatch.delattr(os, "O_DIRECT")


def no_positioned_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has neither pread nor pwrite, and lets other threads run between a seek and what follows."""
    lseek = os.lseek
    monkeypatch.setattr(os, "lseek", lambda *arguments: (lseek(*arguments), time.sleep(0.001))[0])
    for name in ("pwrite", "preadv", "copy_file_range", "fdatasync", "O_DIRECT"):
        monkeypatch.delattr(os, name)


def no_kernel_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in the kernel are refused, as between some file systems."""

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)


def kernel_copy_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in the kernel do a part and then nothing more, as on some virtual file systems."""
    copy, calls = os.copy_file_range, itertools.count()
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *o: 0 if next(calls) % 2 else copy(a, b, 777, *o))


@pytest.mark.skipif(sys.platform != "linux", reason="takes away what Linux has")
@pytest.mark.parametrize(
    "system_lacks", [short_counts, no_direct_writes, no_positioned_io, no_kernel_copy, kernel_copy_stops]
)
def test_a_poorer_system_makes_the_same_bytes(
    system_lacks: Callable[[pytest.MonkeyPatch], None], scene: Scene, small_items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system lacks costs speed and nothing else."""
    system_lacks(monkeypatch)
    scene.merge(workers=4)
    scene.check_finished()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_new_files(mask: int, scene: Scene, small_items: None) -> None:
    """0666 less the umask, folders 0777 less it: also for copies, whatever the mode of what they are copied from."""
    before = os.umask(mask)
    try:
        scene.merge()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in scene.out.iterdir()} == {0o666 & ~mask}
    assert scene.out.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_promised_before_it_is_durable(
    workers: int, overwrite: bool, scene: Scene, small_items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written → synced → journalled, item by item; all files and folders synced → renamed → parent synced."""
    if overwrite:
        shutil.copytree(scene.base, scene.out)
    recorder = Recorder(monkeypatch)
    scene.merge(workers=workers, overwrite=overwrite)
    scene.check_finished()
    inodes = {path.name: path.stat().st_ino for path in scene.out.iterdir()}
    appends = [event for event in recorder.events if event.kind == "journal"]
    assert len(appends) > 3
    for append in appends:
        before = recorder.events[: recorder.events.index(append)]
        for key in append.keys:
            check_item_was_durable(before, key, inodes)
            check_name_was_durable(before, inodes[key.rsplit(":", 2)[0]], scene.out.stat().st_ino)
    published = recorder.index_of("publish", scene.out.stat().st_ino)
    for name, inode in inodes.items():
        check_file_was_durable(recorder.events[:published], inode, len(scene.files[name]))
        assert not [event for event in recorder.events[published:] if event.inode == inode and event.kind == "write"]
    files_synced = max(recorder.index_of("synced", inode) for inode in inodes.values())
    assert files_synced < recorder.index_of("synced", scene.out.stat().st_ino) < published
    assert published < recorder.index_of("synced", scene.out.parent.stat().st_ino)


def check_item_was_durable(before: list[Event], key: str, inodes: dict[str, int]) -> None:
    """Between the last write of an item and its line in the journal lies a whole sync of its file."""
    name, start, _ = key.rsplit(":", 2)
    written = max(
        (
            number
            for number, event in enumerate(before)
            if event.kind == "write" and event.inode == inodes[name] and event.offset == int(start)
        ),
        default=0,  # a file copied as a whole is not written in items
    )
    kinds = [event.kind for event in before[written:] if event.inode == inodes[name]]
    assert "synced" in kinds[kinds.index("sync") :]


def check_name_was_durable(before: list[Event], inode: int, folder: int) -> None:
    """The folder was synced after the file had been made: else the file may be gone after a power loss."""
    made = next(number for number, event in enumerate(before) if event.inode == inode)
    assert [event for event in before[made:] if (event.kind, event.inode) == ("synced", folder)]


def check_file_was_durable(events: list[Event], inode: int, size: int) -> None:
    """The last thing that happens to a file is a sync at its final size."""
    last = [event for event in events if event.inode == inode][-1]
    assert (last.kind, last.size) == ("synced", size)


def test_a_direct_write_begins_at_a_block(tmp_path: Path) -> None:
    """Else it would follow a block that was filled up with zeros: a piece of the file would be lost without a word."""
    import fcntl

    descriptor = system.open_for_writing(tmp_path / "file", 3 * system.BLOCK_BYTES)
    if not getattr(os, "O_DIRECT", 0) & fcntl.fcntl(descriptor, fcntl.F_GETFL):
        os.close(descriptor)
        pytest.skip("NO DIRECT WRITE IS TRIED: the file system of the temporary folder has none")
    buffer = memoryview(system.aligned_buffer(system.BLOCK_BYTES))
    with pytest.raises(ValueError, match="a direct write at 2048"):
        system.write_at(descriptor, buffer, 2048, 2048)
    system.write_at(descriptor, buffer, system.BLOCK_BYTES, 2048)
    os.close(descriptor)
