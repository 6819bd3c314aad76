"""Fixtures of the tests that disturb a merge, and of those that export one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import scenes
from gguf_models import FAKE_CONVERTER
from loraweld.delivery import Delivery
from loraweld.execute import run
from loraweld.planning import memory
from loraweld.planning.facts import Facts
from loraweld.planning.merge_plan import MergePlan
from loraweld.request import WHOLE_METHODS, MergeRequest
from s3_server import Store, s3_store
from scenes import Scene, undisturbed_merge

# No limit on the time of an example: the machine may be busy.
settings.register_profile("loraweld", deadline=None)
settings.load_profile("loraweld")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verify-outputs", action="store_true", help="verify whatever a test merges in its own process")


@pytest.fixture(autouse=True)
def verified(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --verify-outputs a merge into a folder is refused if `verify` finds anything wrong with it: a false alarm,
    where the test expects the merge to be right."""
    if not request.config.getoption("--verify-outputs"):
        return
    original = Delivery.of.__func__

    def verifying(
        cls: type[Delivery], asked: MergeRequest, made: MergePlan, facts: Facts | None, **more: Any
    ) -> Delivery:
        is_model = asked.save_method not in WHOLE_METHODS and more.get("complete") is None
        is_here = asked.keeps_output and asked.store is None
        asked = replace(asked, verify=facts is not None and is_model and is_here and not asked.allow_nonfinite)
        delivery: Delivery = original(cls, asked, made, facts, **more)
        return delivery

    monkeypatch.setattr(Delivery, "of", classmethod(verifying))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("undisturbed")
    return undisturbed_merge(folder, num_files=3, layers=4, hidden=64, intermediate=128, vocab=256)


@pytest.fixture(scope="session")
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


@pytest.fixture
def small_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many items and many checkpoints, in this process, for a small model."""
    monkeypatch.setattr(run, "CHECKPOINT_BYTES", scenes.CHECKPOINT_BYTES)
    monkeypatch.setattr(memory, "ITEM_BYTES", scenes.ITEM_BYTES)
    monkeypatch.setattr(memory, "BUFFER_BYTES", scenes.BUFFER_BYTES)
    monkeypatch.setattr(memory, "MIN_BUFFER_BYTES", scenes.BUFFER_BYTES)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Store]:
    with s3_store() as store:
        yield store


@pytest.fixture
def s3(s3_server: Store) -> Store:
    """An empty bucket."""
    s3_server.reset()
    return s3_server


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the converter's place, which writes down its arguments; no quantiser is there."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "convert_hf_to_gguf.py").write_text(FAKE_CONVERTER)
    monkeypatch.syspath_prepend(fakes)
    monkeypatch.setenv("PYTHONPATH", str(fakes), prepend=os.pathsep)
    monkeypatch.setenv("PATH", str(fakes))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf", raising=False)
    return fakes / "convert_hf_to_gguf.py"
