"""layer_replication: the model written is the one PEFT computes with, before its own merge mixes the copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

import loraweld
from cases import reload_strictly, train_
from fakes import contents, load_folder
from handmade import LAYERS, MODULES, delta, llama_tensors, loras, save_adapter, save_llama
from loraweld.errors import LoraweldError, MatchError, RequestError
from models import GATED, SMALL, TEXT, TOKENS, VOCAB, logits, randomise_, token_ids

STACK = [[0, 2], [1, 2], [0, 2]]  # of two layers: 0 1 1 0 1
INPUTS = {"input_ids": token_ids(VOCAB)}


def llama(**options: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GATED, **options))


def qwen3() -> tf.PreTrainedModel:
    types = ["sliding_attention", "full_attention"]
    return tf.Qwen3ForCausalLM(
        tf.Qwen3Config(**GATED, head_dim=8, layer_types=types, use_sliding_window=True, sliding_window=3)
    )


def bert() -> tf.PreTrainedModel:
    return tf.BertForMaskedLM(tf.BertConfig(**TEXT, intermediate_size=48))


def falcon() -> tf.PreTrainedModel:
    return tf.FalconModel(tf.FalconConfig(**SMALL, **TOKENS, vocab_size=VOCAB, alibi=False))


KINDS = {
    "llama": (llama, tf.AutoModelForCausalLM, {"target_modules": ["q_proj", "down_proj"]}),
    "llama-tied": (
        lambda: llama(tie_word_embeddings=True),
        tf.AutoModelForCausalLM,
        {"target_modules": ["v_proj", "up_proj"], "use_rslora": True},
    ),
    "llama-dora": (llama, tf.AutoModelForCausalLM, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "llama-one-layer": (
        llama,
        tf.AutoModelForCausalLM,
        {"target_modules": ["q_proj"], "layers_to_transform": [3], "modules_to_save": ["lm_head"]},
    ),
    "qwen3-layer-types": (qwen3, tf.AutoModelForCausalLM, {"target_modules": ["q_proj", "o_proj"]}),
    "bert": (bert, tf.AutoModelForMaskedLM, {"target_modules": ["query", "intermediate.dense"]}),
    "falcon": (falcon, tf.AutoModel, {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_equals_the_forward_of_the_replicated_model(kind: str, tmp_path: Path) -> None:
    """Each copy has its own delta; the number of layers and what the config says of each layer grew with them."""
    build, auto, options = KINDS[kind]
    torch.manual_seed(7)
    model = build().eval()
    randomise_(model)
    model.save_pretrained(tmp_path / "base")
    peft = get_peft_model(auto.from_pretrained(tmp_path / "base"), LoraConfig(r=3, layer_replication=STACK, **options))
    train_(peft)
    peft.save_pretrained(tmp_path / "adapter")
    report = loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base", dtype="float32")
    unmerged = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    if kind == "qwen3-layer-types":  # PEFT leaves the list as short as it was, and cannot run past its end
        unmerged.config.layer_types = [("sliding_attention", "full_attention")[layer] for layer in (0, 1, 1, 0, 1)]
    merged = reload_strictly(auto, tmp_path / "out")
    expected = logits(unmerged, INPUTS)
    assert (logits(merged, INPUTS) - expected).abs().max() <= 1e-5
    assert (logits(auto.from_pretrained(tmp_path / "base").eval(), INPUTS) - expected).abs().max() > 1e-2
    assert merged.config.num_hidden_layers == 5
    assert any("layers replicated: [0, 2), [1, 2), [0, 2) of 2 are 5 now" in note for note in report.notes)
    if kind == "qwen3-layer-types":
        assert merged.config.layer_types == unmerged.config.layer_types


def hand_made(place: Path, **config: Any) -> Path:
    """An adapter for the first module of the third layer of a stack of four."""
    module = MODULES[0].replace(".0.", ".2.")
    options = {"layer_replication": [[0, 2], [0, 2]], "lora_alpha": 4, "target_modules": [module], **config}
    tensors = {name.replace(MODULES[0], module): tensor for name, tensor in loras(MODULES[0]).items()}
    return save_adapter(place, tensors, **options)


def merged(base: Path, adapter: Path, **options: Any) -> dict[str, torch.Tensor]:
    out = base.parent / "out"
    loraweld.merge(adapter, output=out, base=base, dtype="float32", **options)
    return load_folder(out)


def test_layers_are_copied_byte_for_byte_and_edited_apart(tmp_path: Path) -> None:
    """All four layers are there, from a base of several files; only the copy that the adapter names is edited."""
    base = save_llama(tmp_path / "base", torch.float32, num_files=3)
    adapter = hand_made(tmp_path / "adapter")
    found, old = merged(base, adapter), llama_tensors(torch.float32)
    layered = {name for name in old if ".layers." in name}
    expected = {name: old[name] for name in old.keys() - layered}
    for name in layered:
        again = name.replace(".0.", ".2.") if ".layers.0." in name else name.replace(".1.", ".3.")
        expected |= {name: old[name], again: old[name]}
    edited = "model.layers.2.self_attn.q_proj.weight"
    change = delta(loras(MODULES[0]), MODULES[0])
    assert (found.pop(edited).double() - (expected.pop(edited).double() + change)).abs().max() < 1e-5
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2 * LAYERS


def test_a_replicated_merge_is_the_same_again_and_keeps_shards_small(tmp_path: Path) -> None:
    """With --max-shard-size the copies are packed as any tensors; the same command then finds its own output."""
    base = save_llama(tmp_path / "base", torch.float32)
    adapter = hand_made(tmp_path / "adapter")
    options = {"output": tmp_path / "out", "base": base, "dtype": "float32", "max_shard_size": 8000}
    loraweld.merge(adapter, **options)
    before = contents(tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in before) > 2
    assert loraweld.merge(adapter, **options).was_there
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("method", ["merged_4bit", "preserve"])
def test_encoded_layers_are_replicated_with_their_scales(method: str, tmp_path: Path) -> None:
    """A 4-bit base keeps codes and scales of each copy; the names of all parts follow the new number."""
    plain = save_llama(tmp_path / "plain", torch.bfloat16)
    unchanged = save_adapter(tmp_path / "other", loras("lm_head"))
    loraweld.merge(unchanged, output=tmp_path / "base", base=plain, save_method="merged_4bit")
    loraweld.merge(hand_made(tmp_path / "adapter"), output=tmp_path / "out", base=tmp_path / "base", save_method=method)
    old, new = load_folder(tmp_path / "base"), load_folder(tmp_path / "out")
    layer = "model.layers.{}.mlp.up_proj."
    parts = {name.removeprefix(layer.format(1)) for name in old if name.startswith(layer.format(1))}
    assert len(parts) > 2
    assert {name.removeprefix(layer.format(3)) for name in new if name.startswith(layer.format(3))} == parts
    for part in parts:
        assert torch.equal(new[layer.format(3) + part], old[layer.format(1) + part])
        assert torch.equal(new[layer.format(1) + part], old[layer.format(1) + part])


def test_lists_of_layers_move_with_them_and_other_lists_stay(tmp_path: Path) -> None:
    """Entries per layer are repeated, numbers of layers renumbered; token ids that happen to be as many are not."""
    lists = {"layer_types": ["a", "b"], "num_key_value_heads": [2, 1], "mlp_only_layers": [1], "eos_token_id": [7, 8]}
    base = save_llama(tmp_path / "base", torch.float32, **lists)
    merged(base, hand_made(tmp_path / "adapter"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["a", "b", "a", "b"]
    assert config["num_key_value_heads"] == [2, 1, 2, 1]
    assert config["mlp_only_layers"] == [1, 3]
    assert config["eos_token_id"] == [7, 8]


def test_layers_past_the_model_stay_behind_it(tmp_path: Path) -> None:
    """A layer for multi-token prediction, which PEFT does not load, comes after the new last layer."""
    extra = {"model.layers.2.eh_proj.weight": torch.randn(16, 32)}
    base = save_llama(tmp_path / "base", torch.float32, more=extra)
    found = merged(base, hand_made(tmp_path / "adapter"))
    assert torch.equal(found["model.layers.4.eh_proj.weight"], extra["model.layers.2.eh_proj.weight"])


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "past-the-end": ({"layer_replication": [[0, 2], [1, 3]]}, {}, ["[1, 3)", "has 2"]),
    "empty": ({"layer_replication": [[1, 1]]}, {}, ["layer_replication", "start < stop"]),
    "negative": ({"layer_replication": [[-1, 1]]}, {}, ["layer_replication", "start < stop"]),
    "no-ranges": ({"layer_replication": {"0": 1}}, {}, ["layer_replication", "ranges"]),
    "pissa": ({"init_lora_weights": "pissa"}, {}, ["layer_replication", "pissa", "path_initial_model"]),
    "moe-by-number": ({}, {"first_k_dense_replace": 2}, ["first_k_dense_replace 2"]),
    "attention-by-number": ({}, {"sliding_window_pattern": 2}, ["sliding_window_pattern 2"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replicated_is_refused(case: str, tmp_path: Path) -> None:
    """Ranges that the base has not, and configs by which a layer is what its number says: nothing is written."""
    options, config, words = REFUSED[case]
    base = save_llama(tmp_path / "base", torch.float32, **config)
    with pytest.raises(LoraweldError) as refused:
        merged(base, hand_made(tmp_path / "adapter", **options))
    assert all(word in str(refused.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_a_base_of_several_stacks_is_refused(tmp_path: Path) -> None:
    """An encoder and a decoder: PEFT finds no layers there, and which were meant is not said."""
    more = {"encoder.layers.0.fc1.weight": torch.randn(4, 4)}
    base = save_llama(tmp_path / "base", torch.float32, more=more)
    with pytest.raises(MatchError, match=r"encoder\.layers, model\.layers"):
        merged(base, hand_made(tmp_path / "adapter"))


def test_adapters_of_other_stacks_are_not_mixed(tmp_path: Path) -> None:
    """The numbers of layers mean something else in each of them."""
    base = save_llama(tmp_path / "base", torch.float32)
    one = hand_made(tmp_path / "one")
    other = save_adapter(tmp_path / "other", loras(MODULES[0]))
    with pytest.raises(MatchError, match="different stacks"):
        loraweld.merge([one, other], output=tmp_path / "out", base=base)


def test_settings_that_number_modules_cannot_be_preserved(tmp_path: Path) -> None:
    """What quantization settings say of layer 1 would be said of another layer."""
    settings = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1.mlp"]}
    base = save_llama(tmp_path / "base", torch.bfloat16, quantization_config=settings)
    with pytest.raises(RequestError, match="number of their layer"):
        loraweld.merge(hand_made(tmp_path / "a"), output=tmp_path / "out", base=base, save_method="preserve")


@pytest.mark.filterwarnings("ignore:tokenizer is None")
def test_a_live_model_is_not_replicated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory the layers are a stack already; while they share their weights, the model is refused as PEFT's is."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(8)
    model = llama()
    randomise_(model)
    model.save_pretrained(tmp_path / "base")
    options = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[1, 2], [0, 2]])
    peft = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), options).eval()
    train_(peft)
    with pytest.raises(RequestError, match="shares parameters"):
        loraweld.save_pretrained_merged(peft, tmp_path / "live")
    for module in peft.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = parameter if parameter is None else torch.nn.Parameter(parameter.clone())
    loraweld.save_pretrained_merged(peft, tmp_path / "live")
    peft.save_pretrained(tmp_path / "adapter")
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "file", base=tmp_path / "base")
    live, file = load_folder(tmp_path / "live"), load_folder(tmp_path / "file")
    assert live.keys() == file.keys()
    assert all(torch.equal(live[name], tensor) for name, tensor in file.items())
