"""The commands: options, exit codes, what is printed where, what is left on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import loraweld
from fakes import INDEX_NAME, contents, load_folder, save_base
from handmade import (
    MODULES,
    Q_PROJ,
    VOCAB,
    assert_nearest,
    delta,
    llama_tensors,
    lora,
    loras,
    save_adapter,
    save_llama,
)
from loraweld.cli import main
from processes import interrupt_halfway, run_command, run_python

TENSORS = loras(*MODULES)
MERGE = "merge adapter --base base -o out"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[[str], Outcome]


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Put back what a command sets for the whole process."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs a command line, split at spaces, in this process."""

    def run(line: str) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main(line.split())
        assert type(exited.value.code) is int
        return Outcome(exited.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder: it holds `base`, two files of weights, and `adapter`."""
    folder = tmp_path / "place"
    save_llama(folder / "base", num_files=2)
    save_adapter(folder / "adapter", TENSORS)
    monkeypatch.chdir(folder)
    return folder


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """Return all files with their bytes, all links with their targets, and all folders."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def assert_merged(folder: Path, base: Path, tensors: Mapping[str, Tensor] = TENSORS, scaling: float = 1.5) -> None:
    """Check all tensors of a merge of one LoRA against float64 arithmetic."""
    merged, stored = load_folder(folder), load_folder(base)
    assert merged.keys() == stored.keys()
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in tensors:
            assert_nearest(merged[name], tensor.double() + scaling * delta(tensors, module))
        else:
            assert torch.equal(merged[name], tensor)


def assert_error(outcome: Outcome, *words: str) -> None:
    """Check for exit code 1, one message on stderr with these words, and nothing else."""
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("loraweld: error: ")
    assert outcome.err.count("loraweld: ") == 1
    assert "Traceback" not in outcome.err
    assert [word for word in words if word not in outcome.err] == [], outcome.err


# Success paths


def test_merge_writes_the_complete_model(place: Path, command: Command) -> None:
    """Exit code 0: OUT holds every tensor, merged once, under the names and in the files of the base."""
    outcome = command(MERGE)
    assert outcome.code == 0
    assert_merged(place / "out", place / "base")
    files = {path.name for path in (place / "base").iterdir()}
    assert {path.name for path in (place / "out").iterdir()} == {*files, "loraweld.json"}
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "out"}


def test_the_installed_command_is_main() -> None:
    """`loraweld` on the command line is `loraweld.cli:main`."""
    (script,) = entry_points(group="console_scripts", name="loraweld")
    assert script.load() is main


@pytest.mark.parametrize(
    "line",
    [
        "merge adapter --base base --output out",
        "merge --base base --output out adapter",
        "merge adapter --base base -o out --workers 1",
        "merge adapter --base base -o out --workers 7",
        "merge adapter --base base -o out --max-memory 64MB",
        "merge adapter --base base -o out --max-memory 1GiB",
        "merge adapter --base base -o out --dtype auto",
        "merge adapter --base base -o out --dtype bfloat16",
        "merge adapter --base base -o out --save-method merged_16bit",
        "merge adapter --base base -o out --no-resume",
        "merge adapter --base base -o out --overwrite",
        "merge ./adapter/ --base ./base/ -o ./out/",
        "merge adapter --base base -o deep/er/out",
    ],
)
def test_options_that_change_no_value_give_the_same_bytes(line: str, place: Path, command: Command) -> None:
    """The same bytes for any number of threads, any memory, any spelling of the same request."""
    loraweld.merge("adapter", base="base", output="plain")
    assert command(line).code == 0
    out = place / "deep" / "er" / "out" if "deep" in line else place / "out"
    assert contents(out) == contents(place / "plain")


def test_several_adapters_are_summed(place: Path, command: Command) -> None:
    """merge ADAPTER ADAPTER: the deltas of both, on top of each other."""
    more = lora(Q_PROJ, seed=77)
    save_adapter(place / "second", more, layers_to_transform=[0])
    assert command("merge adapter second --base base -o out").code == 0
    stored = load_folder(place / "base")[f"{Q_PROJ}.weight"].double()
    exact = stored + 1.5 * delta(TENSORS, Q_PROJ) + 1.5 * delta(more, Q_PROJ)
    assert_nearest(load_folder(place / "out")[f"{Q_PROJ}.weight"], exact)


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_dtype_is_the_dtype_of_the_weights(name: str, place: Path, command: Command) -> None:
    """--dtype: what the base stores in its main dtype."""
    assert command(f"{MERGE} --dtype {name}").code == 0
    assert {tensor.dtype for tensor in load_folder(place / "out").values()} == {getattr(torch, name)}
    assert json.loads((place / "out" / "config.json").read_text())["dtype"] == name


def test_max_shard_size_repacks(place: Path, command: Command) -> None:
    """--max-shard-size: files of at most this size, named and indexed as transformers expects."""
    assert command(f"{MERGE} --max-shard-size 4kB").code == 0
    assert_merged(place / "out", place / "base")
    names = sorted(path.name for path in (place / "out").glob("*.safetensors"))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) > 2
    index = json.loads((place / "out" / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_folder(place / "base").values())


def test_save_method_lora_writes_the_adapter(place: Path, command: Command) -> None:
    """--save-method lora: the adapter alone, without a look at the base."""
    assert command("merge adapter -o out --save-method lora").code == 0
    assert contents(place / "out") == contents(place / "adapter")


def test_a_pickled_adapter_becomes_safetensors(place: Path, command: Command) -> None:
    """--save-method lora of an adapter_model.bin: the same tensors, as safetensors."""
    stored = load_folder(place / "adapter")
    (place / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(stored, place / "adapter" / "adapter_model.bin")
    assert command("merge adapter -o out --save-method lora").code == 0
    written = load_folder(place / "out")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    assert {path.name for path in (place / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_tokenizer_is_shipped_instead_of_the_adapters(place: Path, command: Command) -> None:
    """--tokenizer PATH wins over the adapter's tokenizer, and that over the base's."""
    for folder in ("base", "adapter", "chosen"):
        (place / folder).mkdir(exist_ok=True)
        (place / folder / "tokenizer_config.json").write_text(json.dumps({"from": folder}))
    for options, winner in (("", "adapter"), (" --tokenizer chosen", "chosen")):
        assert command(f"{MERGE}{options} --overwrite").code == 0
        assert json.loads((place / "out" / "tokenizer_config.json").read_text()) == {"from": winner}


def test_the_base_is_the_one_that_the_adapter_names(place: Path, command: Command) -> None:
    """Without --base: base_model_name_or_path; with it, what the adapter names does not matter."""
    save_adapter(place / "named", TENSORS, base_model_name_or_path=str(place / "base"))
    assert command("merge named -o out").code == 0
    assert_merged(place / "out", place / "base")
    save_adapter(place / "stale", TENSORS, base_model_name_or_path="/no/such/folder")
    assert command("merge stale --base base -o other").code == 0
    assert_merged(place / "other", place / "base")


def raw_file(path: Path, tensors: Mapping[str, Tensor], *, header_bytes: int) -> None:
    """Write a safetensors file with its tensors in this very order and a header of this size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "note": "kept"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode().ljust(header_bytes - 8)
    assert len(text) == header_bytes - 8
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def layout(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a safetensors file begins, and its header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_names_order_and_files_stay_as_the_base_has_them(dtype: str, place: Path, command: Command) -> None:
    """A base without config or index, files of odd names, tensors in an odd order: all stay; the data keeps its
    place modulo 4096."""
    tensors = dict(reversed(llama_tensors().items()))
    names = list(tensors)
    odd = place / "odd"
    odd.mkdir()
    for file, chosen, size in (("z.safetensors", names[:9], 4096 + 512), ("a-b.safetensors", names[9:], 2048)):
        raw_file(odd / file, {name: tensors[name] for name in chosen}, header_bytes=size)
    assert command(f"merge adapter --base odd -o out --dtype {dtype}").code == 0
    assert {path.name for path in (place / "out").iterdir()} == {"z.safetensors", "a-b.safetensors", "loraweld.json"}
    for path in odd.iterdir():
        (start, header), (old_start, old_header) = layout(place / "out" / path.name), layout(path)
        assert list(header) == list(old_header)
        assert start % 4096 == old_start % 4096
        assert header["__metadata__"] == old_header["__metadata__"]
    if dtype == "auto":
        assert_merged(place / "out", odd)


def test_a_new_tensor_keeps_the_data_in_place(place: Path, command: Command) -> None:
    """An untied head is appended: the header grows, the data keeps its offset modulo 4096."""
    base = save_llama(place / "tied", tied=True)
    save_adapter(place / "head", lora("lm_head"))
    assert command("merge head --base tied -o out").code == 0
    (start, header), (old_start, old) = layout(place / "out" / "model.safetensors"), layout(base / "model.safetensors")
    assert start % 4096 == old_start % 4096
    assert header.keys() - old.keys() == {"lm_head.weight"}
    offsets = {name: header[name]["data_offsets"] for name in old if name != "__metadata__"}
    assert offsets == {name: old[name]["data_offsets"] for name in offsets}


# What is printed


def test_quiet_prints_nothing(place: Path, command: Command) -> None:
    """--quiet: nothing on stdout or stderr, on success; an error is still said."""
    for line in (
        f"{MERGE} --quiet",
        f"{MERGE} --quiet",
        f"{MERGE} --quiet --overwrite",
        "plan" + MERGE[5:] + " --quiet",
    ):
        assert command(line) == (0, "", "")
    assert_error(command("merge nowhere --base base -o other --quiet"), "nowhere")


def test_json_is_all_that_merge_prints_on_stdout(place: Path, command: Command) -> None:
    """merge --json: stdout parses as one object that says what was written."""
    outcome = command(f"{MERGE} --json")
    report = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert report["recipes"] == {"edit": len(MODULES), "copy": len(llama_tensors()) - len(MODULES)}
    assert {line["tensor"] for line in report["modules"]} == {f"{module}.weight" for module in MODULES}
    written = contents(place / "out")
    assert {*report["files"], "loraweld.json"} == written.keys()
    assert report["bytes_written"] == sum(len(written[name]) for name in report["files"])
    assert (report["was_there"], report["resumed_bytes"]) == (False, 0)
    assert json.loads(command(f"{MERGE} --json").out)["was_there"] is True


def test_an_error_with_json_leaves_stdout_empty(place: Path, command: Command) -> None:
    """--json: an error is a message on stderr as always, stdout holds nothing that could be parsed."""
    for line in ("merge nowhere -o out --json", "plan nowhere -o out --json", "inspect nowhere --json"):
        assert_error(command(line), "nowhere")


def test_a_report_for_people_names_what_was_merged(place: Path, command: Command) -> None:
    """Without --json: the report on stdout; other weights in the base's folder are said not to be copied."""
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf"):
        (place / "base" / name).write_bytes(b"other weights")
    outcome = command(MERGE)
    assert outcome.code == 0
    for word in ("out", "base", "adapter", "q_proj", "consolidated.safetensors", "pytorch_model.bin", "model.gguf"):
        assert word in outcome.out
    assert not {"consolidated.safetensors", "pytorch_model.bin", "model.gguf"} & contents(place / "out").keys()


def test_plan_says_what_merge_will_do(place: Path, command: Command) -> None:
    """plan --json: files with sizes, recipes by kind, bytes read and written, peak memory, free disk."""
    planned = json.loads(command("plan adapter --base base -o out --json").out)
    assert command(MERGE).code == 0
    sizes = {name: len(data) for name, data in contents(place / "out").items() if name != "loraweld.json"}
    assert {file["name"]: file.get("bytes") for file in planned["files"]} == sizes
    assert planned["bytes_written"] == sum(sizes.values())
    read = [*load_folder(place / "base").values(), *TENSORS.values()]
    assert planned["bytes_read"] == sum(tensor.nbytes for tensor in read)
    assert planned["recipes"] == {"edit": len(MODULES), "copy": len(llama_tensors()) - len(MODULES)}
    assert planned["peak_memory_bytes"] > 0
    assert 0 < planned["free_disk_bytes"] <= shutil.disk_usage(place).total


def test_plan_for_people(place: Path, command: Command) -> None:
    """plan without --json: the files and the recipes, on stdout."""
    outcome = command("plan adapter --base base -o out")
    assert (outcome.code, outcome.err) == (0, "")
    for word in ("model-00002-of-00002.safetensors", "14 edit", "base", "adapter", "out"):
        assert word in outcome.out
    assert not (place / "out").exists()


def test_inspect_says_what_a_folder_is(place: Path, command: Command) -> None:
    """inspect: a base, an adapter and an output are told apart, with their sizes."""
    assert command(MERGE).code == 0
    kinds = {"base": "model", "adapter": "adapter", "out": "merged model"}
    for folder, kind in kinds.items():
        found = json.loads(command(f"inspect {folder} --json").out)
        tensors = load_folder(place / folder)
        assert found["kind"] == kind
        assert found["tensors"] == len(tensors)
        assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
        assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        outcome = command(f"inspect {folder}")
        assert (outcome.code, outcome.err) == (0, "")
        assert kind in outcome.out
    found = json.loads(command("inspect adapter --json").out)
    assert (found["rank"], found["alpha"], found["modules"]) == (4, 6, len(MODULES))


# Usage: exit code 2

USAGE = [
    "",
    "weld",
    "merge",
    "merge adapter",
    "merge -o out --base base",
    f"{MERGE} --overwite",
    f"{MERGE} --workers",
    f"{MERGE} --workers two",
    f"{MERGE} --workers 0",
    f"{MERGE} --workers -3",
    f"{MERGE} --dtype int8",
    f"{MERGE} --save-method bogus",
    f"{MERGE} --save-method 32bit",
    f"{MERGE} --max-shard-size 5XB",
    f"{MERGE} --max-shard-size 0GB",
    f"{MERGE} --max-shard-size -1GB",
    f"{MERGE} --max-shard-size nan",
    f"{MERGE} --max-shard-size {'9' * 400}GB",
    f"{MERGE} --max-memory lots",
    f"{MERGE} --max-memory 1kB",
    f"{MERGE} --max-memory {'9' * 400}GB",
    f"{MERGE} --base=--",
    f"{MERGE} --workers=--",
    f"{MERGE} --dtype=--",
    f"{MERGE} --max-memory=--",
    f"{MERGE} --tokenizer=--",
    "merge adapter --base base -o=--",
    "plan adapter -o out --base=--",
    "plan adapter --base base",
    "plan adapter --base base -o out --dtype int8",
    "inspect",
    "inspect base adapter",
    "inspect base --overwrite",
]


@pytest.mark.parametrize("line", USAGE, ids=lambda line: line[:60] or "no command")
def test_wrong_usage_is_exit_code_2(line: str, place: Path, command: Command) -> None:
    """An unknown option, a missing argument or a value that cannot be read: 2, a message on stderr, nothing done."""
    before = everything(place)
    outcome = command(line)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err != ""
    assert "Traceback" not in outcome.err
    assert everything(place) == before


def test_a_wrong_value_is_answered_with_the_valid_ones(place: Path, command: Command) -> None:
    """A save method or dtype that does not exist: the message lists those that do."""
    assert (
        "merged_16bit, merged_4bit, merged_8bit, merged_fp8, preserve, lora"
        in command(f"{MERGE} --save-method bogus").err
    )
    assert "auto, bfloat16, float16, float32" in command(f"{MERGE} --dtype int8").err


# What the user can fix: exit code 1

Prepare = Callable[[], object]


@dataclass(frozen=True)
class Mistake:
    """What is wrong (done in the working folder), the command, and words of the message."""

    prepare: Prepare
    words: tuple[str, ...]
    line: str = MERGE


def nothing() -> None:
    pass


def write(name: str, data: bytes | str) -> Prepare:
    return lambda: Path(name).write_bytes(data.encode() if isinstance(data, str) else data)


def remove(name: str) -> Prepare:
    return lambda: Path(name).unlink()


def cut(name: str, *, kept: int) -> Prepare:
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:kept])


def empty_folder(name: str) -> Prepare:
    def prepare() -> None:
        if Path(name).is_file():
            Path(name).unlink()
        Path(name).mkdir()

    return prepare


def change(name: str, **changes: Any) -> Prepare:
    return lambda: Path(name).write_text(json.dumps({**json.loads(Path(name).read_text()), **changes}))


def occupied_output() -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")


def only_pickles() -> None:
    for path in Path("base").iterdir():
        path.unlink()
    Path("base/pytorch_model.bin").write_bytes(b"pickle")


def send_index_out(target: str) -> Prepare:
    def prepare() -> None:
        index = json.loads(Path("base", INDEX_NAME).read_text())
        index["weight_map"][f"{Q_PROJ}.weight"] = target
        Path("base", INDEX_NAME).write_text(json.dumps(index))

    return prepare


def second_adapter(**config: Any) -> Prepare:
    return lambda: save_adapter(Path("second"), TENSORS, **config)


def name_two_bases() -> None:
    change("adapter/adapter_config.json", base_model_name_or_path="one/base")()
    save_adapter(Path("second"), TENSORS, base_model_name_or_path="other/base")


CONFIG = "adapter/adapter_config.json"
WEIGHTS = "adapter/adapter_model.safetensors"
SHARD = "base/model-00002-of-00002.safetensors"
MISTAKES = {
    "no such adapter": Mistake(nothing, ("nowhere",), "merge nowhere --base base -o out"),
    "adapter is a file": Mistake(nothing, (WEIGHTS,), f"merge {WEIGHTS} --base base -o out"),
    "adapter is empty": Mistake(
        empty_folder("empty"), ("empty", "adapter_config.json"), "merge empty --base base -o out"
    ),
    "adapter is the base": Mistake(nothing, ("base", "adapter_config.json"), "merge base --base base -o out"),
    "adapter without weights": Mistake(remove(WEIGHTS), ("adapter_model.safetensors",)),
    "adapter of mlx": Mistake(lambda: Path(CONFIG).rename("adapter/adapters.safetensors"), ("MLX",)),
    "adapter config is a folder": Mistake(empty_folder(CONFIG), (CONFIG,)),
    "adapter config is not JSON": Mistake(write(CONFIG, "{"), (CONFIG, "JSON")),
    "adapter config is a list": Mistake(write(CONFIG, "[]"), (CONFIG, "object")),
    "adapter config is not text": Mistake(write(CONFIG, b"\xff\xfe\x00"), (CONFIG,)),
    "adapter weights are a folder": Mistake(empty_folder(WEIGHTS), (WEIGHTS,)),
    "adapter weights are empty": Mistake(write(WEIGHTS, b""), (WEIGHTS,)),
    "adapter weights are cut": Mistake(cut(WEIGHTS, kept=5_000), (WEIGHTS,)),
    "adapter header is cut": Mistake(cut(WEIGHTS, kept=50), (WEIGHTS,)),
    "adapter weights are text": Mistake(write(WEIGHTS, "version https://git-lfs.github.com"), (WEIGHTS,)),
    "no tensors": Mistake(lambda: save_adapter(Path("bare"), {}), ("bare",), "merge bare --base base -o out"),
    "no base named": Mistake(nothing, (CONFIG, "--base"), "merge adapter -o out"),
    "the named base is gone": Mistake(
        change(CONFIG, base_model_name_or_path="./gone"), ("./gone", "--base"), "merge adapter -o out"
    ),
    "two bases named": Mistake(name_two_bases, ("one/base", "other/base", "--base"), "merge adapter second -o out"),
    "no such base": Mistake(nothing, ("./nowhere", "--base"), "merge adapter --base ./nowhere -o out"),
    "base is a file": Mistake(nothing, (SHARD,), f"merge adapter --base {SHARD} -o out"),
    "base is empty": Mistake(empty_folder("empty"), ("empty", "safetensors"), "merge adapter --base empty -o out"),
    "base is an adapter": Mistake(nothing, ("adapter", "--base"), "merge adapter --base adapter -o out"),
    "base has pickles only": Mistake(only_pickles, ("base", "pytorch_model.bin", "safetensors")),
    "base lacks a file": Mistake(remove(SHARD), (INDEX_NAME, "model-00002-of-00002.safetensors")),
    "base file is cut": Mistake(cut(SHARD, kept=5_000), (SHARD,)),
    "base file is empty": Mistake(write(SHARD, b""), (SHARD,)),
    "index leaves the folder": Mistake(send_index_out("../secret.safetensors"), (INDEX_NAME, "../secret.safetensors")),
    "index is absolute": Mistake(send_index_out("/secret.safetensors"), (INDEX_NAME, "/secret.safetensors")),
    "index is wrong": Mistake(send_index_out("model-00002-of-00002.safetensors"), (INDEX_NAME, f"{Q_PROJ}.weight")),
    "index is not JSON": Mistake(write(f"base/{INDEX_NAME}", "weights"), (INDEX_NAME, "JSON")),
    "index is empty": Mistake(write(f"base/{INDEX_NAME}", "{}"), (INDEX_NAME, "weight_map")),
    "config is not JSON": Mistake(write("base/config.json", "{'a': 1}"), ("base/config.json", "JSON")),
    "config is a folder": Mistake(empty_folder("base/config.json"), ("base/config.json",)),
    "tokenizer of the adapter is not JSON": Mistake(write("adapter/tokenizer.json", "{"), ("tokenizer.json", "JSON")),
    "no such tokenizer": Mistake(nothing, ("nowhere",), f"{MERGE} --tokenizer nowhere"),
    "tokenizer is a file": Mistake(nothing, (CONFIG,), f"{MERGE} --tokenizer {CONFIG}"),
    "output is a file": Mistake(write("out", "mine"), ("out", "file")),
    "output holds something": Mistake(occupied_output, ("out", "--overwrite")),
    "output lies in a file": Mistake(nothing, (CONFIG,), f"merge adapter --base base -o {CONFIG}/out"),
    "output name is too long": Mistake(nothing, ("aaaa",), f"merge adapter --base base -o {'a' * 300}"),
    "lora of two adapters": Mistake(second_adapter(), ("lora",), "merge adapter second -o out --save-method lora"),
    "lora with a dtype": Mistake(nothing, ("dtype",), "merge adapter -o out --save-method lora --dtype float16"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_explained_and_nothing_is_written(mistake: Mistake, place: Path, command: Command) -> None:
    """Exit code 1: one message that names the file and the next step; the disk is as it was."""
    mistake.prepare()
    before = everything(place)
    assert_error(command(mistake.line), *mistake.words)
    assert everything(place) == before


def test_a_full_disk_is_seen_before_anything_is_written(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little free disk: refused with what is free and what is needed."""
    usage = shutil.disk_usage(place)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = everything(place)
    assert_error(command(MERGE), "10 B free", "out")
    assert everything(place) == before


CONFIG_KEYS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "modules_to_save", "target_modules", "trainable_token_indices", "task_type"),
    *("auto_mapping", "base_model_name_or_path", "revision", "layers_to_transform", "layers_pattern"),
    *("exclude_modules", "target_parameters", "layer_replication", "bias", "lora_bias", "peft_version"),
)
BASE_KEYS = (
    *("architectures", "model_type", "text_config", "tie_word_embeddings", "vocab_size", "num_hidden_layers"),
    *("quantization_config", "dtype", "torch_dtype", "id2label", "label2id", "hidden_size"),
)
TOKENIZER_KEYS = ("model", "added_tokens", "added_tokens_decoder", "vocab")
INDEX_KEYS = ("metadata", "weight_map")
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 7, 0.5, 1e999, "", "x", "("),
    *([], [1], ["x"], [None], {}, {"x": 1}, {"x": [1]}, {"x": {"y": 1}}),
)
WRONG_TYPES = [
    *((CONFIG, key) for key in CONFIG_KEYS),
    *(("base/config.json", key) for key in BASE_KEYS),
    *((f"base/{INDEX_NAME}", key) for key in INDEX_KEYS),
    *((f"adapter/{name}", key) for key in TOKENIZER_KEYS for name in ("tokenizer.json", "tokenizer_config.json")),
    ("adapter/added_tokens.json", "<new>"),
]


@pytest.mark.parametrize(("file", "key"), WRONG_TYPES)
def test_odd_values_in_json_files_never_end_in_a_traceback(
    file: str, key: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of a stranger's file may hold anything: it is used, or refused with one message."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    head = {**TENSORS, **lora("lm_head"), "score.weight": torch.ones(3, 16)}
    shutil.rmtree(place / "adapter")
    save_adapter(
        place / "adapter", head, modules_to_save=["score"], task_type="SEQ_CLS", base_model_name_or_path="base"
    )
    path = place / file
    content = json.loads(path.read_text()) if path.exists() else {}
    lines = ["plan adapter -o out --dtype float16 --quiet", f"inspect {file.partition('/')[0]}"]
    for value in ODD_VALUES:
        path.write_text(json.dumps({**content, key: value}))
        for outcome in map(command, lines):
            if outcome.code != 0:
                assert_error(outcome)


# The output place

INPUTS_AS_OUTPUT = [
    *("base", "./base", "base/", "adapter", "adapter/../base", "base-link", "adapter-link", "chosen"),
    *("base/inner", "base/in/ner", "adapter/inner", "base-link/inner", "chosen/inner"),
    *(".", "..", "../place", "base/..", "place-link"),
]


@pytest.mark.parametrize("overwrite", ["", " --overwrite"])
@pytest.mark.parametrize("out", INPUTS_AS_OUTPUT)
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_an_output_that_is_holds_or_lies_in_an_input_is_refused(
    out: str, absolute: bool, overwrite: str, place: Path, command: Command
) -> None:
    """OUT equals an input, contains one or lies inside one, by any path or link: refused, --overwrite or not."""
    (place / "chosen").mkdir()
    for name, target in (("base-link", "base"), ("adapter-link", "adapter"), ("place-link", ".")):
        (place / name).symlink_to(target)
    before = everything(place.parent)
    path = f"{place}/{out}" if absolute else out
    assert_error(command(f"merge adapter --base base --tokenizer chosen -o {path}{overwrite}"), "input")
    assert everything(place.parent) == before


def test_an_empty_folder_is_filled(place: Path, command: Command) -> None:
    """OUT exists and is empty: taken."""
    (place / "out").mkdir()
    assert command(MERGE).code == 0
    assert_merged(place / "out", place / "base")


def test_a_link_to_an_empty_folder_is_filled(place: Path, command: Command) -> None:
    """OUT is a link to an empty folder elsewhere: the model appears behind the link."""
    (place / "elsewhere").mkdir()
    (place / "out").symlink_to("elsewhere")
    assert command(MERGE).code == 0
    assert_merged(place / "out", place / "base")


def test_overwrite_replaces_what_was_there(place: Path, command: Command) -> None:
    """--overwrite: of the old output nothing is left."""
    (place / "out" / "old").mkdir(parents=True)
    (place / "out" / "old" / "model-00009-of-00009.safetensors").write_bytes(b"old")
    assert command(f"{MERGE} --overwrite").code == 0
    assert_merged(place / "out", place / "base")
    assert not (place / "out" / "old").exists()
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "out"}


def test_a_merge_that_fails_leaves_the_old_output(place: Path, command: Command) -> None:
    """--overwrite: an error found while merging leaves the old output as it was, and nothing beside it."""
    assert command(MERGE).code == 0
    broken = {name: tensor.clone() for name, tensor in TENSORS.items()}
    broken[f"{MODULES[-1]}.lora_B.weight"][0, 0] = float("nan")
    save_adapter(place / "broken", broken)
    before = everything(place)
    outcome = command("merge broken --base base -o out --overwrite --json")
    assert_error(outcome, f"{MODULES[-1]}.weight", "finite")
    assert everything(place) == before


# The same merge again


@pytest.mark.parametrize("options", ["", " --dtype float16", " --max-shard-size 4kB", " --save-method lora"])
def test_the_same_merge_again_compares_and_succeeds(options: str, place: Path, command: Command) -> None:
    """Twice the same command: the second compares byte by byte, writes nothing and exits with 0."""
    line = f"merge adapter -o out{options}" if "lora" in options else MERGE + options
    assert command(line).code == 0
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")}
    bytes_before = everything(place)
    assert command(line).code == 0
    assert everything(place) == bytes_before
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")} == before


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


TAMPERED: dict[str, Callable[[], object]] = {
    "a bit of the last tensor": lambda: flip(Path("out/model-00002-of-00002.safetensors"), -1),
    "a bit of the first file": lambda: flip(Path("out/model-00001-of-00002.safetensors"), 4_000),
    "a weight file is longer": lambda: os.truncate("out/model-00001-of-00002.safetensors", 1 << 16),
    "a weight file is missing": lambda: Path("out/model-00001-of-00002.safetensors").unlink(),
    "config": lambda: flip(Path("out/config.json"), 20),
    "index is missing": lambda: Path("out", INDEX_NAME).unlink(),
    "record": lambda: flip(Path("out/loraweld.json"), 20),
    "record is missing": lambda: Path("out/loraweld.json").unlink(),
    "one file more": lambda: Path("out/model-00003-of-00002.safetensors").write_bytes(b"extra"),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_output_is_refused(tamper: Callable[[], object], place: Path, command: Command) -> None:
    """An output that differs in any byte or file from this merge: exit code 1, left as it is."""
    assert command(MERGE).code == 0
    tamper()
    before = everything(place)
    assert_error(command(f"{MERGE} --json"), "out", "--overwrite")
    assert everything(place) == before


def tune_further() -> None:
    shutil.rmtree("adapter")
    save_adapter(Path("adapter"), {name: tensor * 1.5 for name, tensor in TENSORS.items()})


OTHERS: dict[str, tuple[Callable[[], object], str]] = {
    "another adapter": (tune_further, ""),
    "another scaling": (change(CONFIG, lora_alpha=7), ""),
    "another base": (lambda: flip(Path(SHARD), -1), ""),
    "another dtype": (nothing, " --dtype float16"),
    "other shards": (nothing, " --max-shard-size 6kB"),
    "another companion": (write("base/LICENSE", "licence"), ""),
    "the adapter alone": (nothing, " --save-method lora"),
}


@pytest.mark.parametrize(("prepare", "options"), OTHERS.values(), ids=OTHERS)
def test_the_output_of_another_merge_is_refused(
    prepare: Callable[[], object], options: str, place: Path, command: Command
) -> None:
    """OUT holds the result of other inputs or options: exit code 1, left as it is."""
    assert command(MERGE).code == 0
    prepare()
    before = everything(place)
    assert_error(command(f"{MERGE}{options} --json"), "out", "--overwrite")
    assert everything(place) == before


# Interruption


def test_ctrl_c_is_130_and_the_same_command_finishes(place: Path, command: Command) -> None:
    """SIGINT in the middle of a merge: exit code 130, no traceback, no model; the same command then finishes."""
    loraweld.merge("adapter", base="base", output="whole")
    arguments = [str(place / "adapter"), f"--base={place / 'base'}", f"--output={place / 'out'}"]
    code, shown = interrupt_halfway(arguments, output=place / "out")
    assert code == 130
    assert "interrupted" in shown
    assert "Traceback" not in shown
    assert not (place / "out").exists()
    assert command(MERGE).code == 0
    assert contents(place / "out") == contents(place / "whole")
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "whole", "out"}


def interrupt_after_first_file(**options: Any) -> None:
    """Stop a merge of `adapter` into `out` when one of its two files is written."""
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loraweld.merge("adapter", base="base", output="out", workers=1, progress=stop, **options)
    assert not Path("out").exists()


@pytest.mark.parametrize(("option", "resumes"), [("", True), (" --no-resume", False)])
def test_an_interrupted_merge_continues_unless_told_not_to(
    option: str, resumes: bool, place: Path, command: Command
) -> None:
    """The finished part is kept and used; --no-resume starts afresh. The bytes are the same."""
    loraweld.merge("adapter", base="base", output="whole")
    interrupt_after_first_file()
    report = json.loads(command(f"{MERGE} --json{option}").out)
    first = (place / "whole" / "model-00001-of-00002.safetensors").stat().st_size
    assert report["resumed_bytes"] >= first if resumes else report["resumed_bytes"] == 0
    assert contents(place / "out") == contents(place / "whole")
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "whole", "out"}


@pytest.mark.parametrize(
    ("prepare", "options"), [OTHERS[name] for name in ("another adapter", "another base", "another dtype")]
)
def test_the_rest_of_another_merge_is_not_continued(
    prepare: Callable[[], object], options: str, place: Path, command: Command
) -> None:
    """Interrupted, then repeated with other inputs or options: started afresh, nothing of the old one is used."""
    interrupt_after_first_file()
    prepare()
    report = json.loads(command(f"{MERGE} --json{options}").out)
    assert report["resumed_bytes"] == 0
    assert command(f"merge adapter --base base -o whole --overwrite{options}").code == 0
    assert contents(place / "out") == contents(place / "whole")


def test_two_merges_into_one_place_do_not_meet(place: Path) -> None:
    """A second merge into the same OUT while the first one runs: refused, and the first one finishes."""
    met: list[str] = []

    def merge_too(count: int) -> None:
        if count and not met:
            with pytest.raises(loraweld.OutputError) as caught:
                loraweld.merge("adapter", base="base", output="out")
            met.append(str(caught.value))

    loraweld.merge("adapter", base="base", output="out", workers=1, progress=merge_too)
    assert "out" in met[0]
    assert "running" in met[0]
    assert_merged(place / "out", place / "base")


# What is imported, what is written

IMPORTED = """
import json, sys
from pathlib import Path
import loraweld
for line in sys.argv[1:]:
    try:
        loraweld_main = __import__("loraweld.cli", fromlist=["main"]).main
        loraweld_main(line.split())
    except SystemExit as exited:
        assert exited.code in (0, 2), (line, exited.code)
names = {name.partition(".")[0] for name in sys.modules}
print("IMPORTED " + json.dumps(sorted(names)))
"""


def imported_by(*lines: str, cwd: Path, env: Mapping[str, str] | None = None) -> set[str]:
    """Return the packages that a process has imported after `import loraweld` and these command lines."""
    result = run_python("-c", IMPORTED, *lines, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return set(json.loads(result.stdout.rpartition("IMPORTED ")[2]))


def test_help_imports_nothing_heavy(place: Path) -> None:
    """`import loraweld`, --help, --version and a usage error: neither torch nor numpy nor rich is imported."""
    lines = ("--help", "--version", "merge --help", "plan --help", "extract --help", "inspect --help", "merge --bogus")
    assert not imported_by(*lines, cwd=place) & {"torch", "numpy", "rich", "huggingface_hub", "safetensors"}


def test_plan_writes_nothing_and_needs_no_torch(place: Path, tmp_path: Path) -> None:
    """plan and inspect: not a file or folder anywhere they could write, and torch is not imported."""
    save_llama(place / "tied", tied=True, num_files=2)
    save_adapter(place / "head", lora("lm_head"))
    (place / "adapter" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": VOCAB}}}))
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    env = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"HF_HOME": str(tmp_path / "home" / "hf"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    lines = (
        "plan adapter --base base -o out",
        "plan adapter --base base -o not/yet/there --json --dtype float16",
        "plan adapter --base base -o out --max-shard-size 5kB --overwrite --no-resume",
        "plan head --base tied -o out --json",
        "plan adapter -o out --save-method lora",
        "inspect base",
        "inspect adapter --json",
    )
    before = everything(tmp_path)
    modules = imported_by(*lines, cwd=place, env=env)
    assert everything(tmp_path) == before
    assert "torch" not in modules


# Bases on the Hub


def save_in_cache(cache: Path, repo: str, commit: str, model: Path, *, refs: Sequence[str] = ()) -> None:
    """Put a model into a Hub cache as huggingface_hub keeps it: blobs, a snapshot of links, refs."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for file in model.iterdir():
        blob = folder / "blobs" / f"{commit[:8]}{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)


OLD, NEW = "0" * 39 + "1", "f" * 39 + "2"


@pytest.fixture
def hub(place: Path) -> dict[str, str]:
    """Make a Hub cache with two commits of org/base and return the environment in which it is the only Hub."""
    cache = place / "cache"
    newer = save_llama(place / "newer", seed=9, more={"extra.weight": torch.ones(3).bfloat16()})
    save_in_cache(cache, "org/base", OLD, place / "base", refs=["v1"])
    save_in_cache(cache, "org/base", NEW, newer, refs=["main"])
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}


@pytest.fixture
def hub_in_process(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what huggingface_hub has read from the environment when this process imported it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", hub["HF_HUB_CACHE"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_revision_that_an_adapter_pins_is_merged(place: Path, hub: dict[str, str]) -> None:
    """A base by its Hub id, at the revision of the adapter's config, not at the default branch; found in the local
    cache without a network. Its files are links to blobs: the output holds files."""
    save_adapter(place / "pinned", TENSORS, base_model_name_or_path="org/base", revision="v1")
    result = run_command("merge", "pinned", "-o", "out", "--json", cwd=place, env=hub)
    assert (result.returncode, result.stderr) == (0, "")
    assert_merged(place / "out", place / "base")
    assert json.loads((place / "out" / "loraweld.json").read_text())["base"]["commit"] == OLD
    assert not [path for path in (place / "out").rglob("*") if path.is_symlink()]


@pytest.mark.usefixtures("hub_in_process")
@pytest.mark.parametrize(
    ("revision", "extra"), [(None, True), ("main", True), (NEW, True), ("v1", False), (OLD, False)]
)
def test_a_hub_id_is_found_in_the_cache(revision: str | None, extra: bool, place: Path, command: Command) -> None:
    """Branch, tag or commit: each finds its own snapshot (the newer one has a tensor more)."""
    save_adapter(place / "named", TENSORS, base_model_name_or_path="org/base", revision=revision)
    planned = json.loads(command("plan named -o out --json").out)
    assert sum(planned["recipes"].values()) == len(llama_tensors()) + extra


@pytest.mark.usefixtures("hub_in_process")
@pytest.mark.parametrize(
    ("name", "revision"), [("org/missing", None), ("missing", None), ("org/base", "v9"), ("org/base", "a" * 40)]
)
def test_a_base_that_is_not_in_the_cache_is_explained(
    name: str, revision: str | None, place: Path, command: Command
) -> None:
    """Offline, a Hub id or revision that the cache lacks: exit code 1, the id, the revision and --base."""
    save_adapter(place / "named", TENSORS, base_model_name_or_path=name, revision=revision)
    before = everything(place)
    assert_error(command("merge named -o out"), name, revision or "", "--base")
    if revision is None:
        assert_error(command(f"merge adapter --base {name} -o out"), name, "--base")
        assert_error(command(f"inspect {name}"), name)
    assert everything(place) == before


@pytest.mark.usefixtures("hub_in_process")
def test_a_base_given_by_id_and_an_inspected_id(place: Path, command: Command) -> None:
    """--base and inspect take a Hub id too; a name that is no id is refused as one."""
    assert command("merge adapter --base org/base -o out").code == 0
    assert_merged(place / "out", place / "newer")
    assert json.loads(command("inspect org/base --json").out)["commit"] == NEW
    for name in ("a/b/c", "org/..", "-org/base", "org/base@v1", "~nobody", "https://hub/org/base"):
        assert_error(command(f"merge adapter --base={name} -o other"), name)
    assert not (place / "other").exists()


def test_a_base_without_config_is_merged(place: Path, command: Command) -> None:
    """A folder of safetensors without config.json is a base."""
    save_base(place / "bare", llama_tensors(), None)
    assert command("merge adapter --base bare -o out").code == 0
    assert_merged(place / "out", place / "bare")
    assert not (place / "out" / "config.json").exists()
