"""Verification: planted defects are found and named, right outputs of any tool raise no alarm."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraweld
from cases import CASES, AdapterCase, pairs
from fakes import INDEX_NAME, load_folder
from handmade import MODULES, Q_PROJ, VOCAB, delta, llama_tensors, lora, loras, save_adapter, save_llama
from loraweld.cli import main
from loraweld.errors import RequestError, VerificationError
from loraweld.sinks.folder import FolderSink
from loraweld.verification.expected import Block
from loraweld.verification.findings import ChangeSums, Retention, TensorResult, lost_change_warnings
from loraweld.verification.values import Sums
from models import TinyModel
from test_experts import MODELS as EXPERTS
from test_experts import trained, write_base

Q, V, DOWN = f"{Q_PROJ}.weight", "model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SCALING = 1.5  # alpha 6, rank 4
TENSORS = loras(*MODULES)


# The kinds of merges that defects are planted in


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Options of the base, tensors and options of the adapter, options of the merge."""

    base: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=lambda: TENSORS)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)

    def make(self, folder: Path) -> None:
        save_llama(folder / "base", **self.base)
        save_adapter(folder / "adapter", self.tensors, **self.adapter)
        loraweld.merge(folder / "adapter", base=folder / "base", output=folder / "out", **self.merge)


def bias_of(module: str) -> dict[str, Tensor]:
    return {f"{module}.bias": torch.linspace(-1, 1, 16).to(torch.bfloat16)}


QS = [module for module in MODULES if module.endswith("q_proj")]
MAGNITUDE = {f"{module}.lora_magnitude_vector": torch.linspace(0.5, 2, 16) for module in QS}
TOKEN_ROWS = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.linspace(-1, 1, 32).view(2, 16)}
PLAIN = Scene()
SHARDED = Scene(base={"num_files": 3})
DORA = Scene(tensors={**loras(*QS), **MAGNITUDE}, adapter={"use_dora": True})
RSLORA = Scene(adapter={"use_rslora": True})
TOKENS = Scene(tensors={**TENSORS, **TOKEN_ROWS}, adapter={"trainable_token_indices": {"embed_tokens": [3, 7]}})
BIAS = Scene(
    base={"more": {name: bias for module in QS for name, bias in bias_of(module).items()}, "attention_bias": True},
    tensors={**loras(*QS), **{f"{module}.lora_B.bias": torch.linspace(0.5, 2, 16) for module in QS}},
    adapter={"lora_bias": True},
)
TIED = Scene(base={"tied": True})
UNTIED = Scene(base={"tied": True}, tensors=loras("model.embed_tokens"), adapter={})
NF4 = Scene(merge={"save_method": "merged_4bit", "double_quant": False})
INT8 = Scene(merge={"save_method": "merged_8bit"})


def change(module: str = Q_PROJ, scaling: float = SCALING, tensors: Mapping[str, Tensor] = TENSORS) -> Tensor:
    return scaling * delta(tensors, module)


def base_of(folder: Path, name: str) -> Tensor:
    return load_folder(folder / "base")[name].double()


def put(folder: Path, **tensors: Tensor | None) -> None:
    """Give tensors of the output other values, or (None) take them away."""
    for file in sorted((folder / "out").glob("*.safetensors")):
        held = load_file(file)
        here = {name: held[name] for name in tensors if name in held}
        if here:
            held |= {name: value for name in here if (value := tensors[name]) is not None}
            save_file({k: v for k, v in held.items() if tensors.get(k, v) is not None}, file, {"format": "pt"})


def add(folder: Path, name: str, value: Tensor) -> None:
    file = sorted((folder / "out").glob("*.safetensors"))[-1]
    save_file({**load_file(file), name: value}, file, {"format": "pt"})


def put_change(folder: Path, of_change: Callable[[Tensor], Tensor], name: str = Q) -> None:
    """Store base + some function of the right change, rounded once."""
    module = name.removesuffix(".weight")
    put(folder, **{name: (base_of(folder, name) + of_change(change(module))).to(torch.bfloat16)})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "out" / "config.json", lambda content: content.update(values))


def flip_byte(folder: Path, name: str) -> None:
    value = load_folder(folder / "out")[name].clone()
    value.view(torch.uint8).view(-1)[5] ^= 0x40
    put(folder, **{name: value})


def corrupt_element(folder: Path) -> None:
    value = load_folder(folder / "out")[DOWN].clone()
    value[7, 3] = 40.0
    put(folder, **{DOWN: value})


def swap(folder: Path) -> None:
    found = load_folder(folder / "out")
    put(folder, **{Q: found[K].clone(), K: found[Q].clone()})


def wrong_file_in_index(folder: Path) -> None:
    files = sorted(path.name for path in (folder / "out").glob("*.safetensors"))
    edit_json(folder / "out" / INDEX_NAME, lambda content: content["weight_map"].update({Q: files[-1]}))


def duplicate(folder: Path) -> None:
    add(folder, EMBEDDING, load_folder(folder / "out")[EMBEDDING])


def truncate(folder: Path) -> None:
    path = folder / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_base(folder: Path) -> None:
    """The output is of another base than the one that is given."""
    folder.joinpath("base").rename(folder / "first")
    save_llama(folder / "base", seed=5)
    (folder / "out" / "loraweld.json").unlink()


def other_adapter(folder: Path) -> None:
    other = {name: tensor for seed, m in enumerate(MODULES, 50) for name, tensor in lora(m, seed=seed).items()}
    folder.joinpath("adapter").rename(folder / "first")
    save_adapter(folder / "adapter", other)


def scale_absmax(folder: Path) -> None:
    name = f"{Q}.absmax"
    put(folder, **{name: load_folder(folder / "out")[name] * 1.2})


def plant_tokenizer(folder: Path) -> None:
    content = {"model": {"vocab": {f"t{i}": i for i in range(VOCAB + 9)}}, "added_tokens": []}
    (folder / "out" / "tokenizer.json").write_text(json.dumps(content))


def without_magnitude(folder: Path) -> None:
    tensors = lora(Q_PROJ)
    put(folder, **{Q: (base_of(folder, Q) + change(tensors=tensors)).to(torch.bfloat16)})


def without_bias(folder: Path) -> None:
    put(folder, **{f"{Q_PROJ}.bias": bias_of(Q_PROJ)[f"{Q_PROJ}.bias"]})


def without_token_rows(folder: Path) -> None:
    put(folder, **{EMBEDDING: load_folder(folder / "base")[EMBEDDING]})


def stale_head(folder: Path) -> None:
    add(folder, HEAD, llama_tensors(seed=9)[HEAD])


def not_finite(folder: Path) -> None:
    value = load_folder(folder / "out")[Q].clone()
    value[0, 0] = float("nan")
    put(folder, **{Q: value})


def plain_four_bit(folder: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config(quantization_config=settings)(folder)


def other_quant_type(folder: Path) -> None:
    settings = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    config(quantization_config={**settings, "bnb_4bit_quant_type": "fp4"})(folder)


def no_quantization(folder: Path) -> None:
    edit_json(folder / "out" / "config.json", lambda content: content.pop("quantization_config"))


def put_base_codes(folder: Path) -> None:
    """The int8 codes of one weight are those of the base."""
    empty = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    save_adapter(folder / "none", empty)
    loraweld.merge(folder / "none", base=folder / "base", output=folder / "plain", save_method="merged_8bit")
    codes = load_folder(folder / "plain")
    put(folder, **{Q: codes[Q], f"{Q_PROJ}.SCB": codes[f"{Q_PROJ}.SCB"]})


def halve(name: str) -> Callable[[Path], None]:
    return lambda folder: put(folder, **{name: load_folder(folder / "out")[name][:8].clone()})


def as_dtype(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: put(folder, **{name: load_folder(folder / "out")[name].to(dtype)})


def times(factor: float) -> Callable[[Path], None]:
    return lambda folder: put_change(folder, lambda right: right * factor)


# name → (merge, what is planted, check, where, words of the message)
DEFECTS: dict[str, tuple[Scene, Callable[[Path], object], str, str, tuple[str, ...]]] = {
    "delta missing": (PLAIN, times(0), "value", Q, ("equals the base", "change is missing")),
    "merged twice": (PLAIN, times(2), "value", Q, ("2 times", "merged twice")),
    "subtracted": (PLAIN, times(-1), "value", Q, ("-1 times", "subtracted")),
    "transposed": (PLAIN, lambda f: put_change(f, lambda d: d.T), "value", Q, ("transposed",)),
    "alpha ignored": (PLAIN, times(1 / SCALING), "value", Q, ("alpha / rank was ignored",)),
    "rank ignored": (PLAIN, times(4), "value", Q, ("4 times", "not divided by the rank")),
    "other scale": (PLAIN, times(0.3), "value", Q, ("0.3 times", "another scale")),
    "rslora ignored": (
        RSLORA,
        lambda f: put_change(f, lambda d: d),
        "value",
        Q,
        ("0.5 times", "use_rslora was ignored"),
    ),
    "corrupt byte": (PLAIN, lambda f: flip_byte(f, EMBEDDING), "value", EMBEDDING, ("corrupt", "[0, 2]")),
    "corrupt norm": (PLAIN, lambda f: flip_byte(f, NORM), "value", NORM, ("corrupt", "stored")),
    "corrupt element": (PLAIN, corrupt_element, "value", DOWN, ("corrupt", "[7, 3]", "stored 40")),
    "not finite": (PLAIN, not_finite, "value", Q, ("not finite",)),
    "stale total_size": (
        SHARDED,
        lambda f: edit_json(f / "out" / INDEX_NAME, lambda c: c["metadata"].update(total_size=7)),
        "total_size",
        INDEX_NAME,
        ("says 7 bytes",),
    ),
    "index names another file": (SHARDED, wrong_file_in_index, "index", Q, ("it is in",)),
    "index names no file": (
        SHARDED,
        lambda f: edit_json(f / "out" / INDEX_NAME, lambda c: c["weight_map"].update({Q: "gone.safetensors"})),
        "index",
        "gone.safetensors",
        ("missing",),
    ),
    "stored twice": (SHARDED, duplicate, "duplicate", EMBEDDING, ("is stored in",)),
    "tensor missing": (PLAIN, lambda f: put(f, **{NORM: None}), "missing", NORM, ("not in the output",)),
    "tensor extra": (
        PLAIN,
        lambda f: add(f, f"{Q_PROJ}.lora_A.weight", torch.ones(4, 16)),
        "extra",
        f"{Q_PROJ}.lora_A.weight",
        (),
    ),
    "wrong dtype": (PLAIN, as_dtype(Q, torch.float16), "dtype", Q, ("is F16, expected BF16",)),
    "wrong shape": (PLAIN, halve(Q), "shape", Q, ("(8, 16), expected (16, 16)",)),
    "truncated file": (PLAIN, truncate, "file", "model.safetensors", ("cut short",)),
    "swapped": (PLAIN, swap, "value", Q, (f"the values of {K}",)),
    "tied flag": (UNTIED, config(tie_word_embeddings=True), "tie_word_embeddings", "config.json", ("two tensors",)),
    "head lost": (UNTIED, lambda f: put(f, **{HEAD: None}), "missing", HEAD, ()),
    "untied flag": (TIED, config(tie_word_embeddings=False), "tie_word_embeddings", "config.json", ("true",)),
    "stale tied head": (TIED, stale_head, "tied", HEAD, ("stale",)),
    "vocab_size": (PLAIN, config(vocab_size=VOCAB + 1), "vocab_size", "config.json", (f"{VOCAB} rows",)),
    "vocab_size of text_config": (
        PLAIN,
        config(text_config={"vocab_size": 7}),
        "vocab_size",
        "config.json",
        ("says 7",),
    ),
    "layers": (
        PLAIN,
        config(num_hidden_layers=9),
        "num_hidden_layers",
        "config.json",
        ("num_hidden_layers 9, expected 2",),
    ),
    "config dtype": (PLAIN, config(dtype="float16"), "dtype", "config.json", ("tensors are bfloat16",)),
    "config broken": (PLAIN, lambda f: (f / "out" / "config.json").write_text("{"), "file", "config.json", ("JSON",)),
    "other base": (PLAIN, other_base, "value", EMBEDDING, ("another base",)),
    "other adapter": (PLAIN, other_adapter, "value", Q, ("another adapter", "cosine")),
    "other adapter, by its record": (PLAIN, other_adapter, "record", "adapter", ("sha256", "another adapter")),
    "bias not added": (BIAS, without_bias, "value", f"{Q_PROJ}.bias", ("lora_bias", "not added")),
    "token rows": (TOKENS, without_token_rows, "value", EMBEDDING, ("trained tokens", "not replaced")),
    "DoRA magnitude": (DORA, without_magnitude, "value", Q, ("magnitudes of DoRA were ignored",)),
    "tokenizer": (PLAIN, plant_tokenizer, "tokenizer", "tokenizer", (f"{VOCAB} rows",)),
    "NF4 absmax": (NF4, scale_absmax, "value", Q, ("times those of float64", "scales of bitsandbytes nf4")),
    "NF4 part lost": (NF4, lambda f: put(f, **{f"{Q}.absmax": None}), "encoding", "config.json", ("absmax",)),
    "NF4 codes, FP4 config": (NF4, other_quant_type, "quantization_config", "config.json", ("fp4",)),
    "NF4 codes, no config": (NF4, no_quantization, "quantization_config", "config.json", ("missing",)),
    "plain weights, 4-bit config": (PLAIN, plain_four_bit, "quantization_config", "config.json", ("plain",)),
    "int8 without the delta": (INT8, put_base_codes, "value", Q, ("LLM.int8",)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found_and_named(defect: str, tmp_path: Path) -> None:
    """The finding names the check, the tensor or file, and what it is; before the defect there was none."""
    scene, plant, check, where, words = DEFECTS[defect]
    scene.make(tmp_path)
    inputs = {"base": tmp_path / "base", "adapter": tmp_path / "adapter"}
    assert loraweld.verify(tmp_path / "out", **inputs).findings == ()

    plant(tmp_path)

    report = loraweld.verify(tmp_path / "out", **inputs)
    assert not report.holds
    told = [finding.message for finding in report.findings if (finding.check, finding.where) == (check, where)]
    assert told, report.findings
    assert [word for word in words if word not in told[0]] == [], told[0]


# No false alarm


def peft_adapter(model: TinyModel, case: AdapterCase, folder: Path) -> tuple[Path, tuple[Path, ...]]:
    base = folder / "base"
    model.save(base, torch.bfloat16)
    return base, case.train(model, base, folder / "adapter")[1]


def each_pair(*models: str) -> pytest.MarkDecorator:
    chosen = [pair for pair in pairs() if pair[0].name in models]
    return pytest.mark.parametrize(("model", "case"), chosen, ids=lambda value: value.name)


@each_pair("llama", "gpt2", "bert")
def test_our_merges_hold(model: TinyModel, case: AdapterCase, tmp_path: Path) -> None:
    """Over the table of adapter options: nothing is found, and everything was rounded once."""
    base, adapters = peft_adapter(model, case, tmp_path)
    loraweld.merge(adapters, base=base, output=tmp_path / "out", verify=True)
    report = loraweld.verify(tmp_path / "out", base=base, adapter=adapters)
    assert report.findings == ()
    assert {result.rounded for result in report.tensors} <= {"once"}
    assert report.notes == ()


def named(*names: str) -> list[AdapterCase]:
    return [case for case in CASES if case.name in names]


@pytest.mark.parametrize("method", ["merged_4bit", "merged_8bit", "merged_fp8", "float32", "float16"])
@pytest.mark.parametrize("case", named("linears", "dora", "embedding", "two", "tokens"), ids=lambda case: case.name)
def test_encodings_and_dtypes_hold(method: str, case: AdapterCase, tmp_path: Path) -> None:
    """Decoded values lie within the steps of their codes, and the change is in them."""
    model = next(model for model, _ in pairs("linears") if model.name == "llama")
    base, adapters = peft_adapter(model, case, tmp_path)
    options = {"dtype": method} if method.startswith("float") else {"save_method": method}
    loraweld.merge(adapters, base=base, output=tmp_path / "out", verify=True, **options)
    report = loraweld.verify(tmp_path / "out", base=base, adapter=adapters)
    assert report.findings == ()
    expected = {"float32": "float32", "float16": "once"}.get(method, "encoded")
    assert expected in {result.rounded for result in report.tensors}


@pytest.mark.parametrize("method", ["merged_4bit", "merged_8bit", "merged_fp8"])
def test_an_encoded_base_preserved_or_decoded_holds(method: str, tmp_path: Path) -> None:
    """From codes back to the same codes, and from codes to 16 bit."""
    save_llama(tmp_path / "plain")
    nothing = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    loraweld.merge(
        save_adapter(tmp_path / "none", nothing), base=tmp_path / "plain", output=tmp_path / "base", save_method=method
    )
    save_adapter(tmp_path / "adapter", TENSORS)
    for output in ("preserve", "merged_16bit"):
        options = {"base": tmp_path / "base", "output": tmp_path / output, "save_method": output}
        loraweld.merge(tmp_path / "adapter", verify=True, **options)
        report = loraweld.verify(tmp_path / output, base=tmp_path / "base", adapter=tmp_path / "adapter")
        assert report.findings == ()


DORAS = ("lora-then-dora", "dora-then-lora", "dora-then-dora")


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("case", named(*DORAS), ids=lambda case: case.name)
def test_what_peft_merges_with_dora_among_others_holds(case: AdapterCase, safe_merge: bool, tmp_path: Path) -> None:
    """Before a DoRA it takes the earlier adapters off the weight, and puts them back on, rounding each time."""
    model = next(model for model, _ in pairs("linears") if model.name == "llama")
    base, adapters = peft_adapter(model, case, tmp_path)
    merged = case.unmerged(model, base, adapters).merge_and_unload(safe_merge=safe_merge)
    merged.save_pretrained(tmp_path / "out")
    report = loraweld.verify(tmp_path / "out", base=base, adapter=adapters)
    assert report.findings == ()
    assert report.notes
    assert {one.rounded for one in report.tensors} <= {"once", "twice", "after each adapter"}
    corrupt_element(tmp_path)
    found = loraweld.verify(tmp_path / "out", base=base, adapter=adapters).findings
    assert [finding.where for finding in found] == [DOWN]


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("case", named("linears", "rslora", "dora", "save-norm", "two"), ids=lambda case: case.name)
def test_what_peft_merges_holds(case: AdapterCase, safe_merge: bool, tmp_path: Path) -> None:
    """PEFT's roundings are recognised: once by default, twice with safe_merge, after each of several adapters."""
    model = next(model for model, _ in pairs("linears") if model.name == "llama")
    base, adapters = peft_adapter(model, case, tmp_path)
    merged = case.unmerged(model, base, adapters).merge_and_unload(safe_merge=safe_merge)
    merged.save_pretrained(tmp_path / "out")
    report = loraweld.verify(tmp_path / "out", base=base, adapter=adapters)
    assert report.findings == ()
    rounded = {result.rounded for result in report.tensors}
    if safe_merge and case.name != "dora":  # PEFT does not round DoRA's delta
        assert "twice" in rounded
        assert "safe_merge=True" in report.notes[0]
    else:
        assert "twice" not in rounded
    assert ("after each adapter" in rounded) == (case.name == "two" and not safe_merge)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_experts_hold_and_a_wrong_one_is_found(name: str, tmp_path: Path) -> None:
    """Experts of their own tensors, and rows of one that holds all, in either orientation."""
    base = write_base(name, tmp_path / "base", torch.bfloat16)
    trained(name, base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=EXPERTS[name][1])
    loraweld.merge(tmp_path / "adapter", base=base, output=tmp_path / "out", verify=True)
    inputs = {"base": base, "adapter": tmp_path / "adapter"}
    report = loraweld.verify(tmp_path / "out", **inputs)
    assert report.findings == ()
    changed = next(one.tensor for one in report.tensors if ".experts." in one.tensor)
    put(tmp_path, **{changed: load_folder(base)[changed]})
    found = loraweld.verify(tmp_path / "out", **inputs).findings
    assert [(finding.check, finding.where) for finding in found] == [("value", changed), ("checksum", changed)]
    assert "change is missing" in found[0].message


def test_what_the_base_itself_says_wrongly_is_no_fault_of_the_merge(tmp_path: Path) -> None:
    """A config at odds with the base's own tensors, and a tokenizer larger than its embedding."""
    Scene(base={"vocab_size": VOCAB + 5}).make(tmp_path)
    plant_tokenizer(tmp_path)
    (tmp_path / "base" / "tokenizer.json").write_bytes((tmp_path / "out" / "tokenizer.json").read_bytes())
    assert loraweld.verify(tmp_path / "out", base=tmp_path / "base", adapter=tmp_path / "adapter").findings == ()


def test_a_tie_that_peft_keeps_wrongly_is_found(tmp_path: Path) -> None:
    """PEFT adds the delta of a tied embedding to the head too: the merged model is not the trained one."""
    model, case = next(pair for pair in pairs("embedding") if pair[0].name == "llama")
    base, adapters = peft_adapter(model, case, tmp_path)
    case.unmerged(model, base, adapters).merge_and_unload().save_pretrained(tmp_path / "out")
    report = loraweld.verify(tmp_path / "out", base=base, adapter=adapters)
    found = {finding.check: finding for finding in report.findings}
    assert found.keys() == {"tie_word_embeddings", "missing"}
    assert found["missing"].where == HEAD
    assert "one side of the tie" in found["missing"].message


def test_a_model_may_lie_in_its_inputs(tmp_path: Path) -> None:
    """axolotl merges into the adapter's folder; the base in the model's place has no change."""
    PLAIN.make(tmp_path)
    inputs = {"base": tmp_path / "base", "adapter": tmp_path / "adapter"}
    inside = (tmp_path / "out").rename(tmp_path / "adapter" / "merged")
    assert loraweld.verify(inside, **inputs).holds
    found = loraweld.verify(tmp_path / "base", **inputs).findings
    assert {finding.where for finding in found} == {f"{module}.weight" for module in MODULES}


def test_a_defect_does_not_hide_behind_two_roundings(tmp_path: Path) -> None:
    """One element of a model that was rounded twice is found."""
    PLAIN.make(tmp_path)
    right = {m: change(m).to(torch.bfloat16) for m in MODULES}
    twice = {f"{m}.weight": (base_of(tmp_path, f"{m}.weight") + right[m].double()).to(torch.bfloat16) for m in MODULES}
    put(tmp_path, **twice)
    inputs = {"base": tmp_path / "base", "adapter": tmp_path / "adapter"}
    assert {one.rounded for one in loraweld.verify(tmp_path / "out", **inputs).tensors} == {"twice"}
    corrupt_element(tmp_path)
    found = loraweld.verify(tmp_path / "out", **inputs).findings
    assert [finding.where for finding in found if finding.check == "value"] == [DOWN]


# What is left of the change


def test_a_change_below_the_steps_is_reported_with_what_to_do(tmp_path: Path) -> None:
    """Retention: most elements keep the base's value, and the warning says so."""
    Scene(tensors=loras(*MODULES), adapter={"lora_alpha": 0.002}).make(tmp_path)
    report = loraweld.verify(tmp_path / "out", base=tmp_path / "base", adapter=tmp_path / "adapter")
    assert report.holds
    kept = [result.retention for result in report.tensors if result.retention]
    assert len(kept) == len(MODULES)
    assert all(one.lost > 0.5 and one.error > 0.5 for one in kept)
    assert any("WARNING" in note and "--dtype float32" in note for note in report.notes)


def exact_retention(base: Tensor, change: Tensor, stored: Tensor, unchanged: Tensor | None) -> Retention:
    """By numpy, from the definitions; `unchanged` is what the base alone would be stored as."""
    w, d, s = (part.double().numpy().ravel() for part in (base, change, stored))
    moved = s - w
    norm = np.linalg.norm
    lost = None if unchanged is None else float(np.mean((s == unchanged.double().numpy().ravel())[d != 0]))
    return Retention(
        change=norm(d) / norm(w),
        error=norm(moved - d) / norm(d),
        kept=float(moved @ d) / float(d @ d),
        lost=lost,
        cosine=float(moved @ d) / (norm(moved) * norm(d)) if norm(moved) else 0.0,
    )


def close(found: Retention | None, right: Retention, rel: float = 1e-9) -> bool:
    assert found is not None
    assert (found.lost is None) == (right.lost is None)
    sides = [{key: value for key, value in asdict(one).items() if value is not None} for one in (found, right)]
    return sides[0] == pytest.approx(sides[1], rel=rel, abs=1e-12)


RETENTION_CASES = {
    "bfloat16": ({}, {}, 6),
    "bfloat16, a small change": ({}, {}, 0.05),
    "bfloat16, hardly a change": ({}, {}, 0.002),
    "float32 of bfloat16": ({}, {"dtype": "float32"}, 0.05),
    "bfloat16 of float32": ({"dtype": torch.float32}, {"dtype": "bfloat16"}, 0.05),
    "float16 of bfloat16": ({}, {"dtype": "float16"}, 0.05),
}


@pytest.mark.parametrize("case", RETENTION_CASES)
def test_retention_is_that_of_its_definitions(case: str, tmp_path: Path) -> None:
    """Of each weight, and of all together: from the tensors themselves, in float64, by numpy."""
    base_options, merge_options, alpha = RETENTION_CASES[case]
    Scene(base=base_options, adapter={"lora_alpha": alpha}, merge=merge_options).make(tmp_path)
    report = loraweld.verify(tmp_path / "out", base=tmp_path / "base", adapter=tmp_path / "adapter")
    base, merged = load_folder(tmp_path / "base"), load_folder(tmp_path / "out")
    sides: list[tuple[Tensor, ...]] = []
    for module in MODULES:
        name = f"{module}.weight"
        stored = merged[name]
        sides.append((base[name], change(module, alpha / 4), stored, base[name].to(stored.dtype)))
        found = next(result for result in report.tensors if result.tensor == name)
        assert close(found.retention, exact_retention(*sides[-1])), name
    together = [torch.cat([part.double().reshape(-1) for part in parts]) for parts in zip(*sides, strict=True)]
    assert close(report.total, exact_retention(*together))
    total = report.to_json()["retention"]["total"]
    assert report.total is not None and total == asdict(report.total)
    assert report.changed == [one for one in report.tensors if one.tensor in {f"{m}.weight" for m in MODULES}]
    words = "\n".join(report.lines())
    assert f"all: ‖Δ‖/‖W‖ {report.total.change:.3%}, error {report.total.error:.2%}" in words
    assert f"rounded away {report.total.lost:.1%}, cosine {report.total.cosine:.6f}" in words
    assert all(f"  self_attn.{one}_proj × 2: " in words for one in "qkvo")


def test_retention_of_codes_is_that_of_what_they_decode_to(tmp_path: Path) -> None:
    """LLM.int8, decoded here: what plain weights alone would have been as codes is not known, of codes it is."""
    INT8.make(tmp_path)
    inputs = {"adapter": tmp_path / "adapter"}
    found = loraweld.verify(tmp_path / "out", base=tmp_path / "base", **inputs)
    codes = load_folder(tmp_path / "out")
    stored = (codes[Q].double() * codes[f"{Q_PROJ}.SCB"].double()[:, None] / 127).to(torch.bfloat16)
    (one,) = (result for result in found.tensors if result.tensor == Q)
    base = base_of(tmp_path, Q)
    right = exact_retention(base, change(), stored, None)
    assert close(one.retention, right, rel=1e-2)
    exact = base + change()
    assert one.relative_error == pytest.approx(float((stored.double() - exact).norm() / exact.norm()), rel=1e-2)

    loraweld.merge(tmp_path / "adapter", base=tmp_path / "out", output=tmp_path / "again", save_method="preserve")
    again = loraweld.verify(tmp_path / "again", base=tmp_path / "out", **inputs)
    assert all(one.retention is not None and one.retention.lost is not None for one in again.changed)


@given(values=st.lists(st.tuples(*[st.floats(-4, 4, width=16)] * 3), min_size=1, max_size=24), cut=st.integers(0, 24))
def test_sums_of_parts_are_those_of_the_whole(values: list[tuple[float, float, float]], cut: int) -> None:
    """However a weight is cut into blocks, and whatever is zero: the same retention, by its definition."""
    sides = torch.tensor(values, dtype=torch.float64)
    whole = Sums()
    for part in (sides[:cut], sides[cut:]):
        base, delta_, stored = (part[:, [column]] for column in range(3))
        whole.add(Block(0, base, base + delta_, base[:, :1]), stored, base)
    base, exact, stored = sides[:, 0], sides[:, 0] + sides[:, 1], sides[:, 2]
    if not base.norm() or not (exact - base).norm():
        return
    right = exact_retention(base, exact - base, stored, base)
    assert close(whole.of_change.retention, right)


def test_what_little_is_left_is_told_once_with_what_to_do() -> None:
    """Each weight in one warning, the worst first; what helps differs, and is another for codes."""

    def result(name: str, rounded: str, **sums: float) -> TensorResult:
        made = ChangeSums(weight=1.0, change=1.0, asked=10, **sums)
        return TensorResult(
            tensor=name,
            kind="edit",
            dtype="BF16",
            rounded=rounded,
            elements=10,
            steps=0.5,
            misrounded=0.0,
            relative_error=0.0,
            sums=made,
            stored=name,
        )

    gone = result("gone", "once", error=1.0, lost=10)
    sparse = result("sparse", "once", error=0.36, along=1.0, moved=1.36, lost=6)
    noisy = result("noisy", "once", error=0.36, along=1.0, moved=1.36, lost=5)
    coded = result("coded", "encoded", error=0.81, along=0.4, moved=0.9)
    fine = result("fine", "once", error=0.01, along=1.0, moved=1.01, lost=5)
    results = [noisy, fine, sparse, gone]
    warnings = lost_change_warnings(results)
    named = [[one.tensor for one in results if one.tensor in warning] for warning in warnings]
    assert named == [["gone"], ["sparse"], ["noisy"]]
    random = "--rounding stochastic --seed N"  # it adds to the noise, and takes a loss away
    assert [random in warning for warning in warnings] == [True, True, False]
    assert all("--dtype float32" in warning and "--scale" in warning for warning in warnings)
    (warning,) = lost_change_warnings([coded])
    assert all(cure in warning for cure in ("coded", "merged_16bit", "another encoding", "--scale"))


# Options, commands, publishing


def test_a_sample_looks_at_the_same_share_each_time(tmp_path: Path) -> None:
    """Less is compared, and what is wrong with whole tensors is found all the same."""
    PLAIN.make(tmp_path)
    inputs = {"base": tmp_path / "base", "adapter": tmp_path / "adapter", "sample": 0.25}
    first, second = (loraweld.verify(tmp_path / "out", **inputs) for _ in range(2))
    assert first.holds
    assert first.tensors == second.tensors
    assert next(one.elements for one in first.tensors if one.tensor == Q) == 5 * 16
    times(2)(tmp_path)
    assert [finding.where for finding in loraweld.verify(tmp_path / "out", **inputs).findings] == [Q]


@pytest.mark.parametrize("sample", [0, -1, 1.5])
def test_a_sample_that_is_no_share_is_rejected(sample: float, tmp_path: Path) -> None:
    """Before anything is read."""
    with pytest.raises(RequestError, match="sample"):
        loraweld.verify(tmp_path, sample=sample)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_the_command_exits_with_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 and a report, 1 and the findings, 2 for usage; --json has all of it."""
    PLAIN.make(tmp_path)
    line = ("verify", tmp_path / "out", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    assert run(*line) == 0
    assert "holds" in capsys.readouterr().out
    times(2)(tmp_path)
    assert run(*line, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] is False
    assert told["findings"][0]["where"] == Q
    assert run(*line, "--sample", "2") == 2
    assert run("verify", tmp_path / "out", "--base", tmp_path / "base") == 1
    assert "--adapter" in capsys.readouterr().err


def test_merge_verify_publishes_nothing_that_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The staged model is read again: a byte that the disk got wrong is found, and no output appears."""
    save_llama(tmp_path / "base")
    save_adapter(tmp_path / "adapter", TENSORS)
    finish = FolderSink.finish

    def finish_wrong(sink: FolderSink, name: str, size: int) -> None:
        finish(sink, name, size)
        path = next(path for path in tmp_path.rglob(name) if "base" not in path.parts)
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x40
        path.write_bytes(data)

    options = {"base": tmp_path / "base", "output": tmp_path / "out", "verify": True}
    with monkeypatch.context() as patched:
        patched.setattr(FolderSink, "finish", finish_wrong)
        with pytest.raises(VerificationError, match=r"not published[\s\S]*corrupt"):
            loraweld.merge(tmp_path / "adapter", **options)
    assert not (tmp_path / "out").exists()
    loraweld.merge(tmp_path / "adapter", **options)
    assert loraweld.merge(tmp_path / "adapter", **options).was_there


def test_verify_needs_the_whole_output(tmp_path: Path) -> None:
    """Files that leave the disk one by one cannot be read again; a .gguf or an adapter is no merged model."""
    with pytest.raises(RequestError, match="needs the whole output in a folder; give one"):
        loraweld.merge(tmp_path, push_to_hub="me/model", verify=True)
    for method in ("gguf", "lora"):
        with pytest.raises(RequestError, match="verify has no effect"):
            loraweld.merge(tmp_path, output=tmp_path / "out", save_method=method, verify=True)


def test_compare_tells_equal_differing_missing_and_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers are those of their definitions; exit code 1 where anything differs."""
    PLAIN.make(tmp_path)
    put(tmp_path, **{NORM: None})
    add(tmp_path, "more", torch.ones(2))
    report = loraweld.compare(tmp_path / "base", tmp_path / "out")
    assert (report.missing, report.extra) == ((NORM,), ("more",))
    assert {one.tensor for one in report.differing} == {f"{module}.weight" for module in MODULES}
    assert report.equal == len(load_folder(tmp_path / "base")) - len(MODULES) - 1
    one = next(one for one in report.differing if one.tensor == Q)
    base, merged = base_of(tmp_path, Q), load_folder(tmp_path / "out")[Q].double()
    assert one.relative == pytest.approx(float((merged - base).norm() / base.norm()))
    assert one.largest == float((merged - base).abs().max())
    assert run("compare", tmp_path / "base", tmp_path / "out", "--json") == 1
    assert json.loads(capsys.readouterr().out)["missing"] == [NORM]
    assert run("compare", tmp_path / "base", tmp_path / "base") == 0
