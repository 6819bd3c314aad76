"""Merges that go to the Hub: file by file, in one commit, over connections that break."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

import loraweld
from fakes import contents
from hub_client import environment, point_at
from hub_server import Hub, Repository, hub_server
from processes import PATIENCE_S, run_command
from scenes import Scene

WEIGHTS = ".safetensors"
WRITER = "hf_writer"
SHARDS = "40KB"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub, and an empty folder to be in."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub_server() as served, point_at(served, monkeypatch):
        yield served


def push(scene: Scene, repo_id: str = "me/model", **options: object) -> loraweld.MergeReport:
    return loraweld.merge(scene.adapter, base=scene.base, push_to_hub=repo_id, token=WRITER, **options)


def serve_base(hub: Hub, scene: Scene, name: str = "org/base", **options: object) -> None:
    card = b"---\nlicense: apache-2.0\nlanguage:\n- en\npipeline_tag: text-generation\n---\nThe base.\n"
    hub.repositories[name] = Repository(branches={"main": {**contents(scene.base), "README.md": card}}, **options)


def assert_is(found: dict[str, bytes], scene: Scene) -> None:
    """The files of a repository are those of a merge on the disk, and a card."""
    left_out = {"README.md", "loraweld.json", ".gitattributes"}
    kept = {name: data for name, data in found.items() if name not in left_out}
    assert kept == {name: data for name, data in scene.files.items() if name not in left_out}
    assert "README.md" in found and "loraweld.json" in found


def weight_files(scene: Scene) -> list[str]:
    return sorted(name for name in scene.files if name.endswith(WEIGHTS))


def left_here() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_a_push_is_one_commit_and_leaves_nothing_here(scene: Scene, hub: Hub) -> None:
    """The index comes last in it, and each weight file was sent once."""
    report = push(scene)
    assert_is(hub.content("me/model"), scene)
    (commit,) = hub.repositories["me/model"].commits
    assert commit["order"][-1] == "model.safetensors.index.json" and commit["parentCommit"]
    assert len(hub.received) == len(weight_files(scene)) and left_here() == []
    assert report.pushed is not None and report.pushed.url.startswith(hub.url)
    assert report.pushed.sent_bytes >= sum(size for _, size in hub.received) and report.pushed.copied_bytes == 0
    assert "pushed: " in "\n".join(report.lines())


def test_the_repository_is_empty_until_everything_is_there(scene: Scene, hub: Hub) -> None:
    """Whenever a file has come in, nobody can see one yet."""
    seen = []
    hub.on_object = lambda count: seen.append(hub.content("me/model"))
    push(scene)
    assert len(seen) == len(weight_files(scene)) and not any(seen)


@pytest.mark.parametrize("workers", [1, 4])
def test_no_more_than_two_files_are_on_the_disk(
    workers: int, scene: Scene, hub: Hub, small_items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at whenever the Hub has received one, and whenever one is opened."""
    from loraweld.sinks import system

    most = [0]

    def look() -> None:
        most[0] = max(most[0], len(list(Path().rglob(f"*{WEIGHTS}"))))

    hub.on_object = lambda count: look()
    opened = system.open_for_writing
    monkeypatch.setattr(system, "open_for_writing", lambda *place, **options: (opened(*place, **options), look())[0])
    push(scene, max_shard_size=SHARDS, workers=workers)
    assert len(hub.received) > 5 and 1 <= most[0] <= 2
    assert left_here() == []


def test_with_an_output_the_folder_stays(scene: Scene, hub: Hub) -> None:
    """A second push of it compares the folder and sends nothing large again."""
    push(scene, output="out")
    assert_is(hub.content("me/model"), scene)
    assert_is(contents(Path("out")), scene)
    sent = len(hub.received)
    report = push(scene, output="out")
    assert report.was_there and len(hub.received) == sent
    assert left_here() == ["out"]


def test_the_adapter_alone_goes_in_one_commit(scene: Scene, hub: Hub) -> None:
    push(scene, "me/adapter", save_method="lora")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= hub.content("me/adapter").keys()
    assert ModelCard(hub.content("me/adapter")["README.md"].decode()).data.library_name == "peft"
    assert left_here() == []


def test_gguf_files_go_without_the_model_they_are_made_of(scene: Scene, hub: Hub, converter: Path) -> None:
    (scene.base / "config.json").exists()
    push(scene, "me/gguf", save_method="gguf", gguf_type="q8_0")
    assert {"gguf-Q8_0.gguf", "README.md", "loraweld.json"} <= hub.content("me/gguf").keys()
    assert not any(name.endswith(WEIGHTS) for name in hub.content("me/gguf")) and left_here() == []


def test_options_of_the_commit(scene: Scene, hub: Hub) -> None:
    """Visibility, branch, message, pull request."""
    push(scene, private=True, revision="v2", commit_message="Second")
    repository = hub.repositories["me/model"]
    assert (
        repository.private
        and hub.content("me/model") == {}
        and "model.safetensors.index.json" in repository.branches["v2"]
    )
    assert repository.commits[-1]["summary"] == "Second"
    report = push(scene, create_pr=True)
    assert "refs/pr/1" in repository.branches and "discussions/1" in report.pushed.url
    assert hub.content("me/model") == {}


# -- unchanged files


@pytest.mark.parametrize("streamed", [False, True])
def test_unchanged_files_are_copied_on_the_server(streamed: bool, scene: Scene, hub: Hub) -> None:
    """Only what the adapter changes is sent; the report says what was saved."""
    serve_base(hub, scene)
    base = contents(scene.base)
    same = [name for name in weight_files(scene) if scene.files[name] == base[name]]
    assert same and len(same) < len(weight_files(scene))
    report = loraweld.merge(scene.adapter, base="org/base", push_to_hub="me/model", token=WRITER, stream_base=streamed)
    assert_is(hub.content("me/model"), scene)
    assert len(hub.received) == len(weight_files(scene)) - len(same)
    assert report.pushed.copied_bytes == sum(len(base[name]) for name in same)
    assert "copied on the Hub" in "\n".join(report.lines()) and left_here() == []
    if streamed:
        assert not any("/storage/org/base" in request and request.startswith("PUT") for request in hub.requests)


@pytest.mark.parametrize("streamed", [False, True])
def test_between_storage_regions_files_are_sent(streamed: bool, scene: Scene, hub: Hub) -> None:
    """The Hub refuses to copy: the result is the same."""
    serve_base(hub, scene, region="eu")
    report = loraweld.merge(scene.adapter, base="org/base", push_to_hub="me/model", token=WRITER, stream_base=streamed)
    assert_is(hub.content("me/model"), scene)
    assert len(hub.received) == len(weight_files(scene)) and report.pushed.copied_bytes == 0 and left_here() == []


def test_a_changed_copy_in_the_cache_is_not_taken_for_the_hub_s_file(scene: Scene, hub: Hub) -> None:
    """What was edited in the local snapshot is what is merged and sent."""
    serve_base(hub, scene)
    loraweld.plan(scene.adapter, base="org/base", output="out", token=WRITER)
    base = contents(scene.base)
    name = next(name for name in weight_files(scene) if scene.files[name] == base[name])
    (cached,) = Path(constants.HF_HUB_CACHE).rglob(f"snapshots/*/{name}")
    changed = bytearray(cached.read_bytes())
    changed[-2:] = b"\x01\x3f"
    cached.unlink()
    cached.write_bytes(changed)
    loraweld.merge(scene.adapter, base="org/base", push_to_hub="me/model", token=WRITER)
    assert hub.content("me/model")[name] == bytes(changed)


# -- broken connections, kills, errors


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part_bytes", [None, 10_000])
def test_over_connections_that_break(seed: int, part_bytes: int | None, scene: Scene, hub: Hub) -> None:
    """One in five ends at a random place. The same command, as often as it takes, ends with the right files."""
    serve_base(hub, scene)
    hub.cut, hub.chance, hub.part_bytes = 0.2, random.Random(seed), part_bytes
    for _ in range(20):
        try:
            loraweld.merge(
                scene.adapter,
                base="org/base",
                push_to_hub="me/model",
                token=WRITER,
                stream_base=True,
                max_shard_size=SHARDS,
            )
            break
        except loraweld.LoraweldError:
            continue
    else:
        raise AssertionError("it never ends")
    assert hub.cuts
    hub.cut = 0
    loraweld.merge(scene.adapter, base=scene.base, output="out", max_shard_size=SHARDS)
    found = hub.content("me/model")
    assert all(found[name] == data for name, data in contents(Path("out")).items() if name.endswith(WEIGHTS))
    shutil.rmtree("out")
    oids = [oid for oid, _ in hub.received]
    assert len(oids) == len(set(oids)) and left_here() == []


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3])
def test_killed_and_started_again_it_sends_no_file_twice(after: int, scene: Scene, hub: Hub, tmp_path: Path) -> None:
    """The process dies as soon as the Hub has so many files."""
    environ = {**os.environ, **environment(hub, tmp_path / "home"), "HF_TOKEN": WRITER}
    command = [sys.executable, "-m", "loraweld", "merge", scene.adapter, "--base", scene.base]
    command += ["--push-to-hub", "me/model", "--workers", "1"]
    with subprocess.Popen([*map(str, command)], env=environ, stderr=subprocess.DEVNULL) as process:

        def kill(count: int) -> None:
            if count == after:
                process.send_signal(signal.SIGKILL)
                process.wait(PATIENCE_S)

        hub.on_object = kill
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert hub.content("me/model") == {} and len(hub.received) == after
    hub.on_object = lambda count: None
    # The answer to the last file was lost with the process: that the Hub has it is asked before it is sent again.
    done = run_command(*command[3:], env={**environment(hub, tmp_path / "home"), "HF_TOKEN": WRITER})
    assert done.returncode == 0, done.stderr
    assert_is(hub.content("me/model"), scene)
    oids = [oid for oid, _ in hub.received]
    assert len(oids) == len(set(oids)) == len(weight_files(scene)) and left_here() == []


def test_after_a_commit_that_failed_nothing_is_computed_or_sent_again(
    scene: Scene, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent is remembered; only the commit is repeated."""
    hub.fails_at = "/commit/"
    with pytest.raises(loraweld.OutputError, match=r"upload to me/model failed: the token may not do this"):
        push(scene)
    assert hub.content("me/model") == {} and left_here() == [".model.loraweld"]
    assert not [path for path in Path(".model.loraweld").rglob(f"*{WEIGHTS}")]
    sent, hub.fails_at = len(hub.received), ""
    report = push(scene)
    assert_is(hub.content("me/model"), scene)
    assert len(hub.received) == sent and report.resumed_bytes == sum(len(scene.files[n]) for n in weight_files(scene))
    assert report.pushed.resumed_bytes == report.resumed_bytes and left_here() == []


@pytest.mark.parametrize(
    ("place", "status"),
    [(place, status) for place in ("/preupload/", "/objects/batch", "/commit/") for status in (429, 500, 503)]
    + [("/commit/", 409), ("/commit/", 412)],
)
def test_what_passes_is_tried_again(place: str, status: int, scene: Scene, hub: Hub) -> None:
    """Too many requests, a server in trouble, a commit of somebody else's meanwhile."""
    hub.statuses = [[place, status, 2]]
    if place == "/commit/" and status in (429, 500, 503):
        # The client does not repeat a commit by itself: it could have gone through.
        with pytest.raises(loraweld.OutputError, match=r"fewer requests|the Hub has a problem"):
            push(scene)
        hub.statuses = []
    push(scene)
    assert_is(hub.content("me/model"), scene)
    assert len(hub.received) == len(weight_files(scene))


@pytest.mark.parametrize(
    ("place", "status", "said"),
    [
        ("/commit/", 401, "the Hub does not take the token"),
        ("/preupload/", 403, "the token may not do this"),
        ("/api/repos/create", 403, "repository me/model.*the token may not do this"),
        ("/commit/", 500, "the Hub has a problem"),
    ],
)
def test_errors_say_what_to_do(place: str, status: int, said: str, scene: Scene, hub: Hub) -> None:
    hub.statuses = [[place, status, 100]]
    with pytest.raises(loraweld.OutputError, match=said) as raised:
        push(scene)
    assert WRITER not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"private": True}, "private has no effect without push_to_hub"),
        ({"create_pr": True, "output": "out"}, "create_pr has no effect without push_to_hub"),
        ({"commit_message": "x", "output": "out"}, "commit_message has no effect without push_to_hub"),
        ({}, "no output was given"),
        ({"push_to_hub": "a/b/c"}, "push_to_hub is 'a/b/c'"),
        ({"push_to_hub": "me/m", "token": False}, "token is False"),
        ({"push_to_hub": "me/m", "token": None}, "there is no stored login"),
        ({"push_to_hub": "me/m", "token": "hf_reader"}, "it may only read"),
        ({"push_to_hub": "me/m", "token": "hf_nobody"}, "the Hub does not take it"),
    ],
)
def test_rejected_before_anything_is_read(options: dict[str, object], said: str, scene: Scene, hub: Hub) -> None:
    with pytest.raises(loraweld.RequestError, match=said):
        loraweld.merge("no-adapter", base=scene.base, **options)
    assert left_here() == [] and hub.repositories == {}


# -- the card, the token, the command


def test_the_card(scene: Scene, hub: Hub) -> None:
    """What is known, from where it is known, and how to load it."""
    serve_base(hub, scene)
    hub.repositories["me/adapter"] = Repository(branches={"main": contents(scene.adapter)})
    loraweld.merge("me/adapter", base="org/base", push_to_hub="me/model", token=WRITER)
    card = ModelCard(hub.content("me/model")["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0" and data["language"] == ["en"] and data["library_name"] == "transformers"
    assert "me/adapter" in card.text and 'from_pretrained("me/model")' in card.text
    assert "AutoModelForCausalLM" in card.text or "AutoModel" in card.text


def test_a_card_that_is_there_keeps_its_text(scene: Scene, hub: Hub) -> None:
    old = "---\nlicense: mit\n---\n# Mine\n\nMy words.\n"
    hub.repositories["me/model"] = Repository(branches={"main": {"README.md": old.encode(), "notes.md": b"n"}})
    serve_base(hub, scene)
    loraweld.merge(scene.adapter, base="org/base", push_to_hub="me/model", token=WRITER)
    found = hub.content("me/model")
    card = ModelCard(found["README.md"].decode())
    assert card.text.strip() == "# Mine\n\nMy words." and found["notes.md"] == b"n"
    assert card.data.license == "mit" and card.data.to_dict()["base_model"] == "org/base"


def test_a_quantised_model_s_card_tells_of_its_fidelity(scene: Scene, hub: Hub) -> None:
    push(scene, save_method="merged_4bit")
    text = hub.content("me/model")["README.md"].decode()
    assert "of a weight's norm as error" in text and "quantised to 4 bit" in text


def test_the_command(scene: Scene, hub: Hub, tmp_path: Path) -> None:
    """As a person gives it; the token is nowhere to be seen."""
    environ = environment(hub, tmp_path / "home")
    done = run_command(
        "merge", scene.adapter, "--base", scene.base, "--push-to-hub", "model", "--token", WRITER, "--json", env=environ
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"]["url"].startswith(hub.url)
    assert_is(hub.content("me/model"), scene)
    seen = [done.stdout, done.stderr, *(data.decode("latin-1") for data in hub.content("me/model").values())]
    assert not any(WRITER in text for text in seen) and left_here() == []


def test_the_token_is_not_in_what_stays_after_an_error(scene: Scene, hub: Hub, tmp_path: Path) -> None:
    hub.fails_at = "/commit/"
    command = ("merge", scene.adapter, "--base", scene.base, "--push-to-hub", "model", "--token", WRITER)
    done = run_command(*command, env=environment(hub, tmp_path / "home"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    staged = [path.read_bytes() for path in Path().rglob("*") if path.is_file()]
    assert staged and not any(WRITER.encode() in data for data in [*staged, (done.stdout + done.stderr).encode()])
    assert WRITER not in repr(loraweld.plan(scene.adapter, base=scene.base, output="out", token=WRITER))
