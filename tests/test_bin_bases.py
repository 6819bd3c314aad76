"""Bases that torch.save wrote: the same models as from safetensors, read where they lie, or refused by name.

Oracles: torch.load, the merge of the same base as safetensors, and PEFT's unmerged forward.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import loraweld
from cases import AdapterCase, pairs, reload_merged
from fakes import INDEX_NAME, contents, load_folder
from handmade import MODULES, llama_config, llama_tensors, lora, loras, save_adapter, save_llama
from loraweld.checkpoint.base import open_base
from loraweld.checkpoint.hub import locate_base
from loraweld.checkpoint.pickled import read_pickled
from loraweld.checkpoint.stored import read_bytes
from models import MODELS, TinyModel, logits
from processes import run_python

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep transformers from reporting progress, and torch from splitting tiny products over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def run_and_tell(expression: str, *arguments: str | Path) -> tuple[dict[str, Any], str]:
    """Run a command in a process of its own; return its JSON and what the expression is there at the end."""
    code = f"""import atexit, resource, sys; from loraweld.cli import main
atexit.register(lambda: print({expression}, file=sys.stderr)); sys.exit(main(sys.argv[1:]))"""
    done = run_python("-c", code, *arguments, "--json")
    return json.loads(done.stdout), done.stderr.strip()


def save_bin(folder: Path, tensors: Mapping[str, Any], *, num_files: int = 1, **config: Any) -> Path:
    """Write a Llama as transformers 4 did with safe_serialization=False."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llama_config(**config)))
    if num_files == 1:
        torch.save(tensors, folder / BIN)
        return folder
    names = [f"pytorch_model-{i + 1:05d}-of-{num_files:05d}.bin" for i in range(num_files)]
    weight_map = {name: names[i * num_files // len(tensors)] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# 1. Where tensors lie

TABLE = torch.arange(24, dtype=torch.float32).reshape(4, 6)
TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
PLAIN = {
    **{f"of {name}": torch.arange(1, 6).to(getattr(torch, name)) for name in TYPES},
    "float8": torch.arange(5).to(torch.float8_e4m3fn),
    "table": TABLE,
    "the same table": TABLE,
    "rows of the table": TABLE[1:3],
    "a parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
    "a column": torch.arange(3.0).reshape(3, 1).T,
    "named wëird/ly": torch.ones(1),
}


def test_tensors_are_found_where_torch_load_finds_them(tmp_path: Path) -> None:
    """Every dtype, views of a shared storage, empty and scalar tensors: name, shape and bytes are torch.load's."""
    torch.save(PLAIN, tmp_path / BIN)
    loaded = torch.load(tmp_path / BIN, weights_only=True)
    file = read_pickled(tmp_path / BIN)
    assert file.file_bytes == (tmp_path / BIN).stat().st_size
    assert [tensor.name for tensor in file.tensors] == list(loaded)
    for tensor in file.tensors:
        assert tensor.shape == loaded[tensor.name].shape
        assert read_bytes(tensor) == raw(loaded[tensor.name])


Change = Callable[[list[tuple[zipfile.ZipInfo, bytes]]], None]


def rewrite(path: Path, change: Change) -> None:
    """Write the archive again by Python's zipfile, its entries changed in place."""
    with zipfile.ZipFile(path) as archive:
        entries = [(zipfile.ZipInfo(info.filename), archive.read(info)) for info in archive.infolist()]
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in entries:
            archive.writestr(info, data, info.compress_type)


def test_records_are_found_by_name_whatever_their_order(tmp_path: Path) -> None:
    """An archive that was packed again in another order: torch.load finds records by their name, so do we, though
    the offsets that torch notes on the device "meta" follow from the order in which the pickle names the records."""
    torch.save({name: torch.full((16,), float(i)) for i, name in enumerate("abcd")}, tmp_path / BIN)
    rewrite(tmp_path / BIN, lambda entries: entries.reverse())
    loaded = torch.load(tmp_path / BIN, weights_only=True)
    found = {tensor.name: read_bytes(tensor) for tensor in read_pickled(tmp_path / BIN).tensors}
    assert found == {name: raw(tensor) for name, tensor in loaded.items()}


BIG = 5 * 2**29  # 5 GiB of bf16


@pytest.fixture(scope="module")
def big_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sparse file of more than 4 GiB, in which the last tensor lies beyond 32-bit offsets."""
    folder = tmp_path_factory.mktemp("big") / "base"
    tensors = {"large": torch.empty(BIG, dtype=torch.bfloat16), "last": torch.empty(4, 4, dtype=torch.bfloat16)}
    with torch.serialization.skip_data():
        save_bin(folder, tensors)
    return folder


def test_a_file_of_more_than_4_gib_is_read_in_little_memory(big_base: Path) -> None:
    """What is written where the last tensor is said to lie is what torch.load finds in it; neither is the large
    tensor read nor memory taken for it."""
    last = open_base(big_base).stored["last"]
    assert last.offset > 2 * BIG > 2**32
    with (big_base / BIN).open("r+b") as file:
        file.seek(last.offset)
        file.write(raw(torch.arange(16.0).bfloat16()))
    loaded = torch.load(big_base / BIN, weights_only=True, mmap=True)["last"]
    assert torch.equal(loaded, torch.arange(16.0).bfloat16().reshape(4, 4))
    shown, peak = run_and_tell("resource.getrusage(resource.RUSAGE_SELF).ru_maxrss", "inspect", big_base)
    assert shown["bytes"] == 2 * BIG + 32
    assert int(peak) * 1024 < 2**30


# 2. The same model as from safetensors


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_merge_gives_the_tensors_that_the_safetensors_base_gives(num_files: int, tmp_path: Path) -> None:
    """The same weights from .bin and from safetensors: the same output, tensor for tensor, as safetensors files."""
    tensors = llama_tensors()
    safe = save_llama(tmp_path / "safe", num_files=num_files)
    pickled = save_bin(tmp_path / "base", tensors, num_files=num_files)
    for name in ("training_args.bin", "optimizer.bin", "adapter_model.bin", "tokenizer.json"):
        (pickled / name).write_bytes(b"{}")
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    loraweld.merge(adapter, output=tmp_path / "expected", base=safe)
    plan = loraweld.plan(adapter, output=tmp_path / "merged", base=pickled)
    report = loraweld.merge(adapter, output=tmp_path / "merged", base=pickled)
    expected, merged = load_folder(tmp_path / "expected"), load_folder(tmp_path / "merged")
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    written = {"config.json", "loraweld.json", "model.safetensors", "tokenizer.json"}
    assert contents(tmp_path / "merged").keys() == written
    assert report.bytes_written == plan.bytes_written
    assert loraweld.merge(adapter, output=tmp_path / "merged", base=pickled).was_there
    (note,) = report.notes
    assert "training_args.bin" in note and "pytorch_model" not in note


def test_a_shard_size_makes_several_files_with_a_true_index(tmp_path: Path) -> None:
    """--max-shard-size works for .bin bases; the index names the new files and no .bin."""
    base = save_bin(tmp_path / "base", llama_tensors(), num_files=2)
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    loraweld.merge(adapter, output=tmp_path / "merged", base=base, max_shard_size="9kB")
    index = json.loads((tmp_path / "merged" / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(llama_tensors())
    assert len(set(index["weight_map"].values())) > 1
    assert not list((tmp_path / "merged").glob("*.bin*"))


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    """A folder with both: transformers reads safetensors, so do we, and the pickle is not even opened."""
    base = save_llama(tmp_path / "base")
    (base / BIN).write_bytes(b"not a pickle")
    assert not open_base(base).is_pickled


def test_a_whole_pickle_wins_over_shards_and_other_safetensors(tmp_path: Path) -> None:
    """As in transformers: pytorch_model.bin before its index, and before safetensors of other names."""
    base = save_bin(tmp_path / "base", llama_tensors())
    (base / BIN_INDEX).write_text("{}")
    (base / "consolidated.safetensors").write_bytes(b"of another loader")
    assert set(open_base(base).tensors) == set(llama_tensors())
    assert tf.AutoModelForCausalLM.from_pretrained(base).dtype == torch.bfloat16


def test_a_record_of_a_pickled_base_has_the_hash_of_its_pickle(tmp_path: Path) -> None:
    """loraweld.json names the .bin file; other tensors give another hash, other values alone do not."""
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    hashes = []
    for number, dtype in enumerate((torch.bfloat16, torch.bfloat16, torch.float16)):
        base = save_bin(tmp_path / f"base{number}", llama_tensors(dtype, seed=number))
        loraweld.merge(adapter, output=tmp_path / f"merged{number}", base=base)
        record = json.loads((tmp_path / f"merged{number}" / "loraweld.json").read_text())
        hashes.append(record["base"]["headers_sha256"][BIN])
    assert hashes[0] == hashes[1] != hashes[2]


# 3. Tied parameters, which a pickle holds under both names

TIED_MODELS = ("llama", "gpt2", "opt", "bert", "t5")
TIED_CASES = (
    *("linears", "embedding", "head", "head-dora", "embedding-and-head", "save-head", "save-embedding"),
    *("save-embedding-and-head", "save-embedding-and-head-tied", "tokens", "tokens-untied", "new-tokens"),
    *("new-tokens-trained", "bias-all", "classifier", "backbone", "two"),
)


@pytest.fixture(scope="module")
def pickled_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyModel], Path]:
    """Return a function model -> folder with its state dict as torch.save writes it, both names of ties in it."""
    folders: dict[str, Path] = {}

    def folder(model: TinyModel) -> Path:
        if model.name not in folders:
            place = tmp_path_factory.mktemp(f"{model.name}-bin")
            model.save(place)
            torch.save(model.auto.from_pretrained(place).state_dict(), place / BIN)
            (place / "model.safetensors").unlink()
            folders[model.name] = place
        return folders[model.name]

    return folder


@pytest.mark.parametrize("model", [model for model in MODELS if model.name in TIED_MODELS], ids=lambda m: m.name)
def test_the_pickles_of_these_tests_hold_ties_twice(
    model: TinyModel, pickled_models: Callable[[TinyModel], Path]
) -> None:
    """Two names, one place in the file: otherwise the tests below would test nothing."""
    stored = open_base(pickled_models(model)).stored
    places = [(tensor.offset, tensor.shape) for tensor in stored.values()]
    assert len(set(places)) < len(places)


@pytest.mark.parametrize(
    ("model", "case"),
    [pytest.param(m, c, id=f"{m.name}-{c.name}") for m, c in pairs(*TIED_CASES) if m.name in TIED_MODELS],
)
def test_logits_equal_those_of_the_unmerged_model(
    model: TinyModel, case: AdapterCase, pickled_models: Callable[[TinyModel], Path], tmp_path: Path
) -> None:
    """Whatever side of a tie an adapter is on: merged and reloaded, the model answers as base + adapter do, and as
    the merge of the same base in safetensors, which holds ties once."""
    base = pickled_models(model)
    inputs = case.inputs(model)
    _, adapters = case.train(model, base, tmp_path / "adapter")
    expected = logits(case.unmerged(model, base, adapters), inputs)
    assert (expected - logits(case.load_base(model, base), inputs)).abs().max() > 1e-2, "the adapter does nothing"

    loraweld.merge(adapters, output=tmp_path / "merged", base=base, dtype="float32")

    merged = logits(reload_merged(model, case, tmp_path / "merged"), inputs)
    assert (merged - expected).abs().max() <= 1e-5
    safe = tmp_path / "safe"
    model.save(safe)
    loraweld.merge(adapters, output=tmp_path / "of-safe", base=safe, dtype="float32")
    ours, theirs = load_folder(tmp_path / "merged"), load_folder(tmp_path / "of-safe")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = "config.json"
    assert (tmp_path / "merged" / config).read_text() == (tmp_path / "of-safe" / config).read_text()


def test_names_that_share_bytes_without_a_tie_stay_two_parameters(tmp_path: Path) -> None:
    """tie_word_embeddings false: transformers loads two parameters, each has its own adapter and its own tensor."""
    tensors = llama_tensors(torch.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    base = save_bin(tmp_path / "base", tensors)
    adapter = save_adapter(tmp_path / "adapter", loras("lm_head"))
    loraweld.merge(adapter, output=tmp_path / "merged", base=base, dtype="float32")
    merged = load_folder(tmp_path / "merged")
    assert torch.equal(merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize(("module", "refused"), [("q_proj", False), ("unknown_head", True), ("embed_tokens", True)])
def test_names_that_share_bytes_in_a_way_that_is_not_known_are_not_changed(
    module: str, refused: bool, tmp_path: Path
) -> None:
    """A config that ties, two names of one tensor, and no table that says whether they are one parameter: whether a
    change of one is a change of the other is not guessed. Where neither changes, both are copied."""
    tensors = {f"model.{name}.weight": torch.ones(16, 16) for name in ("embed_tokens", "q_proj")}
    tensors["unknown_head.weight"] = tensors["model.embed_tokens.weight"]
    save_bin(tmp_path / "base", tensors, model_type="unheard", architectures=["Unheard"], tie_word_embeddings=True)
    name = next(name for name in tensors if module in name).removesuffix(".weight")
    adapter = save_adapter(tmp_path / "adapter", lora(name, (16, 16)))
    if refused:
        with pytest.raises(loraweld.MatchError, match=r"model\.embed_tokens\.weight = unknown_head\.weight"):
            loraweld.plan(adapter, output=tmp_path / "merged", base=tmp_path / "base")
    else:
        loraweld.merge(adapter, output=tmp_path / "merged", base=tmp_path / "base", dtype="float32")
        assert load_folder(tmp_path / "merged").keys() == tensors.keys()


# 4. What is refused


class Exploit:
    """A pickle of this makes a folder when it is unpickled without care."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


UNREADABLE: dict[str, tuple[Any, list[str]]] = {
    "a number": ({"step": 3}, ["'step'", "int"]),
    "nested": ({"state_dict": {"x": torch.ones(1)}}, ["'state_dict'", "dict"]),
    "a list": ([torch.ones(1)], ["list", "mapping of names"]),
    "numbered": ({0: torch.ones(1)}, ["0", "Tensor"]),
    "transposed": ({"x": torch.ones(2, 3).T, "y": torch.ones(3)}, ["'x'", "view", "strides (1, 3)", "safetensors"]),
    "every other": ({"x": torch.ones(6)[::2]}, ["'x'", "view"]),
    "expanded": ({"x": torch.ones(1).expand(4)}, ["'x'", "view"]),
    "conjugated": ({"x": torch.ones(3, dtype=torch.complex64).conj()}, ["'x'", "view"]),
    "sparse": ({"x": torch.eye(3).to_sparse()}, ["'x'", "sparse"]),
    "meta": ({"x": torch.ones(3, device="meta")}, ["'x'", "no bytes"]),
    "complex128": ({"x": torch.ones(3, dtype=torch.complex128)}, ["'x'", "complex128"]),
    "surrogate": ({"\ud800": torch.ones(3)}, ["\\ud800", "name"]),
    "metadata": ({"__metadata__": torch.ones(3)}, ["'__metadata__'", "name"]),
}


def assert_refused(place: Path, words: list[str]) -> None:
    """Check that plan and merge refuse the base in `place` naming its file, and write nothing."""
    adapter = save_adapter(place / "adapter", loras(*MODULES))
    for function in (loraweld.plan, loraweld.merge):
        with pytest.raises(loraweld.CheckpointError) as caught:
            function(adapter, output=place / "merged", base=place / "base")
        message = str(caught.value)
        assert [word for word in (str(place / "base"), *words) if word not in message] == [], message
    assert not (place / "merged").exists()


@pytest.mark.parametrize(("state", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_not_plain_tensors_is_refused_by_name(state: Any, words: list[str], tmp_path: Path) -> None:
    """Values that are no tensors, and tensors that do not lie in the file as safetensors would have them."""
    save_bin(tmp_path / "base", state)
    assert_refused(tmp_path, [BIN, *words])


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    """weights_only and nothing else: the message names the callable, without torch's advice to load it anyway."""
    save_bin(tmp_path / "base", {"x": torch.ones(1), "y": Exploit(tmp_path / "made")})
    assert_refused(tmp_path, [BIN, "mkdir", "safetensors"])
    assert not (tmp_path / "made").exists()


def test_a_file_of_old_torch_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """The format before torch 1.6 is no archive; the message says to save it again."""
    base = save_bin(tmp_path / "base", {})
    torch.save(llama_tensors(), base / BIN, _use_new_zipfile_serialization=False)
    assert_refused(tmp_path, [BIN, "1.6", "safetensors"])


def compress(entries: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
    for info, _ in entries:
        if info.filename.endswith("/data/0"):
            info.compress_type = zipfile.ZIP_DEFLATED


def shorten(entries: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
    entries[:] = [(i, data[:-1] if i.filename.endswith("/data/0") else data) for i, data in entries]


def swap_bytes(entries: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
    entries[:] = [(i, b"big" if i.filename.endswith("/byteorder") else data) for i, data in entries]


def remove(name: str) -> Change:
    def change(entries: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        entries[:] = [entry for entry in entries if not entry[0].filename.endswith(name)]

    return change


DAMAGE: dict[str, tuple[Change, list[str]]] = {
    "compressed": (compress, ["'x'", "data/0", "compressed"]),
    "short record": (shorten, ["'x'", "ends at byte 64", "has 63"]),
    "big-endian": (swap_bytes, ["byte order", "big"]),
    "no record": (remove("/data/0"), ["data/0"]),
    "no pickle": (remove("/data.pkl"), ["data.pkl"]),
    "empty": (lambda entries: entries.clear(), ["data.pkl"]),
}


@pytest.mark.parametrize(("change", "words"), DAMAGE.values(), ids=DAMAGE)
def test_archives_that_torch_does_not_write_are_refused(change: Change, words: list[str], tmp_path: Path) -> None:
    """Records that are compressed, short, missing, or of another byte order are not taken for weights."""
    base = save_bin(tmp_path / "base", {"x": torch.ones(16), "y": torch.ones(2)})
    rewrite(base / BIN, change)
    assert_refused(tmp_path, [BIN, *words])


def test_a_record_outside_of_the_file_is_refused(tmp_path: Path) -> None:
    """A directory that says more than there is: sizes in it are not believed."""
    base = save_bin(tmp_path / "base", {"x": torch.ones(16)})
    data = bytearray((base / BIN).read_bytes())
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"/data/0"))
    struct.pack_into("<II", data, entry + 20, 10**6, 10**6)  # its compressed and its own size
    (base / BIN).write_bytes(data)
    assert_refused(tmp_path, [BIN, "data/0", "damaged"])


def test_a_name_listed_twice_is_refused(tmp_path: Path) -> None:
    """Two records of one name: readers differ in which they take."""
    base = save_bin(tmp_path / "base", {"x": torch.ones(16)})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(base / BIN, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data/0"))
        archive.writestr(name, bytes(64))
    assert_refused(tmp_path, [BIN, "twice"])


@pytest.mark.parametrize("kept", [0, 10, 1_000, -30])
def test_a_cut_file_is_refused(kept: int, tmp_path: Path) -> None:
    """A download that did not finish."""
    base = save_bin(tmp_path / "base", llama_tensors())
    (base / BIN).write_bytes((base / BIN).read_bytes()[:kept])
    assert_refused(tmp_path, [BIN, "complete?"])


def point_to(name: str, file: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        index = json.loads((base / BIN_INDEX).read_text())
        index["weight_map"][name] = file
        (base / BIN_INDEX).write_text(json.dumps(index))

    return change


FIRST, SECOND = (f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
INDEX_DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing file": (lambda base: (base / SECOND).unlink(), [BIN_INDEX, SECOND, "missing"]),
    "missing tensor": (point_to("nowhere.weight", FIRST), [BIN_INDEX, "nowhere.weight"]),
    "wrong file": (point_to("lm_head.weight", FIRST), [BIN_INDEX, "lm_head.weight"]),
    "outside": (point_to("lm_head.weight", "../x.bin"), [BIN_INDEX, "../x.bin"]),
    "no map": (lambda base: (base / BIN_INDEX).write_text("{}") and None, [BIN_INDEX, "weight_map"]),
    "only shards": (lambda base: (base / BIN_INDEX).unlink(), ["safetensors", BIN, BIN_INDEX, SECOND]),
}


@pytest.mark.parametrize(("damage", "words"), INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_an_index_that_is_not_true_is_refused(damage: Callable[[Path], None], words: list[str], tmp_path: Path) -> None:
    """The index of .bin files is held to the same rules as that of safetensors files."""
    damage(save_bin(tmp_path / "base", llama_tensors(), num_files=2))
    assert_refused(tmp_path, words)


# 5. Commands, and the Hub


def test_plan_and_inspect_show_a_pickled_base(tmp_path: Path) -> None:
    """Both commands work, write nothing, and say which file it is."""
    base = save_bin(tmp_path / "base", llama_tensors())
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    planned = run_python("-m", "loraweld", "plan", adapter, "--base", base, "-o", tmp_path / "out", "--json")
    names = [file["name"] for file in json.loads(planned.stdout)["files"]]
    assert sorted(names) == ["config.json", "model.safetensors"]
    shown = json.loads(run_python("-m", "loraweld", "inspect", base, "--json").stdout)
    assert (shown["kind"], shown["main_dtype"]) == ("model", "BF16")
    assert shown["files"] == [{"name": BIN, "bytes": (base / BIN).stat().st_size}]
    assert shown["tensors"] == len(llama_tensors())
    assert not (tmp_path / "out").exists()


class Repository:
    """A repository on the Hub, downloaded by patterns into a folder; notes what was fetched."""

    def __init__(self, files: list[str], folder: Path) -> None:
        self.files, self.folder = files, folder
        folder.mkdir()

    def download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str], **options: bool) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if options.get("local_files_only"):
            if not any(self.folder.iterdir()):
                raise LocalEntryNotFoundError("not in the cache")
        else:
            for name in self.files:
                if any(fnmatch(name, pattern) for pattern in allow_patterns):
                    (self.folder / name).write_text(self._content(name))
        return str(self.folder)

    def _content(self, name: str) -> str:
        """An index names the weight files of its own kind."""
        if not name.endswith(".index.json"):
            return ""
        kind = Path(name.removesuffix(".index.json")).suffix
        shards = [file for file in self.files if file.endswith(kind) and "-of-" in file]
        return json.dumps({"weight_map": {str(number): file for number, file in enumerate(shards)}})


SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", BIN_INDEX]
OTHERS = ["config.json", "training_args.bin", "optimizer.bin", "pytorch_model.fp16.bin", "flax_model.msgpack"]


@pytest.mark.parametrize(
    ("weights", "fetched"),
    [
        (["model.safetensors", BIN], ["model.safetensors"]),
        (["model-00001-of-00001.safetensors", INDEX_NAME, *SHARDS], None),
        ([BIN], [BIN]),
        (SHARDS, SHARDS),
    ],
)
def test_pickles_are_downloaded_only_where_there_are_no_safetensors(
    weights: list[str], fetched: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are fetched in one form; a second run finds them in the cache, and so does one after a run that was
    killed between the small files and the weights."""
    repository = Repository([*weights, *OTHERS], tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", repository.download)
    expected = {"config.json", *(fetched or ["model-00001-of-00001.safetensors", INDEX_NAME, BIN_INDEX])}
    (tmp_path / "snapshot" / "config.json").touch()
    for _ in range(3):
        assert locate_base("org/base").folder == tmp_path / "snapshot"
        assert {path.name for path in (tmp_path / "snapshot").iterdir()} == expected
        for path in sorted((tmp_path / "snapshot").glob("*-00002-of-*"))[:1]:
            path.unlink()  # a download that was interrupted after its first weight file: the next run goes on


def test_a_model_is_not_imported_with_torch_unless_it_is_a_pickle(tmp_path: Path) -> None:
    """Planning a merge into a safetensors base does not import torch; the .bin base of the same weights does."""
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    bases = {False: save_llama(tmp_path / "safe"), True: save_bin(tmp_path / "base", llama_tensors())}
    for needs_torch, base in bases.items():
        command = ("plan", adapter, "--base", base, "-o", tmp_path / "out")
        assert run_and_tell("'torch' in sys.modules", *command)[1] == str(needs_torch)
