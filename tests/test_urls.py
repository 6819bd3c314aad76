"""Base and adapter by URL: in a store that speaks S3, in other file systems of fsspec, on the Hub, on this machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
import torch
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import loraweld
from encoded_bases import config_of, nf4
from fakes import contents, random_factors, random_tensors, save_base, write_adapter, write_base
from hub_client import point_at
from hub_server import Hub, Repository, hub_server
from loraweld.checkpoint import remote, url
from loraweld.errors import CheckpointError, LoraweldError
from processes import run_command, run_python
from s3_server import SECRET, Store
from scenes import BUFFER_BYTES, CHECKPOINT_BYTES, ITEM_BYTES, Scene

TENSORS = {"model.layers.0.mlp.up_proj.weight": (64, 32), "lm_head.weight": (40, 32)}
LAYER = {"model.layers.0.mlp.up_proj.weight": (64, 32)}


@pytest.fixture
def store(s3: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """An empty bucket; temporary folders are in a place of their own, and nothing waits before it asks again."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.0)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return s3


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """fsspec's store in this process, empty."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def put(memory: MemoryFileSystem, name: str, files: Path | Mapping[str, bytes]) -> str:
    for path, data in (contents(files) if isinstance(files, Path) else files).items():
        memory.pipe_file(f"/{name}/{path}", data)
    return f"memory://{name}"


# -- the same bytes


@pytest.mark.parametrize("where", ["base", "adapter", "both"])
def test_the_result_is_that_of_folders(where: str, scene: Scene, store: Store, tmp_path: Path) -> None:
    """To the byte, the record too; no weight of base or adapter is stored, and nothing temporary is left."""
    stored: list[Path] = []
    base = store.put("a/base", scene.base) if where != "adapter" else scene.base
    adapter = store.put("adapter", scene.adapter) if where != "base" else scene.adapter

    def look(count: int) -> None:
        stored.extend((tmp_path / "temporary").rglob("*.safetensors"))

    report = loraweld.merge(adapter, base=base, output=scene.out, progress=look)
    scene.check_finished()
    assert report.base == str(base) and report.adapters == ("adapter",)
    assert not stored
    assert not list((tmp_path / "temporary").iterdir())
    assert loraweld.merge(adapter, base=base, output=scene.out).was_there


def test_the_command(scene: Scene, store: Store) -> None:
    """In another process, which has the store from its environment."""
    base, adapter = store.put("base", scene.base), store.put("adapter", scene.adapter)
    planned = run_command("plan", adapter, "--base", f"{base}/", "-o", scene.out, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["base"] == f"{base}/" and not scene.out.exists()
    done = run_command("merge", adapter, "--base", f"{base}/", "-o", scene.out, "--verify", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    scene.check_finished()


def nf4_base(folder: Path) -> Path:
    tensors = random_tensors(TENSORS, torch.bfloat16)
    quantised = nf4(tensors.pop("model.layers.0.mlp.up_proj.weight"), quant_type="nf4")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return save_base(folder, {**tensors, **quantised}, config_of("bitsandbytes", **settings))


def pickled_base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save(random_tensors(TENSORS, torch.bfloat16), folder / "pytorch_model.bin")
    return folder


def pickled_adapter(folder: Path) -> Path:
    write_adapter(folder, random_factors(LAYER))
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    return folder


@pytest.mark.parametrize("make_base", [nf4_base, pickled_base])
@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit", "preserve"])
def test_other_bases_and_a_pickled_adapter(make_base: Any, method: str, store: Store, tmp_path: Path) -> None:
    """In the output of a merge from folders there is nothing else."""
    base, adapter = make_base(tmp_path / "base"), pickled_adapter(tmp_path / "adapter")
    loraweld.merge(adapter, base=base, output=tmp_path / "expected", save_method=method)
    urls = store.put("adapter", adapter), store.put("base", base)
    loraweld.merge(urls[0], base=urls[1], output=tmp_path / "out", save_method=method)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("options", [{}, {"combine": "cat"}])
def test_the_adapter_alone(options: dict[str, str], store: Store, tmp_path: Path) -> None:
    adapters = [
        write_adapter(tmp_path / name, random_factors(LAYER, seed=seed), base_model_name_or_path="org/base")
        for seed, name in enumerate(["one", "two"][: 1 + len(options)])
    ]
    loraweld.merge(adapters, output=tmp_path / "expected", save_method="lora", **options)
    urls = [store.put(adapter.name, adapter) for adapter in adapters]
    loraweld.merge(urls, output=tmp_path / "out", save_method="lora", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_combined_adapters_and_the_4_bit_checkpoint_they_were_trained_on(store: Store, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", random_tensors(TENSORS, torch.bfloat16))
    adapters = [write_adapter(tmp_path / name, random_factors(LAYER, seed=seed)) for seed, name in enumerate("ab")]
    quantised = nf4_base(tmp_path / "quantised")
    named = {"base": base, "merge_base": f"quantized-from:{quantised}"}
    loraweld.merge(adapters, output=tmp_path / "expected", combine="svd", **named)
    named = {"base": store.put("base", base), "merge_base": f"quantized-from:{store.put('quantised', quantised)}"}
    urls = [store.put(adapter.name, adapter) for adapter in adapters]
    loraweld.merge(urls, output=tmp_path / "out", combine="svd", **named)
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    for files in (found, expected):
        del files["loraweld.json"]  # a note names the checkpoint as it was given
    assert found == expected


def test_a_tokenizer_by_url(scene: Scene, store: Store, tmp_path: Path) -> None:
    """Its files alone take the place of the base's, in an adapter too."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"other": 1}')
    place = store.put("tokenizer", tmp_path / "tokenizer")
    for method in ("merged_16bit", "lora"):
        out = scene.out.with_name(method)
        loraweld.merge(scene.adapter, base=scene.base, output=out, tokenizer=place, save_method=method)
        assert (out / "tokenizer.json").read_text() == '{"other": 1}'
    with pytest.raises(CheckpointError, match=r"s3://bucket/nothing' is not there"):
        loraweld.merge(scene.adapter, base=scene.base, output=scene.out, tokenizer="s3://bucket/nothing")


def test_an_adapter_in_a_subfolder_and_states_of_training(scene: Scene, store: Store) -> None:
    """The only one is found; beside a model, older states are not even listed."""
    files = {f"adapter/{name}": data for name, data in contents(scene.adapter).items()}
    loraweld.merge(store.put("run", files), base=scene.base, output=scene.out)
    scene.check_finished()
    older = {f"checkpoint-1/{name}": data for name, data in contents(scene.adapter).items()}
    folder = url.url_folder(
        store.put("adapter", {**contents(scene.adapter), **older}), what="adapter", patterns=["*"], pickles=[]
    )
    assert not (folder.folder / "checkpoint-1").exists()


def test_everything_else_that_takes_a_model(scene: Scene, store: Store, tmp_path: Path) -> None:
    loraweld.merge(scene.adapter, base=scene.base, output=scene.out)
    base, adapter, out = (
        store.put(name, folder) for name, folder in (("base", scene.base), ("adapter", scene.adapter), ("m", scene.out))
    )
    verified = loraweld.verify(out, base=base, adapter=adapter)
    assert verified.holds and verified.output == out
    assert not loraweld.verify(base, base=base, adapter=adapter).holds
    assert loraweld.compare(out, scene.out).is_equal
    assert not loraweld.compare(base, out).is_equal
    here, there = loraweld.inspect(scene.out), loraweld.inspect(out)
    assert there.pop("path") == out and here.pop("path") == str(scene.out)
    assert here == there
    assert loraweld.inspect(adapter) == {**loraweld.inspect(scene.adapter), "path": adapter}
    loraweld.extract(base=base, tuned=out, output=tmp_path / "back", rank=4)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    page = loraweld.report_page(out, base=base, output=tmp_path / "page.html")
    assert len(page.changes) == len(load_tensors(scene.out))


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


# -- other places


def test_other_file_systems(scene: Scene, memory: MemoryFileSystem) -> None:
    base, adapter = put(memory, "deep/base", scene.base), put(memory, "adapter", scene.adapter)
    loraweld.merge(adapter, base=base, output=scene.out)
    scene.check_finished()


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_urls_of_this_machine_are_folders(scheme: str, scene: Scene) -> None:
    base, adapter = f"{scheme}://{scene.base}", f"{scheme}://{scene.adapter}"
    report = loraweld.merge(adapter, base=base, output=scene.out)
    scene.check_finished()
    assert report.base == str(scene.base)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scene: Scene) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server() as served, point_at(served, monkeypatch):
        served.repositories["org/base"] = Repository(branches={"main": contents(scene.base)})
        served.repositories["org/adapter"] = Repository(branches={"main": contents(scene.adapter)})
        yield served


def test_urls_of_the_hub(scene: Scene, hub: Hub, tmp_path: Path) -> None:
    """A model at a revision, the base by ranges: it is not in the cache."""
    commit = {}
    for name in ("org/base", "org/adapter"):
        repository = hub.repositories[name]
        commit[name] = repository.keep(repository.branches["main"])
        repository.branches["main"] = Repository(branches={"main": {"config.json": b"{}"}}).branches["main"]
    loraweld.merge(
        f"hf://org/adapter@{commit['org/adapter']}", base=f"hf://org/base@{commit['org/base']}", output=scene.out
    )
    found = contents(scene.out)
    record = json.loads(found.pop("loraweld.json"))
    assert found == {name: data for name, data in scene.files.items() if name != "loraweld.json"}
    assert (record["base"]["name"], record["base"]["commit"]) == ("org/base", commit["org/base"])
    assert record["adapters"][0]["name"] == "org/adapter"
    assert not list((tmp_path / "cache" / "models--org--base").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf://a/b", ("a/b", None)),
        ("hf://a/b/", ("a/b", None)),
        ("hf://a/b@v1.0", ("a/b", "v1.0")),
        ("hf://a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("hf://a/b@refs%2Fpr%2F3", ("a/b", "refs/pr/3")),
        ("s3://a/b@v1", None),
    ],
)
def test_names_of_the_hub(name: str, expected: tuple[str, str | None] | None) -> None:
    assert url.hub_name(name) == expected


@pytest.mark.parametrize("name", ["hf://a", "hf://", "hf://datasets/a/b", "hf://a/b/folder", "hf://a/b@"])
def test_names_that_are_none_of_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not a model of the Hub; expected hf://OWNER/NAME"):
        url.hub_name(name)


# -- runs that are killed, files that change


MERGE = """
import os, sys
import loraweld
from loraweld.execute import run
from loraweld.planning import memory

run.CHECKPOINT_BYTES = {checkpoint}
memory.ITEM_BYTES = {item}
memory.BUFFER_BYTES = memory.MIN_BUFFER_BYTES = {buffer}
adapter, base, out, limit = sys.argv[1:]
done = 0

def progress(count):
    global done
    done += count
    if done > int(limit):
        os._exit(9)

report = loraweld.merge(adapter, base=base, output=out, workers=1, progress=progress)
print(report.resumed_bytes)
"""


@pytest.mark.parametrize("place", ["s3", "hub"])
def test_another_process_continues(
    place: str, scene: Scene, store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The temporary folder has another name there; what it stands for is the same."""
    script = tmp_path / "merge.py"
    script.write_text(MERGE.format(checkpoint=CHECKPOINT_BYTES, item=ITEM_BYTES, buffer=BUFFER_BYTES))
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    if place == "s3":
        names = store.put("adapter", scene.adapter), store.put("base", scene.base)
    else:
        names = str(scene.adapter), "hf://org/base"
    size = sum(len(data) for name, data in scene.files.items() if name.endswith(".safetensors"))
    killed = run_python(script, *names, scene.out, str(size // 2), env=variables)
    assert killed.returncode == 9, killed.stderr
    finished = run_python(script, *names, scene.out, str(2 * size), env=variables)
    assert finished.returncode == 0, finished.stderr
    assert size // 4 < int(finished.stdout) < size
    if place == "s3":
        scene.check_finished()


def test_other_content_is_not_continued(scene: Scene, store: Store, small_items: None) -> None:
    """The same URL with another checksum is another merge."""
    base, adapter = store.put("base", scene.base), store.put("adapter", scene.adapter)

    def interrupt(count: int) -> None:
        if count:
            raise KeyboardInterrupt

    heads = []
    name = "model-00002-of-00003.safetensors"
    data = (scene.base / name).read_bytes()
    for content in (data, data, data[:-1] + bytes([data[-1] ^ 1])):
        store.put("base", {name: content})
        with pytest.raises(KeyboardInterrupt):
            loraweld.merge(adapter, base=base, output=scene.out, progress=interrupt)
        heads.append(json.loads((scene.staging / "journal").read_text().splitlines()[0])["merge"])
    assert heads[0] == heads[1] != heads[2]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("base/model-00003-of-00003.safetensors", "other bytes"),
        ("base/tokenizer.json", "removed"),
        ("adapter/adapter_model.safetensors", "other bytes"),
    ],
)
def test_an_object_that_changes_meanwhile_is_found(name: str, change: str, scene: Scene, store: Store) -> None:
    """Of the same size, at the last moment: nothing appears, nothing is kept to go on from."""
    base, adapter = store.put("base", scene.base), store.put("adapter", scene.adapter)
    folder, _, file = name.partition("/")
    data = store.get(folder)[file]
    left = sum(len(data) for name, data in scene.files.items() if name.endswith(".safetensors"))

    def disturb(count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0 and change == "removed":
            store.client.rm_file(f"bucket/{name}")
        elif left <= 0:
            store.put(folder, {file: data[:-1] + bytes([data[-1] ^ 1])})

    with pytest.raises(CheckpointError, match=rf"^s3://bucket/{name}: (has changed while|cannot be found any more)"):
        loraweld.merge(adapter, base=base, output=scene.out, progress=disturb)
    assert not list(scene.out.parent.iterdir())
    store.put(folder, {file: data})
    loraweld.merge(adapter, base=base, output=scene.out)
    scene.check_finished()


# -- what cannot be had


def test_a_read_that_fails_twice_and_then_works(scene: Scene, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each range of each file: all are asked for a third time."""
    base, adapter = store.put("base", scene.base), store.put("adapter", scene.adapter)
    asked: dict[tuple[object, ...], int] = {}
    read = s3fs.S3FileSystem._cat_file

    async def failing(self: Any, path: str, *, start: int, end: int) -> bytes:
        key = path, start, end
        asked[key] = asked.get(key, 0) + 1
        if asked[key] <= 2:
            raise OSError("connection reset by peer")
        return await read(self, path, start=start, end=end)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", failing)
    loraweld.merge(adapter, base=base, output=scene.out)
    assert len(asked) > 5
    scene.check_finished()


def test_a_read_that_never_works(scene: Scene, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    base = store.put("base", scene.base)

    async def failing(self: Any, path: str, **options: Any) -> bytes:
        raise OSError("connection reset by peer")

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", failing)
    message = r"s3://bucket/base/\S+: cannot be read at byte \d+: OSError: connection reset by peer; the same command"
    with pytest.raises(CheckpointError, match=message):
        loraweld.merge(scene.adapter, base=base, output=scene.out)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("s3://nothing/base", "is not there; check bucket and path"),
        ("s3://bucket/nothing", "is not there; check bucket and path"),
        ("s3://bucket/base/config.json", "holds no files; expected the folder"),
        ("https://127.0.0.1:9/base", "is of https, which has no folders"),
        ("simplecache::s3://bucket/base", "is a chain of file systems"),
        ("s3://bucket/base::file:///etc", "is a chain of file systems"),
        ("gs://bucket/base", "needs a package that is not installed: pip install gcsfs"),
        ("az://bucket/base", "needs a package that is not installed: pip install adlfs"),
        ("nonsense://bucket/base", "cannot be opened: ValueError: Protocol not known: nonsense"),
    ],
)
@pytest.mark.parametrize("what", ["base", "adapter"])
def test_what_is_not_there(what: str, name: str, problem: str, scene: Scene, store: Store) -> None:
    store.put("base", scene.base)
    named = {"base": scene.base, "adapter": scene.adapter, what: name}
    with pytest.raises(CheckpointError) as raised:
        loraweld.merge(named["adapter"], base=named["base"], output=scene.out)
    assert str(raised.value).startswith(f"{what} '{name}' {problem}")
    assert not list(scene.out.parent.iterdir())


def test_credentials_that_the_store_does_not_take(scene: Scene, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong ones, and none at all."""
    base = store.put("base", scene.base)
    with store.strict(), pytest.raises(CheckpointError, match=r"^base 's3://bucket/base' may not be read") as raised:
        loraweld.merge(scene.adapter, base=base, output=scene.out)
    assert SECRET not in str(raised.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(CheckpointError, match=r"^base 's3://bucket/base' cannot be had: NoCredentialsError"):
        loraweld.merge(scene.adapter, base=base, output=scene.out)


def test_pickles_are_copied_up_to_a_bound(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = pickled_base(tmp_path / "base"), pickled_adapter(tmp_path / "adapter")
    urls = store.put("base", base), store.put("adapter", adapter)
    monkeypatch.setattr(url, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"adapter 's3://bucket/adapter' holds \d+ bytes of pickles.*safetensors"):
        loraweld.merge(urls[1], base=base, output=tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"base 's3://bucket/base' holds \d+ bytes of pickles.*safetensors"):
        loraweld.merge(adapter, base=urls[0], output=tmp_path / "out")


# -- strangers, and secrets


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file system may be opened."""

    def opened(*place: object, **options: object) -> None:
        raise AssertionError("a file system was opened")

    monkeypatch.setattr(fsspec.core, "url_to_fs", opened)


@pytest.mark.parametrize(
    "name",
    ["s3://bucket/base", "http://169.254.169.254/latest", "file:///etc", "hf://org/base", "simplecache::s3://b/c"],
)
@pytest.mark.usefixtures("unopened")
def test_a_url_that_a_file_names_is_not_followed(name: str, scene: Scene, tmp_path: Path) -> None:
    """Neither that of an adapter's config nor that of an output's record."""
    adapter = write_adapter(tmp_path / "adapter", random_factors(LAYER), base_model_name_or_path=name)
    with pytest.raises(CheckpointError, match=r"a URL that a file names is not followed, give it with --base"):
        loraweld.merge(adapter, output=scene.out)
    with pytest.raises(CheckpointError, match=r"not followed, give it with --merge-base quantized-from:CHECKPOINT"):
        loraweld.merge(adapter, base=scene.base, merge_base="quantized-from", output=scene.out)
    loraweld.merge(scene.adapter, base=scene.base, output=scene.out)
    record = json.loads((scene.out / "loraweld.json").read_text())
    record["base"] |= {"name": name, "commit": "0" * 40}
    (scene.out / "loraweld.json").write_text(json.dumps(record))
    with pytest.raises(LoraweldError, match=r"a URL that a file names is not followed"):
        loraweld.verify(scene.out, adapter=adapter)
    assert "give it with --base" in loraweld.report_page(scene.out, output=tmp_path / "page.html").reason


class Hostile(MemoryFileSystem):
    """A store whose keys are what `keys` says."""

    protocol = "hostile"
    keys: tuple[str, ...] = ()
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/base"

    def ls(self, path: str, detail: bool = True, **options: object) -> list[dict[str, object]]:
        return [{"name": f"/base/{key}", "size": 2, "type": "file"} for key in self.keys]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        return b"{}"


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> type[Hostile]:
    fsspec.register_implementation("hostile", Hostile, clobber=True)
    monkeypatch.setattr(Hostile, "keys", ())
    return Hostile


@pytest.mark.parametrize(
    "key",
    ["../x.json", "../../x.json", "a/../../x.json", "/x.json", "a//x.json", "./x.json", "a\x00.json", "a\\x.json"],
)
def test_names_in_a_bucket_do_not_lead_out_of_the_folder(
    key: str, hostile: type[Hostile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(hostile, "keys", ("config.json", key))
    with pytest.raises(CheckpointError, match=r"is no name of a file or folder"):
        loraweld.inspect("hostile://base")
    assert not list(tmp_path.rglob("x.json"))


def test_keys_that_are_files_and_folders_at_once(hostile: type[Hostile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "keys", ("a.json", "a.json/b.json"))
    with pytest.raises(CheckpointError, match=r"hostile://base/a.json/b.json: cannot be copied"):
        loraweld.inspect("hostile://base")


def test_a_listing_is_bounded(hostile: type[Hostile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "keys", tuple(f"{number}.bin" for number in range(10_001)))
    with pytest.raises(CheckpointError, match=r"holds more than 10000 files"):
        loraweld.inspect("hostile://base")


def test_credentials_in_a_url_are_nowhere_to_be_seen(
    scene: Scene, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in report, plan, record, adapter or error."""
    secret = "user:pass/w@rd"
    base, adapter = put(memory, f"{secret}@host/base", scene.base), put(memory, f"{secret}@host/adapter", scene.adapter)
    report = loraweld.merge(adapter, base=base, output=scene.out)
    scene.check_finished()
    assert report.base == "memory://host/base"
    said = [json.dumps(report.to_json()), json.dumps(loraweld.inspect(base))]
    out = scene.out.with_name("out")
    loraweld.merge([adapter, adapter], base=base, output=out, save_method="lora", combine="cat")
    said.append((out / "adapter_config.json").read_text())

    def failing(self: Any, path: str, **options: Any) -> list[str]:
        raise RuntimeError(f"no connection to memory:/{path}")

    def error_of(name: str, pattern: str, fails: str | None = None, *, late: bool = False) -> str:
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=pattern) as raised:
            patch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.0)

            def disturb(count: int) -> None:
                if fails:
                    patch.setattr(MemoryFileSystem, fails, failing)

            if not late:
                disturb(0)
            loraweld.merge(scene.adapter, base=name, output=scene.out.with_name("failed"), progress=disturb)
        return str(raised.value)

    said += [
        error_of(f"{base}x", r"^base 'memory://host/basex' is not there"),
        error_of(base, r"^base 'memory://host/base' cannot be had: RuntimeError: no connection", "ls"),
        error_of(base, r"^memory://host/base/\S+: cannot be read at byte 0: OSError: no connection", "cat_file"),
        error_of(base, r"^memory://host/base: cannot be listed: OSError: no connection", "ls", late=True),
    ]
    for text in said:
        assert "pass" not in text and "w@rd" not in text and "user" not in text


@given(st.text("ab:/@%", min_size=1, max_size=8), st.text("ab/", max_size=6), st.sampled_from(["", "?sig=S3CR3T"]))
def test_shown_names_hold_no_secrets(user: str, place: str, query: str) -> None:
    text = url.shown(f"ftp://{user}:S3CR3T@{place}{query}")
    assert "S3CR3T" not in text and text == f"ftp://{place}"


@pytest.mark.parametrize("name", ["org/base", "/a:b@c", "abfs://container@account/base", "s3://bucket/base@v1"])
def test_other_names_are_shown_as_they_are(name: str) -> None:
    assert url.shown(name) == name
