"""A base that is read from the Hub by ranges, and what is said when a base of the Hub cannot be had."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import loraweld
from fakes import contents
from hub_client import environment, point_at
from hub_server import Hub, Repository, hub_server
from loraweld.checkpoint import remote
from processes import run_command
from scenes import Scene

TOKEN = "hf_writer"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scene: Scene) -> Iterator[Hub]:
    """A Hub with the scene's base, and an empty folder to be in."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub_server() as served, point_at(served, monkeypatch):
        served.repositories["org/base"] = Repository(branches={"main": contents(scene.base)})
        yield served


def stream(scene: Scene, base: str = "org/base", **options: object) -> loraweld.MergeReport:
    return loraweld.merge(scene.adapter, base=base, output="out", stream_base=True, **options)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "loraweld.json"}


@pytest.mark.parametrize("piece", [4 << 20, 1000])
def test_the_result_is_that_of_a_stored_base(
    piece: int, scene: Scene, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, whatever the ranges; nothing of the base is stored."""
    monkeypatch.setattr(remote, "PIECE_BYTES", piece)
    monkeypatch.setattr(remote, "REQUEST_BYTES", 2 * piece)
    stream(scene)
    assert weights(Path("out")) == {name: data for name, data in scene.files.items() if name != "loraweld.json"}
    assert not Path(constants.HF_HUB_CACHE).exists()
    record = json.loads(Path("out/loraweld.json").read_text())
    assert record["base"]["name"] == "org/base" and record["base"]["commit"] in hub.repositories["org/base"].history


def test_a_plan_reads_headers_only(scene: Scene, hub: Hub) -> None:
    """With small pieces, of each file no more than its header's."""
    whole = sum(len(data) for name, data in contents(scene.base).items() if name.endswith(".safetensors"))
    remote_piece, remote.PIECE_BYTES = remote.PIECE_BYTES, 1 << 10
    try:
        loraweld.plan(scene.adapter, base="org/base", output="out", stream_base=True)
    finally:
        remote.PIECE_BYTES = remote_piece
    assert 0 < hub.sent_bytes < whole / 4
    assert not Path("out").exists()


def test_a_repeated_merge_compares_and_a_killed_one_continues(scene: Scene, hub: Hub) -> None:
    """The file's checksum stands for its content: the same base, streamed again, is the same merge."""
    stream(scene)
    assert stream(scene).was_there
    commit = hub.repositories["org/base"].keep(hub.repositories["org/base"].branches["main"])
    assert commit == json.loads(Path("out/loraweld.json").read_text())["base"]["commit"]


@pytest.mark.parametrize("seed", range(3))
def test_over_connections_that_break(seed: int, scene: Scene, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them: what does not come in full is asked for again."""
    monkeypatch.setattr(remote, "PIECE_BYTES", 2000)
    monkeypatch.setattr(remote, "REQUEST_BYTES", 4000)
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.0)
    hub.cut, hub.chance = 0.5, random.Random(seed)
    stream(scene)
    assert hub.cuts > 5
    assert weights(Path("out")) == {name: data for name, data in scene.files.items() if name != "loraweld.json"}


def test_a_connection_that_stays_broken_is_an_error_that_can_be_continued(
    scene: Scene, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.0)
    hub.cut = 1.0
    with pytest.raises(loraweld.CheckpointError, match=r"org/base@.*cannot be read at byte \d+.*same command"):
        stream(scene)
    assert not Path("out").exists()


# -- what cannot be had


def test_gated(scene: Scene, hub: Hub) -> None:
    hub.repositories["org/base"].gated = True
    for options in ({"stream_base": True}, {"stream_base": False}):
        with pytest.raises(loraweld.CheckpointError, match=r"base 'org/base'.*is gated: accept its") as raised:
            loraweld.merge(scene.adapter, base="org/base", output="out", token="hf_reader", **options)
        assert "hf_reader" not in str(raised.value)
    loraweld.merge(scene.adapter, base="org/base", output="out", token=TOKEN)


@pytest.mark.parametrize("streamed", [False, True])
def test_missing_private_or_misspelt(streamed: bool, scene: Scene, hub: Hub) -> None:
    """The Hub does not tell them apart, and so the message does not either."""
    with pytest.raises(loraweld.CheckpointError, match=r"base 'org/nothing'.*no such repository, or it is private"):
        loraweld.merge(scene.adapter, base="org/nothing", output="out", stream_base=streamed)
    hub.repositories["org/base"].private = True
    with pytest.raises(loraweld.CheckpointError, match=r"base 'org/base'.*no such repository, or it is private"):
        loraweld.merge(scene.adapter, base="org/base", output="out", stream_base=streamed)
    loraweld.merge(scene.adapter, base="org/base", output="out", stream_base=streamed, token=TOKEN)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_revision_that_the_base_does_not_have(streamed: bool, scene: Scene, hub: Hub, tmp_path: Path) -> None:
    """The adapter's config names it."""
    adapter = adapter_of(scene, tmp_path / "adapter", base_model_name_or_path="org/base", revision="v9")
    with pytest.raises(loraweld.CheckpointError, match=r"base 'org/base' at revision 'v9'.*no such revision"):
        loraweld.merge(adapter, output="out", stream_base=streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_revision_of_the_adapter_s_config_counts(streamed: bool, scene: Scene, hub: Hub, tmp_path: Path) -> None:
    """Not the newest state of the base."""
    base = hub.repositories["org/base"]
    old = base.keep(base.branches["main"])
    newer = {name: data if name != "config.json" else b"{}" for name, data in contents(scene.base).items()}
    base.branches["main"] = Repository(branches={"main": newer}).branches["main"]
    adapter = adapter_of(scene, tmp_path / "adapter", base_model_name_or_path="org/base", revision=old)
    loraweld.merge(adapter, output="out", stream_base=streamed)
    assert json.loads(Path("out/loraweld.json").read_text())["base"]["commit"] == old


def test_offline(scene: Scene, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming needs the network; without it a base that is in the cache is merged, also a read-only one."""
    loraweld.merge(scene.adapter, base="org/base", output="first")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(loraweld.CheckpointError, match=r"HF_HUB_OFFLINE"):
        stream(scene)
    cached = [Path(constants.HF_HUB_CACHE), *Path(constants.HF_HUB_CACHE).rglob("*")]
    for path in cached:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        loraweld.merge(scene.adapter, base="org/base", output="second")
    finally:
        for path in cached:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
    assert weights(Path("second")) == weights(Path("first"))


def test_a_folder_or_pickles_are_not_streamed(scene: Scene, hub: Hub) -> None:
    with pytest.raises(loraweld.CheckpointError, match=r"is on this machine; --stream-base is for one on the Hub"):
        stream(scene, base=str(scene.base))
    hub.repositories["org/pickled"] = Repository(branches={"main": {"config.json": b"{}", "pytorch_model.bin": b"x"}})
    with pytest.raises(loraweld.CheckpointError, match=r"no \*\.safetensors, and other weights are not streamed"):
        stream(scene, base="org/pickled")


def test_an_adapter_of_the_hub(scene: Scene, hub: Hub) -> None:
    """By its id, in the usual cache; the report calls it so."""
    hub.repositories["me/adapter"] = Repository(branches={"main": contents(scene.adapter)})
    report = loraweld.merge("me/adapter", base="org/base", output="out")
    assert report.adapters == ("me/adapter",)
    assert weights(Path("out")) == {name: data for name, data in scene.files.items() if name != "loraweld.json"}
    with pytest.raises(loraweld.CheckpointError, match=r"adapter 'me/nothing'.*no such repository, or it is private"):
        loraweld.merge("me/nothing", base="org/base", output="out2")


def test_the_command(scene: Scene, hub: Hub, tmp_path: Path) -> None:
    """In another process, with the usual variables of the Hub's client."""
    done = run_command(
        "merge",
        scene.adapter,
        "--base",
        "org/base",
        "--stream-base",
        "-o",
        "out",
        env=environment(hub, tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert weights(Path("out")) == {name: data for name, data in scene.files.items() if name != "loraweld.json"}
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def adapter_of(scene: Scene, folder: Path, **config: object) -> Path:
    """The scene's adapter with another config."""
    folder.mkdir()
    save_file(load_file(scene.adapter / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    old = json.loads((scene.adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**old, **config}))
    return folder
