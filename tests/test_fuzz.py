"""Ten thousand inputs made of valid ones: planned, or refused in words; those that once were neither; a fuzzer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import strategies
from hostile import ALLOWED_SECONDS, FILES, make_scene, survives

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "corpus"
JSON_KINDS = ("adapter_config", "config", "index", "tokenizer")
FUZZER_SECONDS = 15

# Keys that a merge reads and that the scene's files do not all have.
MORE_KEYS: dict[str, dict[str, Any]] = {
    "adapter_config": {
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "revision": None,
        "target_parameters": None,
        "feedforward_modules": None,
        "layer_replication": None,
        "init_lora_weights": True,
        "peft_version": "0.18.0",
        "auto_mapping": None,
    },
    "config": {
        "quantization_config": None,
        "text_config": None,
        "id2label": None,
        "auto_map": None,
        "layer_types": None,
        "num_experts": None,
        "compression_config": None,
        "vision_config": None,
    },
    "index": {},
    "tokenizer": {},
}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 0.5, 1e300, float("nan"), float("inf")),
    *("", "\0", "..", "/etc/passwd", "../x.safetensors", "(a+)+$", "[", "²", "lm_head", "q_proj", "a" * 3000),
    *([], {}, [[]], [{}], {"a": {}}, {"": 1}, [1, 2], ["x"], [[0, 1]], [[0, 10**9]], {"q_proj": 4}, {"0": [0]}),
    *(
        "LORA",
        "ADALORA",
        "LOHA",
        "LOKR",
        "IA3",
        "LN_TUNING",
        "VERA",
        "OFT",
        "TRAINABLE_TOKENS",
        "BONE",
        "pissa",
        "olora",
    ),
    *("bitsandbytes", "gptq", "fp8", {"quant_method": "fp8"}, {"load_in_4bit": True, "quant_method": "bitsandbytes"}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value, its own first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with the value at `path` another one."""
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(copied[path[0]], path[1:], new)
    return copied


def check(scene: Path, kind: str, data: bytes) -> None:
    """Success or LoraweldError, in time; else the input is shown so that it can be kept."""
    started = time.process_time()
    survives(scene, kind, data)
    assert time.process_time() - started < ALLOWED_SECONDS, f"{kind}: slow: {data[:2000]!r}"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scene(tmp_path_factory.mktemp("fuzz") / "scene")


def many(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples, as they come."""
    unhealthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, database=None, suppress_health_check=unhealthy)


HEADER = 7000
JSON = 600
FILE = 700
assert HEADER + len(JSON_KINDS) * JSON + FILE > 10_000


@many(HEADER)
@given(data=st.data())
def test_mutated_headers_are_parsed_or_refused(data: st.DataObject, scene: Path) -> None:
    """The adapter's file with bytes changed, or its header's values; parsed with the keys of every tuner."""
    check(scene, "header", data.draw(mutated_files(scene)))


@many(FILE)
@given(data=st.data())
def test_mutated_adapters_are_planned_or_refused(data: st.DataObject, scene: Path) -> None:
    """The same, and the merge is planned with it."""
    check(scene, "adapter", data.draw(mutated_files(scene)))


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_mutated_json_is_planned_or_refused(kind: str, scene: Path) -> None:
    """Index, configs, tokenizer: one or two values are others, or bytes are; the merge is planned with it."""
    valid = json.loads((scene / FILES[kind]).read_bytes()) | MORE_KEYS[kind]

    @many(JSON)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        if data.draw(st.integers(0, 4)) == 0:
            check(scene, kind, data.draw(strategies.damaged(json.dumps(valid).encode())))
            return
        value = mutated_json(data.draw, valid)
        check(scene, kind, json.dumps(value).encode("utf-8", "surrogatepass"))

    run()


def mutated_json(draw: Callable[..., Any], value: Any) -> Any:
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(value)))
        value = changed(value, path, draw(st.sampled_from(ODD) | strategies.json_values()))
    return value


@st.composite
def mutated_files(draw: st.DrawFn, scene: Path) -> bytes:
    """The adapter's file: bytes of it changed, or the JSON of its header, with a right length before it."""
    whole = (scene / FILES["adapter"]).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    how = draw(st.sampled_from(["length", "bytes", "names", "values", "text"]))
    body, rest = whole[8 : 8 + length], whole[8 + length :]
    if how == "length":
        return draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * length)).to_bytes(8, "little") + whole[8:]
    if how == "bytes":
        return draw(strategies.damaged(whole[: 8 + length])) + rest
    header = json.loads(body)
    if how == "names":
        old = draw(st.sampled_from(sorted(header)))
        header[old + draw(st.text(max_size=3)) if draw(st.booleans()) else draw(st.text())] = header.pop(old)
    elif how == "values":
        header = mutated_json(draw, header)
    text = draw(strategies.damaged(body)) if how == "text" else json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + rest


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_stays_found(path: Path, scene: Path) -> None:
    """Inputs of the kinds that are easily got wrong, and what the fuzzers find: each is refused, or harmless."""
    kind, data = path.parent.name, path.read_bytes()
    if kind == "json":
        kind, data = JSON_KINDS[data[0] % len(JSON_KINDS)], data[1:]
    check(scene, kind, data)


@pytest.mark.parametrize("name", ["fuzz_header", "fuzz_json", "fuzz_keys"])
def test_the_coverage_guided_fuzzer_finds_nothing(name: str, tmp_path: Path) -> None:
    """A short run of each; `make fuzz` is the long one."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("NOT TESTED: coverage-guided fuzzing; atheris is not installed (no wheel for this Python?)")
    (tmp_path / "corpus").mkdir()
    # By way of a shell: libFuzzer limits the peak of its memory, and a new process begins with that of who starts it.
    fuzzer = [sys.executable, ROOT / "fuzz" / f"{name}.py", str(FUZZER_SECONDS), tmp_path / "corpus"]
    command = ["sh", "-c", '"$@"; exit $?', "sh", *fuzzer]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done" in done.stderr
