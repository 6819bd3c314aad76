"""Files of strangers: harmless, or refused in one message, soon, in little memory, with nothing written."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loraweld
from fakes import INDEX_NAME, contents, load_folder
from handmade import Q_PROJ, llama_tensors, loras, save_adapter, save_llama
from hostile import ALLOWED_BYTES, ALLOWED_SECONDS, FILES, make_scene, plan_with
from loraweld.adapter.patterns import Budget, LayerNumber, Pattern, PatternTable
from loraweld.checkpoint.jsonfile import MAX_JSON_BYTES
from loraweld.errors import CheckpointError, LoraweldError, NumericsError, printable

JSON_KINDS = ["index", "config", "tokenizer", "adapter_config"]


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return make_scene(tmp_path / "scene")


def refusal(scene: Path) -> str:
    """The message with which the merge is refused, in time, and nothing written."""
    before = sorted(scene.rglob("*"))
    started = time.process_time()
    with pytest.raises(LoraweldError) as caught:
        loraweld.merge(scene / "adapter", base=scene / "base", output=scene / "out")
    assert time.process_time() - started < ALLOWED_SECONDS
    assert sorted(scene.rglob("*")) == before
    assert len(str(caught.value)) < 10_000
    return str(caught.value)


def config_with(scene: Path, kind: str, **values: Any) -> bytes:
    return json.dumps(json.loads((scene / FILES[kind]).read_bytes()) | values).encode()


# JSON

BAD_JSON = {
    "nothing": b"",
    "a list": b"[]",
    "not UTF-8": b'{"\xff": 1}',
    "nested arrays": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested as deep as Python can": b'{"a":' + b"[" * 400 + b"]" * 400 + b"}",
    "nested objects": b'{"a":' * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a number of 50 digits": b'{"a": ' + b"9" * 50 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "more values than memory": b'{"a": [' + b"[]," * 2_000_000 + b"[]]}",
}


@pytest.mark.parametrize("kind", JSON_KINDS)
@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_broken_or_out_of_bounds_is_refused(text: bytes, kind: str, scene: Path) -> None:
    """Not JSON, too deep, too much, too long: the message names the file."""
    (scene / FILES[kind]).write_bytes(text)
    assert str(scene / FILES[kind]) in refusal(scene)


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_json_over_the_limit_is_not_parsed(kind: str, scene: Path) -> None:
    """A file of one byte more than the limit, here a hole, is refused by its size."""
    os.truncate(scene / FILES[kind], MAX_JSON_BYTES + 1)
    assert str(MAX_JSON_BYTES) in refusal(scene)


@pytest.mark.parametrize("kind", ["index", "config", "adapter_config"])
def test_a_name_given_twice_is_refused(kind: str, scene: Path) -> None:
    """Readers of JSON differ in which of two values counts."""
    path = scene / FILES[kind]
    path.write_bytes(b'{"r": 4,' + path.read_bytes().strip()[1:-1] + b', "r": 4}')
    assert "'r'" in refusal(scene)


def test_infinity_in_a_config_is_no_obstacle(scene: Path) -> None:
    """Configs of transformers have it (`time_step_limit`); it is copied where nothing reads it."""
    plan_with(scene, "config", config_with(scene, "config", time_step_limit=[0.0, float("inf")]))


WRONG_VALUES: list[tuple[str, str, list[Any]]] = [
    ("adapter_config", "r", [None, True, "4", 4.0, -1, 0, [4]]),
    ("adapter_config", "lora_alpha", ["8", True, float("nan"), float("inf"), [8], {}]),
    ("adapter_config", "rank_pattern", [[1], "x", {"a": "4"}, {"a": 0}, {"a": True}]),
    ("adapter_config", "alpha_pattern", [[1], "x", {"a": "4"}, {"a": float("nan")}, {"a": None}]),
    ("adapter_config", "peft_type", [None, 1, "", "LORAX", ["LORA"]]),
    ("adapter_config", "target_modules", [1, {"a": 1}, [1], [None]]),
    ("adapter_config", "exclude_modules", [1, {"a": 1}, [1]]),
    ("adapter_config", "layers_to_transform", ["1", [1.5], {"a": 1}]),
    ("adapter_config", "layers_pattern", [1, [1], {"a": 1}]),
    ("adapter_config", "modules_to_save", [1, "lm_head", [1], {"a": 1}]),
    ("adapter_config", "target_parameters", [1, [1], {"a": 1}]),
    ("adapter_config", "trainable_token_indices", [1, ["1"], [-1], [1, 1], {"a": 1}, {"a": [1.5]}]),
    ("adapter_config", "layer_replication", [1, [1], [[1, 0]], [["0", "1"]], [[0, 1, 2]], {"a": 1}]),
    ("adapter_config", "init_lora_weights", [1, [], "no such", {"a": 1}]),
    *(("adapter_config", key, [1, "false", [True]]) for key in ("use_rslora", "use_dora", "fan_in_fan_out")),
    *(
        ("adapter_config", key, [1, ["x"], {"a": 1}])
        for key in ("peft_version", "task_type", "base_model_name_or_path", "revision")
    ),
    *(("config", key, [1, ["x"], True]) for key in ("model_type", "text_config", "quantization_config", "id2label")),
    *(("config", key, ["1", [1], {"a": 1}]) for key in ("vocab_size", "num_hidden_layers", "tie_word_embeddings")),
    ("config", "architectures", [1, "x", {"a": 1}]),
    ("index", "weight_map", [1, "x", [], {}, {"a": 1}, {"a": None}, {"a": ["b"]}]),
    ("index", "metadata", [1, "x", [1]]),
]


@pytest.mark.parametrize(
    ("kind", "key", "value"), [(kind, key, value) for kind, key, values in WRONG_VALUES for value in values]
)
def test_a_value_of_another_type_is_refused(kind: str, key: str, value: Any, scene: Path) -> None:
    """Every key that is read: the message names the file and what is wrong with it."""
    (scene / FILES[kind]).write_bytes(config_with(scene, kind, **{key: value}))
    message = refusal(scene)
    assert str(scene / FILES[kind]) in message
    assert key in message or "pattern" in key or (key, value) == ("r", -1) or (key, value) == ("r", 0)


# Names and places

BAD_FILE_NAMES = [
    *("../base/model-00001-of-00002.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ""),
    *("a\0.safetensors", "a\n.safetensors", "x" * 300 + ".safetensors", "c:x.safetensors", "a\\b.safetensors"),
    *("config.json", "loraweld.json", "\ud800.safetensors"),
]


@pytest.mark.parametrize("name", BAD_FILE_NAMES)
def test_an_index_names_files_beside_it_only(name: str, scene: Path) -> None:
    """No folders, no other file's name, nothing a file system or a terminal takes amiss."""
    path = scene / FILES["index"]
    (scene / "base" / "loraweld.json").write_bytes((scene / "base" / "model-00001-of-00002.safetensors").read_bytes())
    weight_map = json.loads(path.read_bytes())["weight_map"]
    path.write_text(json.dumps({"weight_map": weight_map | {next(iter(weight_map)): name}}))
    message = refusal(scene)
    assert str(path) in message
    assert all(letter.isprintable() or letter == "\n" for letter in message)


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[2Jb", "a\nb", "a" * 2000, "\x7f"])
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_names_of_tensors_are_those_of_this_world(where: str, name: str, scene: Path) -> None:
    """Control characters and names longer than any path are refused, and shown without effect on a terminal."""
    path = next((scene / where).glob("*.safetensors"))
    save_file({**load_file(path), name: torch.zeros(1)}, path)
    message = refusal(scene)
    assert str(path) in message
    assert all(letter.isprintable() or letter == "\n" for letter in message)


def test_a_name_like_a_path_is_a_name(scene: Path) -> None:
    """No tensor's name is ever a path: "../../x" is a tensor as any other."""
    path = scene / "base" / "model-00002-of-00002.safetensors"
    save_file({**load_file(path), "../../x": torch.zeros(1)}, path)
    index = scene / FILES["index"]
    weight_map = json.loads(index.read_bytes())["weight_map"] | {"../../x": path.name}
    index.write_text(json.dumps({"weight_map": weight_map}))
    loraweld.merge(scene / "adapter", base=scene / "base", output=scene / "out")
    assert "../../x" in load_folder(scene / "out")
    assert {path.name for path in scene.iterdir()} == {"base", "adapter", "out"}


def test_messages_do_not_steer_the_terminal() -> None:
    """Escapes, carriage returns and marks that turn the direction of writing are shown, not sent; long text is cut."""
    assert printable("a\x1b[2J\r\u202eb\nc") == "a\\x1b[2J\\r\\u202eb\nc"
    assert len(str(CheckpointError("x" * 10**6))) < 300_000


SECRET = "root:secret"
LINKS = [
    *("base/tokenizer.json", "base/model-00001-of-00002.safetensors", "base/config.json", "base/modeling.py"),
    *("base/deep/er/notes.txt", "adapter/tokenizer.json", "adapter/adapter_config.json"),
    *("adapter/adapter_model.safetensors", "adapter/additional_chat_templates/rag.jinja", f"base/{INDEX_NAME}"),
]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leaves_its_folder_is_not_followed(name: str, scene: Path, tmp_path: Path) -> None:
    """What is copied or merged is what the folder holds, never what its links point to elsewhere on this machine."""
    link, target = scene / name, tmp_path / "elsewhere"
    target.write_bytes(link.read_bytes() if link.exists() else SECRET.encode())
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    message = refusal(scene)
    assert str(link) in message and "link" in message


def test_a_folder_that_is_a_link_is_not_copied(scene: Path, tmp_path: Path) -> None:
    """Templates in a folder that leads elsewhere are refused, other folders that do are left out."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text(SECRET)
    (scene / "base" / "assets").symlink_to(tmp_path / "private")
    loraweld.merge(scene / "adapter", base=scene / "base", output=scene / "out")
    assert not any(SECRET.encode() in data for data in contents(scene / "out").values())


def test_an_adapter_in_a_folder_that_leads_elsewhere_is_refused(scene: Path, tmp_path: Path) -> None:
    """The only subfolder with an adapter is taken for it: not one of somebody else's."""
    (scene / "adapter").rename(tmp_path / "private")
    (scene / "adapter").mkdir()
    (scene / "adapter" / "inner").symlink_to(tmp_path / "private")
    assert "link" in refusal(scene)


@pytest.mark.parametrize("name", ["a" * 300, "a/b/" + "c" * 300])
def test_a_path_that_no_file_system_takes_is_refused(name: str) -> None:
    """The system's refusal is a message, of inspect as of merge."""
    with pytest.raises(LoraweldError):
        loraweld.inspect(name)


def test_folders_nested_without_end_are_refused(scene: Path) -> None:
    """A folder in a folder, hundreds of times: no recursion follows it."""
    folder = scene / "base"
    for _ in range(300):
        folder /= "d"
    folder.mkdir(parents=True)
    assert "nested" in refusal(scene)


def test_links_within_the_folder_are_followed(scene: Path) -> None:
    """A folder may hold a file under two names."""
    (scene / "base" / "tokenizer.json").write_text("{}")
    (scene / "base" / "vocab.json").symlink_to("tokenizer.json")
    loraweld.merge(scene / "adapter", base=scene / "base", output=scene / "out")
    assert (scene / "out" / "vocab.json").read_text() == "{}"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)  # the path of a socket is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("NOT TESTED: a device in the place of a file; only root can make one")


@pytest.mark.skipif(os.name == "nt", reason="special files of POSIX")
@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device, Path.mkdir])
@pytest.mark.parametrize(
    "name",
    [
        *(FILES[kind] for kind in ("index", "config", "adapter_config", "adapter")),
        "base/model-00001-of-00002.safetensors",
    ],
)
def test_special_files_are_refused_without_waiting(name: str, make: Callable[[Path], None], scene: Path) -> None:
    """A pipe would block, a device never end; the message says what it is."""
    (scene / name).unlink()
    make(scene / name)
    assert str(scene / name) in refusal(scene)


# Expressions

CATASTROPHES = [
    "(a+)+$",
    "(a|aa)+$",
    "(.*)*x",
    "(a|a?)+$",
    "((((a*)*)*)*)*b",
    "(?:a?){64}a{64}",
    "a?" * 64 + "a" * 64 + "b",
    "(.*a){20}b",
    "(?=(a+)+b)a",
    "(\\w*\\.?)*\\d",
    "(?:.*.*.*.*.*)=z",
    "a{1,999999999}b",
    "((a{1,999}){1,999}){1,999}b",
    "(" * 500 + "a" + ")" * 500,
    "(a)\\1+",
    "[",
    "a" * 100_000,
    "(?P<n>a)(?(n)b|c)",
]


@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]
)
@pytest.mark.parametrize("expression", CATASTROPHES, ids=range(len(CATASTROPHES)))
def test_no_expression_takes_for_ever(expression: str, key: str, scene: Path) -> None:
    """Whatever a config's expressions are: matched, or refused, in time."""
    path = scene / "base" / "model-00002-of-00002.safetensors"
    save_file({**load_file(path), f"{'a' * 900}.{'a' * 60}.weight": torch.zeros(2, 2)}, path)
    (scene / FILES["index"]).unlink()
    value: Any = {expression: 4} if key.endswith("_pattern") and key != "layers_pattern" else expression
    more = {"layers_to_transform": [0, 1]} if key == "layers_pattern" else {}
    (scene / FILES["adapter_config"]).write_bytes(config_with(scene, "adapter_config", **{key: value}, **more))
    started = time.process_time()
    try:
        loraweld.plan(scene / "adapter", base=scene / "base", output=scene / "out")
    except LoraweldError as error:
        assert str(scene / "adapter") in str(error) or "scene" in str(error) or "adapter" in str(error)
    assert time.process_time() - started < ALLOWED_SECONDS


PARTS = st.recursive(
    st.sampled_from(["a", "b", ".", "\\.", "0", "\\d", "\\w", "[ab]", "[^a]", "\\b", "^", "$", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
    ),
    max_leaves=8,
)


@given(text=PARTS, module=st.text("ab.0", max_size=10))
def test_expressions_match_as_those_of_python(text: str, module: str) -> None:
    """For small expressions and paths `re` is the oracle, of whole paths and of the keys of patterns."""
    pattern = Pattern(text, Budget(Path("config")))
    expected = re.fullmatch(text, module) is not None
    assert pattern.matches(module) == expected
    assert bool(pattern.ends(module, 1) >> len(module) & 1) == expected
    found = PatternTable([text], Budget(Path("config"))).first(module) is not None
    assert found == (re.match(rf"(.*\.)?({text})$", module) is not None)


@pytest.mark.parametrize(
    ("keys", "module", "expected"),
    [
        (["q_proj", "layers.1.q_proj"], "model.layers.1.q_proj", "q_proj"),
        (["layers.1.q_proj", "q_proj"], "model.layers.11.q_proj", "q_proj"),
        (["_proj"], "model.layers.1.q_proj", None),
        (["layers.1"], "model.layersX1", "layers.1"),
        ([r".*\.[01]\.q_proj", "q_proj"], "m.layers.1.q_proj", r".*\.[01]\.q_proj"),
        ([r"layers\.(0|2)\.q_proj"], "m.layers.1.q_proj", None),
    ],
)
def test_the_first_key_that_matches_an_end_counts(keys: list[str], module: str, expected: str | None) -> None:
    """As PEFT finds it: `(.*\\.)?(KEY)$`, in the order of the config; a dot in a key stands for any letter."""
    assert PatternTable(keys, Budget(Path("config"))).first(module) == expected


def test_layers_are_numbered_as_peft_does() -> None:
    """The first number, or the one behind the name that is given."""
    budget = Budget(Path("config"))
    assert LayerNumber([], budget).of("model.3.layers.7.q") == 3
    assert LayerNumber(["layers"], budget).of("model.3.layers.7.q") == 7
    assert LayerNumber(["h|blocks"], budget).of("model.3.blocks.7.q") == 7
    assert LayerNumber(["h"], budget).of("model.3.layers.7.q") is None


# Sizes: each in a process of its own, whose memory is measured

MEASURED = """
import re, sys, time
from pathlib import Path
import loraweld
started = time.process_time()
try:
    loraweld.plan(sys.argv[1] + "/adapter", base=sys.argv[1] + "/base", output=sys.argv[1] + "/out")
except loraweld.LoraweldError as error:
    assert len(str(error)) < 300_000
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(time.process_time() - started, int(peak) * 1024)
"""


def header_of(entries: str) -> bytes:
    return len(entries).to_bytes(8, "little") + entries.encode()


def many_tensors(prefix: str, count: int, suffix: str) -> bytes:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return header_of("{" + ",".join(f'"{prefix}{n}{suffix}":{entry}' for n in range(count)) + "}")


GIANTS: dict[str, Callable[[Path], tuple[str, bytes]]] = {
    "50,000 modules that the base lacks": lambda s: (
        "adapter",
        many_tensors("base_model.model.layers.", 50_000, ".lora_A.weight"),
    ),
    "a header of a million entries": lambda s: ("adapter", many_tensors("x", 1_000_000, "")),
    "100,000 ranks": lambda s: (
        "adapter_config",
        config_with(s, "adapter_config", rank_pattern={f"layers.{n}.q": 1 for n in range(100_000)}),
    ),
    "100,000 ranks by expression": lambda s: (
        "adapter_config",
        config_with(s, "adapter_config", rank_pattern={f"(a|{n})": 1 for n in range(100_000)}),
    ),
    "a rank of 10**18": lambda s: ("adapter_config", config_with(s, "adapter_config", r=10**18)),
    "200,000 targets": lambda s: (
        "adapter_config",
        config_with(s, "adapter_config", target_modules=[f"m{n}" for n in range(200_000)]),
    ),
    "200,000 modules to save": lambda s: (
        "adapter_config",
        config_with(s, "adapter_config", modules_to_save=[f"m{n}" for n in range(200_000)]),
    ),
    "50 MB of text": lambda s: ("config", config_with(s, "config", note="\U0001f600" * 4_000_000)),
    "60 MB of numbers": lambda s: ("config", b'{"a":[' + b"0," * 30_000_000 + b"0]}"),
    "layers repeated a billion times": lambda s: (
        "adapter_config",
        config_with(s, "adapter_config", layer_replication=[[0, 10**9]] * 10),
    ),
    "a vocabulary of 10**11": lambda s: ("tokenizer", b'{"added_tokens_decoder": {"99999999999": {}}}'),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="NOT TESTED: the peak of memory; Linux tells it")
@pytest.mark.parametrize("make", GIANTS.values(), ids=GIANTS)
def test_giants_are_refused_in_little_time_and_memory(make: Callable[[Path], tuple[str, bytes]], scene: Path) -> None:
    """Within seconds and half a GiB, in a process of its own, without a traceback."""
    kind, data = make(scene)
    (scene / FILES[kind]).write_bytes(data)
    command = [sys.executable, "-c", MEASURED, str(scene)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, peak = map(float, done.stdout.split())
    assert seconds < 2 * ALLOWED_SECONDS  # of the processor; others may slow it down
    assert peak < ALLOWED_BYTES


@pytest.mark.parametrize(("peft_type", "key"), [("VERA", "r"), ("OFT", "oft_block_size"), ("LORA", "r")])
def test_sizes_that_peft_would_make_matrices_of_are_bounded(peft_type: str, key: str, scene: Path) -> None:
    """PEFT's own layers are made from the config: not of a size that would take all memory."""
    more = {"kasa_config": {"a": 1}} if peft_type == "LORA" else {}
    data = config_with(scene, "adapter_config", peft_type=peft_type, **{key: 10**9}, **more)
    (scene / FILES["adapter_config"]).write_bytes(data)
    assert f"{key} is 1000000000" in refusal(scene)


def test_code_of_a_model_is_copied_and_never_imported(scene: Path, tmp_path: Path) -> None:
    """`auto_map` names classes in files of the model: they are text to a merge."""
    marker = tmp_path / "was_run"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for name in ("modeling_evil.py", "__init__.py", "torch.py"):
        (scene / "base" / name).write_text(code)
    auto_map = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (scene / FILES["config"]).write_bytes(config_with(scene, "config", auto_map=auto_map))
    loraweld.merge(scene / "adapter", base=scene / "base", output=scene / "out")
    assert (scene / "out" / "modeling_evil.py").read_text() == code
    assert json.loads((scene / "out" / "config.json").read_text())["auto_map"] == auto_map
    assert not marker.exists()


# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_pass_only_if_asked(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """Refused with the tensor's name and the option; with the option written, and counted in a note."""
    weight = llama_tensors(dtype)[f"{Q_PROJ}.weight"]
    weight[3, 2] = value
    base = save_llama(tmp_path / "base", dtype, more={f"{Q_PROJ}.weight": weight})
    adapter = save_adapter(tmp_path / "adapter", loras(Q_PROJ), layers_to_transform=[0])
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NumericsError, match=rf"{Q_PROJ}\.weight.*--allow-nonfinite"):
        loraweld.merge(adapter, base=base, output=tmp_path / "out", dtype=name)
    report = loraweld.merge(adapter, base=base, output=tmp_path / "out", dtype=name, allow_nonfinite=True)
    assert [note for note in report.notes if "1 weights hold values that are not finite" in note and Q_PROJ in note]
    merged = load_folder(tmp_path / "out")[f"{Q_PROJ}.weight"]
    assert (~torch.isfinite(merged)).nonzero().tolist() == [[3, 2]]
    clean = llama_tensors(dtype)[f"{Q_PROJ}.weight"]
    assert (merged != clean).sum() > 100


def test_an_overflow_passes_only_if_asked(tmp_path: Path) -> None:
    """Too large for float16: refused, or written as infinity and told."""
    large = torch.full((16, 16), 60_000.0).half()
    base = save_llama(tmp_path / "base", torch.float16, more={f"{Q_PROJ}.weight": large})
    tensors = {name: tensor.abs() * 100 for name, tensor in loras(Q_PROJ).items()}
    adapter = save_adapter(tmp_path / "adapter", tensors, layers_to_transform=[0])
    with pytest.raises(NumericsError, match="float16"):
        loraweld.merge(adapter, base=base, output=tmp_path / "out")
    report = loraweld.merge(adapter, base=base, output=tmp_path / "out", allow_nonfinite=True)
    assert torch.isinf(load_folder(tmp_path / "out")[f"{Q_PROJ}.weight"]).any()
    assert [note for note in report.notes if "not finite" in note]


def test_codes_never_hold_values_that_are_not_finite(tmp_path: Path) -> None:
    """An encoding has no NaN: --allow-nonfinite does not reach the weights that are put into one."""
    weight = llama_tensors()[f"{Q_PROJ}.weight"]
    weight[0, 0] = float("nan")
    base = save_llama(tmp_path / "base", more={f"{Q_PROJ}.weight": weight})
    adapter = save_adapter(tmp_path / "adapter", loras(Q_PROJ), layers_to_transform=[0])
    with pytest.raises(NumericsError, match=Q_PROJ):
        loraweld.merge(adapter, base=base, output=tmp_path / "out", save_method="merged_8bit", allow_nonfinite=True)


# Identity


@pytest.mark.parametrize(
    ("named", "folder", "is_told"),
    [
        ("meta/Llama-7B", "Llama-7B", False),
        ("/home/someone/llama-7b/", "Llama-7B", False),
        ("meta/Llama-7B", "models--meta--Llama-7B/snapshots/abc", False),
        ("meta/Llama-7B", "Mistral-7B", True),
        ("/home/someone/other", "Llama-7B", True),
        (None, "Llama-7B", False),
    ],
)
def test_another_base_than_the_adapter_names_is_told(
    named: str | None, folder: str, is_told: bool, tmp_path: Path
) -> None:
    """In plan, report and record; the folder's own path is in none of them."""
    base = save_llama(tmp_path / folder)
    adapter = save_adapter(tmp_path / "adapter", loras(Q_PROJ), layers_to_transform=[0], base_model_name_or_path=named)
    planned = loraweld.plan(adapter, base=base, output=tmp_path / "out")
    report = loraweld.merge(adapter, base=base, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "loraweld.json").read_text())
    for notes in (planned.notes, report.notes, record["notes"]):
        told = [note for note in notes if "names the base" in note]
        assert len(told) == is_told
        assert not [note for note in told if "/home" in note or str(tmp_path) in note]


# Inputs that change


@pytest.mark.parametrize("name", ["base/model-00001-of-00002.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("change", ["touched", "replaced", "removed", "grown"])
def test_an_input_that_changes_meanwhile_is_found_before_publishing(
    name: str, change: str, scene: Path, tmp_path: Path
) -> None:
    """Size, time or inode are others than when it was opened: nothing appears, nothing is kept to go on from."""
    path = scene / name
    data, inode = path.read_bytes(), path.stat().st_ino

    lock = threading.Lock()  # threads tell of their progress at the same time

    def disturb(count: int) -> None:
        with lock:
            disturb_alone()

    def disturb_alone() -> None:
        if change == "touched":
            os.utime(path, ns=(1, 1))
        elif change == "grown" and path.stat().st_size == len(data):
            with path.open("ab") as file:
                file.write(b"x")
        elif change == "removed":
            path.unlink(missing_ok=True)
        elif change == "replaced" and path.stat().st_ino == inode:  # once: a second file may get the first one's inode
            other = path.with_name("other")
            other.write_bytes(data)
            os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
            other.replace(path)

    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        loraweld.merge(scene / "adapter", base=scene / "base", output=scene / "out", progress=disturb)
    assert {found.name for found in scene.iterdir()} == {"base", "adapter"}
    path.write_bytes(data)
    loraweld.merge(scene / "adapter", base=scene / "base", output=scene / "out")
