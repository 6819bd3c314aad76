"""The output appears complete or not at all, whatever happens on the way, and the same command finishes it."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import loraweld
from fakes import (
    Event,
    Recorder,
    contents,
    fail_at_call,
    llama_shapes,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)
from fork_server import ForkServer, Outcome
from loraweld.errors import OutputError
from loraweld.execute import run
from loraweld.planning import memory
from loraweld.report import MergeReport
from loraweld.sinks import system
from loraweld.sinks.folder import FolderSink

SMALL = {"item_bytes": 16 << 10, "checkpoint_bytes": 32 << 10}
Files = dict[str, bytes]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Inputs and a place for the output, with the files that an undisturbed merge makes."""

    base: Path
    adapter: Path
    out: Path
    files: Files

    @property
    def staging(self) -> Path:
        """Where the output grows, as documented."""
        return self.out.with_name(f".{self.out.name}.loraweld")

    def merge(self, **options: object) -> MergeReport:
        return loraweld.merge(self.adapter, output=self.out, base=self.base, **options)

    def state(self) -> Files | None:
        """The files of the output; None while it is absent. Nothing else may be in sight."""
        seen = [path for path in self.out.parent.iterdir() if not path.name.startswith(".")]
        assert seen in ([], [self.out])
        return contents(self.out) if seen else None

    def check_finished(self) -> None:
        """The output is there, to the byte, and nothing is left beside it."""
        assert self.state() == self.files
        assert list(self.out.parent.iterdir()) == [self.out]


def undisturbed_merge(folder: Path, *, num_files: int, layers: int, **sizes: int) -> Scene:
    """Merge a base of which no adapter touches the last layer, and so perhaps not the last file."""
    shapes = llama_shapes(layers=layers, **sizes)
    base = write_base(folder / "base", random_tensors(shapes, torch.bfloat16), num_files=num_files)
    (base / "tokenizer.json").write_text("{}")
    linears = {name: shape for name, shape in shapes.items() if "proj" in name and f"layers.{layers - 1}." not in name}
    adapter = write_adapter(folder / "adapter", random_factors(linears))
    loraweld.merge(adapter, output=folder / "out", base=base)
    return Scene(base=base, adapter=adapter, out=folder / "out", files=contents(folder / "out"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("undisturbed")
    return undisturbed_merge(folder, num_files=3, layers=4, hidden=64, intermediate=128, vocab=256)


@pytest.fixture(scope="module")
def undisturbed_tiny(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("tiny")
    return undisturbed_merge(folder, num_files=2, layers=2, hidden=16, intermediate=24, vocab=32)


@pytest.fixture
def scene(undisturbed: Scene, tmp_path: Path) -> Scene:
    """A new, empty place."""
    (tmp_path / "place").mkdir()
    return replace(undisturbed, out=tmp_path / "place" / "model")


@pytest.fixture
def tiny_scene(undisturbed_tiny: Scene, tmp_path: Path) -> Scene:
    """A new, empty place for a merge of few steps."""
    (tmp_path / "place").mkdir()
    return replace(undisturbed_tiny, out=tmp_path / "place" / "model")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    started = ForkServer()
    yield started
    started.close()


@pytest.fixture
def small_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many items and many checkpoints, in this process, for a small model."""
    monkeypatch.setattr(run, "CHECKPOINT_BYTES", SMALL["checkpoint_bytes"])
    monkeypatch.setattr(memory, "ITEM_BYTES", SMALL["item_bytes"])
    monkeypatch.setattr(memory, "MIN_ITEM_BYTES", SMALL["item_bytes"])


def run_in(server: ForkServer, scene: Scene, **options: object) -> Outcome:
    outcome = server.merge(**{**SMALL, **scene_options(scene), **options})
    assert outcome.error == ""
    return outcome


def scene_options(scene: Scene) -> dict[str, object]:
    return {"adapter": scene.adapter, "base": scene.base, "output": scene.out, "workers": 2}


def usual_seconds(server: ForkServer, scene: Scene) -> float:
    """The duration of an undisturbed run, the shortest of three."""
    seconds = []
    for _ in range(3):
        seconds.append(run_in(server, scene).seconds)
        scene.check_finished()
        shutil.rmtree(scene.out)
    return min(seconds)


@pytest.mark.slow
def test_a_hundred_kills_leave_no_trace_in_the_output(server: ForkServer, scene: Scene) -> None:
    """Killed at a random moment: the output is absent or complete. Run again: it is complete, byte for byte."""
    moments = random.Random(0)
    duration = usual_seconds(server, scene)
    killed = resumed = 0
    for _ in range(100):
        killed += run_in(server, scene, kill_after_s=moments.uniform(0, duration)).killed
        assert scene.state() in (None, scene.files)
        again = run_in(server, scene)
        scene.check_finished()
        resumed += again.report["resumed_bytes"] > 0
        shutil.rmtree(scene.out)
    assert killed > 50
    assert resumed > 5


@pytest.mark.slow
def test_kills_while_replacing_leave_the_old_or_the_new_model(server: ForkServer, scene: Scene) -> None:
    """With --overwrite there is a complete model at any time: the old one or the new one."""
    moments = random.Random(1)
    old = scene.base
    duration = usual_seconds(server, scene)
    for _ in range(40):
        shutil.copytree(old, scene.out)
        run_in(server, scene, kill_after_s=moments.uniform(0, duration), overwrite=True)
        assert scene.state() in (contents(old), scene.files)
        run_in(server, scene, overwrite=True)
        scene.check_finished()
        shutil.rmtree(scene.out)


def nothing(scene: Scene, server: ForkServer) -> None:
    """Before the merge, or after its kill: all stays as it is."""


def old_model(scene: Scene, server: ForkServer) -> None:
    """The output place holds a model."""
    shutil.copytree(scene.base, scene.out)


def another_killed_merge(scene: Scene, server: ForkServer) -> None:
    """Another merge into the same place, with other file names, was killed when most of it was written."""
    killed = run_in(server, scene, max_shard_size="4KB", kill_at_step=15)
    assert killed.killed
    assert list(scene.staging.rglob("*-00001-of-*"))


def same_killed_merge(scene: Scene, server: ForkServer) -> None:
    """The same merge was killed when most of it was written."""
    assert run_in(server, scene, kill_at_step=12).killed


def output_deleted(scene: Scene, server: ForkServer) -> None:
    """The user deletes the output that the killed run may have left."""
    shutil.rmtree(scene.out, ignore_errors=True)


Happening = Callable[[Scene, ForkServer], None]


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        (nothing, nothing, {}),
        (nothing, output_deleted, {}),
        (same_killed_merge, nothing, {"resume": False}),
        (another_killed_merge, nothing, {}),
        (old_model, nothing, {"overwrite": True}),
        (old_model, output_deleted, {"overwrite": True}),
        (old_model, nothing, {"overwrite": True, "can_exchange": False}),
        (old_model, output_deleted, {"overwrite": True, "can_exchange": False}),
    ],
)
def test_a_kill_before_any_step_is_recovered_from(
    before: Happening, after: Happening, options: dict[str, bool], server: ForkServer, tiny_scene: Scene
) -> None:
    """Every sync, rename and removal is once the moment of the kill; the same command always ends well.

    Only a system without atomic exchange of folders has a moment without any model, while it replaces one.
    """
    scene = tiny_scene
    old = contents(scene.base) if "overwrite" in options else None
    allowed = [scene.files, old] if "can_exchange" not in options else [scene.files, old, None]
    again = {name: value for name, value in options.items() if name != "resume"}
    step, killed = 0, True
    while killed:
        before(scene, server)
        killed = run_in(server, scene, kill_at_step=step, workers=1, **options).killed
        assert scene.state() in allowed
        after(scene, server)
        run_in(server, scene, workers=1, **again)
        scene.check_finished()
        shutil.rmtree(scene.out)
        step += 1
    assert step > 20


@pytest.mark.slow
def test_the_killed_command_continues(scene: Scene) -> None:
    """The real command, killed five times soon after it began to write, and the last time run again."""
    arguments = ["merge", scene.adapter, "--base", scene.base, "-o", scene.out]
    command = [sys.executable, "-m", "loraweld", *map(str, arguments), "--quiet"]
    for number in range(5):
        shutil.rmtree(scene.staging, ignore_errors=True)
        while not was_killed_at_work(command, scene, delay_s=0.004 * number):
            scene.check_finished()  # it was faster
            shutil.rmtree(scene.out)
        assert scene.state() in (None, scene.files)
    subprocess.run(command, check=True)
    scene.check_finished()


def was_killed_at_work(command: list[str], scene: Scene, *, delay_s: float) -> bool:
    """Start the command, kill it a little after it has created a weight file; False if it had ended by then."""
    with subprocess.Popen(command) as process:
        while process.poll() is None and not list(scene.staging.glob("model/*.safetensors")):
            time.sleep(0.001)
        time.sleep(delay_s)
        process.kill()
    return process.returncode == -signal.SIGKILL


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


def own_inputs(scene: Scene, folder: Path) -> Scene:
    """The scene with inputs that a test may change, and with no expectation."""
    shutil.copytree(scene.base, folder / "base")
    shutil.copytree(scene.adapter, folder / "adapter")
    return replace(scene, base=folder / "base", adapter=folder / "adapter", files={})


def flip_last_byte(path: Path, *, keep_time: bool) -> None:
    """Change a value and nothing else of a file, not even its size."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=times)


@pytest.mark.parametrize(
    ("changed", "keep_time"),
    [
        ("adapter/adapter_model.safetensors", True),
        ("base/model-00001-of-00003.safetensors", False),
        ("base/tokenizer.json", False),
    ],
)
def test_changed_inputs_are_not_continued(
    changed: str, keep_time: bool, server: ForkServer, scene: Scene, tmp_path: Path
) -> None:
    """An input rewritten with the same size after the kill: the merge starts again and is that of the new input."""
    scene = own_inputs(scene, tmp_path)
    assert run_in(server, scene, kill_at_step=30).killed
    flip_last_byte(tmp_path / changed, keep_time=keep_time)
    again = run_in(server, scene)
    assert again.report["resumed_bytes"] == 0
    loraweld.merge(scene.adapter, output=tmp_path / "expected", base=scene.base)
    assert scene.state() == contents(tmp_path / "expected")


@pytest.mark.parametrize(("resume", "continues"), [(True, True), (False, False)])
def test_resume_can_be_declined(resume: bool, continues: bool, server: ForkServer, scene: Scene) -> None:
    """resume=False starts afresh; both ways end with the same bytes."""
    assert run_in(server, scene, kill_at_step=30).killed
    again = run_in(server, scene, resume=resume)
    assert (again.report["resumed_bytes"] > 0) == continues
    scene.check_finished()


@pytest.mark.parametrize("damage", ["cut", "garbage", "no newline", "no journal"])
def test_a_damaged_journal_is_not_believed(damage: str, server: ForkServer, scene: Scene) -> None:
    """A torn last line is ignored, anything else in the journal's place starts the merge again."""
    assert run_in(server, scene, kill_at_step=30).killed
    journal = scene.staging / "journal"
    data = journal.read_bytes()
    damaged = {"cut": data[:-5], "garbage": b"\0" * len(data), "no newline": data[:20]}
    if damage == "no journal":
        journal.unlink()
    else:
        journal.write_bytes(damaged[damage])
    again = run_in(server, scene)
    scene.check_finished()
    assert (again.report["resumed_bytes"] > 0) == (damage == "cut")


@pytest.mark.parametrize("cut_to", [None, 5000])
def test_a_staged_file_that_is_not_whole_is_made_again(cut_to: int | None, server: ForkServer, scene: Scene) -> None:
    """The journal is not believed against what is there: files gone or cut after the kill are made anew."""
    assert run_in(server, scene, kill_at_step=30, workers=1).killed
    staged = sorted(scene.staging.glob("model/*.safetensors"))
    assert len(staged) > 1
    for path in staged:
        if cut_to is None:
            path.unlink()
        else:
            os.truncate(path, cut_to)
    run_in(server, scene)
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


@pytest.mark.parametrize("name", ["a b", "m[1]", "%s{}", "-o", "модель", "x" * 200])
def test_any_name_of_an_output_can_be_finished(name: str, server: ForkServer, scene: Scene) -> None:
    """Killed while it cleans up, then run again: no name of an output is mistaken for a pattern or an option."""
    scene = replace(scene, out=scene.out.with_name(name))
    last = run_in(server, scene).steps
    scene.check_finished()
    shutil.rmtree(scene.out)
    assert run_in(server, scene, kill_at_step=last - 2).killed
    run_in(server, scene)
    scene.check_finished()


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
        for key in append.keys:
            check_item_was_durable(recorder.events, append, key, inodes)
    published = recorder.index_of("publish", scene.out.stat().st_ino)
    for name, inode in inodes.items():
        check_file_was_durable(recorder.events[:published], inode, len(scene.files[name]))
        assert not [event for event in recorder.events[published:] if event.inode == inode and event.kind == "write"]
    files_synced = max(recorder.index_of("synced", inode) for inode in inodes.values())
    assert files_synced < recorder.index_of("synced", scene.out.stat().st_ino) < published
    assert published < recorder.index_of("synced", scene.out.parent.stat().st_ino)


def check_item_was_durable(events: list[Event], append: Event, key: str, inodes: dict[str, int]) -> None:
    """Between the last write of an item and its line in the journal lies a whole sync of its file."""
    name, start, _ = key.rsplit(":", 2)
    before = events[: events.index(append)]
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


def check_file_was_durable(events: list[Event], inode: int, size: int) -> None:
    """The last thing that happens to a file is a sync at its final size."""
    last = [event for event in events if event.inode == inode][-1]
    assert (last.kind, last.size) == ("synced", size)
