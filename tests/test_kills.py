"""A merge may be killed at any moment: the output is absent or complete, and the same command finishes it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import loraweld
import scenes
from fakes import contents
from fork_server import ForkServer, Outcome
from scenes import Scene

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    started = ForkServer()
    yield started
    started.close()


def run_in(server: ForkServer, scene: Scene, **options: object) -> Outcome:
    """Merge the scene in a process of its own; it must end well, or by being killed."""
    sizes = {"item_bytes": scenes.ITEM_BYTES, "checkpoint_bytes": scenes.CHECKPOINT_BYTES}
    inputs = {"adapter": scene.adapter, "base": scene.base, "output": scene.out, "workers": 2}
    outcome = server.merge(**{**sizes, **inputs, **options})
    assert outcome.error == ""
    return outcome


def kill_halfway(server: ForkServer, scene: Scene) -> None:
    """Kill the merge when several items are journalled and several are not."""
    assert run_in(server, scene, kill_at_step=30, workers=1).killed
    assert len((scene.staging / "journal").read_bytes().splitlines()) > 3
    assert scene.state() is None


def usual_seconds(server: ForkServer, scene: Scene) -> float:
    """The duration of an undisturbed run, the shortest of three."""
    seconds = []
    for _ in range(3):
        seconds.append(run_in(server, scene).seconds)
        scene.check_finished()
        shutil.rmtree(scene.out)
    return min(seconds)


@pytest.mark.slow
def test_two_hundred_kills_leave_no_trace_in_the_output(server: ForkServer, scene: Scene) -> None:
    """Killed at a random moment: the output is absent or complete. Run again: it is complete, byte for byte."""
    moments = random.Random(0)
    duration = usual_seconds(server, scene)
    killed = resumed = 0
    for _ in range(200):
        killed += run_in(server, scene, kill_after_s=moments.uniform(0, duration)).killed
        assert scene.state() in (None, scene.files)
        again = run_in(server, scene)
        scene.check_finished()
        resumed += again.report["resumed_bytes"] > 0
        shutil.rmtree(scene.out)
    assert killed > 100
    assert resumed > 10


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
    assert run_in(server, scene, max_shard_size="4KB", workers=1, kill_at_step=15).killed
    assert list(scene.staging.rglob("*-00001-of-*"))


def same_killed_merge(scene: Scene, server: ForkServer) -> None:
    """The same merge was killed when most of it was written."""
    assert run_in(server, scene, workers=1, kill_at_step=15).killed
    assert len((scene.staging / "journal").read_bytes().splitlines()) > 1


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
    kill_halfway(server, scene)
    flip_last_byte(tmp_path / changed, keep_time=keep_time)
    again = run_in(server, scene)
    assert again.report["resumed_bytes"] == 0
    loraweld.merge(scene.adapter, output=tmp_path / "expected", base=scene.base)
    assert scene.state() == contents(tmp_path / "expected")


@pytest.mark.parametrize(("resume", "continues"), [(True, True), (False, False)])
def test_resume_can_be_declined(resume: bool, continues: bool, server: ForkServer, scene: Scene) -> None:
    """resume=False starts afresh; both ways end with the same bytes."""
    kill_halfway(server, scene)
    again = run_in(server, scene, resume=resume)
    assert (again.report["resumed_bytes"] > 0) == continues
    scene.check_finished()


@pytest.mark.parametrize("damage", ["cut", "garbage", "no newline", "no journal"])
def test_a_damaged_journal_is_not_believed(damage: str, server: ForkServer, scene: Scene) -> None:
    """A torn last line is ignored, anything else in the journal's place starts the merge again."""
    kill_halfway(server, scene)
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
    kill_halfway(server, scene)
    staged = sorted(scene.staging.glob("model/*.safetensors"))
    assert len(staged) > 1
    for path in staged:
        if cut_to is None:
            path.unlink()
        else:
            os.truncate(path, cut_to)
    run_in(server, scene)
    scene.check_finished()


@pytest.mark.parametrize("name", ["a b", "m[1]", "%s{}", "-o", "модель", "x" * 200])
def test_any_name_of_an_output_can_be_finished(name: str, server: ForkServer, scene: Scene) -> None:
    """Killed while it cleans up, then run again: no name of an output is mistaken for a pattern or an option."""
    scene = replace(scene, out=scene.out.with_name(name))
    steps = run_in(server, scene, workers=1).steps
    scene.check_finished()
    shutil.rmtree(scene.out)
    assert run_in(server, scene, workers=1, kill_at_step=steps - 2).killed
    run_in(server, scene)
    scene.check_finished()
