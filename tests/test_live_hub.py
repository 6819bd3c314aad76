"""Uploads of a model in memory, against a Hub on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers as tf
from huggingface_hub import constants, metadata_load
from peft import PeftModel

import loraweld
from hub_client import point_at
from hub_server import Hub, Repository, hub_server
from live_models import live_llama
from test_live_parameters import names, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:tokenizer is None")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server() as served, point_at(served, monkeypatch):
        yield served


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return live_llama(tmp_path / "base")


def files_of(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    return hub.content(name, branch)


def test_the_upload_is_what_would_be_saved(live: PeftModel, hub: Hub) -> None:
    """In one commit, with a card; nothing is left on this machine."""
    live.save_pretrained_merged("me/my-model", tokenizer(), push_to_hub=True, token="hf_writer", max_shard_size="20KB")
    found = files_of(hub, "me/my-model")
    assert len(hub.repositories["me/my-model"].commits) == 1 and names() == []
    live.save_pretrained_merged("out", tokenizer(), max_shard_size="20KB")
    expected = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert found.keys() - expected.keys() == {"README.md"}
    # The record has a fingerprint of the whole output, the card included.
    assert all(found[name] == data for name, data in expected.items() if name != "loraweld.json")
    assert b"hf_writer" not in b"".join(found.values())


def test_what_a_commit_says(live: PeftModel, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Visibility, message, description, tags and datasets, as a pull request to a new repository."""
    with caplog.at_level(logging.WARNING, logger="loraweld"):
        live.push_to_hub_merged(
            "my-model",
            tokenizer(),
            private=True,
            token="hf_fine",
            commit_message="Second fine-tune",
            commit_description="With more data.",
            tags=["chat"],
            datasets=["me/my-data"],
            create_pr=True,
        )
    repository = hub.repositories["me/my-model"]
    assert repository.private and hub.content("me/my-model") == {}
    (commit,) = repository.commits
    assert (commit["branch"], commit["summary"], commit["description"]) == (
        "refs/pr/1",
        "Second fine-tune",
        "With more data.",
    )
    Path("README.md").write_bytes(files_of(hub, "me/my-model", "refs/pr/1")["README.md"])
    metadata = metadata_load("README.md")
    assert metadata["tags"] == ["chat"] and metadata["datasets"] == ["me/my-data"]
    assert "discussions/1" in caplog.text
    live.push_to_hub_merged("my-model", token="hf_writer", revision="refs/pr/1", tags=["more"])
    Path("README.md").write_bytes(files_of(hub, "me/my-model", "refs/pr/1")["README.md"])
    assert metadata_load("README.md")["tags"] == ["chat", "more"] and hub.content("me/my-model") == {}


def test_an_existing_repository_keeps_its_card_and_loses_stale_weights(live: PeftModel, hub: Hub) -> None:
    """Its text stays, metadata is added, shards of an older model go in the same commit; branches are made."""
    card = b"---\nlicense: mit\ntags:\n- old\n---\n# Mine\n\nText of mine.\n"
    stale = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    there = {"README.md": card, "notes.txt": b"stays", **stale}
    hub.repositories["team/model"] = Repository(branches={"main": dict(there)})
    live.push_to_hub_merged("team/model", token="hf_writer", tags=["new"], revision="v2")
    assert files_of(hub, "team/model") == there
    found = files_of(hub, "team/model", "v2")
    assert "model.safetensors" in found and not stale.keys() & found.keys() and found["notes.txt"] == b"stays"
    assert found["README.md"].endswith(b"# Mine\n\nText of mine.\n")
    Path("README.md").write_bytes(found["README.md"])
    assert metadata_load("README.md")["license"] == "mit" and metadata_load("README.md")["tags"] == ["old", "new"]


def test_the_adapter_alone(live: PeftModel, hub: Hub) -> None:
    live.push_to_hub_merged("me/adapter", save_method="lora", token="hf_writer")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files_of(hub, "me/adapter").keys()


def test_the_staged_folder_may_stay(live: PeftModel, hub: Hub) -> None:
    """`use_temp_dir=False`: in a folder named like the repository."""
    live.push_to_hub_merged("me/my-model", token="hf_writer", use_temp_dir=False)
    assert names() == ["my-model"] and "model.safetensors" in names("my-model")


def test_files_of_a_private_base_are_read_with_the_token(
    live: PeftModel, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a tokenizer in the call: those of the base, and its licence; without a token the output has none."""
    tokenizer().save_pretrained(tmp_path / "words")
    beside = {path.name: path.read_bytes() for path in (tmp_path / "words").iterdir()}
    card = b"---\nlicense: apache-2.0\n---\nA base.\n"
    weights = b"not wanted here"
    files = {**beside, "config.json": b"{}", "README.md": card, "model.safetensors": weights}
    hub.repositories["me/base"] = Repository(private=True, branches={"main": files})
    monkeypatch.setattr(live.config, "_name_or_path", "me/base")
    live.save_pretrained_merged("without", token=False)
    assert "tokenizer.json" not in names("without")
    live.save_pretrained_merged("with", token="hf_writer", tags=["a"])
    assert Path("with/tokenizer.json").read_bytes() == beside["tokenizer.json"]
    assert metadata_load(Path("with/README.md"))["license"] == "apache-2.0"
    assert not any("model.safetensors" in request for request in hub.requests)


def test_the_stored_login(live: PeftModel, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """True and None take it; without one, both are rejected."""
    for token in (True, None):
        with pytest.raises(loraweld.RequestError, match=f"token is {token}, and there is no stored login"):
            live.push_to_hub_merged("me/my-model", token=token)
    assert hub.requests == []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_writer")
    for number, token in enumerate((True, None)):
        live.save_pretrained_merged(f"me/model{number}", push_to_hub=True, token=token)
        assert "model.safetensors" in files_of(hub, f"me/model{number}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token": "hf_reader"}, "token: it may only read"),
        ({"token": "hf_unknown"}, "token: the Hub does not take it"),
        ({"private": True}, "private is True, but me/there exists and is public"),
        ({"private": "yes"}, "private is 'yes'"),
        ({"create_pr": 1}, "create_pr is 1"),
        ({"use_temp_dir": "no"}, "use_temp_dir is 'no'"),
        ({"commit_message": 5}, "commit_message is 5"),
        ({"commit_description": 5}, "commit_description is 5"),
        ({"revision": "a b"}, "revision is 'a b'"),
        ({"revision": "refs/heads/x"}, "revision is 'refs/heads/x'"),
        ({"revision": "v2", "create_pr": True}, "create_pr is True and revision 'v2'"),
        ({"repo_id": "a/b/c"}, "repo_id is 'a/b/c'"),
        ({"repo_id": ""}, "repo_id is ''"),
        ({"repo_id": "me/new", "revision": "refs/pr/1"}, "revision is 'refs/pr/1', but me/new does not exist"),
        ({"save_method": "merged-6bit"}, "save_method is"),
    ],
)
def test_rejected_before_anything_is_merged(options: dict[str, Any], said: str, live: PeftModel, hub: Hub) -> None:
    """By name; the Hub is as it was, and so is the disk."""
    hub.repositories["me/there"] = Repository()
    with pytest.raises(loraweld.RequestError, match=said) as raised:
        live.push_to_hub_merged(**{"repo_id": "me/there", "token": "hf_writer", **options})
    assert list(hub.repositories) == ["me/there"] and hub.repositories["me/there"].commits == []
    assert names() == [] and "hf_" not in str(raised.value)
    assert not [request for request in hub.requests if request.startswith("POST")]


def test_a_failed_upload_raises(live: PeftModel, hub: Hub) -> None:
    """What was there is there; nothing is left on this machine."""
    hub.repositories["me/there"] = Repository(branches={"main": {"model.safetensors": b"old"}})
    hub.fails_at = "/commit/"
    with pytest.raises(loraweld.OutputError, match=r"upload to me/there failed.*not today"):
        live.push_to_hub_merged("me/there", token="hf_writer")
    assert files_of(hub, "me/there") == {"model.safetensors": b"old"} and names() == []
    assert os.environ.get("HF_TOKEN") is None
