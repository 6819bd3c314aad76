"""The parts of a merge as tasks of a Ray cluster: the same bytes, whatever dies."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

import loraweld
from fakes import llama_shapes, random_factors, random_tensors, write_adapter, write_base
from loraweld.distributed import on_ray
from loraweld.errors import LoraweldError, OutputError, RequestError
from s3_server import BUCKET, Store
from scenes import Scene

ray = pytest.importorskip("ray", reason="needs Ray: pip install -e '.[test]'")


PART_BYTES = 128 << 20
IN_MANY_PARTS = f"""
from loraweld.cli import main
from loraweld.distributed import on_ray

on_ray.PART_BYTES = {PART_BYTES}
main()
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three workers of one thread, which find the package that is tested."""
    monkeypatch.setenv("PYTHONPATH", str(Path(loraweld.__file__).parent.parent))
    monkeypatch.setattr(on_ray, "PART_BYTES", 64 << 10)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_tasks_make_the_local_bytes(scene: Scene, cluster: None) -> None:
    seen: list[int] = []
    report = scene.merge(executor="ray", workers=2, progress=seen.append)
    scene.check_finished()
    assert sum(seen) == sum(len(data) for name, data in scene.files.items() if name.endswith(".safetensors"))
    assert report.output == scene.out


def test_tasks_fill_a_store(scene: Scene, s3: Store, cluster: None) -> None:
    loraweld.merge(scene.adapter, base=scene.base, output=f"s3://{BUCKET}/model", executor="ray", workers=2)
    assert s3.get("model") == scene.files


def test_what_a_task_refuses_is_said(scene: Scene, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_other_inputs(document: Mapping[str, object]) -> str:
        return json.dumps({**document, "identity": "that of other inputs"})

    monkeypatch.setattr(on_ray, "document_text", of_other_inputs)
    with pytest.raises(OutputError, match=r"part \d/\d failed: .*have changed"):
        scene.merge(executor="ray", workers=2)
    assert scene.state() is None


def test_a_part_that_would_fail_again_leaves_nothing(scene: Scene, s3: Store, cluster: None) -> None:
    """Nor does any task run on: what they make is removed."""
    url = f"s3://{BUCKET}/models/model"
    options = {"executor": "ray", "workers": 2, "dtype": "float16", "scale": 1e9}
    with pytest.raises(LoraweldError, match=r"part \d/\d: .*too large for float16"):
        loraweld.merge(scene.adapter, base=scene.base, output=url, **options)
    assert s3.get("models") == {} and s3.client.list_multipart_uploads(BUCKET) == []


def test_options_that_do_not_fit(scene: Scene) -> None:
    with pytest.raises(RequestError, match="ray_address has no effect"):
        scene.merge(ray_address="auto")
    with pytest.raises(RequestError, match="executor"):
        scene.merge(executor="dask")


def test_a_cluster_that_is_not_there(scene: Scene) -> None:
    with pytest.raises(RequestError, match="cannot be reached"):
        scene.merge(executor="ray", ray_address="127.0.0.1:1")


@pytest.mark.slow
def test_three_gigabytes_into_a_store_while_a_worker_is_killed(tmp_path: Path, s3: Store, cluster: None) -> None:
    """Also: no worker takes more memory than its task declares, however many parts it makes, and the driver the same
    whatever the model."""
    small = merged_by_a_driver(tmp_path / "small", s3, layers=1, kill=False)
    large = merged_by_a_driver(tmp_path / "large", s3, layers=6, kill=True)
    assert large.killed == 1
    assert large.driver_bytes <= 1.15 * small.driver_bytes
    peaks = [*small.worker_bytes.values(), *large.worker_bytes.values()]
    assert large.merged_bytes > 4 * len(large.worker_bytes) * PART_BYTES, "each makes some"
    assert max(peaks) <= large.declared_bytes, f"{large.declared_bytes >> 20} MiB declared"


@dataclass
class Watched:
    """A merge's bytes, and those that each task declares; peaks of resident memory in bytes, workers by their process
    ids, and how many were killed."""

    merged_bytes: int
    declared_bytes: int
    driver_bytes: int = 0
    worker_bytes: dict[int, int] = field(default_factory=dict)
    killed: int = 0

    def look(self, driver: psutil.Process) -> None:
        with suppress(psutil.Error):
            self.driver_bytes = max(self.driver_bytes, driver.memory_info().rss)
        for process in making_parts():
            with suppress(psutil.Error):
                peak = max(self.worker_bytes.get(process.pid, 0), process.memory_info().rss)
                self.worker_bytes[process.pid] = peak

    def kill_one(self) -> None:
        """Kill a worker that has been seen at work for a while."""
        for process in making_parts():
            if self.worker_bytes.get(process.pid, 0) > 350 << 20:  # torch is there, so weights are being made
                process.kill()
                self.killed += 1
                return


def merged_by_a_driver(folder: Path, s3: Store, *, layers: int, kill: bool) -> Watched:
    """Merge by a command of its own and compare with the local merge; return what was seen."""
    shapes = llama_shapes(layers=layers, hidden=4096, intermediate=14336, vocab=8192)
    base = write_base(folder / "base", random_tensors(shapes, torch.bfloat16), num_files=layers)
    (base / "tokenizer.json").write_text("{}")
    adapter = write_adapter(folder / "adapter", random_factors({n: s for n, s in shapes.items() if "proj" in n}))
    loraweld.merge(adapter, base=base, output=folder / "local", workers=2)
    url = f"s3://{BUCKET}/{folder.name}"
    made = loraweld.plan(adapter, base=base, output=url, workers=2)
    options = ["--executor", "ray", "--ray-address", ray.get_runtime_context().gcs_address, "--workers", "2"]
    command = ["-c", IN_MANY_PARTS, "merge", adapter, "--base", base, "-o", url, "--quiet", *options]
    watched = Watched(merged_bytes=made.merged_bytes, declared_bytes=on_ray.declared_memory(made))
    with subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True) as driver:
        while driver.poll() is None:
            watched.look(psutil.Process(driver.pid))
            if kill and not watched.killed:
                watched.kill_one()
            time.sleep(0.1)
        assert driver.stderr is not None
        assert driver.returncode == 0, driver.stderr.read()
    client = s3.client
    names = {path.relative_to(folder / "local").as_posix() for path in (folder / "local").iterdir()}
    assert {path.removeprefix(f"{BUCKET}/{folder.name}/") for path in client.find(f"{BUCKET}/{folder.name}")} == names
    for name in names:
        with (folder / "local" / name).open("rb") as file, client.open(f"{url}/{name}") as stored:
            while piece := file.read(64 << 20):
                assert stored.read(len(piece)) == piece, name
    shutil.rmtree(folder)
    client.rm(url, recursive=True)
    return watched


def making_parts() -> list[psutil.Process]:
    """The cluster's processes that make parts now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::loraweld"]:
                found.append(process)
    return found
