"""Every parameter of the saving methods: its effect is seen in the output, or the call is rejected by its name."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import metadata_load
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import loraweld
from live_models import live_llama, state_of, with_adapter, write_base
from models import logits, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:tokenizer is None")
SHARDS = 20_000


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    yield


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    monkeypatch.chdir(tmp_path)
    return live_llama(tmp_path / "base")


def tokenizer(size: int = 90) -> tf.PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(size)}
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2", padding_side="right"
    )
    made.chat_template = "{{ messages }}"
    return made


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


def names(folder: str | Path = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plain(live: PeftModel) -> dict[str, torch.Tensor]:
    live.save_pretrained_merged("plain")
    return all_weights(Path("plain"))


# What each parameter does. A check gets the model and sees the effect.


def directory_with_parents(live: PeftModel) -> None:
    live.save_pretrained_merged("a/b/../c", tokenizer())
    assert Path("a/c/model.safetensors").is_file()


def home_is_expanded(live: PeftModel) -> None:
    os.environ["HOME"] = str(Path.cwd() / "home")
    live.save_pretrained_merged(Path("~/model"))
    assert Path("home/model/model.safetensors").is_file()


def tokenizer_files(live: PeftModel) -> None:
    made = tokenizer()
    before = made.to_str() if hasattr(made, "to_str") else repr(made)
    live.save_pretrained_merged("out", made)
    made.save_pretrained("expected")
    for path in Path("expected").iterdir():
        assert (Path("out") / path.name).read_bytes() == path.read_bytes(), path
    assert made.padding_side == "right" and (made.to_str() if hasattr(made, "to_str") else repr(made)) == before
    assert tf.AutoTokenizer.from_pretrained("out").chat_template == "{{ messages }}"


def processor_files(live: PeftModel) -> None:
    class Processor:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "processor_config.json").write_text("{}")
            (Path(folder) / "entity_vocab.tsv").write_text("of its own name")

    live.save_pretrained_merged("out", Processor())
    assert Path("out/processor_config.json").is_file() and Path("out/entity_vocab.tsv").is_file()


def no_tokenizer(live: PeftModel) -> None:
    Path("base/tokenizer_config.json").write_text('{"of": "the base"}')
    with pytest.warns(UserWarning, match="tokenizer is None"):
        live.save_pretrained_merged("out")
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"of": "the base"}


def larger_tokenizer(live: PeftModel) -> None:
    with pytest.warns(UserWarning, match="the tokenizer has 100 tokens"):
        live.save_pretrained_merged("out", tokenizer(100))
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 100


def method_by_any_spelling(live: PeftModel) -> None:
    for number, name in enumerate(["Merged 16bit", "MERGED-16BIT", "16bit"]):
        live.save_pretrained_merged(f"out{number}", save_method=name)
        assert same(all_weights(Path(f"out{number}")), plain(live))
    for number, name in enumerate(["merged_4bit", "merged_4bit_forced", "forced_merged_4bit"]):
        live.save_pretrained_merged(f"four{number}", save_method=name)
        config = json.loads(Path(f"four{number}/config.json").read_text())
        assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def other_methods(live: PeftModel) -> None:
    for method in ("merged_8bit", "merged_fp8"):
        live.save_pretrained_merged(method, save_method=method)
        assert json.loads(Path(f"{method}/config.json").read_text())["quantization_config"]
    live.save_pretrained_merged("preserve", save_method="preserve")
    assert same(all_weights(Path("preserve")), plain(live))


def lora_alone(live: PeftModel) -> None:
    live.save_pretrained_merged("out", tokenizer(), save_method="lora")
    live.save_pretrained("expected")
    assert Path("out/adapter_model.safetensors").read_bytes() == Path("expected/adapter_model.safetensors").read_bytes()
    configs = [json.loads(Path(f"{name}/adapter_config.json").read_text()) for name in ("out", "expected")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    assert Path("out/tokenizer.json").is_file() and not Path("out/config.json").exists()
    loaded = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained("base"), "out").eval()
    inputs = {"input_ids": token_ids(96)}
    assert torch.equal(logits(loaded, inputs), logits(live, inputs))


def not_the_main_process(live: PeftModel) -> None:
    live.save_pretrained_merged("out", is_main_process=False)
    live.save_pretrained_merged("me/out", push_to_hub=True, token="t", is_main_process=False)
    assert names() == ["base"]


def tensors_of_the_caller(live: PeftModel) -> None:
    given = state_of(live)
    name = next(name for name in given if name.endswith("model.norm.weight"))
    given[name] = torch.full_like(given[name], 2.0)
    copies = {key: value.clone() for key, value in given.items()}
    live.save_pretrained_merged("out", state_dict=given)
    found, expected = all_weights(Path("out")), plain(live)
    assert (found["model.norm.weight"] == 2).all()
    assert same({**found, "model.norm.weight": expected["model.norm.weight"]}, expected)
    assert same(given, copies)


def adapter_of_the_caller(live: PeftModel) -> None:
    given = {name: value * 2 if "lora_B" in name else value for name, value in state_of(live).items()}
    live.save_pretrained_merged("out", save_method="lora", state_dict=given)
    live.save_pretrained("expected")
    found, expected = all_weights(Path("out")), all_weights(Path("expected"))
    assert all(torch.equal(found[name], value * (2 if "lora_B" in name else 1)) for name, value in expected.items())


def function_for_pickles(live: PeftModel) -> None:
    calls = []

    def save(tensors: dict[str, torch.Tensor], path: str) -> None:
        calls.append((Path(path).name, len(tensors)))
        torch.save(tensors, path)

    live.save_pretrained_merged("out", safe_serialization=False, save_function=save, max_shard_size=SHARDS)
    files = sorted(path.name for path in Path("out").glob("*.bin"))
    assert sorted(name for name, _ in calls) == files and len(files) > 1
    assert same(all_weights(Path("out")), plain(live))
    assert not list(Path("out").glob("**/*.safetensors"))


def pickles(live: PeftModel) -> None:
    live.save_pretrained_merged("out", safe_serialization=False)
    assert Path("out/pytorch_model.bin").is_file() and Path("out/loraweld.json").is_file()
    assert same(all_weights(Path("out")), plain(live))
    live.save_pretrained_merged("sharded", safe_serialization=False, max_shard_size=SHARDS)
    for folder in ("out", "sharded"):
        loaded = tf.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
        assert torch.equal(loaded.model.norm.weight, live.get_base_model().model.norm.weight)


def pickled_adapter(live: PeftModel) -> None:
    live.save_pretrained_merged("out", save_method="lora", safe_serialization=False)
    live.save_pretrained("expected")
    assert same(torch.load("out/adapter_model.bin", weights_only=True), all_weights(Path("expected")))
    assert not Path("out/adapter_model.safetensors").exists()
    PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained("base"), "out")


def shards(live: PeftModel) -> None:
    live.save_pretrained_merged("out", max_shard_size="20KB")
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    files = {name: load_file(Path("out") / name) for name in set(index["weight_map"].values())}
    sizes = {name: sum(t.numel() * t.element_size() for t in tensors.values()) for name, tensors in files.items()}
    assert len(files) > 1 and all(size <= SHARDS or len(files[name]) == 1 for name, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert same(all_weights(Path("out")), plain(live))
    tf.AutoModelForCausalLM.from_pretrained("out")


def variants(live: PeftModel) -> None:
    live.save_pretrained_merged("one", variant="fp16")
    assert Path("one/model.fp16.safetensors").is_file()
    live.save_pretrained_merged("more", variant="fp16", max_shard_size=SHARDS)
    assert Path("more/model.safetensors.index.fp16.json").is_file()
    assert list(Path("more").glob("model.fp16-00001-of-*.safetensors"))
    for folder in ("one", "more"):
        loaded = tf.AutoModelForCausalLM.from_pretrained(folder, variant="fp16")
        assert torch.equal(loaded.lm_head.weight, plain(live)["lm_head.weight"])
    live.save_pretrained_merged("pickled", variant="x", safe_serialization=False, max_shard_size=SHARDS)
    loaded = tf.AutoModelForCausalLM.from_pretrained("pickled", variant="x", use_safetensors=False)
    assert torch.equal(loaded.lm_head.weight, plain(live)["lm_head.weight"])


def plain_keys(live: PeftModel) -> None:
    live.save_pretrained_merged("out", save_method="lora", save_peft_format=False)
    live.save_pretrained("expected")
    expected = {k.removeprefix("base_model.model."): v for k, v in all_weights(Path("expected")).items()}
    assert same(all_weights(Path("out")), expected)


def card(live: PeftModel) -> None:
    Path("base/README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    for method in ("merged_16bit", "lora"):
        live.save_pretrained_merged(method, save_method=method, tags=["chat", "a b"], datasets=["me/data"])
        found = metadata_load(f"{method}/README.md")
        assert found["tags"] == ["chat", "a b"] and found["datasets"] == ["me/data"]
        assert found["license"] == "apache-2.0" and "base_model" not in found
    live.save_pretrained_merged("none")
    assert not Path("none/README.md").exists()


def temporary_place(live: PeftModel) -> None:
    seen = []

    class Spy:
        def save_pretrained(self, folder: str) -> None:
            seen.append(Path(folder).resolve())

    live.save_pretrained_merged("out", Spy(), temporary_location="here/and/there")
    assert seen[0].is_relative_to(Path("here/and/there").resolve()) and not Path("here").exists()
    Path("here").mkdir()
    Path("here/foreign").write_text("stays")
    live.save_pretrained_merged("again", Spy(), temporary_location="here")
    assert names("here") == ["foreign"]


def temporary_place_after_an_error(live: PeftModel) -> None:
    with pytest.raises(loraweld.LoraweldError):
        live.save_pretrained_merged("out", Broken())
    assert names() == ["base"]


class Broken:
    def save_pretrained(self, folder: str) -> None:
        raise loraweld.LoraweldError("broken")


def memory(live: PeftModel) -> None:
    live.save_pretrained_merged("small", maximum_memory_usage=0.05)
    live.save_pretrained_merged("large", maximum_memory_usage=0.95)
    assert Path("small/model.safetensors").read_bytes() == Path("large/model.safetensors").read_bytes()


EFFECTS: list[tuple[str, Callable[[PeftModel], None]]] = [
    ("save_directory", directory_with_parents),
    ("save_directory", home_is_expanded),
    ("tokenizer", tokenizer_files),
    ("tokenizer", processor_files),
    ("tokenizer", no_tokenizer),
    ("tokenizer", larger_tokenizer),
    ("save_method", method_by_any_spelling),
    ("save_method", other_methods),
    ("save_method", lora_alone),
    ("is_main_process", not_the_main_process),
    ("state_dict", tensors_of_the_caller),
    ("state_dict", adapter_of_the_caller),
    ("save_function", function_for_pickles),
    ("safe_serialization", pickles),
    ("safe_serialization", pickled_adapter),
    ("max_shard_size", shards),
    ("variant", variants),
    ("save_peft_format", plain_keys),
    ("tags", card),
    ("datasets", card),
    ("temporary_location", temporary_place),
    ("temporary_location", temporary_place_after_an_error),
    ("maximum_memory_usage", memory),
]


@pytest.mark.parametrize(("name", "check"), EFFECTS, ids=lambda value: getattr(value, "__name__", value))
def test_effect(
    name: str, check: Callable[[PeftModel], None], live: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the parameter is for happens."""
    monkeypatch.setenv("HOME", os.environ["HOME"])
    check(live)


@dataclass(frozen=True)
class Rejected:
    """A call that is refused with a message that holds `said`."""

    options: dict[str, Any]
    said: str


REJECTED = [
    Rejected({"save_directory": 5}, "save_directory is 5"),
    Rejected({"save_directory": ""}, "save_directory is ''"),
    Rejected({"save_directory": "a/b/c", "push_to_hub": True, "token": "t"}, "save_directory is 'a/b/c'"),
    Rejected({"save_directory": "/tmp/x", "push_to_hub": True, "token": "t"}, "save_directory is '/tmp/x'"),
    Rejected({"tokenizer": 7}, "tokenizer is a int"),
    Rejected({"save_method": "merged-6bit"}, "save_method is 'merged-6bit'.*merged_16bit.*did you mean"),
    Rejected({"save_method": None}, "save_method is None"),
    *(Rejected({"save_method": name}, "known but not offered") for name in ("w4a16", "nvfp4", "torchao_int8")),
    Rejected({"push_to_hub": 1}, "push_to_hub is 1"),
    Rejected({"push_to_hub": True, "token": False}, "token is False"),
    Rejected({"token": 5}, "token is a int"),
    Rejected({"token": ""}, "token is empty"),
    Rejected({"is_main_process": None}, "is_main_process is None"),
    Rejected({"state_dict": []}, "state_dict is a list"),
    Rejected(
        {"state_dict": {"unknown": torch.zeros(1)}},
        "(?s)state_dict is not.*unknown: the model has no.*missing.*and .* more",
    ),
    Rejected({"save_function": print}, "save_function has no effect"),
    Rejected({"save_function": 5, "safe_serialization": False}, "save_function is 5"),
    *(Rejected({"max_shard_size": size}, "max_shard_size is") for size in (0, -1, "many", True, None, 1.5)),
    Rejected({"max_shard_size": "1GB", "save_method": "lora"}, "max_shard_size is '1GB'"),
    Rejected({"safe_serialization": None}, "safe_serialization is None"),
    Rejected({"safe_serialization": False, "save_method": "merged_4bit"}, "safe_serialization is False"),
    *(Rejected({"variant": name}, "variant is") for name in ("a/b", "..", "", 5, "a-00001-of-00002")),
    Rejected({"variant": "fp16", "save_method": "lora"}, "variant is 'fp16'"),
    Rejected({"variant": "fp16", "save_method": "gguf"}, "variant is 'fp16'"),
    Rejected({"save_peft_format": False}, "save_peft_format is for save_method lora"),
    Rejected({"save_peft_format": "no"}, "save_peft_format is 'no'"),
    *(Rejected({"tags": value}, "tags is") for value in ("chat", [1], {"a": 1})),
    *(Rejected({"datasets": value}, "datasets is") for value in ("me/data", [None])),
    Rejected({"temporary_location": "base/config.json/x"}, "temporary_location is 'base/config.json/x'"),
    Rejected({"temporary_location": None}, "temporary_location is None"),
    *(
        Rejected({"maximum_memory_usage": value}, "maximum_memory_usage is")
        for value in (0, -1, 0.96, 1.5, True, "half", math.nan, None)
    ),
    Rejected({"maximum_memory_usage": 1e-6}, "maximum_memory_usage is 1e-06.*tensor '.*' needs"),
]


@pytest.mark.parametrize("case", REJECTED, ids=lambda case: str(case.options)[:60])
def test_rejected(case: Rejected, live: PeftModel) -> None:
    """The message names the parameter and its value; nothing is written or left behind."""
    with pytest.raises(loraweld.LoraweldError, match=case.said):
        live.save_pretrained_merged(**{"save_directory": "out", **case.options})
    assert names() == ["base"]


def test_every_parameter_is_in_the_tables() -> None:
    """A parameter without a row would be one that nobody has seen work."""
    parameters = list(inspect.signature(loraweld.save_pretrained_merged).parameters)[1:]
    seen = {name for name, _ in EFFECTS} | {name for case in REJECTED for name in case.options}
    assert seen == set(parameters)
    assert {"push_to_hub", "token"} == set(parameters) - {name for name, _ in EFFECTS}  # test_live_hub has these


def test_signatures_are_the_contract(live: PeftModel) -> None:
    """Names, order and defaults, on the method as a user sees it."""
    found = inspect.signature(live.save_pretrained_merged).parameters
    expected = {
        "save_directory": inspect.Parameter.empty,
        "tokenizer": None,
        "save_method": "merged_16bit",
        "push_to_hub": False,
        "token": None,
        "is_main_process": True,
        "state_dict": None,
        "save_function": torch.save,
        "max_shard_size": "5GB",
        "safe_serialization": True,
        "variant": None,
        "save_peft_format": True,
        "tags": None,
        "temporary_location": "_unsloth_temporary_saved_buffers",
        "maximum_memory_usage": 0.75,
        "datasets": None,
    }
    assert {name: parameter.default for name, parameter in found.items()} == expected
    pushed = list(inspect.signature(live.push_to_hub_merged).parameters)
    assert pushed == [
        *("repo_id", "tokenizer", "save_method", "use_temp_dir", "commit_message", "private", "token"),
        *("max_shard_size", "create_pr", "safe_serialization", "revision", "commit_description", "tags"),
        *("temporary_location", "maximum_memory_usage", "datasets"),
    ]
    with pytest.raises(TypeError):
        live.save_pretrained_merged("out", calibration_dataset=[])


def test_a_folder_of_other_things_is_left_alone(live: PeftModel) -> None:
    """Only what a save has written is replaced."""
    Path("out").mkdir()
    Path("out/notes.docx").write_text("mine")
    with pytest.raises(loraweld.OutputError, match=r"notes\.docx"):
        live.save_pretrained_merged("out")
    for folder in (".", "base", "_unsloth_temporary_saved_buffers/.."):
        with pytest.raises(loraweld.LoraweldError, match=r"output \. holds|loaded from|holds the input"):
            live.save_pretrained_merged(folder)
    live.save_pretrained("adapter")
    with pytest.raises(loraweld.OutputError, match="other things than a saved model"):
        live.save_pretrained_merged("adapter")
    assert Path("out/notes.docx").read_text() == "mine"


def test_several_adapters(live: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    """All that are active count; "lora" writes one and says so of two."""
    config = live.peft_config["default"]
    live.add_adapter("other name", config)
    live.base_model.set_adapter(["default", "other name"])
    for name, parameter in live.named_parameters():
        if "lora_B.other name" in name:
            parameter.data.normal_()
    live.float()
    expected = logits(live, {"input_ids": token_ids(96)})
    live.save_pretrained_merged("out", save_method="preserve")
    reloaded = tf.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    assert (logits(reloaded, {"input_ids": token_ids(96)}) - expected).abs().max() <= 1e-5
    with pytest.raises(loraweld.RequestError, match="save_method 'lora' writes one adapter"):
        live.save_pretrained_merged("lora", save_method="lora")
    live.base_model.set_adapter("other name")
    live.save_pretrained_merged("lora", save_method="lora")
    assert Path("lora/adapter_model.safetensors").is_file()
    with caplog.at_level(logging.WARNING, logger="loraweld"):
        live.merge_adapter()
        live.save_pretrained_merged("merged")
    assert "merged adapters ['other name']" in caplog.text


def test_what_is_neither_here_nor_there_is_rejected(live: PeftModel, tmp_path: Path) -> None:
    """Layers that are merged in part, and models that are none."""
    live.get_base_model().model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(loraweld.RequestError, match=r"\['default'\] are merged in some layers, but not in"):
        live.save_pretrained_merged("out")
    with pytest.raises(loraweld.RequestError, match="model is a Linear"):
        loraweld.attach(torch.nn.Linear(2, 2))
    write_base("llama", tmp_path / "other")
    with_adapter(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "other"), "llama")
    plain_model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with pytest.raises(loraweld.RequestError, match="the model has no adapter"):
        loraweld.save_pretrained_merged(plain_model, "out", save_method="lora")


def test_values_that_are_elsewhere_are_named(live: PeftModel) -> None:
    """A parameter on the device meta has no values to save."""
    live.get_base_model().model.norm.to("meta")
    with pytest.raises(loraweld.RequestError, match=r"(?s)no values in memory.*model\.norm\.weight"):
        live.save_pretrained_merged("out")
    given = state_of(live)
    name = next(name for name in given if name.endswith("model.norm.weight"))
    given[name] = torch.full((32,), 3.0, dtype=torch.bfloat16)
    live.save_pretrained_merged("out", state_dict=given)
    assert (all_weights(Path("out"))["model.norm.weight"] == 3).all()


@pytest.mark.parametrize("package", ["transformers", "safetensors", "peft", "bitsandbytes", "accelerate"])
def test_a_package_that_is_missing_is_named(package: str, live: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it."""
    calls = {
        "peft": lambda: loraweld.FastLanguageModel.get_peft_model(live),
        "bitsandbytes": lambda: loraweld.FastLanguageModel.from_pretrained("base"),
        "accelerate": lambda: loraweld.FastLanguageModel.from_pretrained("base"),
    }
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(loraweld.RequestError, match=rf"needs {package}: pip install 'loraweld\[live\]'"):
        calls.get(package, lambda: live.save_pretrained_merged("out"))()


def of_one_process(rank: int, folder: str, port: int) -> None:
    """What each process of a distributed run does: all call, one writes."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    here = Path(folder) / str(rank)
    here.mkdir()
    os.chdir(here)
    model = loraweld.attach(with_adapter(tf.AutoModelForCausalLM.from_pretrained(Path(folder) / "base"), "llama"))
    model.save_pretrained_merged("out", tokenizer(), is_main_process=torch.distributed.get_rank() == 0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_of_several_processes_one_writes(tmp_path: Path) -> None:
    """The others come back at once and leave nothing, not even a temporary folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write_base("llama", tmp_path / "base")
    torch.multiprocessing.spawn(of_one_process, args=(str(tmp_path), port), nprocs=2)
    assert names(tmp_path / "0") == ["out"] and "model.safetensors" in names(tmp_path / "0" / "out")
    assert names(tmp_path / "1") == []
