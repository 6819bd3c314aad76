"""LoRA on mixtures of experts: fused in memory, fused or one by one on disk, in either orientation."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraweld
from models import GATED, HIDDEN, logits, randomise_, token_ids

MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Build = Callable[[], tf.PreTrainedModel]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()


def qwen3_moe() -> tf.PreTrainedModel:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GATED, **MOE, mlp_only_layers=[], head_dim=8))


def qwen2_moe() -> tf.PreTrainedModel:
    shared = {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**GATED, **MOE, **shared))


def mixtral() -> tf.PreTrainedModel:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2))


def deepseek_v3() -> tf.PreTrainedModel:
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    lora = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    options = {**GATED, "num_key_value_heads": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**options, **sizes, **lora))


def gpt_oss() -> tf.PreTrainedModel:
    options = {**GATED, "intermediate_size": 40, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**options, layer_types=["full_attention"] * 2))


def square_gpt_oss() -> tf.PreTrainedModel:
    options = {**GATED, "intermediate_size": HIDDEN, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**options, layer_types=["full_attention"] * 2))


def llama4() -> tf.PreTrainedModel:
    options = {**GATED, "intermediate_size": 24, "intermediate_size_mlp": 40, "head_dim": 8, "num_local_experts": 4}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**options, num_experts_per_tok=1))


def granitemoe() -> tf.PreTrainedModel:
    return tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**GATED, num_local_experts=4, num_experts_per_tok=2))


def qwen3_vl_moe() -> tf.PreTrainedModel:
    text = {
        **GATED,
        **MOE,
        "head_dim": 8,
        "mlp_only_layers": [],
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": HIDDEN}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision))


LLAMA4 = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
GRANITE = ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]
MODELS: dict[str, tuple[Build, list[str]]] = {
    "qwen3_moe": (qwen3_moe, BOTH),
    "qwen2_moe": (qwen2_moe, BOTH),
    "mixtral": (mixtral, BOTH),
    "deepseek_v3": (deepseek_v3, BOTH),
    "gpt_oss": (gpt_oss, BOTH),
    "square_gpt_oss": (square_gpt_oss, BOTH),
    "llama4": (llama4, LLAMA4),
    "granitemoe": (granitemoe, GRANITE),
    "qwen3_vl_moe": (qwen3_vl_moe, BOTH),
}


def write_base(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(zlib.crc32(name.encode()))
    model = MODELS[name][0]().eval()
    randomise_(model)
    for parameter in model.parameters():  # three-dimensional: of experts
        if parameter.ndim == 3:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def auto_of(name: str) -> Any:
    return tf.AutoModelForImageTextToText if name == "qwen3_vl_moe" else tf.AutoModelForCausalLM


def trained(name: str, base: Path, folder: Path, **options: Any) -> PeftModel:
    """Return base + a random adapter, which is saved to `folder`."""
    model = auto_of(name).from_pretrained(base).eval()
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options})).eval()
    torch.manual_seed(5)
    for key, parameter in peft.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    peft.save_pretrained(folder)
    return peft


def inputs() -> dict[str, Tensor]:
    return {"input_ids": token_ids(96)}


def check(name: str, peft: PeftModel, base: Path, adapter: Path, out: Path, **options: Any) -> None:
    """Merged and reloaded, the model answers as the unmerged one."""
    expected = logits(peft, inputs())
    with peft.disable_adapter():
        assert (expected - logits(peft, inputs())).abs().max() > 1e-2, "the adapter does nothing"
    loraweld.merge(adapter, output=out, base=base, dtype="float32", **options)
    merged, info = auto_of(name).from_pretrained(out, output_loading_info=True)
    assert not {kind: keys for kind, keys in info.items() if keys}
    assert (logits(merged.eval(), inputs()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("which", ["both", "first", "second"])
@pytest.mark.parametrize("name", list(MODELS))
def test_parameters_of_experts(name: str, which: str, tmp_path: Path) -> None:
    """One parameter or both, which PEFT wraps one into the other."""
    targets = {"both": MODELS[name][1], "first": MODELS[name][1][:1], "second": MODELS[name][1][1:]}[which]
    base = write_base(name, tmp_path / "base")
    peft = trained(
        name,
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "o_proj"][:1] if name != "deepseek_v3" else ["o_proj"],
        target_parameters=targets,
    )
    check(name, peft, base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # which PEFT itself has put there
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen2_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("deepseek_v3", ["o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen3_moe", ["gate"]),
    ],
)
def test_names_of_modules_that_became_parameters(name: str, targets: list[str], tmp_path: Path) -> None:
    """PEFT turns the names of each expert's layers into parameters, the router's and the shared experts' among them."""
    base = write_base(name, tmp_path / "base")
    peft = trained(name, base, tmp_path / "adapter", target_modules=targets)
    check(name, peft, base, tmp_path / "adapter", tmp_path / "out")


def test_files_that_hold_experts_the_other_way_round(tmp_path: Path) -> None:
    """Old checkpoints of Qwen3-VL-MoE have (experts, inputs, outputs); the shapes tell."""
    base = write_base("qwen3_vl_moe", tmp_path / "base")
    peft = trained("qwen3_vl_moe", base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=BOTH)
    tensors = load_file(base / "model.safetensors")
    turned = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
    save_file(turned, base / "model.safetensors", {"format": "pt"})
    check("qwen3_vl_moe", peft, base, tmp_path / "adapter", tmp_path / "out")


# -- adapters that PEFT of today does not write


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["gate_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return folder


def pair(outputs: int, inputs: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe"])
def test_an_adapter_of_each_expert(name: str, tmp_path: Path) -> None:
    """As transformers 4 named them: on a checkpoint that has the experts one by one, and on one that has them fused."""
    base = write_base(name, tmp_path / "base")
    before = weights_of(base)
    stem = "model.language_model." if name == "qwen3_vl_moe" else "model."
    module = f"{stem}layers.1.mlp.experts"
    shapes = {"gate_proj": (24, HIDDEN), "up_proj": (24, HIDDEN), "down_proj": (HIDDEN, 24)}
    factors = {
        f"{module}.{e}.{p}": pair(*shape, 3, seed=10 * e + i)
        for e in range(4)
        for i, (p, shape) in enumerate(shapes.items())
    }
    tensors = {f"{k}.lora_{x}.weight": t for k, ab in factors.items() for x, t in zip("AB", ab, strict=True)}
    adapter = write_adapter(tmp_path / "adapter", tensors, layers_to_transform=[1], target_modules=list(shapes))
    loraweld.merge(adapter, output=tmp_path / "out", base=base, dtype="float32")
    after = weights_of(tmp_path / "out")
    for expert in range(4):
        delta = {
            p: 2 * (factors[f"{module}.{expert}.{p}"][1].double() @ factors[f"{module}.{expert}.{p}"][0].double())
            for p in shapes
        }
        if name == "qwen3_moe":
            for p in shapes:
                key = f"{module}.{expert}.{p}.weight"
                assert_close(after[key], before[key].double() + delta[p])
            continue
        fused = torch.cat([delta["gate_proj"], delta["up_proj"]])
        for key, change in ((f"{module}.gate_up_proj", fused), (f"{module}.down_proj", delta["down_proj"])):
            assert_close(after[key][expert], before[key][expert].double() + change)


def expert_factors(outputs: int, inputs: int, rank: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and the deltas (experts, outputs, inputs) in float64, as PEFT lays them out."""
    generator = torch.Generator().manual_seed(3)
    a, b = (
        torch.randn(rank * experts, inputs, generator=generator),
        torch.randn(outputs, rank * experts, generator=generator),
    )
    each = torch.stack([b[:, e::experts].double() @ a[e * rank : (e + 1) * rank].double() for e in range(experts)])
    return a, b, each


def of_old_peft(base: Path, folder: Path, *, size: int, version: str | None) -> tuple[Path, Tensor]:
    """An adapter on down_proj of layer 0 whose A reads the first size, as PEFT 0.17 had it, and its deltas."""
    a, b, each = expert_factors(size, HIDDEN, 3, 4)
    key = "model.layers.0.mlp.experts"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    config = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": None, "layers_to_transform": [0]}
    return write_adapter(folder, tensors, **config, **({"peft_version": version} if version else {})), 2 * each


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0", "0.21.2"])
def test_factors_the_other_way_round_are_known_by_their_shapes(version: str, tmp_path: Path) -> None:
    """PEFT 0.17 and 0.18: A reads the first size of the parameter. Who says to have written it makes no difference."""
    base = write_base("qwen3_moe", tmp_path / "base")
    adapter, each = of_old_peft(base, tmp_path / "adapter", size=24, version=version)
    loraweld.merge(adapter, output=tmp_path / "out", base=base, dtype="float32")
    before, after = weights_of(base), weights_of(tmp_path / "out")
    for expert in range(4):
        key = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        assert_close(after[key], before[key].double() + each[expert].T)


@pytest.mark.parametrize(
    ("version", "options", "is_swapped"),
    [
        ("0.17.0", {}, True),
        ("0.18.1", {}, True),
        ("0.19.0", {}, False),
        ("0.19.1", {}, True),
        ("0.21.2", {}, True),
        (None, {"expert_layout": "swapped"}, True),
        (None, {"expert_layout": "standard"}, False),
    ],
)
def test_square_experts(version: str | None, options: dict[str, str], is_swapped: bool, tmp_path: Path) -> None:
    """gpt-oss's down_proj is square: the version decides, or the user."""
    base = write_base("square_gpt_oss", tmp_path / "base")
    adapter, each = of_old_peft(base, tmp_path / "adapter", size=HIDDEN, version=version)
    loraweld.merge(adapter, output=tmp_path / "out", base=base, dtype="float32", **options)
    key = "model.layers.0.mlp.experts.down_proj"
    change = each.transpose(1, 2) if is_swapped else each
    assert_close(weights_of(tmp_path / "out")[key], weights_of(base)[key].double() + change)


def test_square_experts_of_nobody_knows_which_version_are_refused(tmp_path: Path) -> None:
    base = write_base("square_gpt_oss", tmp_path / "base")
    adapter, _ = of_old_peft(base, tmp_path / "adapter", size=HIDDEN, version=None)
    with pytest.raises(loraweld.LoraweldError, match=r"experts are square.*--expert-layout standard"):
        loraweld.merge(adapter, output=tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


# -- refused


def test_an_expert_that_the_base_lacks(tmp_path: Path) -> None:
    base = write_base("qwen3_moe", tmp_path / "base")
    trained("qwen3_moe", base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=BOTH)
    tensors = weights_of(base)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(loraweld.MatchError, match=r"lacks tensors of its experts.*experts\.2\.up_proj"):
        loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=base)


def test_an_adapter_that_lacks_the_experts_of_a_layer(tmp_path: Path) -> None:
    """Its config says that all layers were trained."""
    base = write_base("qwen3_moe", tmp_path / "base")
    trained("qwen3_moe", base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=BOTH)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1.mlp" not in k}, path, {"format": "pt"})
    with pytest.raises(loraweld.MatchError, match=r"layers\.1\.mlp\.experts.*the file has no tensors for it"):
        loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=base)


def test_another_number_of_experts(tmp_path: Path) -> None:
    base = write_base("qwen3_moe", tmp_path / "base")
    a, b, _ = expert_factors(HIDDEN, 24, 3, 5)
    key = "model.layers.0.mlp.experts"
    config = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": None, "layers_to_transform": [0]}
    adapter = write_adapter(
        tmp_path / "adapter", {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, **config, peft_version="0.21.2"
    )
    with pytest.raises(loraweld.MatchError, match=r"A is \(15, 24\).*expected \(rank · 4"):
        loraweld.merge(adapter, output=tmp_path / "out", base=base)


# -- formats


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_bfloat16_results_are_rounded_once(name: str, tmp_path: Path) -> None:
    """Against float64, expert by expert; PEFT rounds the delta first."""
    base = write_base(name, tmp_path / "base", torch.bfloat16)
    peft = trained(name, base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=MODELS[name][1])
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=base)
    merged = auto_of(name).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    exact = auto_of(name).from_pretrained(base, dtype=torch.float64)
    double = PeftModel.from_pretrained(exact, tmp_path / "adapter", autocast_adapter_dtype=False).double()
    wrong = total = 0
    for key, weight in double.merge_and_unload().state_dict().items():
        if ".experts." in key:
            found = merged.state_dict()[key]
            wrong += int((found != weight.to(torch.bfloat16)).sum())
            total += found.numel()
    assert total and wrong <= 1e-3 * total
    assert peft is not None


@pytest.mark.parametrize("size", [4096, 65536])
def test_the_same_bytes_whatever_the_memory(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that cut an expert in the middle."""
    from loraweld.planning import memory

    base = write_base("gpt_oss", tmp_path / "base", torch.bfloat16)
    trained("gpt_oss", base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=BOTH)
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "one", base=base, workers=1)
    monkeypatch.setattr(memory, "ITEM_BYTES", size)
    monkeypatch.setattr(memory, "BUFFER_BYTES", size)
    monkeypatch.setattr(memory, "MIN_BUFFER_BYTES", size)
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "other", base=base, workers=3)
    assert weights_of(tmp_path / "one").keys() == weights_of(tmp_path / "other").keys()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()
