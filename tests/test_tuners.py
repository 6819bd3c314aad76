"""Every tuner of the installed PEFT is merged as its unmerged model computes, or refused by name and reason."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from torch import Tensor

import exact
import loraweld
from cases import reload_strictly
from loraweld.adapter.tuners import TUNERS, UNMERGEABLE
from loraweld.errors import AdapterError, LoraweldError, MatchError
from models import logits
from tuner_cases import TARGETS, TunerCase, cases, installed, kinds_of, mergeable

BaseFolder = Callable[..., Path]

# On which kinds of layers the tuners of PEFT 0.21 can be merged; "Linear" alone where nothing is said.
KINDS = {
    "ADALORA": {"Linear", "Conv1D", "Conv2d"},
    "BOFT": {"Linear", "Conv2d"},
    "DEFT": {"Linear", "Conv1D"},
    "FOURIERFT": {"Linear", "Conv1D"},
    "FROD": {"Linear", "Conv1D"},
    "GRALORA": {"Linear", "Conv1D"},
    "HIRA": {"Linear", "Conv1D", "Conv2d", "Conv1d", "Embedding"},
    "HRA": {"Linear", "Conv2d"},
    "IA3": {"Linear", "Conv1D", "Conv2d"},
    "LN_TUNING": {"Norm"},
    "LOHA": {"Linear", "Conv2d", "Conv1d"},
    "LOKR": {"Linear", "Conv2d", "Conv1d"},
    "OFT": {"Linear", "Conv2d", "Embedding"},
    "PVERA": {"Linear", "Conv1D"},
    "RANDLORA": {"Linear", "Conv1D"},
    "TINYLORA": {"Linear", "Conv1D", "Embedding"},
    "TRAINABLE_TOKENS": {"Embedding"},
    "UNILORA": {"Linear", "Conv1D"},
    "VBLORA": {"Linear", "Conv1D"},
    "VERA": {"Linear", "Conv1D"},
    "WAVEFT": {"Linear", "Conv1D"},
}
# PEFT merges these in bf16 or rounds the delta to it before the sum: its result is further from the exact one than one
# rounding. They are held to its float32 merge, rounded once, alone.
ROUNDED_TWICE_BY_PEFT = {
    *(
        "ADAMSS",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FROD",
        "GLORA",
        "HIRA",
        "HRA",
        "IA3",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
    ),
    *("PSOFT", "RANDLORA", "ROAD", "SUPERTUNING", "UNILORA", "LORA"),
}
NATIVE = ("ADALORA", "LOHA", "LOKR", "IA3")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """One thread a product, as in a merge; no progress of transformers, no advice of PEFT on training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> BaseFolder:
    """Return a function case -> folder with its base, written at the first call."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder(case: TunerCase, dtype: torch.dtype = torch.float32) -> Path:
        key = (case.model.name, dtype)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(case.model.name)
            case.model.save(folders[key], dtype)
        return folders[key]

    return folder


def no_weight_does_it(case: TunerCase) -> bool:
    """OFT on a convolution: PEFT's own merge is not what its forward computes."""
    return (case.tuner, case.kind) == ("OFT", "Conv2d")


MERGED = [case for case in cases() if not no_weight_does_it(case)]
each_case = pytest.mark.parametrize("case", MERGED, ids=str)


def test_every_tuner_of_peft_is_in_one_of_the_tables() -> None:
    """A tuner that a later PEFT brings is decided on, not refused as unknown."""
    assert {tuner.value for tuner in PeftType} <= TUNERS.keys() | UNMERGEABLE.keys()
    assert not TUNERS.keys() & UNMERGEABLE.keys()


def test_the_cases_cover_every_kind_of_layer_that_peft_merges() -> None:
    """A tuner that could not be attached for a wrong option of ours would drop out of the cases unseen."""
    found = {tuner: set(kinds_of(tuner)) for tuner in mergeable() if installed(tuner)}
    assert found == {tuner: KINDS.get(tuner, {"Linear"}) for tuner in found}


@each_case
def test_logits_equal_those_of_the_unmerged_model(case: TunerCase, base_folder: BaseFolder, tmp_path: Path) -> None:
    """Merged and reloaded without PEFT, a model answers as base + adapter do, within 1e-5 in fp32."""
    base, inputs = base_folder(case), case.model.inputs(96)
    adapter = case.train(base, tmp_path / "adapter")
    expected = logits(case.unmerged(base, adapter), inputs)
    assert (expected - logits(case.load_base(base, torch.float32), inputs)).abs().max() > 1e-3, "does nothing"

    loraweld.merge([adapter], output=tmp_path / "merged", base=base, dtype="float32")

    merged = logits(reload_strictly(case.model.auto, tmp_path / "merged"), inputs)
    assert (merged - expected).abs().max() <= 1e-5


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged_by_peft(model: PeftModel, folder: Path) -> dict[str, Tensor]:
    model.merge_and_unload().save_pretrained(folder)
    return tensors_of(folder)


@each_case
def test_bf16_weights_are_those_of_peft(case: TunerCase, base_folder: BaseFolder, tmp_path: Path) -> None:
    """Within one step of PEFT's bf16 model, widened to fp32, merged and rounded once; of its bf16 merge where that
    rounds once too."""
    base = base_folder(case, torch.bfloat16)
    adapter = case.train(base, tmp_path / "adapter", torch.bfloat16)
    loraweld.merge([adapter], output=tmp_path / "merged", base=base)
    merged, before = tensors_of(tmp_path / "merged"), tensors_of(base)
    widened = merged_by_peft(case.unmerged(base, adapter, torch.bfloat16).float(), tmp_path / "fp32")
    in_bf16 = merged_by_peft(case.unmerged(base, adapter, torch.bfloat16), tmp_path / "bf16")

    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    targets = [name for name in before if _is_target(name, case)]
    assert targets and any(not torch.equal(merged[name], before[name]) for name in targets)
    for name in set(merged) & set(widened):
        if name not in targets:
            assert torch.equal(merged[name], before.get(name, merged[name]))
        _assert_within_one_step(merged[name], widened[name].bfloat16())
        if case.tuner not in ROUNDED_TWICE_BY_PEFT:
            _assert_within_one_step(merged[name], in_bf16[name])


def _is_target(name: str, case: TunerCase) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in TARGETS[case.kind][1]


def _assert_within_one_step(merged: Tensor, expected: Tensor) -> None:
    steps = exact.steps_apart(merged, expected)
    noise = (merged.float() - expected.float()).abs() < 1e-7  # of a float32 sum near 0
    assert torch.where(noise, steps.clamp(max=1), steps).max() <= 1


@pytest.mark.parametrize("case", [case for case in MERGED if case.tuner in NATIVE and case.kind != "Conv2d"], ids=str)
def test_native_formulas_round_the_exact_sum_once(case: TunerCase, base_folder: BaseFolder, tmp_path: Path) -> None:
    """At most 1 weight in 2,000 differs from PEFT's merge in float64, and by one step."""
    base = base_folder(case, torch.bfloat16)
    adapter = case.train(base, tmp_path / "adapter")
    loraweld.merge([adapter], output=tmp_path / "merged", base=base)
    merged, before = tensors_of(tmp_path / "merged"), tensors_of(base)
    in_fp64 = case.unmerged(base, adapter, torch.float32).double().merge_and_unload().state_dict()

    changed = [name for name in merged if name in before and not torch.equal(merged[name], before[name])]
    nearest = {name: exact.rounded(np.asarray(in_fp64[name]), exact.BF16) for name in changed}
    steps = torch.cat([exact.steps_apart(merged[name], nearest[name]).flatten() for name in changed])
    assert steps.max() <= 1
    assert steps.count_nonzero() <= steps.numel() / 2000


def test_oft_on_convolutions_is_refused_as_peft_merges_another_function(
    base_folder: BaseFolder, tmp_path: Path
) -> None:
    """PEFT's forward adds overlapping rotated patches; its merged weight does not, so neither would ours."""
    case = TunerCase(tuner="OFT", kind="Conv2d")
    base, inputs = base_folder(case), case.model.inputs(96)
    adapter = case.train(base, tmp_path / "adapter")
    unmerged = case.unmerged(base, adapter)
    expected = logits(unmerged, inputs)
    assert (logits(unmerged.merge_and_unload(), inputs) - expected).abs().max() > 1e-2
    with pytest.raises(MatchError, match="overlapping patches"):
        loraweld.merge([adapter], output=tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tuner", sorted(UNMERGEABLE))
def test_what_cannot_be_merged_is_refused_by_name_and_reason(
    tuner: str, base_folder: BaseFolder, tmp_path: Path
) -> None:
    """Before anything is written."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"prompt_embeddings": torch.zeros(2, 32)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": tuner}))
    with pytest.raises(AdapterError) as refused:
        loraweld.merge([adapter], output=tmp_path / "merged", base=base_folder(MERGED[0]))
    assert tuner in str(refused.value)
    assert UNMERGEABLE[tuner] in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_unknown_tuner_is_refused_with_those_that_are_known(base_folder: BaseFolder, tmp_path: Path) -> None:
    adapter = MERGED[0].train(base_folder(MERGED[0]), tmp_path / "adapter")
    change_config(adapter, peft_type="TOMORROW")
    with pytest.raises(AdapterError, match=r"TOMORROW, which is not known.*VERA"):
        loraweld.merge([adapter], output=tmp_path / "merged", base=base_folder(MERGED[0]))


def change_config(adapter: Path, **options: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize("tuner", [tuner for tuner in mergeable() if TUNERS[tuner].packages])
def test_a_package_that_peft_needs_for_one_tuner_is_named(
    tuner: str, base_folder: BaseFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdaMSS clusters with scikit-learn; without it the merge is refused while it is planned."""
    hide(monkeypatch, *TUNERS[tuner].packages)
    case = TunerCase(tuner="VERA", kind="Linear")
    adapter = case.train(base_folder(case), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    own = {name.replace("vera_lambda_b", f"{TUNERS[tuner].prefix}b"): t for name, t in tensors.items() if "_b" in name}
    save_file(own, adapter / "adapter_model.safetensors")
    change_config(adapter, peft_type=tuner)
    with pytest.raises(LoraweldError, match=r"sklearn is not installed; pip install 'loraweld\[peft\]' scikit-learn"):
        loraweld.merge([adapter], output=tmp_path / "merged", base=base_folder(case))
    assert not (tmp_path / "merged").exists()


def test_without_peft_the_message_says_what_to_install(
    base_folder: BaseFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formulas of our own need no PEFT; the others name the extra."""
    cases = [TunerCase(tuner="LOHA", kind="Linear"), TunerCase(tuner="VERA", kind="Linear")]
    native, foreign = (case.train(base_folder(case), tmp_path / case.tuner) for case in cases)
    hide(monkeypatch, "peft")
    loraweld.merge([native], output=tmp_path / "merged", base=base_folder(cases[0]))
    with pytest.raises(LoraweldError, match=r"VERA.*peft is not installed; pip install 'loraweld\[peft\]'"):
        loraweld.merge([foreign], output=tmp_path / "other", base=base_folder(cases[1]))
    assert not (tmp_path / "other").exists()


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make `importlib` say that packages are not there."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


DAMAGES = [
    # (tuner, end of a tensor's name to drop or None, name of a tensor to add or None, what the message says)
    ("LOHA", "q_proj.hada_w2_b", None, "hada_w2_b"),
    ("LOKR", "q_proj.lokr_w2", None, "lokr_w2"),
    ("ADALORA", "q_proj.lora_E", None, "lora_E"),
    ("LOHA", None, "model.layers.0.self_attn.q_proj.hada_more", "hada_more"),
    ("VERA", "vera_A", None, "vera_A"),
    ("VERA", "layers.1.self_attn.q_proj.vera_lambda_b", None, "vera_lambda_b"),
    ("HRA", None, "model.layers.0.self_attn.q_proj.hra_more", "hra_more"),
    ("HRA", None, "model.layers.7.self_attn.q_proj.hra_u", "layers.7"),
    ("VBLORA", "vblora_vector_bank", None, "vblora_vector_bank"),
    ("HRA", "layers.1.self_attn.q_proj.hra_u", None, "layers.1.self_attn.q_proj"),
    ("BEFT", "layers.1.self_attn.q_proj.beft_bias", None, "layers.1.self_attn.q_proj"),
]


@pytest.mark.parametrize(("tuner", "dropped", "added", "told"), DAMAGES, ids=str)
def test_every_tensor_is_used_or_the_merge_is_refused(
    tuner: str, dropped: str | None, added: str | None, told: str, base_folder: BaseFolder, tmp_path: Path
) -> None:
    """A tensor too few, of a module or of all, or one too many is named, and no weight is written."""
    case = TunerCase(tuner=tuner, kind="Linear")
    adapter = case.train(base_folder(case), tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(weights).items() if not (dropped and name.endswith(dropped))}
    if added:
        tensors[f"base_model.model.{added}"] = torch.ones(32, 4)
    save_file(tensors, weights)
    with pytest.raises(LoraweldError, match=told):
        loraweld.merge([adapter], output=tmp_path / "merged", base=base_folder(case))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("claimed", ["LORA", "LOHA", "ADALORA", "VERA", "UNILORA"])
def test_tensors_of_another_tuner_are_not_taken_for_its_own(
    claimed: str, base_folder: BaseFolder, tmp_path: Path
) -> None:
    """A config that names the wrong tuner would merge nothing, or nonsense."""
    case = TunerCase(tuner="IA3", kind="Linear")
    adapter = case.train(base_folder(case), tmp_path / "adapter")
    change_config(adapter, peft_type=claimed)
    with pytest.raises(LoraweldError, match=r"q_proj\.ia3_l"):
        loraweld.merge([adapter], output=tmp_path / "merged", base=base_folder(case))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tuner", ["LOHA", "LOKR", "ADALORA", "IA3", "VERA", "BOFT"])
def test_an_adapter_of_another_base_is_refused(tuner: str, base_folder: BaseFolder, tmp_path: Path) -> None:
    """Its tensors fit other shapes; the message names a module, and no weight is written."""
    case = TunerCase(tuner=tuner, kind="Linear")
    adapter = case.train(base_folder(case), tmp_path / "adapter")
    base = tmp_path / "base"
    config = tf.LlamaConfig(
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        attention_bias=True,
    )
    tf.LlamaForCausalLM(config).save_pretrained(base)
    with pytest.raises(LoraweldError, match="_proj"):
        loraweld.merge([adapter], output=tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


def test_frod_without_its_projection_is_refused(base_folder: BaseFolder, tmp_path: Path) -> None:
    case = TunerCase(tuner="FROD", kind="Linear", options={"save_projection": False})
    adapter = case.train(base_folder(case), tmp_path / "adapter")
    with pytest.raises(LoraweldError, match="save_projection"):
        loraweld.merge([adapter], output=tmp_path / "merged", base=base_folder(case))


def test_the_plan_counts_what_peft_holds(base_folder: BaseFolder, tmp_path: Path) -> None:
    """PEFT's layers hold whole weights; the plan counts them, where a formula of our own needs rows alone."""
    wide = TunerCase(tuner="HRA", kind="Linear")
    plans = []
    for tuner in ("HRA", "LOHA"):
        case = TunerCase(tuner=tuner, kind="Linear")
        adapter = case.train(base_folder(case), tmp_path / tuner)
        plans.append(loraweld.plan([adapter], output=tmp_path / "merged", base=base_folder(wide)))
    largest = max(t.numel() for name, t in tensors_of(base_folder(wide)).items() if "_proj.weight" in name)
    assert plans[0].peak_memory_bytes - plans[1].peak_memory_bytes >= 12 * 4 * largest


def test_two_tuners_in_a_row_are_merged_in_their_order(base_folder: BaseFolder, tmp_path: Path) -> None:
    """A formula of our own on top of PEFT's layer is the sum of merging one after the other; the reverse is refused."""
    cases = [TunerCase(tuner="HRA", kind="Linear"), TunerCase(tuner="LOHA", kind="Linear")]
    base = base_folder(cases[0])
    first, second = (case.train(base, tmp_path / case.tuner) for case in cases)
    loraweld.merge([first], output=tmp_path / "one", base=base, dtype="float32")
    loraweld.merge([second], output=tmp_path / "two", base=tmp_path / "one", dtype="float32")
    loraweld.merge([first, second], output=tmp_path / "both", base=base, dtype="float32")
    one_by_one, together = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "both")
    assert all((one_by_one[name] - together[name]).abs().max() <= 1e-6 for name in one_by_one)
    with pytest.raises(LoraweldError, match="such an adapter comes first"):
        loraweld.merge([second, first], output=tmp_path / "reverse", base=base, dtype="float32")


@pytest.mark.parametrize("additive", ["WAVEFT", "C3A"])
def test_tuners_that_add_mix_in_any_order(additive: str, base_folder: BaseFolder, tmp_path: Path) -> None:
    """What PEFT's layer adds to the base is added to what another adapter has made of it."""
    cases = [TunerCase(tuner=additive, kind="Linear"), TunerCase(tuner="LOHA", kind="Linear")]
    base = base_folder(cases[0])
    first, second = (case.train(base, tmp_path / case.tuner) for case in cases)
    for name, adapters in (("one", [first, second]), ("other", [second, first])):
        loraweld.merge(adapters, output=tmp_path / name, base=base, dtype="float32")
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    before = tensors_of(base)
    assert any((one[name] - before[name]).abs().max() > 1e-3 for name in one)
    assert all((one[name] - other[name]).abs().max() <= 1e-6 for name in one)


def test_models_in_memory(base_folder: BaseFolder, tmp_path: Path) -> None:
    """Saved from memory as from files; tensors that PEFT keeps outside the model are refused with the way around."""
    case, shared = TunerCase(tuner="HRA", kind="Linear"), TunerCase(tuner="VBLORA", kind="Linear")
    base = base_folder(case, torch.bfloat16)
    adapters = [one.train(base, tmp_path / one.tuner, torch.bfloat16) for one in (case, shared)]
    loraweld.merge([adapters[0]], output=tmp_path / "files", base=base)
    live = loraweld.attach(case.unmerged(base, adapters[0], torch.bfloat16))
    with pytest.warns(UserWarning, match="tokenizer"):
        live.save_pretrained_merged(str(tmp_path / "memory"), None)
    from_files, from_memory = tensors_of(tmp_path / "files"), tensors_of(tmp_path / "memory")
    assert from_files.keys() == from_memory.keys()
    assert all(torch.equal(from_files[name], from_memory[name]) for name in from_files)

    live = loraweld.attach(shared.unmerged(base, adapters[1], torch.bfloat16))
    with (
        pytest.warns(UserWarning, match="tokenizer"),
        pytest.raises(LoraweldError, match=r"VBLORA, whose layers share tensors.*save_pretrained"),
    ):
        live.save_pretrained_merged(str(tmp_path / "refused"), None)


def test_targets_have_the_layers_they_name() -> None:
    """Each kind of layer is tested on a model that has it."""
    for kind, (_, names) in TARGETS.items():
        model = TunerCase(tuner="LORA", kind=kind).model.build()
        found = {type(m).__name__ for path, m in model.named_modules() if path.rpartition(".")[2] in names}
        assert {name.removeprefix("Llama") for name in found} <= {kind, "RMSNorm"}
