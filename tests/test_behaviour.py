"""Behaviour: base + adapter and the merged model on prompts; the oracle is PEFT's forward pass and float64 in numpy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import loraweld
from cases import CASES, AdapterCase
from cases import pairs as cases_of
from fakes import llama_shapes, random_factors, random_tensors, save_base, write_adapter
from loraweld.cli import main
from loraweld.errors import RequestError
from loraweld.verification import behaviour, prompts
from loraweld.verification.findings import VerifyReport
from models import MODELS

HIDDEN, VOCAB = 64, 96  # rows of whole blocks: bitsandbytes decodes others wrongly on a CPU
SHAPES = llama_shapes(hidden=HIDDEN, intermediate=128, vocab=VOCAB)
LINEARS = {name: shape for name, shape in SHAPES.items() if "proj" in name}
V_PROJ = "model.layers.1.self_attn.v_proj"
PROMPTS = ("w3 w5 w9 w40 w95 w17", "w7 w8 w3", "w60 w61 w62 w63 w64 w11 w12 w13 w14")
SCALING = 1.5  # alpha 6, rank 4


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def save_model(folder: Path) -> Path:
    tensors = random_tensors(SHAPES, torch.bfloat16, std=0.12)
    tensors |= {name: torch.ones_like(tensor) for name, tensor in tensors.items() if tensor.ndim == 1}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    save_base(folder, tensors, {**named, **sizes, **heads})
    save_tokenizer(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Place:
    """A base with a tokenizer, adapters, prompts, and room for outputs."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.txt"

    def adapter(self, name: str) -> Path:
        return self.folder / name

    def merge(self, output: str, *adapters: str, **options: Any) -> Path:
        given = [self.adapter(name) for name in adapters or ("adapter",)]
        options.setdefault("base", self.base)
        loraweld.merge(given, output=self.folder / output, overwrite=True, **options)
        return self.folder / output

    def verify(self, output: Path, *adapters: str, **options: Any) -> VerifyReport:
        given = [self.adapter(name) for name in adapters or ("adapter",)]
        return loraweld.verify(output, **{"base": self.base, "adapter": given, "behaviour": self.prompts, **options})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("behaviour")
    save_model(folder / "base")
    for seed, name in enumerate(("adapter", "other"), start=1):
        write_adapter(
            folder / name, random_factors(LINEARS, seed=seed), alpha=6, base_model_name_or_path=str(folder / "base")
        )
    strong = random_factors(LINEARS, seed=1)
    strong[V_PROJ] = (strong[V_PROJ][0], strong[V_PROJ][1] * 8)
    write_adapter(folder / "strong", strong, alpha=6)
    write_adapter(folder / "dora", random_factors(LINEARS), alpha=6, use_dora=True, more=magnitudes())
    write_adapter(folder / "nothing", {name: (a, b * 0) for name, (a, b) in random_factors(LINEARS).items()}, alpha=6)
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n \n")
    return Place(folder=folder)


def magnitudes() -> dict[str, torch.Tensor]:
    """Vectors of DoRA near the norms of the rows."""
    return {
        f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector": torch.full((rows,), 1.2)
        for name, (rows, _) in LINEARS.items()
    }


def behaviour_findings(report: VerifyReport) -> list[str]:
    return [finding.message for finding in report.findings if finding.check == "behaviour"]


# Numbers


def logits_of(model: Any, prompt: str) -> np.ndarray[Any, Any]:
    ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
    with torch.no_grad():
        return np.asarray(model.eval()(input_ids=ids).logits[0].double().numpy())


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def kl(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    p, q = log_softmax(first), log_softmax(second)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def test_the_numbers_are_those_of_their_definition(place: Place) -> None:
    """Of every prompt and of all together, from models that the test loads itself."""
    output = place.merge("numbers")
    report = place.verify(output)
    assert report.holds
    found = report.behaviour
    assert found is not None

    def load(folder: Path) -> Any:
        return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    base, merged = load(place.base), load(output)
    adapted = PeftModel.from_pretrained(load(place.base), place.adapter("adapter"))
    everything = []
    for prompt, told in zip(PROMPTS, found.prompts, strict=True):
        alone, right, stored = (logits_of(model, prompt) for model in (base, adapted, merged))
        everything.append((kl(right, stored), right.argmax(-1) == stored.argmax(-1), kl(right, alone)))
        assert (told.prompt, told.tokens) == (prompt, len(prompt.split()))
        assert told.kl_mean == pytest.approx(kl(right, stored).mean(), rel=1e-3)
        assert told.kl_max == pytest.approx(kl(right, stored).max(), rel=1e-3)
        assert told.adapter_kl_mean == pytest.approx(kl(right, alone).mean(), rel=1e-3)
        assert told.base_kl_mean == pytest.approx(kl(alone, stored).mean(), rel=1e-3)
        assert told.top1 == pytest.approx((right.argmax(-1) == stored.argmax(-1)).mean())
        assert told.logit_difference == pytest.approx(np.abs(right - stored).max(), rel=1e-2)
    stored_kls, same, alone_kls = (np.concatenate(parts) for parts in zip(*everything, strict=True))
    assert found.total.tokens == len(stored_kls)
    assert found.total.kl_mean == pytest.approx(stored_kls.mean(), rel=1e-3)
    assert found.total.kl_max == pytest.approx(stored_kls.max(), rel=1e-3)
    assert found.total.top1 == pytest.approx(same.mean())
    assert found.limit == pytest.approx(0.1 * alone_kls.mean(), rel=1e-3)


# Defects


def copy_of_base(place: Place) -> Path:
    return Path(shutil.copytree(place.base, place.folder / "copied", dirs_exist_ok=True))


def without_one_module(place: Place) -> Path:
    output = place.merge("without", "strong")
    tensors = load_file(output / "model.safetensors")
    name = f"{V_PROJ}.weight"
    tensors[name] = load_file(place.base / "model.safetensors")[name]
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


DEFECTS: dict[str, tuple[str, Callable[[Place], Path]]] = {
    "the base, copied": ("adapter", copy_of_base),
    "alpha ignored": ("adapter", lambda place: place.merge("weak", scale=1 / SCALING)),
    "merged twice": ("adapter", lambda place: place.merge("twice", scale=2.0)),
    "subtracted": ("adapter", lambda place: place.merge("minus", scale=-1.0)),
    "another adapter": ("adapter", lambda place: place.merge("another", "other")),
    "one strong module missing": ("strong", without_one_module),
    "the base, in 4 bit": ("adapter", lambda place: place.merge("codes", "nothing", save_method="merged_4bit")),
    "the base, in FP8": ("adapter", lambda place: place.merge("codes", "nothing", save_method="merged_fp8")),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect: str, place: Place) -> None:
    """The finding has both divergences; the right model of the same adapter has none."""
    adapter, plant = DEFECTS[defect]
    output = plant(place)
    (output / "loraweld.json").unlink(missing_ok=True)  # what another tool made: only its weights are wrong
    message, *more = behaviour_findings(place.verify(output, adapter))
    assert more == []
    assert "nats a token, expected at most" in message
    assert place.verify(place.merge("right", adapter), adapter).holds


@pytest.mark.parametrize("method", ["merged_4bit", "merged_8bit", "merged_fp8"])
def test_codes_are_asked_to_be_nearer_to_the_adapter_than_to_the_base(method: str, place: Place) -> None:
    """Their divergence is told, larger than that of 16 bit; from such a base 16 bit is as near as ever."""
    plain = place.verify(place.merge("plain")).behaviour
    found = place.verify(place.merge(method, save_method=method))
    assert plain is not None and found.behaviour is not None
    assert found.holds
    assert found.behaviour.total.kl_mean > 2 * plain.total.kl_mean
    assert found.behaviour.limit == found.behaviour.total.base_kl_mean
    base = place.merge(f"base-{method}", "nothing", save_method=method)
    decoded = place.verify(place.merge(f"from-{method}", base=base), base=base)
    assert decoded.holds and decoded.behaviour is not None
    assert decoded.behaviour.total.kl_mean < 1e-3 * decoded.behaviour.total.adapter_kl_mean


def named(*names: str) -> list[AdapterCase]:
    return [case for case in CASES if case.name in names]


@pytest.mark.parametrize(
    "case",
    named(
        *("linears", "rslora", "dora", "embedding", "save-embedding-and-head", "tokens", "pissa", "olora", "pickled"),
        *("two", "lora-then-dora", "new-tokens", "new-tokens-saved", "new-tokens-trained"),
    ),
    ids=lambda case: case.name,
)
def test_right_models_raise_no_alarm(case: AdapterCase, tmp_path: Path) -> None:
    """Over the table of what adapters can be: the one rounding to bfloat16 is far below the limit."""
    model = next(model for model, _ in cases_of("linears") if model.name == "llama")
    model.save(tmp_path / "base", torch.bfloat16)
    adapters = case.train(model, tmp_path / "base", tmp_path / "adapter")[1]
    save_tokenizer(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    loraweld.merge(adapters, base=tmp_path / "base", output=tmp_path / "out")
    report = loraweld.verify(
        tmp_path / "out", base=tmp_path / "base", adapter=adapters, behaviour=tmp_path / "prompts.txt"
    )
    assert report.holds
    assert report.behaviour is not None
    assert report.behaviour.total.kl_mean < 1e-3 * report.behaviour.total.adapter_kl_mean


# Several adapters


@pytest.mark.parametrize(
    "options",
    [{}, {"weights": [0.7, 0.3]}, {"weights": [2.0, -1.0]}, {"weights": [1.0, 0.0]}, {"combine": "svd", "svd_rank": 3}],
    ids=str,
)
def test_a_combination_is_that_of_the_record(options: dict[str, Any], place: Place) -> None:
    """PEFT has both adapters at their weights, or the one that they were combined to; other weights are found."""
    output = place.merge("several", "adapter", "other", **options)
    report = place.verify(output, "adapter", "other")
    assert report.holds
    assert report.behaviour is not None
    assert report.behaviour.total.kl_mean < 1e-3 * report.behaviour.total.adapter_kl_mean
    if "combine" not in options:
        assert behaviour_findings(place.verify(output, "adapter", "other", weights=[0.2, 0.9]))


def test_what_peft_cannot_express_is_refused(place: Place) -> None:
    """DoRA in part, and a base that was taken to another form: no comparison instead of a wrong one."""
    output = place.merge("part", "dora", scale=0.5)
    assert place.verify(output, "dora", behaviour=None).holds
    with pytest.raises(RequestError, match=r"cannot compare this combination: model\.layers.* taken in part"):
        place.verify(output, "dora")
    output = place.merge("requantised", merge_base="quantized-from")
    with pytest.raises(RequestError, match="quantized-from"):
        place.verify(output, merge_base="quantized-from")


def test_an_adapter_that_peft_loads_in_part_is_refused(tmp_path: Path, place: Place) -> None:
    """One that was trained on the model without its head: PEFT finds no place for its names, a merge does."""
    bare = {name.removeprefix("model."): pair for name, pair in random_factors(LINEARS).items()}
    write_adapter(tmp_path / "bare", bare, alpha=6)
    loraweld.merge(tmp_path / "bare", base=place.base, output=tmp_path / "out")
    with pytest.raises(RequestError, match="in part"):
        loraweld.verify(tmp_path / "out", base=place.base, adapter=tmp_path / "bare", behaviour=place.prompts)


# What a user can fix


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a file"),
        (b"", "holds no prompt"),
        (b"\n  \n\t\n", "holds no prompt"),
        (b"w1 \xff\xfe", "not text in UTF-8"),
        (b"w1 w2\n" * (prompts.MAX_PROMPTS + 1), "limit is 1000"),
        (b"w" * (prompts.MAX_FILE_BYTES + 1), "limit for prompts is 1000000"),
        (b"w1 " * (behaviour.MAX_TOKENS + 1), "has 2049 tokens, expected 1 to 2048"),
    ],
    ids=["missing", "empty", "blank", "binary", "many", "large", "long"],
)
def test_prompts_out_of_bounds_are_refused(content: bytes | None, words: str, place: Place, tmp_path: Path) -> None:
    """Each with the file or the prompt, and what was expected."""
    if content is not None:
        (tmp_path / "given.txt").write_bytes(content)
    with pytest.raises(RequestError, match=words):
        place.verify(place.merge("bounds"), behaviour=tmp_path / "given.txt")


def test_without_a_tokenizer_one_has_to_be_given(place: Place, tmp_path: Path) -> None:
    """The message says where none was found, and --tokenizer helps."""
    shutil.copytree(place.base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    given = {"base": tmp_path / "base", "adapter": place.adapter("adapter"), "behaviour": place.prompts}
    loraweld.merge(given["adapter"], base=given["base"], output=tmp_path / "out")
    with pytest.raises(RequestError, match=r"no tokenizer in .*out.*--tokenizer"):
        loraweld.verify(tmp_path / "out", **given)
    assert loraweld.verify(tmp_path / "out", **given, tokenizer=place.base).holds


def test_too_little_memory_or_disk_is_told_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is needed and what is there."""
    output = place.merge("room")
    with monkeypatch.context() as patched:
        patched.setattr(behaviour, "free_memory_bytes", lambda: 100_000)
        with pytest.raises(RequestError, match=r"of memory, 0\.0 GB are free"):
            place.verify(output)
    usage = shutil.disk_usage(place.folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(RequestError, match=r"keeps the logits of 18 tokens.*TMPDIR"):
        place.verify(output)


def test_missing_packages_are_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the extra that brings them; without --behaviour they are not needed."""
    output = place.merge("packages")
    monkeypatch.setattr(behaviour, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"needs transformers and peft: pip install 'loraweld\[peft\]'"):
        place.verify(output)
    assert place.verify(output, behaviour=None).behaviour is None


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_other_models_than_causal_ones_are_refused(name: str, tmp_path: Path) -> None:
    """By the class that their config names."""
    model = next(model for model in MODELS if model.name == name)
    model.save(tmp_path / "base", torch.bfloat16)
    case = next(case for case in CASES if case.name == "linears")
    adapters = case.train(model, tmp_path / "base", tmp_path / "adapter")[1]
    loraweld.merge(adapters, base=tmp_path / "base", output=tmp_path / "out")
    (tmp_path / "prompts.txt").write_text("w1")
    with pytest.raises(RequestError, match=r"is \w+For\w+; --behaviour is for language models with a causal head"):
        loraweld.verify(tmp_path / "out", base=tmp_path / "base", adapter=adapters, behaviour=tmp_path / "prompts.txt")


def test_code_of_a_model_is_not_run(tmp_path: Path, place: Place) -> None:
    """A base whose classes are in its folder is refused."""
    shutil.copytree(place.base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config |= {"model_type": "own", "auto_map": classes, "architectures": ["Model"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    given = {"base": tmp_path / "base", "adapter": place.adapter("adapter")}
    loraweld.merge(given["adapter"], base=given["base"], output=tmp_path / "out")
    with pytest.raises(RequestError, match="transformers cannot read its config"):
        loraweld.verify(tmp_path / "out", **given, behaviour=place.prompts)
    assert not (tmp_path / "ran").exists()


# An output that is damaged


def truncate(output: Path) -> None:
    path = output / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_norm(output: Path) -> None:
    tensors = load_file(output / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, output / "model.safetensors", {"format": "pt"})


def put_nan(output: Path) -> None:
    tensors = load_file(output / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, output / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "cannot be loaded or run"),
        (drop_norm, "finds no values for 1 parameters, the first is model.norm.weight"),
        (put_nan, "KL from base + adapter is nan"),
    ],
    ids=["truncated", "tensor lost", "not a number"],
)
def test_a_damaged_output_is_a_finding(damage: Callable[[Path], None], words: str, place: Place) -> None:
    """What is wrong with the output ends no verification, and the report is JSON."""
    output = place.merge("damaged")
    damage(output)
    report = place.verify(output)
    assert any(words in message for message in behaviour_findings(report))
    json.dumps(report.to_json(), allow_nan=False)


# The command


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_the_command_prints_a_table(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each prompt and one for all; --json has the numbers; 1 for the base in the model's place."""
    output = place.merge("command")
    line = ("--base", place.base, "--adapter", place.adapter("adapter"), "--behaviour", place.prompts)
    assert run("verify", output, *line) == 0
    shown = capsys.readouterr().out.splitlines()
    table = shown[next(i for i, row in enumerate(shown) if row.startswith("behaviour on 3 prompts")) :]
    assert [row.split()[0] for row in table[2:]] == ["w3", "w7", "w60", "all"]
    assert run("verify", output, *line, "--json") == 0
    told = json.loads(capsys.readouterr().out)["behaviour"]
    assert told["holds"] is True
    assert [one["tokens"] for one in told["prompts"]] == [6, 3, 9]
    assert run("verify", copy_of_base(place), *line, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["behaviour"]["kl_mean"] == told["behaviour"]["adapter_kl_mean"]
    assert told["behaviour"]["holds"] is False


def test_prompts_that_do_not_show_the_adapter_are_noted(place: Place) -> None:
    """An adapter that changes nothing: equal to the base, and it says so."""
    report = place.verify(place.merge("same", "nothing"), "nothing")
    assert report.holds
    assert report.behaviour is not None
    assert report.behaviour.total.adapter_kl_mean == 0
    assert "do not show the adapter" in report.lines()[-1]
