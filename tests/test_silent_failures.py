"""Merges that other tools report as done although the model is wrong: here it is right, or it is refused.

The expected values are computed in float64 from the input files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import loraweld
from fakes import INDEX_NAME, contents, load_folder, save_base
from handmade import (
    DTYPE_NAMES,
    EMBEDDING,
    MODULES,
    Q_PROJ,
    VOCAB,
    assert_nearest,
    delta,
    llama_config,
    llama_tensors,
    lora,
    loras,
    save_adapter,
    save_llama,
)
from processes import kill_halfway

K_PROJ, V_PROJ, DOWN = (MODULES[index] for index in (1, 2, 6))
LAYER_0 = "model.layers.0."
LAYER_1 = "model.layers.1."
TOKENS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"


def on_embedding(num_rows: int) -> dict[str, Tensor]:
    """Return the tensors of a LoRA on an embedding with so many rows."""
    return {
        f"{EMBEDDING}.lora_embedding_A": torch.ones(4, num_rows),
        f"{EMBEDDING}.lora_embedding_B": torch.ones(16, 4),
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def merge(folder: Path, *adapters: Path, base: Path | None = None, **options: Any) -> dict[str, Tensor]:
    """Merge into `folder`/merged and return its tensors, read by another library."""
    loraweld.merge(adapters, output=folder / "merged", base=base or folder / "base", **options)
    return load_folder(folder / "merged")


def merged_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "merged" / "config.json").read_text())
    return config


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return all files with their bytes, and all folders."""
    names = {path.relative_to(folder).as_posix(): None for path in folder.rglob("*")}
    return {**names, **contents(folder)}


def assert_refused(
    folder: Path, *adapters: Path, words: Sequence[str], in_planning: bool = True, **options: Any
) -> None:
    """Check that a merge is refused with a message that has all `words`, and leaves nothing behind.

    `in_planning`: the plan, which writes nothing, is refused with the same message.
    """
    before = everything(folder)
    arguments = {"output": folder / "merged", "base": folder / "base", **options}
    with pytest.raises(loraweld.LoraweldError) as caught:
        loraweld.merge(adapters, **arguments)
    message = str(caught.value)
    assert [word for word in words if word.lower() not in message.lower()] == [], message
    assert everything(folder) == before
    if in_planning:
        with pytest.raises(loraweld.LoraweldError) as planned:
            loraweld.plan(adapters, **arguments)
        assert str(planned.value) == message


def assert_only_changed(merged: Mapping[str, Tensor], base: Mapping[str, Tensor], changed: set[str]) -> None:
    """Check that exactly the tensors `changed` differ from the base, in any bit, and none is lost or new."""
    assert merged.keys() == base.keys()
    same = {name for name in base if merged[name].dtype == base[name].dtype and torch.equal(merged[name], base[name])}
    assert base.keys() - same == changed


# 1. Parts of the adapter that get lost or are applied wrongly

UNMERGEABLE = {
    "lily": ({"peft_type": "LILY"}, ["LILY", "router"]),
    "xlora": ({"peft_type": "XLORA"}, ["XLORA", "classifier"]),
    "unknown-tuner": ({"peft_type": "TOMORROW"}, ["TOMORROW"]),
    "pissa-niter": ({"init_lora_weights": "pissa_niter_16"}, ["pissa_niter_16", "path_initial_model"]),
    "corda": ({"init_lora_weights": "corda"}, ["corda", "path_initial_model"]),
    "loftq": ({"init_lora_weights": "loftq"}, ["loftq", "path_initial_model"]),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, ["lora_ga", "path_initial_model"]),
    "unknown-init": ({"init_lora_weights": "sorcery"}, ["sorcery"]),
    "activated-lora": ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens"]),
    "qalora": ({"use_qalora": True}, ["use_qalora"]),
}


@pytest.mark.parametrize(("config", "words"), UNMERGEABLE.values(), ids=UNMERGEABLE)
def test_adapters_of_other_kinds_are_refused_by_name(config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """Unknown tuners gave the base; LoftQ, CorDA, pissa_niter, lora_ga a merge onto the wrong base: merge,
    or refuse naming the tuner type or the option, with the conversion option."""
    save_llama(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", loras(Q_PROJ), **config)
    assert_refused(tmp_path, adapter, words=[str(adapter), *words])


UNKNOWN = [f"model.blocks.{index}.attn.query" for index in range(30)]
Q_BOTH = loras(Q_PROJ, f"{LAYER_1}self_attn.q_proj")
A_ONLY = {name: tensor for name, tensor in Q_BOTH.items() if "lora_A" in name}
MAGNITUDE = {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(16)}
MISFITS: dict[str, tuple[dict[str, Tensor], dict[str, Any], list[str]]] = {
    "half of the keys do not match any tensor": (
        {**Q_BOTH, **lora(UNKNOWN[0], (16, 16)), **lora(UNKNOWN[1], (16, 16))},
        {},
        UNKNOWN[:2],
    ),
    "many keys do not match: all are listed": (
        {name: tensor for module in UNKNOWN for name, tensor in lora(module, (16, 16)).items()},
        {},
        UNKNOWN,
    ),
    "the config lists a target without tensors": (Q_BOTH, {"target_modules": ["q_proj", "v_proj"]}, ["v_proj"]),
    "the same where layers are chosen": (
        Q_BOTH,
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]},
        ["v_proj"],
    ),
    "the same as a regular expression": (Q_BOTH, {"target_modules": r".*\.(q|v)_proj"}, ["v_proj"]),
    "one layer of a target has no tensors": (loras(Q_PROJ), {}, [f"{LAYER_1}self_attn.q_proj"]),
    "a chosen layer has no tensors": (
        loras(Q_PROJ),
        {"layers_to_transform": [0, 1]},
        [f"{LAYER_1}self_attn.q_proj"],
    ),
    "lora_A without lora_B": (A_ONLY, {}, [Q_PROJ, "lora_B"]),
    "a part of another method": (
        {**Q_BOTH, f"{Q_PROJ}.lora_diag": torch.ones(4)},
        {},
        [f"{Q_PROJ}.lora_diag"],
    ),
    "magnitude, but no use_dora": ({**Q_BOTH, **MAGNITUDE}, {}, [Q_PROJ, "use_dora"]),
    "use_dora, but no magnitude": (Q_BOTH, {"use_dora": True}, [Q_PROJ, "magnitude"]),
    "a rank the config contradicts": (Q_BOTH, {"r": 2}, [Q_PROJ, "rank"]),
    "another MLP width": (
        lora(f"{LAYER_0}mlp.up_proj", (32, 16)),
        {},
        [f"{LAYER_0}mlp.up_proj", "(32, 4)", "(24, 16)"],
    ),
    "another hidden size": (lora(Q_PROJ, (32, 32)), {}, [Q_PROJ, "(16, 16)"]),
    "more layers than the base": (
        lora("model.layers.2.self_attn.q_proj", (16, 16)),
        {},
        ["model.layers.2.self_attn.q_proj"],
    ),
    "lora_bias on a layer that cannot have one": (
        {**Q_BOTH, f"{Q_PROJ}.lora_B.bias": torch.ones(16)},
        {"lora_bias": True},
        [Q_PROJ, "bias"],
    ),
    "a bias the base does not have": (
        {**Q_BOTH, f"{Q_PROJ}.base_layer.bias": torch.ones(16)},
        {"bias": "lora_only"},
        [f"{Q_PROJ}.bias"],
    ),
    "a saved module of another shape": (
        {"model.norm.weight": torch.ones(16, 2)},
        {"modules_to_save": ["norm"]},
        ["model.norm.weight"],
    ),
    "saved norm of another width": (
        {"model.norm.weight": torch.ones(32)},
        {"modules_to_save": ["norm"]},
        ["model.norm.weight", "32", "16"],
    ),
    "trained tokens the config does not name": ({**Q_BOTH, TOKENS: torch.ones(2, 16)}, {}, [EMBEDDING]),
    "fewer trained rows than tokens": (
        {**Q_BOTH, TOKENS: torch.ones(2, 16)},
        {"trainable_token_indices": [3, 5, 7]},
        [EMBEDDING],
    ),
    "a trained token past the vocabulary": (
        {**Q_BOTH, TOKENS: torch.ones(2, 16)},
        {"trainable_token_indices": [3, VOCAB]},
        [EMBEDDING],
    ),
    "tokens in the config, none in the file": (
        Q_BOTH,
        {"trainable_token_indices": [3, 5]},
        ["trainable_token_indices"],
    ),
    "a saved module in the config, none in the file": (
        Q_BOTH,
        {"modules_to_save": ["lm_head"]},
        ["lm_head"],
    ),
}


@pytest.mark.parametrize(("tensors", "config", "words"), MISFITS.values(), ids=MISFITS)
def test_every_adapter_tensor_finds_its_place_or_the_merge_is_refused(
    tensors: dict[str, Tensor], config: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    """Keys that match nothing, targets without tensors, a base of another width: account for every adapter
    tensor, used exactly once, or refuse in planning with the full list."""
    save_llama(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", tensors, **config)
    assert_refused(tmp_path, adapter, words=words)


def test_three_targets_that_the_base_lacks_are_all_named(tmp_path: Path) -> None:
    """3 of 14 LoRA targets absent on disk: refuse, naming the three (and not the other eleven)."""
    absent = [MODULES[2], MODULES[6], MODULES[9]]
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name.removesuffix(".weight") not in absent}
    save_base(tmp_path / "base", tensors, llama_config())
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    assert_refused(tmp_path, adapter, words=absent)
    with pytest.raises(loraweld.MatchError) as caught:
        loraweld.plan(adapter, output=tmp_path / "merged", base=tmp_path / "base")
    assert [module for module in MODULES if module in str(caught.value)] == absent


def test_a_base_whose_packed_weights_are_incomplete_is_refused(tmp_path: Path) -> None:
    """None of the LoRA targets exists on disk (GPTQ/AWQ with `qweight`): decode that format and merge, or refuse."""
    tensors = llama_tensors()
    for module in MODULES:
        rows = tensors.pop(f"{module}.weight").shape[0]
        tensors[f"{module}.qweight"] = torch.ones(2, rows, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.ones(1, rows, dtype=torch.float16)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    save_base(tmp_path / "base", tensors, llama_config(quantization_config=settings))
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    assert_refused(tmp_path, adapter, words=["lacks its zero", "mlp.down_proj.qzeros"])


def test_an_adapter_in_a_named_subfolder_is_merged(tmp_path: Path) -> None:
    """Adapter named other than "default": any name works; the files lie in the subfolder of that name."""
    base = load_folder(save_llama(tmp_path / "base"))
    tensors = loras(Q_PROJ)
    save_adapter(tmp_path / "run" / "tuned", tensors, layers_to_transform=[0])
    merged = merge(tmp_path, tmp_path / "run")
    assert_nearest(merged[f"{Q_PROJ}.weight"], base[f"{Q_PROJ}.weight"].double() + 1.5 * delta(tensors, Q_PROJ))


def test_one_of_two_adapters_side_by_side_must_be_named(tmp_path: Path) -> None:
    """Two adapters, the second one active, the wrong one merged: merge what is named."""
    base = load_folder(save_llama(tmp_path / "base"))
    chosen = lora(Q_PROJ, seed=2)
    save_adapter(tmp_path / "run" / "first", lora(Q_PROJ, seed=1), layers_to_transform=[0])
    second = save_adapter(tmp_path / "run" / "second", chosen, layers_to_transform=[0])
    assert_refused(tmp_path, tmp_path / "run", words=["first", "second"])
    merged = merge(tmp_path, second)
    assert_nearest(merged[f"{Q_PROJ}.weight"], base[f"{Q_PROJ}.weight"].double() + 1.5 * delta(chosen, Q_PROJ))


def two_adapters(folder: Path) -> tuple[tuple[Path, Path], dict[str, Tensor]]:
    """Write two overlapping adapters, the first rsLoRA, in folders of one name; return the scaled sum of deltas."""
    first, second = loras(Q_PROJ, DOWN, rank=4), {**lora(DOWN, seed=8, rank=2), **lora(K_PROJ, seed=9, rank=2)}
    common: dict[str, Any] = {"layers_to_transform": [0]}
    adapters = (
        save_adapter(folder / "one" / "final", first, lora_alpha=6, use_rslora=True, **common),
        save_adapter(folder / "two" / "final", second, lora_alpha=3, alpha_pattern={"down_proj": 5}, **common),
    )
    sums = {Q_PROJ: 3.0 * delta(first, Q_PROJ), K_PROJ: 1.5 * delta(second, K_PROJ)}
    sums[DOWN] = 3.0 * delta(first, DOWN) + 2.5 * delta(second, DOWN)
    return adapters, sums


def test_two_adapters_add_their_deltas_each_with_its_own_scaling(tmp_path: Path) -> None:
    """Only the first of two merged; rsLoRA inherited by the second; A and B summed apart; one name for both:
    merge all, Σ sᵢ Bᵢ Aᵢ, each with its own s and patterns."""
    base = load_folder(save_llama(tmp_path / "base", torch.float32))
    adapters, sums = two_adapters(tmp_path)
    merged = merge(tmp_path, *adapters, dtype="float32")
    assert_only_changed(merged, base, {f"{module}.weight" for module in sums})
    for module, total in sums.items():
        assert_nearest(merged[f"{module}.weight"], base[f"{module}.weight"].double() + total)


@pytest.mark.parametrize("names", [("one/final", "two/final"), ("first", "second")], ids=["same name", "own names"])
def test_two_adapters_that_contradict_each_other_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    """One adapter replaces the tensor that another one edits: no sum is right, whatever the folders are called."""
    save_llama(tmp_path / "base")
    saved = {f"{Q_PROJ}.weight": torch.ones(16, 16), **loras(K_PROJ)}
    one = save_adapter(tmp_path / names[0], saved, modules_to_save=["q_proj"], layers_to_transform=[0])
    two = save_adapter(tmp_path / names[1], loras(Q_PROJ), layers_to_transform=[0])
    assert_refused(tmp_path, one, two, words=[f"{Q_PROJ}.weight"])


def test_two_adapters_that_train_the_same_token_are_refused(tmp_path: Path) -> None:
    """Two adapters active together, one lost: rows of one token cannot be added, and none of them is right."""
    save_llama(tmp_path / "base")
    adapters = [
        save_adapter(tmp_path / name, {TOKENS: torch.full((2, 16), value)}, trainable_token_indices=tokens)
        for name, value, tokens in (("first", 1.0, [3, 5]), ("second", 2.0, [5, 7]))
    ]
    assert_refused(tmp_path, *adapters, words=["first", "second", f"{EMBEDDING}.weight", "5"])


def test_two_adapters_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    """One adapter resized the embedding before it added its delta, the other one did not: no sum fits."""
    save_llama(tmp_path / "base")
    tables = {f"{name}.base_layer.weight": torch.ones(VOCAB + 4, 16) for name in (EMBEDDING, "lm_head")}
    grown = {**tables, **on_embedding(VOCAB + 4), **lora("lm_head", (VOCAB + 4, 16))}
    first = save_adapter(tmp_path / "first", grown, r=4)
    second = save_adapter(tmp_path / "second", on_embedding(VOCAB), r=4)
    for adapters in ((first, second), (second, first)):
        assert_refused(tmp_path, *adapters, words=[f"{EMBEDDING}.weight", str(VOCAB), str(VOCAB + 4)])


@pytest.mark.parametrize(("dtype", "code"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_codes_are_not_taken_for_numbers(dtype: torch.dtype, code: str, tmp_path: Path) -> None:
    """fp8 / uint8 codes taken for numbers: a dtype that needs a scale is never arithmetic input without it."""
    save_llama(tmp_path / "base")
    codes = {name: (tensor * 10).to(dtype) for name, tensor in loras(Q_PROJ).items()}
    adapter = save_adapter(tmp_path / "adapter", codes, layers_to_transform=[0])
    assert_refused(tmp_path, adapter, words=[Q_PROJ, code])


PATTERNS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "rslora": ({"use_rslora": True}, (3.0, 3.0)),
    "a name needs a dot before it": ({"alpha_pattern": {"proj": 40}}, (1.5, 1.5)),
    "by last name": ({"alpha_pattern": {"q_proj": 40}}, (10.0, 10.0)),
    "by path": ({"alpha_pattern": {"layers.1.self_attn.q_proj": 40}}, (1.5, 10.0)),
    "anchored": ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 40}}, (10.0, 1.5)),
    "anchored elsewhere": ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 40}}, (1.5, 1.5)),
    "up to the end of the name": ({"alpha_pattern": {"self_attn": 40}}, (1.5, 1.5)),
    "the first key that matches": ({"alpha_pattern": {r".*\.1\..*": 40, "q_proj": 20}}, (5.0, 10.0)),
    "rank from the pattern": ({"r": 64, "rank_pattern": {"q_proj": 4}}, (1.5, 1.5)),
    "both, rslora": (
        {"r": 64, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}, "use_rslora": True},
        (4.0, 4.0),
    ),
}


@pytest.mark.parametrize(("config", "scalings"), PATTERNS.values(), ids=PATTERNS)
def test_scaling_follows_the_patterns_and_rslora(
    config: dict[str, Any], scalings: tuple[float, float], tmp_path: Path
) -> None:
    """alpha / r hard-coded: alpha / r, or alpha / √r with rsLoRA, after rank_pattern and alpha_pattern, whose
    keys are regular expressions that end where the module name ends."""
    base = load_folder(save_llama(tmp_path / "base", torch.float32))
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH, **{"lora_alpha": 6, **config})
    merged = merge(tmp_path, adapter, dtype="float32")
    for layer, scaling in enumerate(scalings):
        module = f"model.layers.{layer}.self_attn.q_proj"
        exact = base[f"{module}.weight"].double() + scaling * delta(Q_BOTH, module)
        assert_nearest(merged[f"{module}.weight"], exact)


def test_every_tensor_of_a_saved_module_is_replaced(tmp_path: Path) -> None:
    """Biases of a `modules_to_save` module: replace every tensor of the module."""
    names = [f"{Q_PROJ}.bias", f"{K_PROJ}.bias"]
    base = load_folder(save_llama(tmp_path / "base", more={name: torch.ones(16).bfloat16() for name in names}))
    saved = {f"{Q_PROJ}.weight": torch.full((16, 16), 2.0), f"{Q_PROJ}.bias": torch.full((16,), 3.0)}
    adapter = save_adapter(tmp_path / "adapter", {**saved, **loras(V_PROJ)}, modules_to_save=["q_proj"])
    adapter_config(adapter, layers_to_transform=[0])
    merged = merge(tmp_path, adapter)
    assert_only_changed(merged, base, {*saved, f"{V_PROJ}.weight"})
    assert all(torch.equal(merged[name].float(), tensor) for name, tensor in saved.items())


def adapter_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_report_says_for_each_tensor_what_came_from_the_adapter(tmp_path: Path) -> None:
    """Parameters trained outside PEFT, a "merged" folder that is the base: files cannot know, so say what was
    taken from where; what the report does not name is the base's, bit by bit."""
    base = load_folder(save_llama(tmp_path / "base"))
    tensors = {**loras(*MODULES), "model.norm.weight": torch.ones(16)}
    adapter = save_adapter(tmp_path / "adapter", tensors, modules_to_save=["norm"])
    report = loraweld.merge(adapter, output=tmp_path / "merged", base=tmp_path / "base")
    changed = {f"{module}.weight" for module in MODULES} | {"model.norm.weight"}
    assert {line.tensor for line in report.modules} == changed
    assert_only_changed(load_folder(tmp_path / "merged"), base, changed)
    counted = {"edit": len(MODULES), "replace": 1, "copy": len(base) - len(changed)}
    assert report.recipes == counted


def test_a_merge_that_rounding_undoes_is_an_error(tmp_path: Path) -> None:
    """A "merged" folder that is the base: a merge in which no tensor with a non-zero delta changed is an error."""
    base = load_folder(save_llama(tmp_path / "base"))
    tensors = {name: tensor * 1e-6 for name, tensor in Q_BOTH.items()}
    exact = base[f"{Q_PROJ}.weight"].double() + 1.5 * delta(tensors, Q_PROJ)
    assert torch.equal(exact.bfloat16(), base[f"{Q_PROJ}.weight"])
    adapter = save_adapter(tmp_path / "adapter", tensors)
    assert_refused(tmp_path, adapter, words=["float32"], in_planning=False)


def zeroed(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) if part in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_an_adapter_that_changes_nothing_is_told(dtype: str, tmp_path: Path) -> None:
    """An untrained adapter reported as merged: the weights are the base's, and a note says so, also when the same
    merge is compared."""
    base = save_llama(tmp_path / "base", num_files=2)
    adapter = save_adapter(tmp_path / "adapter", zeroed(loras(*MODULES), "lora_B"))
    for was_there in (False, True):
        report = loraweld.merge(adapter, output=tmp_path / "merged", base=base, dtype=dtype)
        assert report.was_there == was_there
        assert [note for note in report.notes if "changes nothing" in note and "adapter" in note]
    merged = load_folder(tmp_path / "merged")
    assert all(torch.equal(merged[name].float(), tensor.float()) for name, tensor in load_folder(base).items())


def test_an_adapter_that_changes_anything_is_not_said_to_change_nothing(tmp_path: Path) -> None:
    """One trained factor, or a tensor saved whole beside untrained factors: no such note."""
    save_llama(tmp_path / "base")
    idle = zeroed(lora(Q_PROJ), "lora_B")
    trained = save_adapter(tmp_path / "trained", {**idle, **lora(DOWN)}, target_modules=[Q_PROJ, DOWN])
    saved = save_adapter(
        tmp_path / "saved",
        {**idle, "model.norm.weight": torch.ones(16)},
        modules_to_save=["norm"],
        target_modules=[Q_PROJ],
    )
    summed = (save_adapter(tmp_path / "idle", idle, target_modules=[Q_PROJ]), trained)
    for number, adapters in enumerate(((trained,), (saved,), summed)):
        report = loraweld.merge(adapters, output=tmp_path / f"out-{number}", base=tmp_path / "base")
        assert "changes nothing" not in " ".join(report.notes)


def test_an_adapter_converted_from_pissa_is_merged_as_it_is(tmp_path: Path) -> None:
    """PiSSA delta added to the unmodified base; converted adapters refused: read what the file is. Converted,
    A' = [A; A₀], B' = [B, -B₀], alpha and rank doubled."""
    base = load_folder(save_llama(tmp_path / "base", torch.float32))
    first, trained = lora(Q_PROJ, seed=1), lora(Q_PROJ, seed=2)
    a, b = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"
    converted = {a: torch.cat([trained[a], first[a]]), b: torch.cat([trained[b], -first[b]], dim=1)}
    config: dict[str, Any] = {"init_lora_weights": True, "layers_to_transform": [0]}
    adapter = save_adapter(tmp_path / "adapter", converted, r=8, lora_alpha=12, **config)
    merged = merge(tmp_path, adapter, dtype="float32")
    exact = base[f"{Q_PROJ}.weight"].double() + 1.5 * (delta(trained, Q_PROJ) - delta(first, Q_PROJ))
    assert_nearest(merged[f"{Q_PROJ}.weight"], exact)


def test_a_float32_adapter_is_not_rounded_before_use(tmp_path: Path) -> None:
    """`low_cpu_mem_usage` with an fp32 adapter: file values exactly; one dtype rule for the output, saved
    modules included."""
    base = load_folder(save_llama(tmp_path / "base"))
    tensors = {name: tensor * 30 for name, tensor in loras(Q_PROJ).items()}
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    norm = torch.linspace(0.9, 1.1, 16)
    adapter = save_adapter(
        tmp_path / "adapter",
        {**tensors, "model.norm.weight": norm},
        modules_to_save=["norm"],
        layers_to_transform=[0],
    )
    merged = merge(tmp_path, adapter)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    stored = base[f"{Q_PROJ}.weight"].double()
    exact = stored + 1.5 * delta(tensors, Q_PROJ)
    assert not torch.equal(exact.bfloat16(), (stored + 1.5 * delta(rounded, Q_PROJ)).bfloat16())
    assert_nearest(merged[f"{Q_PROJ}.weight"], exact)
    assert_nearest(merged["model.norm.weight"], norm.double())


LANGUAGE = "model.language_model.layers.0.self_attn.q_proj"
OLD_LANGUAGE = "language_model.model.layers.0.self_attn.q_proj"
VISION = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
RENAMED = {
    "deepseek_v3 dense, v4": ("deepseek_v3", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate_proj"),
    "deepseek_v3 shared expert, v4": (
        "deepseek_v3",
        "model.layers.0.mlp.shared_experts.up_proj",
        "model.layers.0.mlp.shared_experts.up_proj",
    ),
    "qwen3_next shared expert, v4": (
        "qwen3_next",
        "model.layers.0.mlp.shared_expert.down_proj",
        "model.layers.0.mlp.shared_expert.down_proj",
    ),
    "gpt_neox head, v4": ("gpt_neox", "embed_out", "embed_out"),
    "gpt_neox head, v5": ("gpt_neox", "lm_head", "embed_out"),
    "gemma3 text, v4": ("gemma3", OLD_LANGUAGE, OLD_LANGUAGE),
    "gemma3 text, v5": ("gemma3", LANGUAGE, OLD_LANGUAGE),
    "gemma3 vision, v4": ("gemma3", VISION, VISION),
    "gemma3 vision, v5": ("gemma3", f"model.{VISION}", VISION),
    "llava text, v4": ("llava", OLD_LANGUAGE, OLD_LANGUAGE),
    "llava text, v5": ("llava", LANGUAGE, OLD_LANGUAGE),
    "llava head, v4": ("llava", "language_model.lm_head", "language_model.lm_head"),
    "llava head, v5": ("llava", "lm_head", "language_model.lm_head"),
    "mistral3 text, v5": ("mistral3", LANGUAGE, OLD_LANGUAGE),
    "qwen2_5_vl text, v4": (
        "qwen2_5_vl",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
    ),
    "qwen2_5_vl text, v5": ("qwen2_5_vl", LANGUAGE, "model.layers.0.self_attn.q_proj"),
    "qwen2_5_vl vision, v5": ("qwen2_5_vl", "model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
    "qwen2_vl text, v5": ("qwen2_vl", LANGUAGE, "model.layers.0.self_attn.q_proj"),
    "vit query, v4": (
        "vit",
        "vit.encoder.layer.0.attention.attention.query",
        "vit.encoder.layer.0.attention.attention.query",
    ),
    "vit query, v5": (
        "vit",
        "vit.layers.0.attention.q_proj",
        "vit.encoder.layer.0.attention.attention.query",
    ),
    "mixtral w1 without w3, v4": (
        "mixtral",
        "model.layers.0.block_sparse_moe.experts.0.w1",
        "model.layers.0.block_sparse_moe.experts.0.w1",
    ),
}


@pytest.mark.parametrize(("model_type", "trained", "stored"), RENAMED.values(), ids=RENAMED)
def test_names_of_other_transformers_versions_find_their_tensor(
    model_type: str, trained: str, stored: str, tmp_path: Path
) -> None:
    """Adapters dropped without a word where transformers renamed the layers (DeepSeek-V3, Qwen3-Next, GPT-NeoX,
    Gemma 3, Qwen2.5-VL, LLaVA, Mistral 3, ViT): the old path is the key on disk, the new one is in a table."""
    other = stored.replace("q_proj", "other").replace("query", "other") + ".other"
    base = {f"{stored}.weight": torch.randn(24, 16), f"{other}.weight": torch.randn(24, 16)}
    save_base(tmp_path / "base", base, {"model_type": model_type, "tie_word_embeddings": False})
    tensors = lora(trained, (24, 16))
    merged = merge(tmp_path, save_adapter(tmp_path / "adapter", tensors), dtype="float32")
    assert_only_changed(merged, base, {f"{stored}.weight"})
    assert_nearest(merged[f"{stored}.weight"], base[f"{stored}.weight"].double() + 1.5 * delta(tensors, trained))


PREFIXES = ["", "base_model.model.", "_orig_mod.base_model.model.", "base_model.model._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix or "none")
def test_prefixes_that_wrappers_leave_in_the_keys_are_no_part_of_the_name(prefix: str, tmp_path: Path) -> None:
    """Half of the keys match nothing because a wrapper (PEFT's, that of torch.compile) is in their names."""
    base = load_folder(save_llama(tmp_path / "base", torch.float32))
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES), prefix=prefix)
    merged = merge(tmp_path, adapter, dtype="float32")
    assert_only_changed(merged, base, {f"{module}.weight" for module in MODULES})


def test_a_saved_head_under_its_old_name_replaces_the_stored_one(tmp_path: Path) -> None:
    """v4 LLaVA adapter with modules_to_save lm_head: match in disk-key space."""
    base = {"language_model.lm_head.weight": torch.ones(24, 16), "other.weight": torch.ones(24, 16)}
    save_base(tmp_path / "base", base, {"model_type": "llava", "tie_word_embeddings": False})
    head = torch.randn(24, 16)
    saved = {"language_model.lm_head.weight": head}
    adapter = save_adapter(tmp_path / "adapter", saved, modules_to_save=["lm_head"])
    merged = merge(tmp_path, adapter, dtype="float32")
    assert_only_changed(merged, base, {"language_model.lm_head.weight"})
    assert torch.equal(merged["language_model.lm_head.weight"], head)


def tiny_model(name: str, **more: Any) -> tf.PreTrainedModel:
    """Make a model of a class of transformers for any kind of text model, as small as it gets."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "embedding_size": 8}
    sizes |= {"d_model": 16, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "encoder_layers": 1}
    sizes |= {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model_class = getattr(tf, name)
    return model_class(model_class.config_class(**sizes, **more))


TASK_MODELS = {
    "bert": ("BertForMaskedLM", "BertForSequenceClassification", "query", ["bert.pooler.dense"]),
    "bert with a pooler": ("BertForPreTraining", "BertForSequenceClassification", "query", []),
    "albert": ("AlbertForMaskedLM", "AlbertForSequenceClassification", "query", ["albert.pooler"]),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2ForSequenceClassification", "query_proj", ["pooler.dense"]),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertForSequenceClassification", "q_lin", []),
    "electra": ("ElectraForMaskedLM", "ElectraForSequenceClassification", "query", []),
    "bart": (
        *("BartForConditionalGeneration", "BartForSequenceClassification", "q_proj"),
        ["classification_head.dense", "classification_head.out_proj"],
    ),
}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("base", "task", "target", "missing"), TASK_MODELS.values(), ids=TASK_MODELS)
def test_layers_that_neither_base_nor_adapter_holds_are_named(
    base: str, task: str, target: str, missing: Sequence[str], saved: bool, tmp_path: Path
) -> None:
    """A classifier whose layer below the head is random at every load, without a word: a note names what the class
    of the task misses in the merged files; there is none where modules_to_save has saved it."""
    tiny_model(base).save_pretrained(tmp_path / "base")
    model = getattr(tf, task).from_pretrained(tmp_path / "base")
    names = [layer.removeprefix("bert.").removeprefix("albert.") for layer in missing] if saved else []
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=[target], modules_to_save=names or None)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    report = loraweld.merge(tmp_path / "adapter", output=tmp_path / "merged", base=tmp_path / "base")
    _, loading = getattr(tf, task).from_pretrained(tmp_path / "merged", output_loading_info=True)
    expected = [] if saved else list(missing)
    assert sorted({key.rpartition(".")[0] for key in loading["missing_keys"]}) == expected
    notes = [note for note in report.notes if "neither base nor adapter holds" in note]
    assert len(notes) == bool(expected)
    assert all(layer in note for note in notes for layer in expected)


# 2. Tied embeddings and vocabulary


def test_trained_tokens_with_a_lora_on_the_tied_head_are_untied(tmp_path: Path) -> None:
    """Trainable tokens on the embedding + LoRA on the head, tied: two tensors, untied. In training the head saw
    the trained rows too, with the delta on top."""
    base = load_folder(save_llama(tmp_path / "base", torch.float32, tied=True))
    rows, tensors = torch.randn(2, 16), lora("lm_head")
    adapter = save_adapter(
        tmp_path / "adapter", {**tensors, TOKENS: rows}, trainable_token_indices={"embed_tokens": [3, 5]}
    )
    merged = merge(tmp_path, adapter, dtype="float32")
    table = base[f"{EMBEDDING}.weight"].double()
    table[[3, 5]] = rows.double()
    assert merged_config(tmp_path)["tie_word_embeddings"] is False
    assert_nearest(merged[f"{EMBEDDING}.weight"], table)
    assert_nearest(merged["lm_head.weight"], table + 1.5 * delta(tensors, "lm_head"))


TEXT_LEVELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "set at both": ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "set at the top": ({"tie_word_embeddings": True}, {}),
    "set below": ({}, {"tie_word_embeddings": True}),
    "left to the default": ({}, {}),
}


@pytest.mark.parametrize(("top", "below"), TEXT_LEVELS.values(), ids=TEXT_LEVELS)
def test_an_untied_head_is_untied_at_every_level_of_the_config(
    top: dict[str, Any], below: dict[str, Any], tmp_path: Path
) -> None:
    """Flag `tie_word_embeddings` left true, reload ties again: flag and tensors agree at every level, as
    transformers reads the config."""
    embedding = "language_model.model.embed_tokens.weight"
    base = {embedding: torch.randn(VOCAB, 16), "multi_modal_projector.weight": torch.randn(16, 16)}
    text = {"model_type": "gemma3_text", "vocab_size": VOCAB, "hidden_size": 16, **below}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    save_base(tmp_path / "base", base, {**config, **top})
    tensors = lora("lm_head", (VOCAB, 16))
    merged = merge(tmp_path, save_adapter(tmp_path / "adapter", tensors), dtype="float32")

    (head,) = merged.keys() - base.keys()
    assert head.endswith("lm_head.weight")
    assert torch.equal(merged[embedding], base[embedding])
    assert_nearest(merged[head], base[embedding].double() + 1.5 * delta(tensors, "lm_head"))
    read = tf.AutoConfig.from_pretrained(tmp_path / "merged")
    assert read.tie_word_embeddings is False
    assert read.get_text_config().tie_word_embeddings is False


def tokenizer_json(num_tokens: int) -> str:
    vocabulary = {f"token{i}": i for i in range(num_tokens)}
    return json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tokenizer_that_grew_never_contradicts_the_file(tied: bool, tmp_path: Path) -> None:
    """Vocabulary resized, embeddings not trained: never a config that contradicts the file."""
    base = load_folder(save_llama(tmp_path / "base", tied=tied))
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH)
    (adapter / "tokenizer.json").write_text(tokenizer_json(VOCAB + 6))
    merged = merge(tmp_path, adapter)
    tables = [name for name in base if name in (f"{EMBEDDING}.weight", "lm_head.weight")]
    assert len(tables) == (1 if tied else 2)
    assert merged_config(tmp_path)["vocab_size"] == VOCAB + 6
    for name in tables:
        assert merged[name].shape == (VOCAB + 6, 16)
        assert torch.equal(merged[name][:VOCAB], base[name])
        assert torch.isfinite(merged[name]).all()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "tensors",
    [lora("lm_head"), on_embedding(VOCAB), {**lora("lm_head"), **on_embedding(VOCAB)}],
    ids=["head", "embedding", "both"],
)
def test_a_delta_with_fewer_rows_than_the_tokenizer_is_refused(
    tensors: dict[str, Tensor], tied: bool, tmp_path: Path
) -> None:
    """Vocabulary resized, the LoRA on its tables not: the delta has no values for the new rows; refuse."""
    save_llama(tmp_path / "base", tied=tied)
    adapter = save_adapter(tmp_path / "adapter", tensors, r=4)
    (adapter / "tokenizer.json").write_text(tokenizer_json(VOCAB + 6))
    assert_refused(tmp_path, adapter, words=["tokenizer", str(VOCAB + 6), str(VOCAB)])


def test_a_tokenizer_smaller_than_a_padded_table_changes_nothing(tmp_path: Path) -> None:
    """A vocabulary padded beyond the tokenizer is no contradiction: the table keeps its rows."""
    base = load_folder(save_llama(tmp_path / "base"))
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH)
    (adapter / "tokenizer.json").write_text(tokenizer_json(VOCAB - 7))
    assert_only_changed(
        merge(tmp_path, adapter), base, {f"{module}.weight" for module in MODULES if "q_proj" in module}
    )
    assert merged_config(tmp_path)["vocab_size"] == VOCAB


@pytest.mark.parametrize("grown", [f"{EMBEDDING}.weight", "lm_head.weight"])
def test_an_embedding_and_a_head_of_different_rows_are_refused(grown: str, tmp_path: Path) -> None:
    """Vocabulary resized, one table in the adapter, the other not: refuse, never a config that fits only one."""
    save_llama(tmp_path / "base")
    module = grown.removesuffix(".weight").rpartition(".")[2]
    tensors = {**Q_BOTH, grown: torch.ones(VOCAB + 4, 16)}
    adapter = save_adapter(tmp_path / "adapter", tensors, modules_to_save=[module])
    assert_refused(tmp_path, adapter, words=[f"{EMBEDDING}.weight", "lm_head.weight", str(VOCAB + 4)])


def test_grown_tables_set_the_vocabulary_everywhere(tmp_path: Path) -> None:
    """Vocabulary grew: PEFT raises, others copy the index: take the adapter's shape, set `vocab_size` wherever
    it is read, compute the index from what was written."""
    save_llama(tmp_path / "base", num_files=3, text_config={"vocab_size": VOCAB, "model_type": "llama"})
    tables = {name: torch.randn(VOCAB + 4, 16) for name in (f"{EMBEDDING}.weight", "lm_head.weight")}
    adapter = save_adapter(tmp_path / "adapter", {**Q_BOTH, **tables}, modules_to_save=["embed_tokens", "lm_head"])
    merged = merge(tmp_path, adapter)
    for name, table in tables.items():
        assert_nearest(merged[name], table.double())
    config = merged_config(tmp_path)
    assert (config["vocab_size"], config["text_config"]["vocab_size"]) == (VOCAB + 4, VOCAB + 4)
    assert_index_is_true(tmp_path / "merged")


def assert_index_is_true(folder: Path) -> None:
    """Check the index against the files: every tensor where it says, total_size in bytes of all tensors."""
    index = json.loads((folder / INDEX_NAME).read_text())
    files = sorted(folder.glob("*.safetensors"))
    found = {name: file.name for file in files for name in load_file_names(file)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_folder(folder).values())


def load_file_names(file: Path) -> list[str]:
    """Return the tensors of a file in the order of their data."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


# 5. Numbers, dtypes, metadata, companion files


def large_layer(folder: Path, *, dtype: torch.dtype) -> Tensor:
    """Write a base with one layer large enough to count rounding errors in; return its weight in float64."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    save_base(folder, {"layer.weight": weight}, {"model_type": "llama", "dtype": DTYPE_NAMES[dtype]})
    return weight.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_of_several_deltas_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Delta rounded before the add, or after each adapter: fp32 sum, one rounding."""
    exact = large_layer(tmp_path / "base", dtype=dtype)
    adapters = []
    one_by_one, rounded_before = exact.to(dtype), exact.to(dtype)
    for seed in (1, 2):
        tensors = lora("layer", (96, 128), seed=seed)
        adapters.append(save_adapter(tmp_path / str(seed), tensors))
        exact = exact + 1.5 * delta(tensors, "layer")
        one_by_one = (one_by_one.double() + 1.5 * delta(tensors, "layer")).to(dtype)
        rounded_before = rounded_before + (1.5 * delta(tensors, "layer")).to(dtype)
    for wrong in (one_by_one, rounded_before):
        with pytest.raises(AssertionError):
            assert_nearest(wrong, exact)
    assert_nearest(merge(tmp_path, *adapters)["layer.weight"], exact)


DTYPES = {
    "bf16 stays": (torch.bfloat16, "auto", torch.bfloat16),
    "fp16 stays": (torch.float16, "auto", torch.float16),
    "fp32 becomes bf16": (torch.float32, "auto", torch.bfloat16),
    "fp32 to bf16": (torch.float32, "bfloat16", torch.bfloat16),
    "fp32 to fp16": (torch.float32, "float16", torch.float16),
    "fp32 stays when asked": (torch.float32, "float32", torch.float32),
    "bf16 to fp16": (torch.bfloat16, "float16", torch.float16),
    "bf16 to fp32": (torch.bfloat16, "float32", torch.float32),
    "fp16 to bf16": (torch.float16, "bfloat16", torch.bfloat16),
}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(("stored", "asked", "expected"), DTYPES.values(), ids=DTYPES)
def test_config_and_tensors_have_the_dtype_asked_for(
    stored: torch.dtype, asked: str, expected: torch.dtype, key: str, tmp_path: Path
) -> None:
    """A dtype that was asked for ignored; bf16 shards with "float16" in the config: honour it, config and
    tensors agree at every level, the index too."""
    config = llama_config(text_config={key: DTYPE_NAMES[stored]})
    del config["dtype"]
    save_base(tmp_path / "base", llama_tensors(stored), {**config, key: DTYPE_NAMES[stored]}, num_files=2)
    base = load_folder(tmp_path / "base")
    merged = merge(tmp_path, save_adapter(tmp_path / "adapter", Q_BOTH), dtype=asked)
    assert {tensor.dtype for tensor in merged.values()} == {expected}
    written = merged_config(tmp_path)
    assert (written[key], written["text_config"][key]) == (DTYPE_NAMES[expected], DTYPE_NAMES[expected])
    assert_index_is_true(tmp_path / "merged")
    for name, tensor in base.items():
        exact = tensor.double()
        if "q_proj" in name:
            exact = exact + 1.5 * delta(Q_BOTH, name.removesuffix(".weight"))
        assert_nearest(merged[name], exact)


FLOAT32_NAMES = ("aaa.first.weight", f"{LAYER_0}input_layernorm.weight", f"{Q_PROJ}.bias")


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float16", "float32"])
def test_tensors_kept_in_float32_stay_so(asked: str, tmp_path: Path) -> None:
    """One fp32 tensor met first made a whole model fp32: each tensor keeps its stored dtype unless the user asks,
    and asking is about the main weights, not the few that are kept in float32 on purpose."""
    kept = {name: torch.randn(16, generator=torch.Generator().manual_seed(5)) for name in FLOAT32_NAMES}
    tensors = {FLOAT32_NAMES[0]: kept[FLOAT32_NAMES[0]], **llama_tensors(), **kept}
    config = llama_config()
    del config["dtype"]
    save_base(tmp_path / "base", tensors, config)
    bias = {f"{Q_PROJ}.lora_B.bias": torch.linspace(-1, 1, 16)}
    adapter = save_adapter(tmp_path / "adapter", {**loras(Q_PROJ), **bias}, lora_bias=True, layers_to_transform=[0])
    merged = merge(tmp_path, adapter, dtype=asked)
    main = getattr(torch, asked) if asked != "auto" else torch.bfloat16
    assert {name for name in merged if merged[name].dtype == torch.float32} >= set(FLOAT32_NAMES)
    assert {merged[name].dtype for name in merged if name not in FLOAT32_NAMES} == {main}
    exact_bias = kept[f"{Q_PROJ}.bias"].double() + 1.5 * bias[f"{Q_PROJ}.lora_B.bias"].double()
    assert_nearest(merged[f"{Q_PROJ}.bias"], exact_bias)
    assert all(torch.equal(merged[name], kept[name]) for name in FLOAT32_NAMES[:2])


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    """Overflow to inf is an error that names the tensor and a dtype that would hold it."""
    weight = torch.full((16, 16), 60_000.0)
    save_llama(tmp_path / "base", torch.float16, more={f"{Q_PROJ}.weight": weight.half()})
    large = {name: tensor.abs() * 100 for name, tensor in loras(Q_PROJ).items()}
    adapter = save_adapter(tmp_path / "adapter", large, layers_to_transform=[0])
    assert_refused(tmp_path, adapter, words=[f"{Q_PROJ}.weight", "float16", "bfloat16"], in_planning=False)
    assert torch.isfinite(merge(tmp_path, adapter, dtype="bfloat16")[f"{Q_PROJ}.weight"]).all()


def test_an_untouched_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    """The same for a tensor that no adapter touches and that is only converted."""
    save_llama(tmp_path / "base", more={"model.norm.weight": torch.full((16,), 1e6).bfloat16()})
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH)
    assert_refused(tmp_path, adapter, words=["model.norm.weight", "float16"], in_planning=False, dtype="float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_adapter_is_refused(value: float, tmp_path: Path) -> None:
    """A delta that is no number never reaches a model."""
    save_llama(tmp_path / "base")
    tensors = loras(Q_PROJ)
    tensors[f"{Q_PROJ}.lora_B.weight"][3, 2] = value
    adapter = save_adapter(tmp_path / "adapter", tensors, layers_to_transform=[0])
    assert_refused(tmp_path, adapter, words=[f"{Q_PROJ}.weight", "finite"], in_planning=False)


def test_tensors_that_the_model_class_does_not_load_are_kept(tmp_path: Path) -> None:
    """Base with tensors its class does not load (MTP heads), layers past the last included: copy every tensor."""
    extra = {
        "model.layers.2.self_attn.q_proj.weight": torch.randn(16, 16).bfloat16(),
        "model.layers.2.eh_proj.weight": torch.randn(16, 32).bfloat16(),
        "mtp.layers.0.self_attn.q_proj.weight": torch.randn(16, 16).bfloat16(),
        "mtp.counter": torch.tensor([7]),
    }
    base = load_folder(save_llama(tmp_path / "base", more=extra))
    merged = merge(tmp_path, save_adapter(tmp_path / "adapter", loras(*MODULES)))
    assert_only_changed(merged, base, {f"{module}.weight" for module in MODULES})


BASE_FILES = {
    "LICENSE": b"the licence\n",
    "README.md": b"---\nlicense: other\nlanguage: de\n---\n",
    "generation_config.json": b'{"temperature":0.7}',
    "preprocessor_config.json": b'{"size": 8}',
    "tokenizer.json": tokenizer_json(VOCAB).encode(),
    "tokenizer.model": bytes(range(256)),
    "tokenizer_config.json": b'{"tokenizer_class": "OfTheBase"}',
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"base {{ messages }}\r\n",
    "modeling_custom.py": b"raise SystemExit\n",
    "vision/figure.txt": b"inner",
}
OTHER_WEIGHTS = ("consolidated.safetensors", "pytorch_model.bin", "model-q4.gguf", "original/consolidated.00.pth")
TUNED_FILES = {
    "tokenizer.json": tokenizer_json(VOCAB).replace("token1", "Token1").encode(),
    "tokenizer_config.json": b'{"tokenizer_class": "OfTheAdapter"}',
    "chat_template.jinja": b"tuned",
    "added_tokens.json": b'{"<tool>": 39}',
}
TRAINING_FILES = ("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_companion_files_are_copied_and_those_of_the_adapter_win(tmp_path: Path) -> None:
    """LICENSE, README, processor, chat template, custom code not copied; the adapter's tokenizer ignored; a
    licence made up: all of the base's files, byte for byte, and the adapter's tokenizer files in their place."""
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH)
    write_files(base, {**BASE_FILES, **dict.fromkeys(OTHER_WEIGHTS, b"weights")})
    write_files(adapter, {**TUNED_FILES, **dict.fromkeys(TRAINING_FILES, b"of the training run")})
    report = loraweld.merge(adapter, output=tmp_path / "merged", base=base)
    written = contents(tmp_path / "merged")
    expected = {**BASE_FILES, **TUNED_FILES, "config.json": (base / "config.json").read_bytes()}
    assert {name: written[name] for name in expected if name in written} == expected
    assert written.keys() - expected.keys() == {"model.safetensors", "loraweld.json"}
    assert [name for name in OTHER_WEIGHTS if name.split("/")[0] not in " ".join(report.notes)] == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_files_have_the_mode_that_the_umask_asks_for(umask: int, tmp_path: Path) -> None:
    """Weights readable by the owner only, mode 0600: `0666 & ~umask`, whatever the inputs have."""
    base = save_llama(tmp_path / "base", num_files=3)
    write_files(base, BASE_FILES)
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH)
    for path in [*base.iterdir(), *adapter.iterdir()]:
        path.chmod(0o700 if path.is_dir() else 0o400)
    before = os.umask(umask)
    try:
        loraweld.merge(adapter, output=tmp_path / "merged", base=base)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").rglob("*")}
    assert len(modes) >= len(BASE_FILES) + 5
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o666 & ~umask}
    folders = {mode for path, mode in modes.items() if path.is_dir()} | {(tmp_path / "merged").stat().st_mode & 0o777}
    assert folders == {0o777 & ~umask}


# 6. Arguments, process, interruption


@pytest.mark.parametrize(
    "spelling", ["merged_16bit", "MERGED_16BIT", "merged 16bit", "Merged-16bit", "16bit", " 16 Bit "]
)
def test_spellings_of_a_save_method_mean_the_same(spelling: str, tmp_path: Path) -> None:
    """`save_method="MERGED_16BIT"` wrote weights without config.json: aliases normalised."""
    save_llama(tmp_path / "base")
    merge(tmp_path, save_adapter(tmp_path / "adapter", Q_BOTH), save_method=spelling)
    assert merged_config(tmp_path) == llama_config()


@pytest.mark.parametrize(
    "options",
    [
        {"save_method": "merged_6bit"},
        {"save_method": "bogus"},
        {"save_method": "w4a16"},
        {"quant_type": "nf4"},
        {"skip_modules": ["q_proj"]},
        {"merge_base": "quantised"},
        {"dtype": "int8"},
        {"dtype": ""},
        {"max_shard_size": "5 gigs"},
        {"max_shard_size": 0},
        {"max_memory": "1kB"},
        {"workers": 0},
    ],
    ids=str,
)
def test_other_values_of_options_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """Options accepted and ignored: anything else refused with the option, the value and what is valid."""
    save_llama(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH)
    ((name, value),) = options.items()
    said = "has no effect" if name in ("quant_type", "skip_modules") else str(value)
    assert_refused(tmp_path, adapter, words=[name, said], **options)


@pytest.mark.parametrize("name", ["safe_serialization", "tags", "variant", "state_dict", "maximum_memory_usage"])
def test_options_that_do_not_exist_are_not_swallowed(name: str, tmp_path: Path) -> None:
    """Options accepted and ignored: honour or refuse each."""
    save_llama(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH)
    options: dict[str, Any] = {name: True}
    with pytest.raises(TypeError, match=name):
        loraweld.merge(adapter, output=tmp_path / "merged", base=tmp_path / "base", **options)
    assert not (tmp_path / "merged").exists()


def test_save_method_lora_writes_the_adapter_and_only_the_adapter(tmp_path: Path) -> None:
    """`save_method="lora"` wrote a full merge without config: the adapter, and only the adapter."""
    adapter = save_adapter(tmp_path / "adapter", Q_BOTH, base_model_name_or_path="nowhere/at-all")
    write_files(adapter, {**TUNED_FILES, "optimizer.pt": b"state"})
    loraweld.merge(adapter, output=tmp_path / "merged", save_method="lora")
    written = contents(tmp_path / "merged")
    expected = {name: data for name, data in contents(adapter).items() if name != "optimizer.pt"}
    assert written == expected


SHARD_SIZES = [1, 700, 8_000, "9kB", "20kB", "1GB"]


@pytest.mark.parametrize("size", SHARD_SIZES)
def test_the_shard_size_never_changes_content(size: int | str, tmp_path: Path) -> None:
    """`max_shard_size` close to the base's shard size exported the base: shard size never changes content."""
    limit = size if isinstance(size, int) else {"9kB": 9_000, "20kB": 20_000, "1GB": 10**9}[size]
    base = save_llama(tmp_path / "base", num_files=2)
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    plain = merge(tmp_path, adapter)
    loraweld.merge(adapter, output=tmp_path / "repacked", base=base, max_shard_size=size)
    repacked = load_folder(tmp_path / "repacked")
    assert_only_changed(repacked, plain, set())
    files = sorted((tmp_path / "repacked").glob("*.safetensors"))
    names = [load_file_names(file) for file in files]
    assert all(len(group) == 1 or sum(plain[name].nbytes for name in group) <= limit for group in names)
    if len(files) > 1:
        assert_index_is_true(tmp_path / "repacked")
    else:
        assert files[0].name == "model.safetensors"
        assert not (tmp_path / "repacked" / INDEX_NAME).exists()


def test_a_killed_merge_leaves_no_model_and_continues(tmp_path: Path) -> None:
    """Merge interrupted, the folder loads, wrong; repeated, wrong again; a cache folder counts as done: no
    complete-looking model until it is complete, then the bytes of a merge that was never killed."""
    base = save_llama(tmp_path / "base", num_files=4)
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    loraweld.merge(adapter, output=tmp_path / "whole", base=base)
    kill_halfway([adapter, "--base", base, "-o", tmp_path / "merged"], output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    visible = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert visible == {"base", "adapter", "whole"}
    loraweld.merge(adapter, output=tmp_path / "merged", base=base)
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "whole", "merged"}


def test_merging_twice_gives_the_same_model(tmp_path: Path) -> None:
    """Save twice into the same folder, delta merged twice: the second run gives the same bytes as the first."""
    base = save_llama(tmp_path / "base", num_files=2)
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    before = everything(base), everything(adapter)
    loraweld.merge(adapter, output=tmp_path / "merged", base=base)
    first = contents(tmp_path / "merged")
    loraweld.merge(adapter, output=tmp_path / "merged", base=base)
    assert contents(tmp_path / "merged") == first
    loraweld.merge(adapter, output=tmp_path / "merged", base=base, overwrite=True)
    assert contents(tmp_path / "merged") == first
    assert (everything(base), everything(adapter)) == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-16])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def put_the_base_there(path: Path) -> None:
    path.write_bytes((path.parent.parent / "base" / path.name).read_bytes())


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, put_the_base_there, Path.unlink])
def test_an_existing_output_counts_only_if_it_is_this_merge(damage: Any, tmp_path: Path) -> None:
    """Existing output reused without a check, even truncated; an untargeted tensor corrupt or missing: compare
    every byte with the plan, or refuse, and leave it as it is."""
    save_llama(tmp_path / "base", num_files=2)
    adapter = save_adapter(tmp_path / "adapter", loras(*MODULES))
    merge(tmp_path, adapter)
    damage(tmp_path / "merged" / "model-00002-of-00002.safetensors")
    assert_refused(tmp_path, adapter, words=["merged", "overwrite"], in_planning=False)
    merge(tmp_path, adapter, overwrite=True)
    merge(tmp_path, adapter)


# 7. Cases that stop, but late, unclearly or without need


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """Opaque error after files were written: a LoRA on a grouped convolution mixes the groups, so that no grouped
    weight equals it; refuse in planning, naming the layer."""
    save_base(tmp_path / "base", {"conv.weight": torch.ones(8, 4, 3)}, {"model_type": "any"})
    tensors = {"conv.lora_A.weight": torch.ones(4, 8, 3), "conv.lora_B.weight": torch.ones(8, 2, 1)}
    adapter = save_adapter(tmp_path / "adapter", tensors)
    assert_refused(tmp_path, adapter, words=["conv"])
