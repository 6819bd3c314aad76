"""The way back: the adapter that leads from a base to a tuned model, by loraweld's merge and by PEFT's forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraweld
from cases import as_merged_, reload_strictly, train_
from fakes import PREFIX, contents, load_folder, save_base
from handmade import MODULES, Q_PROJ, delta, llama_config, llama_tensors, loras, save_adapter, save_llama
from loraweld.cli import main
from loraweld.compute import truncated
from loraweld.compute.truncated import truncate
from loraweld.errors import MatchError, NumericsError, OutputError, RequestError
from loraweld.extraction.report import ExtractReport
from models import MODELS, VOCAB, TinyModel, logits, randomise_

BY_NAME = {model.name: model for model in MODELS}
NORM = "model.norm.weight"


def tuned_llama(folder: Path, changes: Mapping[str, Tensor], *, tied: bool = False, **config: Any) -> Path:
    """The Llama of `save_llama` in float32 with changes added to some tensors, or new tensors in their place."""
    tensors = llama_tensors(torch.float32, tied=tied)
    for name, change in changes.items():
        old = tensors.get(name)
        tensors[name] = change if old is None or old.shape != change.shape else old + change
    options = {"tie_word_embeddings": tied, "dtype": "float32", **config}
    return save_base(folder, tensors, llama_config(**options))


def noise(*shape: int, seed: int = 3, std: float = 0.1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def extracted(place: Path, **options: Any) -> ExtractReport:
    return loraweld.extract(base=place / "base", tuned=place / "tuned", output=place / "adapter", **options)


def merged(place: Path) -> dict[str, Tensor]:
    loraweld.merge(place / "adapter", output=place / "again", base=place / "base", dtype="float32")
    return load_folder(place / "again")


def assert_comes_back(place: Path) -> None:
    """The merge has the tensors of the tuned model, within float32 rounding, and says of itself what that does."""
    again = merged(place)
    # Where the base's files leave a prefix out, so does the merge, but not transformers.
    tuned = {
        name if name in again else name.partition(".")[2]: tensor
        for name, tensor in load_folder(place / "tuned").items()
    }
    assert again.keys() == tuned.keys()
    for name, tensor in tuned.items():
        assert again[name].shape == tensor.shape
        assert (again[name].double() - tensor.double()).abs().max() <= 4e-6 * max(1.0, float(tensor.abs().max())), name


# The arithmetic


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 16), (3, 100)])
def test_the_leading_part_is_the_nearest_of_its_rank(shape: tuple[int, int]) -> None:
    """Eckart–Young: the error is what the singular values beyond the rank add up to."""
    matrix = noise(*shape, std=1.0).double()
    values = torch.linalg.svdvals(matrix)
    for rank in range(1, min(shape) + 1):
        found = truncate(matrix, rank=rank)
        error = torch.linalg.matrix_norm(matrix - found.left_NR.double() @ found.right_RC.double()) ** 2
        assert found.left_NR.shape[1] == rank
        assert float(error) == pytest.approx(float(values[rank:].square().sum()), rel=1e-5, abs=1e-9)
        assert found.squared_kept == pytest.approx(float(values[:rank].square().sum()), rel=1e-9)
        assert found.squared_norm == pytest.approx(float(values.square().sum()), rel=1e-9)


@pytest.mark.parametrize("shape", [(700, 900), (1200, 640)])
def test_sampling_finds_what_the_exact_decomposition_finds(shape: tuple[int, int]) -> None:
    """A slowly falling spectrum, the hard case: at most 0.1 % more error than the best; the same bits again."""
    rows, cols = shape
    count = min(shape)
    u, v = (torch.linalg.qr(noise(size, count, seed=size, std=1.0).double()).Q for size in shape)
    values = torch.arange(1, count + 1).double() ** -0.5
    matrix = ((u * values) @ v.T).float()
    assert truncated.working_dtype(rows, cols, 16) == torch.float32
    found, again = truncate(matrix, rank=16), truncate(matrix, rank=16)
    error = torch.linalg.matrix_norm(matrix.double() - found.left_NR.double() @ found.right_RC.double())
    best = torch.linalg.vector_norm(values[16:])
    assert best * (1 - 1e-6) <= error <= best * 1.001
    assert found.squared_norm - found.squared_kept == pytest.approx(float(error) ** 2, rel=1e-4)
    assert torch.equal(found.left_NR, again.left_NR)
    assert torch.equal(found.right_RC, again.right_RC)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.63, 1), (0.65, 2), (0.95, 2), (0.97, 3), (1.0, 3)])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy: float, rank: int) -> None:
    """The squares of the singular values are 64, 32 and 4 of 100; zeros are never taken, and rank is the limit."""
    matrix = torch.zeros(6, 5, dtype=torch.float64)
    matrix[0, 1], matrix[3, 0], matrix[2, 2] = 8, -(32**0.5), 2
    assert truncate(matrix, rank=5, energy=energy).left_NR.shape[1] == rank
    assert truncate(matrix, rank=1, energy=energy).left_NR.shape[1] == 1


# Round trips


def train_adapter(model: TinyModel, base: Path, folder: Path, **options: Any) -> None:
    """A PEFT adapter with noise in it, for the linear layers of the model."""
    torch.manual_seed(5)
    peft = get_peft_model(model.auto.from_pretrained(base), LoraConfig(target_modules=list(model.linears), **options))
    train_(peft)
    peft.save_pretrained(folder)


ROUND_TRIPS = [
    "llama",
    "qwen3",
    "phi3",
    "gpt2",
    "opt",
    "bert",
    "t5",
    "whisper",
    "gpt2-without-prefix",
    "bert-old-norms",
]


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_merge_extract_merge_comes_back(name: str, tmp_path: Path) -> None:
    """An adapter of rank 4 is found again, at rank 4, from what its merge has changed, and PEFT loads it."""
    model = BY_NAME[name]
    model.save(tmp_path / "base")
    train_adapter(model, tmp_path / "base", tmp_path / "trained", r=4, lora_alpha=6)
    loraweld.merge(tmp_path / "trained", output=tmp_path / "tuned", base=tmp_path / "base", dtype="float32")
    report = extracted(tmp_path, rank=4)
    trained = {key.partition(".lora_")[0] for key in load_file(tmp_path / "trained" / "adapter_model.safetensors")}
    assert {PREFIX + module.module for module in report.modules} == trained
    assert report.kept > 1 - 1e-9
    assert report.saved == ()
    assert_comes_back(tmp_path)
    assert_peft_agrees(model, tmp_path)


def assert_peft_agrees(model: TinyModel, place: Path, *, auto: Any = None) -> None:
    """PEFT loads the adapter, all of it, and computes with it what the tuned and the merged model compute."""
    auto = auto or model.auto
    base = auto.from_pretrained(place / "base").eval()
    inputs = model.inputs(VOCAB)
    before = logits(base, inputs)
    peft = as_merged_(PeftModel.from_pretrained(base, place / "adapter"), ("default",))
    state, stored = peft.state_dict(), load_file(place / "adapter" / "adapter_model.safetensors")
    held = {key.replace(".default", "").replace("modules_to_save.", ""): value for key, value in state.items()}
    for key, tensor in stored.items():
        assert torch.equal(held[key].float(), tensor.float()), key
    found = logits(peft, inputs)
    for folder in ("tuned", "again"):
        assert (logits(reload_strictly(auto, place / folder), inputs) - found).abs().max() <= 3e-5
    assert (before - found).abs().max() > 1e-3


FULL = ["llama", "qwen3", "gpt2", "bert", "t5", "whisper", "vit", "gpt2-without-prefix"]


@pytest.mark.parametrize("name", FULL)
def test_a_model_trained_in_full_comes_back_at_full_rank(name: str, tmp_path: Path) -> None:
    """Every parameter has changed, tied and convolutions too: weights by LoRA, the rest whole, nothing lost."""
    model = BY_NAME[name]
    model.save(tmp_path / "base")
    torch.manual_seed(9)
    tuned = model.auto.from_pretrained(tmp_path / "base")
    for parameter in tuned.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "tuned")
    report = extracted(tmp_path, rank=1000)
    assert report.unchanged == 0
    assert report.kept > 1 - 1e-9
    kinds = {module.kind for module in report.modules}
    assert ("conv1d" in kinds) == name.startswith("gpt2")
    assert ("conv" in kinds) == (name == "whisper")  # ViT's is in a module that is saved whole
    assert ("embedding" in kinds) == (name != "vit")
    assert_comes_back(tmp_path)
    assert_peft_agrees(model, tmp_path)


def test_bfloat16_models_come_back_but_for_their_rounding(tmp_path: Path) -> None:
    """What bfloat16 has rounded away is no low rank: the merge differs from the model by what the report says."""
    base = save_llama(tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(tmp_path / "trained", loras(*MODULES))
    loraweld.merge(adapter, output=tmp_path / "tuned", base=base)
    report = extracted(tmp_path, rank=4)
    old, tuned, again = load_folder(base), load_folder(tmp_path / "tuned"), merged(tmp_path)
    for module in report.modules:
        name = f"{module.module}.weight"
        change, error = (tuned[name].double() - t[name].double() for t in (old, again))
        share = float(error.square().sum() / change.square().sum())
        assert 1 - module.kept == pytest.approx(share, rel=1e-3)
        assert 0 < share < 1e-3
    assert {f"{module.module}.weight" for module in report.modules} == {
        name for name in old if not torch.equal(old[name], tuned[name])
    }


@pytest.mark.parametrize("method", ["merged_4bit", "merged_8bit", "merged_fp8"])
def test_a_quantised_base_is_decoded(method: str, tmp_path: Path) -> None:
    """The change is that from the numbers the codes stand for, so that the merge into them comes to the tuned model."""
    plain = save_llama(tmp_path / "plain", torch.float32)
    loraweld.merge(
        save_adapter(tmp_path / "head", loras("lm_head")), output=tmp_path / "base", base=plain, save_method=method
    )
    tuned_llama(tmp_path / "tuned", {})
    report = extracted(tmp_path, rank=1000)
    assert {module.module for module in report.modules} >= set(MODULES)
    assert_comes_back(tmp_path)


def test_both_may_be_quantised(tmp_path: Path) -> None:
    """Two 8-bit models: the change between their decoded weights, where it is largest by far."""
    plain = save_llama(tmp_path / "plain", torch.float32)
    for name, modules in (("base", ["lm_head"]), ("tuned", ["lm_head", Q_PROJ])):
        adapter = save_adapter(tmp_path / f"to-{name}", loras(*modules), target_modules=modules)
        loraweld.merge(adapter, output=tmp_path / name, base=plain, save_method="merged_8bit")
    report = extracted(tmp_path, rank=16)
    assert [module.module for module in report.modules] == [Q_PROJ]
    again = merged(tmp_path)
    change = 1.5 * delta(loras("lm_head", Q_PROJ), Q_PROJ)
    error = again[f"{Q_PROJ}.weight"].double() - decoded_by_hand(tmp_path / "base") - change
    assert error.norm() < 0.05 * change.norm()
    assert (again[f"{Q_PROJ}.weight"].double() - decoded_by_hand(tmp_path / "tuned")).abs().max() < 1e-6


def decoded_by_hand(folder: Path) -> Tensor:
    """LLM.int8: codes times the largest magnitude of their row over 127, in the dtype of the rest of the model."""
    stored = load_folder(folder)
    codes, largest = stored[f"{Q_PROJ}.weight"].double(), stored[f"{Q_PROJ}.SCB"].double()
    return (codes * largest[:, None] / 127).to(stored[NORM].dtype).double()


def test_ranks_differ_where_energy_says_so(tmp_path: Path) -> None:
    """Two modules of ranks 2 and 5 and one in which a direction stands out: patterns that PEFT and the merge follow."""
    save_llama(tmp_path / "base", torch.float32)
    small = loras(MODULES[1], rank=2) | {k: v for k, v in loras(MODULES[8], rank=5).items()}
    changes = {f"{module}.weight": delta(small, module).float() for module in (MODULES[1], MODULES[8])}
    big = torch.outer(noise(16, seed=8), noise(16, seed=9))
    changes[f"{Q_PROJ}.weight"] = 100 * big + noise(16, 16, std=1e-3)
    tuned_llama(tmp_path / "tuned", changes)
    report = extracted(tmp_path, rank=8, energy=0.9999)
    assert {module.module: module.rank for module in report.modules} == {Q_PROJ: 1, MODULES[1]: 2, MODULES[8]: 5}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted([Q_PROJ, MODULES[1], MODULES[8]])
    assert config["rank_pattern"] == config["alpha_pattern"]
    peft = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ranks = {name: m.r["default"] for name, m in peft.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {name: rank for name, rank in ranks.items()} == {Q_PROJ: 1, MODULES[1]: 2, MODULES[8]: 5}
    assert report.kept >= 0.9999
    assert merged(tmp_path).keys() == load_folder(tmp_path / "tuned").keys()


def test_a_rank_that_is_too_small_is_said(tmp_path: Path) -> None:
    """Noise has no low rank: --energy cannot be reached, and the report says in how many modules."""
    save_llama(tmp_path / "base", torch.float32)
    tuned_llama(tmp_path / "tuned", {f"{Q_PROJ}.weight": noise(16, 16)})
    report = extracted(tmp_path, rank=2, energy=0.99)
    assert report.modules[0].rank == 2
    assert any("rank 2 does not reach 99.00% of the change in 1 of 1 modules" in note for note in report.notes)


# What no low rank expresses


def test_norms_biases_and_heads_are_kept_whole(tmp_path: Path) -> None:
    """A changed norm is a module to save; a bias is replaced alone, so that the weight beside it has a low rank."""
    torch.manual_seed(2)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False))
    randomise_(base)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        layer = base.model.layers[1]
        layer.self_attn.q_proj.weight += torch.outer(noise(32, seed=1), noise(32, seed=2)) * 10
        layer.self_attn.q_proj.bias += 0.3
        layer.self_attn.v_proj.bias += 0.2
        layer.input_layernorm.weight += 0.4
    base.save_pretrained(tmp_path / "tuned")
    report = extracted(tmp_path, rank=1)
    path = "model.layers.1."
    assert [(module.module, module.rank) for module in report.modules] == [(f"{path}self_attn.q_proj", 1)]
    assert {(saved.parameter, saved.how) for saved in report.saved} == {
        (f"{path}input_layernorm.weight", "modules_to_save"),
        (f"{path}self_attn.q_proj.bias", "bias"),
        (f"{path}self_attn.v_proj.bias", "bias"),
    }
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert f"{PREFIX}{path}input_layernorm.weight" in stored
    assert f"{PREFIX}{path}self_attn.q_proj.base_layer.bias" in stored
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [f"{path}input_layernorm"]
    assert config["bias"] == "all"
    assert_comes_back(tmp_path)
    assert_peft_agrees(BY_NAME["llama"], tmp_path)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_vocabulary_is_kept_whole(tied: bool, tmp_path: Path) -> None:
    """Embedding and head of another size; tied ones are one again after the merge, with the new vocab_size."""
    save_llama(tmp_path / "base", torch.float32, tied=tied)
    changes = {"model.embed_tokens.weight": noise(43, 16), f"{Q_PROJ}.weight": noise(16, 16)}
    if not tied:
        changes["lm_head.weight"] = noise(43, 16, seed=4)
    tuned_llama(tmp_path / "tuned", changes, tied=tied, vocab_size=43)
    report = extracted(tmp_path)
    assert {saved.parameter for saved in report.saved} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert any("resize_token_embeddings(43)" in note for note in report.notes)
    assert_comes_back(tmp_path)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (43, tied)


@pytest.mark.parametrize("parts", [("embed",), ("head",), ("embed", "head")], ids="+".join)
def test_a_model_that_was_untied_comes_back_untied(parts: tuple[str, ...], tmp_path: Path) -> None:
    """The base ties embedding and head, the tuned model has changed one of them, or each in its own way."""
    save_llama(tmp_path / "base", torch.float32, tied=True)
    shared = llama_tensors(torch.float32)["model.embed_tokens.weight"]
    embed = shared + noise(40, 16, seed=1) * ("embed" in parts)
    head = shared + noise(40, 16, seed=2) * ("head" in parts)
    tuned_llama(tmp_path / "tuned", {"model.embed_tokens.weight": embed - shared, "lm_head.weight": head - shared})
    overwrite = {**load_folder(tmp_path / "tuned"), "model.embed_tokens.weight": embed, "lm_head.weight": head}
    save_file(overwrite, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    report = extracted(tmp_path, rank=16)
    assert len(report.modules) == len(parts)
    assert_comes_back(tmp_path)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_embedding_stays_tied(tmp_path: Path) -> None:
    """One change under both names: the merge finds them equal, and PEFT's forward has it on both sides."""
    model = BY_NAME["llama"]
    model.save(tmp_path / "base")
    tuned = model.auto.from_pretrained(tmp_path / "base")
    tuned.get_input_embeddings().weight.data.add_(torch.outer(noise(VOCAB), noise(32, seed=5)) * 5)
    tuned.save_pretrained(tmp_path / "tuned")
    report = extracted(tmp_path, rank=1)
    assert [(module.module, module.kind) for module in report.modules] == [
        ("model.embed_tokens", "embedding"),
        ("lm_head", "linear"),
    ]
    assert_comes_back(tmp_path)
    assert_peft_agrees(model, tmp_path)


def test_a_convolution_alone_has_a_low_rank(tmp_path: Path) -> None:
    """ViT's patches: factors of four dimensions, which PEFT's convolution takes."""
    model = BY_NAME["vit"]
    model.save(tmp_path / "base")
    tuned = model.auto.from_pretrained(tmp_path / "base")
    weight = next(p for name, p in tuned.named_parameters() if name.endswith("projection.weight"))
    weight.data.add_(torch.outer(noise(32), noise(48, seed=6)).reshape(weight.shape) * 10)
    tuned.save_pretrained(tmp_path / "tuned")
    report = extracted(tmp_path, rank=1)
    assert [(module.kind, module.rank) for module in report.modules] == [("conv", 1)]
    assert report.kept > 1 - 1e-6
    assert_comes_back(tmp_path)
    assert_peft_agrees(model, tmp_path)


# What is refused


def test_whole_parameters_can_be_refused_by_name(tmp_path: Path) -> None:
    """Without modules_to_save, what has no low rank ends the extraction before anything is written."""
    save_llama(tmp_path / "base", torch.float32)
    tuned_llama(tmp_path / "tuned", {f"{Q_PROJ}.weight": noise(16, 16), NORM: noise(16)})
    with pytest.raises(MatchError, match=r"model\.norm[\s\S]*--no-modules-to-save"):
        extracted(tmp_path, modules_to_save=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_models_that_do_not_fit_are_refused_with_a_list(tmp_path: Path) -> None:
    """Parameters that one side lacks and shapes that differ: all of them are named."""
    save_llama(tmp_path / "base", torch.float32, more={"model.layers.0.extra.weight": noise(4, 4)})
    tuned_llama(tmp_path / "tuned", {f"{Q_PROJ}.weight": noise(16, 12), "model.other.weight": noise(3, 3)})
    with pytest.raises(MatchError) as refused:
        extracted(tmp_path)
    for line in (
        "model.layers.0.extra.weight: only the base has it",
        "model.other.weight: only the tuned model has it",
        f"{Q_PROJ}.weight: is (16, 16) in the base and (16, 12) in the tuned model",
    ):
        assert line in str(refused.value)


def test_old_tables_are_no_parameters(tmp_path: Path) -> None:
    """Older checkpoints hold rotary frequencies, newer ones do not."""
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": noise(4)}
    save_llama(tmp_path / "base", torch.float32, more=table)
    tuned_llama(tmp_path / "tuned", {f"{Q_PROJ}.weight": noise(16, 16)})
    assert [module.module for module in extracted(tmp_path).modules] == [Q_PROJ]


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
ODD = {
    "equal": ({}, "no linear layer of"),
    "only-a-norm": ({NORM: noise(16)}, "no linear layer of"),
    "expert": ({EXPERT: noise(4, 6)}, EXPERT),
    "beside-layers": ({"model.scale": noise(4)}, r"model\.scale.*would save all the layers"),
    "of-no-module": ({"scale": noise(4)}, "belongs to no module"),
    "integers": ({"model.table": torch.arange(4)}, "stored as I64"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_no_adapter_can_hold_is_refused(case: str, tmp_path: Path) -> None:
    """Nothing to extract, experts, parameters of no module, and what is no float: by name, and nothing is written."""
    changes, words = ODD[case]
    more = {name: torch.zeros_like(t) for name, t in changes.items() if name != NORM}
    save_llama(tmp_path / "base", torch.float32, more=more)
    tuned_llama(tmp_path / "tuned", changes)
    with pytest.raises(MatchError, match=words):
        extracted(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_another_config_is_said(tmp_path: Path) -> None:
    """What the tuned model has in its config does not come back with an adapter."""
    save_llama(tmp_path / "base", torch.float32, rope_theta=1e4, use_cache=True)
    tuned_llama(tmp_path / "tuned", {f"{Q_PROJ}.weight": noise(16, 16)}, rope_theta=1e6, use_cache=False)
    (note,) = extracted(tmp_path).notes
    assert note.endswith("these are not the base's: rope_theta")


def test_infinite_weights_are_named(tmp_path: Path) -> None:
    """A damaged model gives no adapter, and leaves nothing staged."""
    save_llama(tmp_path / "base", torch.float32)
    broken = torch.zeros(16, 16)
    broken[3, 4] = torch.inf
    tuned_llama(tmp_path / "tuned", {f"{Q_PROJ}.weight": broken})
    with pytest.raises(NumericsError, match=Q_PROJ):
        extracted(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": -1}, {"energy": 0.0}, {"energy": 1.5}])
def test_options_out_of_range_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """Ranks start at 1, shares lie above 0 and up to 1; nothing is opened."""
    with pytest.raises(RequestError, match=next(iter(options))):
        extracted(tmp_path, **options)


# Commands and the output's place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a base and a model tuned from it by rank 2 in one layer."""
    save_llama(tmp_path / "base", torch.float32)
    tuned_llama(tmp_path / "tuned", {f"{Q_PROJ}.weight": delta(loras(Q_PROJ, rank=2), Q_PROJ).float()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(line: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(line.split())
    assert type(exited.value.code) is int
    return exited.value.code


EXTRACT = "extract --base base --tuned tuned --rank 2 -o adapter"


def test_the_command_writes_and_reports(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People get lines, programs JSON, `--quiet` nothing; each time the same files."""
    assert command(EXTRACT) == 0
    shown = capsys.readouterr()
    assert "1 modules of rank 2" in shown.out
    assert "100.00%" in shown.out
    first = contents(place / "adapter")
    assert command(f"{EXTRACT} --json --overwrite") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kept"] == pytest.approx(1.0)
    assert [module["module"] for module in report["modules"]] == [Q_PROJ]
    assert report["modules"][0]["norm"] == pytest.approx(float(delta(loras(Q_PROJ, rank=2), Q_PROJ).norm()), rel=1e-6)
    assert command(f"{EXTRACT} --quiet --overwrite") == 0
    assert tuple(capsys.readouterr()) == ("", "")
    assert contents(place / "adapter") == first
    assert sorted(path.name for path in place.iterdir()) == ["adapter", "base", "tuned"]
    assert command("merge adapter -o again --dtype float32") == 0


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    """The same adapter, byte for byte, also where the decomposition is a sampled one; the setting is put back."""
    size = 600
    weight = noise(size, size)
    for name, change in (("base", 0.0), ("tuned", 0.01)):
        tensors = {"model.layers.0.q_proj.weight": weight + change * noise(size, size, seed=5)}
        save_base(tmp_path / name, tensors, {"model_type": "llama"})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            extracted(tmp_path, rank=8, overwrite=True)
            assert torch.get_num_threads() == threads
            found.append(contents(tmp_path / "adapter"))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_an_output_that_is_there_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --overwrite a folder with something in it stays as it is; an input is never the output."""
    (place / "adapter").mkdir()
    (place / "adapter" / "note").write_text("mine")
    assert command(EXTRACT) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert contents(place / "adapter") == {"note": b"mine"}
    assert command("extract --base base --tuned tuned -o tuned --overwrite") == 1
    assert "is the input" in capsys.readouterr().err
    assert command(f"{EXTRACT} --energy 2") == 2
    assert command(f"{EXTRACT} --overwrite") == 0
    assert sorted(contents(place / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_failed_write_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the output is written: one message, an old adapter stays, nothing is left behind."""
    extracted(place)
    before = contents(place)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", str(place / "adapter"))

    monkeypatch.setattr("loraweld.sinks.system.write_at", full)
    with pytest.raises(OutputError, match="No space left"):
        extracted(place, overwrite=True)
    assert contents(place) == before


def test_an_interrupt_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 130, and what was staged is gone: there is nothing to continue."""

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loraweld.extraction.extract.truncate", interrupted)
    assert command(EXTRACT) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == ["base", "tuned"]


def test_the_tokenizer_of_the_tuned_model_goes_along(place: Path) -> None:
    """A merge of the adapter then ships it, as it does with adapters that were trained."""
    (place / "tuned" / "chat_template.jinja").write_text("{{ messages }}")
    extracted(place)
    assert (place / "adapter" / "chat_template.jinja").read_text() == "{{ messages }}"
