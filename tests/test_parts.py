"""A merge in parts: any order, any repetition, any process, the same bytes, in a folder and in object stores."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loraweld
from fakes import contents
from loraweld import api
from loraweld.errors import CheckpointError, LoraweldError, OutputError, RequestError, VerificationError
from loraweld.execute import run
from loraweld.execute.items import Item
from loraweld.execute.parts import Part, missing_parts, parse_part, shares
from loraweld.planning.merge_plan import WeightFile
from loraweld.request import make_request
from loraweld.sinks import store as store_module
from loraweld.sinks import uploads
from loraweld.sinks.uploads import MIN_PART_BYTES, part_number, part_unit
from processes import run_command
from s3_server import BUCKET, Store
from scenes import Files, Scene, undisturbed_merge

COUNTS = (1, 3, 7)


@pytest.fixture(params=["folder", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, small_parts: None) -> Iterator[Place]:
    """An output place of each kind, and how to look into it with another client."""
    if request.param == "folder":
        (tmp_path / "place").mkdir(exist_ok=True)
        yield FolderPlace(tmp_path / "place" / "model")
    elif request.param == "s3":
        yield StorePlace(f"s3://{BUCKET}/models/model", request.getfixturevalue("s3").client)
    else:
        files = fsspec.filesystem("memory")
        yield StorePlace("memory://models/model", files)
        files.rm("/models", recursive=True)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch, small_items: None) -> None:
    """Parts of a store as small as the items of the tests, and a server that takes none that are smaller."""
    monkeypatch.setattr(uploads, "MIN_PART_BYTES", 24 << 10)
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 24 << 10)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 24 << 10)


class Place:
    output: str

    def files(self) -> Files:
        """The files of the output."""
        raise NotImplementedError

    def left(self) -> list[str]:
        """What lies beside the output."""
        raise NotImplementedError


class FolderPlace(Place):
    def __init__(self, path: Path) -> None:
        self.path, self.output = path, str(path)

    def files(self) -> Files:
        return contents(self.path) if self.path.exists() else {}

    def left(self) -> list[str]:
        return [path.name for path in self.path.parent.iterdir() if path != self.path]


class StorePlace(Place):
    def __init__(self, url: str, client: fsspec.AbstractFileSystem) -> None:
        self.output, self.client = url, client
        self.root = client._strip_protocol(url)

    def found(self) -> Files:
        self.client.invalidate_cache()
        parent = self.root.rsplit("/", 1)[0]
        paths = self.client.find(parent) if self.client.exists(parent) else []
        return {path.removeprefix(f"{parent}/"): self.client.cat_file(path) for path in paths}

    def files(self) -> Files:
        return {name[6:]: data for name, data in self.found().items() if name.startswith("model/")}

    def left(self) -> list[str]:
        uploads = self.client.list_multipart_uploads(BUCKET) if hasattr(self.client, "call_s3") else []
        return [name for name in self.found() if not name.startswith("model/")] + [one["Key"] for one in uploads]


@pytest.fixture
def s3_place(s3: Store, small_parts: None) -> StorePlace:
    return StorePlace(f"s3://{BUCKET}/models/model", s3.client)


@contextmanager
def dying_after_one_file() -> Iterator[None]:
    """The process ends between the first and the second file that appears in a store."""
    original = uploads.MultipartUploads.complete
    completed: list[str] = []

    def dying(self: uploads.MultipartUploads, path: str, upload: str) -> None:
        if completed:
            raise KeyboardInterrupt
        completed.append(path)
        original(self, path, upload)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(uploads.MultipartUploads, "complete", dying)
        yield


def saved(scene: Scene, place: Place, path: Path, **options: object) -> Path:
    request = make_request(scene.adapter, output=place.output, base=scene.base, **options)
    api.save_plan(request, path)
    return path


@pytest.mark.parametrize("count", COUNTS)
def test_any_order_and_repetition_gives_the_same_bytes(scene: Scene, place: Place, tmp_path: Path, count: int) -> None:
    plan = saved(scene, place, tmp_path / "plan.json")
    order = [*range(1, count + 1)] * 2
    random.Random(count).shuffle(order)
    for number in order:
        assert place.files() == {}
        api.run_part(plan, f"{number}/{count}")
    report = api.publish(plan)
    assert place.files() == scene.files
    assert place.left() == []
    assert str(report.output) == place.output


def test_cuts_can_be_mixed(scene: Scene, place: Place, tmp_path: Path) -> None:
    plan = saved(scene, place, tmp_path / "plan.json")
    for part in ("1/3", "2/3", "5/7", "6/7", "7/7"):
        api.run_part(plan, part)
    api.publish(plan)
    assert place.files() == scene.files


@pytest.mark.parametrize("count", COUNTS)
def test_publish_names_the_parts_that_are_missing(scene: Scene, place: Place, tmp_path: Path, count: int) -> None:
    plan = saved(scene, place, tmp_path / "plan.json")
    with pytest.raises(OutputError, match="no part has been run"):
        api.publish(plan)
    absent = {count} if count < 3 else {2, count}
    for number in sorted({*range(1, count + 1)} - absent):
        api.run_part(plan, f"{number}/{count}")
    if count > 1:
        with pytest.raises(OutputError) as caught:
            api.publish(plan)
        absent = {int(number) for number in re.findall(rf"(\d+)/{count}\b", str(caught.value))} & absent
        assert 2 in absent  # the last one has no work where the last file is copied whole
    assert place.files() == {}
    for number in sorted(absent):
        with suppress(OutputError):
            api.publish(plan)
            pytest.fail("published too early")
        api.run_part(plan, f"{number}/{count}")
    api.publish(plan)
    assert place.files() == scene.files


def test_parts_at_the_same_time(scene: Scene, place: Place, tmp_path: Path) -> None:
    plan = saved(scene, place, tmp_path / "plan.json")
    threads = [threading.Thread(target=api.run_part, args=(plan, f"{number}/4")) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    api.publish(plan)
    assert place.files() == scene.files


def test_discard_leaves_nothing(scene: Scene, place: Place, tmp_path: Path) -> None:
    plan = saved(scene, place, tmp_path / "plan.json")
    api.run_part(plan, "1/2")
    assert place.left()
    api.discard(plan)
    assert place.left() == [] and place.files() == {}
    with pytest.raises(OutputError, match="not prepared"):
        api.run_part(plan, "1/2")
    with pytest.raises(OutputError, match=r"no part|not prepared"):
        api.publish(plan)


def test_merge_into_a_store_is_the_local_merge(scene: Scene, s3: Store, small_parts: None) -> None:
    place = StorePlace(f"s3://{BUCKET}/models/model", s3.client)
    loraweld.merge(scene.adapter, base=scene.base, output=place.output)
    assert place.files() == scene.files and place.left() == []
    with pytest.raises(OutputError, match="--overwrite"):
        loraweld.merge(scene.adapter, base=scene.base, output=place.output)
    s3.put("models/model", {"model-00009-of-00009.safetensors": b"of an earlier model"})
    loraweld.merge(scene.adapter, base=scene.base, output=place.output, overwrite=True)
    assert place.files() == scene.files and place.left() == []


def test_a_merge_that_is_refused_halfway_leaves_no_object(
    scene: Scene, s3: Store, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = StorePlace(f"s3://{BUCKET}/models/model", s3.client)
    made = itertools.count()

    def failing(*arguments: object) -> Iterator[object]:
        if next(made) == 3:
            raise loraweld.errors.NumericsError("halfway")
        return original(*arguments)

    original = run.kept_pieces
    monkeypatch.setattr(run, "kept_pieces", failing)
    with pytest.raises(LoraweldError, match="halfway"):
        loraweld.merge(scene.adapter, base=scene.base, output=place.output)
    assert place.files() == {} and place.left() == []


def test_a_killed_part_is_continued(
    scene: Scene, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = saved(scene, place, tmp_path / "plan.json", workers=1)
    seen: list[int] = []

    def stopping(count: int) -> None:
        seen.append(count)
        if sum(seen) > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run_part(plan, "1/1", progress=stopping)
    with pytest.raises(OutputError, match="1 of 1 parts"):
        api.publish(plan)
    again: list[int] = []
    api.run_part(plan, "1/1", progress=again.append)
    assert again[0] > 0, "what was finished is not made again"
    api.publish(plan)
    assert place.files() == scene.files and place.left() == []


def test_publish_continues_where_it_was_killed(scene: Scene, s3_place: StorePlace, tmp_path: Path) -> None:
    plan = saved(scene, s3_place, tmp_path / "plan.json")
    api.run_part(plan, "1/1")
    with dying_after_one_file():
        api.publish(plan)
    assert len(s3_place.files()) == 1
    api.publish(plan)
    assert s3_place.files() == scene.files and s3_place.left() == []


def test_bytes_lost_in_the_store_are_noticed(scene: Scene, s3: Store, small_parts: None, tmp_path: Path) -> None:
    place = StorePlace(f"s3://{BUCKET}/models/model", s3.client)
    plan = saved(scene, place, tmp_path / "plan.json")
    api.run_part(plan, "1/1")
    client = s3.client
    upload = client.list_multipart_uploads(BUCKET)[0]
    known = {"Bucket": BUCKET, "Key": upload["Key"], "UploadId": upload["UploadId"]}
    number = client.call_s3("list_parts", **known)["Parts"][0]["PartNumber"]
    client.call_s3("upload_part", **known, PartNumber=number, Body=b"short")
    with pytest.raises(OutputError, match="did not arrive"):
        api.publish(plan)
    assert place.files() == {}


def test_another_input_is_refused(scene: Scene, place: Place, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, data in contents(scene.adapter).items():
        (adapter / name).write_bytes(data)
    plan = saved(replace(scene, adapter=adapter), place, tmp_path / "plan.json")
    api.run_part(plan, "1/2")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5 * config["lora_alpha"]}))
    for step in (lambda: api.run_part(plan, "2/2"), lambda: api.publish(plan)):
        with pytest.raises(OutputError, match="have changed"):
            step()


def test_a_folder_in_use_is_refused(scene: Scene, tmp_path: Path, small_items: None) -> None:
    plan = saved(scene, FolderPlace(scene.out), tmp_path / "plan.json")
    api.run_part(plan, "1/2")
    scene.merge()  # an ordinary merge takes the place over
    with pytest.raises(OutputError, match="not prepared"):
        api.run_part(plan, "2/2")
    with pytest.raises(OutputError, match="--overwrite"):
        saved(scene, FolderPlace(scene.out), tmp_path / "plan.json")


def test_encoded_weights_keep_their_report(scene: Scene, place: Place, tmp_path: Path) -> None:
    whole = loraweld.merge(scene.adapter, base=scene.base, output=tmp_path / "whole", save_method="merged_4bit")
    plan = saved(scene, place, tmp_path / "plan.json", save_method="merged_4bit")
    for number in (3, 1, 2):
        api.run_part(plan, f"{number}/3")
    report = api.publish(plan)
    assert place.files() == contents(tmp_path / "whole")
    assert report.fidelity == whole.fidelity and report.fidelity
    assert report.notes == whole.notes


def test_a_change_that_is_lost_in_all_parts_is_refused(place: Place, tmp_path: Path) -> None:
    scene = undisturbed_merge(tmp_path / "made", num_files=2, layers=2, hidden=16, intermediate=24, vocab=32)
    plan = saved(scene, place, tmp_path / "plan.json", scale=1e-30)
    for number in (1, 2):
        api.run_part(plan, f"{number}/2")
    with pytest.raises(loraweld.errors.NumericsError, match="smaller than the output can hold"):
        api.publish(plan)
    assert place.files() == {}


def test_the_same_merge_ends_a_publication_that_was_killed(scene: Scene, s3_place: StorePlace) -> None:
    with dying_after_one_file():
        loraweld.merge(scene.adapter, base=scene.base, output=s3_place.output)
    loraweld.merge(scene.adapter, base=scene.base, output=s3_place.output)
    assert s3_place.files() == scene.files and s3_place.left() == []


def test_what_begins_badly_leaves_no_upload(scene: Scene, s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    place = StorePlace(f"s3://{BUCKET}/models/model", s3.client)
    original = uploads.MultipartUploads.begin
    begun: list[str] = []

    def failing(self: uploads.MultipartUploads, path: str) -> str:
        if len(begun) == 2:
            raise OSError(errno.EIO, "no third one")
        begun.append(path)
        return original(self, path)

    monkeypatch.setattr(uploads.MultipartUploads, "begin", failing)
    with pytest.raises(OutputError, match="no third one"):
        loraweld.merge(scene.adapter, base=scene.base, output=place.output)
    assert place.left() == []


@pytest.mark.parametrize("url", ["s3://there-is-no-such-bucket/model", "nothing://bucket/model"])
def test_a_store_that_is_not_there(scene: Scene, s3: Store, url: str) -> None:
    shown = run_command("merge", scene.adapter, "--base", scene.base, "-o", url)
    assert shown.returncode == 1
    assert shown.stderr.startswith("loraweld: error: ") and url in shown.stderr and "Traceback" not in shown.stderr


def test_a_full_disk_is_a_message_and_can_be_continued(
    scene: Scene, tmp_path: Path, small_items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = saved(scene, FolderPlace(scene.out), tmp_path / "plan.json")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("loraweld.sinks.system.write_at", full)
        with pytest.raises(OutputError, match="the disk is full"):
            api.run_part(plan, "1/1")
    api.run_part(plan, "1/1")
    api.publish(plan)
    scene.check_finished()


def test_an_input_that_changes_while_a_part_is_made_takes_its_notes_back(
    scene: Scene, tmp_path: Path, small_items: None
) -> None:
    base = tmp_path / "base"
    shutil.copytree(scene.base, base)
    path = next(base.glob("*-00001-of-*.safetensors"))
    before = path.stat()
    plan = saved(replace(scene, base=base), FolderPlace(scene.out), tmp_path / "plan.json")
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        api.run_part(plan, "1/1", progress=lambda count: os.utime(path, ns=(1, 1)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OutputError, match="1 of 1 parts"):
        api.publish(plan)
    again: list[int] = []
    api.run_part(plan, "1/1", progress=again.append)
    assert again[0] == 0
    api.publish(plan)
    scene.check_finished()


def test_verify_is_heeded_when_parts_are_published(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a merge: a byte that the disk has turned is found before the output appears."""
    plan = saved(scene, FolderPlace(scene.out), tmp_path / "plan.json", verify=True)
    api.run_part(plan, "1/1")
    weights = max(scene.staging.rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\x80\x42"  # 64 in bfloat16
    weights.write_bytes(data)
    with pytest.raises(VerificationError, match="was not published"):
        api.publish(plan)
    assert scene.state() is None


def test_a_plan_of_another_version_is_refused(scene: Scene, tmp_path: Path) -> None:
    path = saved(scene, FolderPlace(scene.out), tmp_path / "plan.json")
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "loraweld_version": "0.0.1"}))
    with pytest.raises(RequestError, match=r"saved by loraweld 0\.0\.1"):
        api.run_part(path, "1/1")


def test_from_the_command_line(scene: Scene, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    merge = ("plan", scene.adapter.name, "--base", scene.base.name, "-o", scene.out)
    made = run_command(*merge, "--save", plan, cwd=scene.base.parent)
    assert (made.returncode, made.stderr) == (0, "")
    early = run_command("publish", plan)
    assert early.returncode == 1 and "no part has been run" in early.stderr
    for number in (2, 1):
        done = run_command("run", plan, "--part", f"{number}/2", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    published = run_command("publish", plan, "--json", cwd=tmp_path)
    assert json.loads(published.stdout)["output"] == str(scene.out)
    scene.check_finished()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "1/3/5", "-1/3", "1/1000000", ""])
def test_parts_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected I/N"):
        parse_part(text)
    shown = run_command("run", tmp_path / "plan.json", f"--part={text}")
    assert shown.returncode == 1 and "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    "document", ["", "[]", "{}", '{"identity": 1}', '{"identity": "a", "request": {}, "plan": {}}']
)
def test_plans_that_are_none(document: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(document)
    for step in (lambda: api.run_part(path, "1/1"), lambda: api.publish(path), lambda: api.discard(path)):
        with pytest.raises(LoraweldError):
            step()


def test_no_secret_is_saved(scene: Scene, tmp_path: Path) -> None:
    path = saved(scene, FolderPlace(scene.out), tmp_path / "plan.json", token="hf_secret")
    assert "hf_secret" not in path.read_text()


def an_item(start: int, end: int) -> Item:
    return Item(WeightFile(name="w", header=b"", placed=(), same_as=None), start, end)


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=60), count=st.integers(1, 80))
def test_shares_are_the_whole_in_order_and_even(sizes: list[int], count: int) -> None:
    ends = [*itertools.accumulate(sizes)]
    work = [(an_item(end - size, end),) for size, end in zip(sizes, ends, strict=True)]
    cut = shares(work, count)
    assert len(cut) == count
    assert [one for share in cut for one in share] == work
    for share in cut:
        assert sum(item.end - item.start for (item,) in share) <= ends[-1] / count + max(sizes)


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=30), count=st.integers(1, 9), data=st.data())
def test_missing_parts_are_those_with_an_item_that_is_not_done(
    sizes: list[int], count: int, data: st.DataObject
) -> None:
    ends = [*itertools.accumulate(sizes)]
    work = [(an_item(end - size, end),) for size, end in zip(sizes, ends, strict=True)]
    done = data.draw(st.sets(st.sampled_from([item.key for (item,) in work])))
    found = missing_parts(work, done, [count])
    for number, share in enumerate(shares(work, count), 1):
        assert (Part(count=count, number=number) in found) == any(item.key not in done for (item,) in share)


@settings(max_examples=200)
@given(size=st.integers(1, 5 << 40), data=st.data())
def test_part_numbers_rise_and_stay_within_the_limits_of_s3(size: int, data: st.DataObject) -> None:
    unit = part_unit(size)
    assert unit >= MIN_PART_BYTES == 5 << 20
    first = data.draw(st.integers(0, size - 1))
    second = data.draw(st.integers(min(first + unit, size), size))
    assert 1 <= part_number(first, size) <= 10_000
    if second < size:
        assert part_number(first, size) < part_number(second, size) <= 10_000
