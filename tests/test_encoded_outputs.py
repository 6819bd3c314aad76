"""Outputs in 4 and 8 bit: what transformers and bitsandbytes load is what was meant, and the report tells the loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import loraweld
import scenes
from cases import pairs, reload_strictly
from encoded_bases import decoded
from fakes import contents, load_folder
from fork_server import ForkServer
from handmade import (
    EMBEDDING,
    MODULES,
    Q_PROJ,
    delta,
    llama_config,
    llama_tensors,
    lora,
    loras,
    save_adapter,
    save_base,
    save_llama,
)
from loraweld.checkpoint.base import open_base
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from models import MODELS, TinyModel, logits
from test_codecs_decode import dequantised

METHODS = ("merged_4bit", "merged_8bit", "merged_fp8")
QUANTISABLE = [model for model in MODELS if not model.name.startswith(("gpt2", "bert-old"))]
SCALING = 1.5  # lora_alpha 6 over rank 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """bitsandbytes' mean of the block scales depends on the number of torch's threads; the engine uses one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def merge(place: Path, *, method: str, out: str = "merged", base: str = "base", **options: Any) -> loraweld.MergeReport:
    return loraweld.merge(place / "adapter", output=place / out, base=place / base, save_method=method, **options)


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A base of bfloat16 and an adapter on every linear layer but those of the last layer's mlp."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"self_attn.q_proj": (64, 48), "mlp.up_proj": (80, 48), "mlp.down_proj": (48, 80)}
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=generator).mul_(0.05).bfloat16()
        for layer in range(2)
        for name, shape in shapes.items()
    }
    tensors |= {f"{EMBEDDING}.weight": torch.randn(40, 48).bfloat16(), "lm_head.weight": torch.randn(40, 48).bfloat16()}
    save_base(tmp_path / "base", tensors, llama_config(hidden_size=48, intermediate_size=80))
    edited = {"model.layers.0.mlp.up_proj": (80, 48), "model.layers.0.mlp.down_proj": (48, 80)}
    factors = {k: v for name, shape in edited.items() for k, v in lora(name, shape, std=0.05).items()}
    save_adapter(tmp_path / "adapter", factors, layers_to_transform=[0])
    return tmp_path


# What transformers loads


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", QUANTISABLE, ids=lambda model: model.name)
def test_every_architecture_loads_with_the_decoded_weights(model: TinyModel, method: str, tmp_path: Path) -> None:
    """No key missing or left over; the weights that transformers has then are those that the file's codes decode to."""
    (case,) = {case.name: case for _, case in pairs("linears")}.values()
    model.save(tmp_path / "base")
    case.train(model, tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path, method="merged_16bit", out="plain", dtype="float32")
    merge(tmp_path, method=method, out="encoded", dtype="float32")
    loaded, found = model.auto.from_pretrained(
        tmp_path / "encoded", output_loading_info=True, device_map="cpu", dtype=torch.float32
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    inputs = case.inputs(model)
    if method == "merged_fp8":  # it also rounds the activations, to 8 bit
        close = (logits(loaded.eval(), inputs) - decoded_logits(model, tmp_path)).norm()
        assert close < 0.1 * decoded_logits(model, tmp_path).norm()
        return
    plain = reload_strictly(model.auto, tmp_path / "plain").float()
    encoded = {name: module for name, module in loaded.named_modules() if isinstance(module, BNB_LAYERS)}
    assert len(encoded) >= len(model.linears)
    for name, module in encoded.items():
        plain.get_submodule(name).weight.data = weight_of(module)
    assert torch.allclose(logits(plain, inputs), decoded_logits(model, tmp_path), atol=1e-5, rtol=1e-5)


BNB_LAYERS = (Linear4bit, Linear8bitLt)


def weight_of(module: nn.Module) -> Tensor:
    """What bitsandbytes has as the weight of one of its layers."""
    if isinstance(module, Linear4bit):
        return dequantised(module.weight.data, module.weight.quant_state)
    return int8_vectorwise_dequant(module.weight.data, module.weight.SCB)


def decoded_logits(model: TinyModel, place: Path) -> Tensor:
    """Return the logits of the plain merged model with the encoded weights as our decoders read them."""
    base, plain = open_base(place / "encoded"), load_folder(place / "plain")
    assert set(base.tensors) == set(plain)
    is_encoded = {name for name, tensor in base.tensors.items() if isinstance(tensor, EncodedTensor)}
    tensors = {name: decoded(base, name) if name in is_encoded else plain[name] for name in plain}
    folder = place / "decoded"
    shutil.rmtree(folder, ignore_errors=True)
    save_base(folder, tensors, json.loads((place / "plain" / "config.json").read_text()))
    (case,) = {case.name: case for _, case in pairs("linears")}.values()
    return logits(reload_strictly(model.auto, folder).float(), case.inputs(model))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_absmax_makes_what_transformers_makes_while_loading(
    quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    """The packed bytes and block scales of a merge equal those of the merged float32 model loaded in 4 bit."""
    model = MODELS[0]
    (case,) = {case.name: case for _, case in pairs("linears")}.values()
    model.save(tmp_path / "base")
    case.train(model, tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path, method="merged_16bit", dtype="float32", out="plain")
    options = {"quant_type": quant_type, "double_quant": double_quant, "quantizer": "absmax", "dtype": "float32"}
    merge(tmp_path, method="merged_4bit", out="encoded", **options)
    asked = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    theirs = model.auto.from_pretrained(
        tmp_path / "plain", quantization_config=asked, device_map="cpu", dtype=torch.float32
    )
    ours = load_folder(tmp_path / "encoded")
    count = 0
    for name, tensor in theirs.state_dict().items():
        if name in ours and "quant_state" not in name:
            assert torch.equal(ours[name], tensor), name
            count += name.endswith("absmax")
        elif "quant_state" in name:
            states = [json.loads(bytes(state.tolist())) for state in (ours[name], tensor)]
            assert states[0] == states[1]
    assert count >= len(model.linears)


# Which weights are encoded, and what the config says


def test_embeddings_head_and_skipped_modules_stay_plain(llama: Path) -> None:
    """They are named in llm_int8_skip_modules, and their bytes are those of a plain merge."""
    report = merge(llama, method="merged_4bit", skip_modules=["up_proj", "model.layers.1"])
    merge(llama, method="merged_16bit", out="plain")
    found, plain = load_folder(llama / "merged"), load_folder(llama / "plain")
    encoded = {name.split(".weight.")[0] for name in found if ".absmax" in name}
    assert encoded == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"}
    for name in plain:
        if name.removesuffix(".weight") not in encoded:
            assert torch.equal(found[name], plain[name])
    skipped = quantization(llama / "merged")["llm_int8_skip_modules"]
    assert {"lm_head", "up_proj", "model.layers.1"} <= set(skipped)
    assert report.recipes["encode"] + report.recipes["edit"] == 2 + 1  # one edit is of a weight that is skipped


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"skip_modules": ["k_proj"]}, "k_proj"),
        ({"skip_modules": ["proj"]}, "would encode nothing"),
    ],
)
def test_skipping_nothing_or_everything_is_refused(options: dict[str, Any], words: str, llama: Path) -> None:
    with pytest.raises(loraweld.LoraweldError, match=words):
        merge(llama, method="merged_4bit", **options)
    assert not (llama / "merged").exists()


def test_a_model_of_transposed_layers_only_is_refused(tmp_path: Path) -> None:
    """GPT-2's layers are Conv1D: their weights are stored as (in, out), and are left as they are."""
    model = next(model for model in MODELS if model.name == "gpt2")
    (case,) = {case.name: case for _, case in pairs("linears")}.values()
    model.save(tmp_path / "base", torch.bfloat16)
    case.train(model, tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(loraweld.LoraweldError, match="would encode nothing"):
        merge(tmp_path, method="merged_4bit")


def test_routers_and_experts_stay_plain(tmp_path: Path) -> None:
    """transformers 5 holds experts as one parameter, which bitsandbytes does not quantise; the result loads."""
    config = tf.Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=40,
        head_dim=16,
        mlp_only_layers=[],
    )
    tf.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", lora(Q_PROJ, (32, 32)))
    merge(tmp_path, method="merged_4bit")
    names = load_folder(tmp_path / "merged")
    encoded = {name.split(".weight.")[0].rpartition(".")[2] for name in names if ".absmax" in name}
    assert encoded == {"q_proj", "k_proj", "v_proj", "o_proj"}
    loaded, found = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, device_map="cpu"
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, Linear4bit)


# Bases that are in the encoding already


def test_untouched_weights_keep_their_packed_bytes(llama: Path) -> None:
    """A 4-bit base to 4 bit: what the adapter does not touch is copied, codes and scales; the rest is encoded anew."""
    merge(llama, method="merged_4bit", out="four")
    report = merge(llama, method="merged_4bit", base="four")
    before, after = load_folder(llama / "four"), load_folder(llama / "merged")
    edited = {module.tensor for module in report.modules}
    assert set(before) == set(after)
    for name in before:
        if not any(name.startswith(weight) for weight in edited):
            assert torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in edited)


@pytest.mark.parametrize("method", METHODS)
def test_preserve_goes_back_to_the_encoding_of_the_base(method: str, llama: Path) -> None:
    """Same names, dtypes, shapes and quantization_config; untouched tensors to the byte; the change is there."""
    merge(llama, method=method, out="encoded")
    merge(llama, method="preserve", base="encoded")
    before, after = load_folder(llama / "encoded"), load_folder(llama / "merged")
    assert {name: (t.dtype, t.shape) for name, t in before.items() if "quant_state" not in name} == {
        name: (t.dtype, t.shape) for name, t in after.items() if "quant_state" not in name
    }
    assert quantization(llama / "encoded") == quantization(llama / "merged")
    base, merged = open_base(llama / "encoded"), open_base(llama / "merged")
    factors = load_folder(llama / "adapter")
    for name in base.tensors:
        module = name.removesuffix(".weight")
        old, new = (decoded(opened, name).double() for opened in (base, merged))
        key = f"base_model.model.{module}.lora_A.weight"
        if key not in factors:
            assert torch.equal(old, new)
            continue
        wanted = old + SCALING * factors[f"base_model.model.{module}.lora_B.weight"].double() @ factors[key].double()
        assert (new - wanted).norm() < 0.12 * wanted.norm()
        assert (new - wanted).norm() < 0.6 * (old - wanted).norm()


def test_sixteen_bit_from_an_encoded_base_is_base_plus_delta_rounded_once(llama: Path) -> None:
    """decode, add in float32, round: against float64 arithmetic on what bitsandbytes decodes."""
    merge(llama, method="merged_4bit", out="four")
    merge(llama, method="merged_16bit", base="four")
    base, merged = open_base(llama / "four"), load_folder(llama / "merged")
    assert "quantization_config" not in json.loads((llama / "merged" / "config.json").read_text())
    factors = {name.removeprefix("base_model.model."): t for name, t in load_folder(llama / "adapter").items()}
    for name, tensor in merged.items():
        exact = decoded(base, name).double()
        if f"{name.removesuffix('.weight')}.lora_A.weight" in factors:
            exact = exact + SCALING * delta(factors, name.removesuffix(".weight"))
        assert (tensor.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        assert (tensor != exact.bfloat16()).sum() <= 1e-3 * tensor.numel()


# quantized-from


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantized_from_is_the_merge_of_the_quantised_checkpoint(
    quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    """A 16-bit base folded as in training equals, to the byte, the merge of the checkpoint bitsandbytes made of it."""
    model = MODELS[0]
    (case,) = {case.name: case for _, case in pairs("linears")}.values()
    model.save(tmp_path / "base", torch.bfloat16)
    case.train(model, tmp_path / "base", tmp_path / "adapter")
    asked = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    quantised = model.auto.from_pretrained(tmp_path / "base", quantization_config=asked, device_map="cpu")
    quantised.save_pretrained(tmp_path / "four")
    merge(tmp_path, method="merged_16bit", base="four", out="expected")
    expected = load_folder(tmp_path / "expected")
    checkpoint = f"quantized-from:{tmp_path / 'four'}"
    said = merge(tmp_path, method="merged_16bit", out="said", merge_base=checkpoint)
    options = {"quant_type": quant_type, "double_quant": double_quant}
    assumed = merge(tmp_path, method="merged_16bit", out="assumed", merge_base="quantized-from", **options)
    for report in (said, assumed):
        found = load_folder(report.output)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name
        assert any("folded onto" in note for note in report.notes)
    plain, four = load_folder(tmp_path / "base"), open_base(tmp_path / "four")
    lost = whole = 0.0
    for name in quantised.state_dict():
        if name.endswith(".absmax"):
            weight = plain[name.removesuffix(".absmax")]
            name = name.removesuffix(".absmax")
            lost += float((decoded(four, name).double() - weight.double()).square().sum())
            whole += float(weight.double().square().sum())
    assert f"differs from the given weights by {(lost / whole) ** 0.5:.2%}" in " ".join(said.notes)


def test_quantized_from_names_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    """Its blocks have no scale."""
    damaged = llama_tensors()[f"{Q_PROJ}.weight"].clone()
    damaged[3, 5] = float("nan")
    save_llama(tmp_path / "base", more={f"{Q_PROJ}.weight": damaged})
    save_adapter(tmp_path / "adapter", loras(*MODULES), base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(loraweld.LoraweldError, match=r"q_proj\.weight.*not finite"):
        merge(tmp_path, method="merged_16bit", merge_base="quantized-from")
    assert not (tmp_path / "merged").exists()


def test_quantized_from_leaves_what_was_not_quantised(llama: Path) -> None:
    """Modules that the checkpoint skips, embeddings and the head are those of the base."""
    merge(llama, method="merged_4bit", out="four", skip_modules=["q_proj"])
    merge(llama, method="merged_16bit", merge_base=f"quantized-from:{llama / 'four'}")
    merge(llama, method="merged_16bit", out="plain")
    found, plain = load_folder(llama / "merged"), load_folder(llama / "plain")
    same = {name for name in plain if torch.equal(found[name], plain[name])}
    assert same == {name for name in plain if "q_proj" in name or "embed" in name or "lm_head" in name}


@pytest.mark.parametrize(
    ("base", "merge_base", "words"),
    [
        ("four", "quantized-from", "is for a 16-bit base"),
        ("base", "quantized-from:{place}/base", "not quantised"),
        ("base", "quantized-from:{place}/eight", "knows the 4 bit of bitsandbytes|has no 4-bit weights"),
        ("base", "quantized-from:{place}/nowhere", "nowhere"),
        ("base", "quantized-from", "names no base model"),
    ],
)
def test_quantized_from_the_wrong_thing_is_refused(base: str, merge_base: str, words: str, llama: Path) -> None:
    merge(llama, method="merged_4bit", out="four")
    merge(llama, method="merged_8bit", out="eight")
    with pytest.raises(loraweld.LoraweldError, match=words):
        merge(llama, method="merged_16bit", base=base, merge_base=merge_base.format(place=llama))
    assert not (llama / "merged").exists()


# The report


@settings(max_examples=8)
@given(size=st.sampled_from([6e-3, 0.02, 0.05, 1.0]), method=st.sampled_from(METHODS))
def test_the_report_tells_error_and_what_is_left_of_the_change(
    size: float, method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against float64 sums over what the files hold; less than half of the change left is a warning."""
    place = tmp_path_factory.mktemp("report")
    save_llama(place / "plain-base", num_files=2)
    save_adapter(place / "none", {k: v * 0 for k, v in lora(Q_PROJ).items()}, layers_to_transform=[0])
    loraweld.merge(place / "none", output=place / "base", base=place / "plain-base", save_method=method)
    save_adapter(place / "adapter", {k: v * size**0.5 for k, v in loras(*MODULES).items()})
    report = merge(place, method="preserve")
    factors = {name.removeprefix("base_model.model."): t for name, t in load_folder(place / "adapter").items()}
    base, merged = open_base(place / "base"), open_base(place / "merged")
    assert {weight.tensor for weight in report.fidelity} == {f"{module}.weight" for module in MODULES}
    for weight in report.fidelity:
        change = SCALING * delta(factors, weight.tensor.removesuffix(".weight"))
        old, new = (decoded(opened, weight.tensor).double() for opened in (base, merged))
        error = (new - old - change).norm() / (old + change).norm()
        assert weight.relative_error == pytest.approx(float(error), rel=2e-3)
        kept = float(((new - old) * change).sum() / change.square().sum())
        assert weight.kept == pytest.approx(kept, abs=max(2e-2, 2e-3 / size))
    lost = [weight for weight in report.fidelity if (weight.kept or 0) < 0.5]
    assert any("less than half" in note for note in report.notes) == bool(lost)


def test_a_change_that_vanishes_altogether_is_refused(llama: Path) -> None:
    """ "fuse did nothing": no stored byte would differ from the base's."""
    merge(llama, method="merged_8bit", out="eight")
    shutil.rmtree(llama / "adapter")
    tiny = {k: v * 1e-4 for k, v in lora("model.layers.0.mlp.up_proj", (80, 48)).items()}
    save_adapter(llama / "adapter", tiny, layers_to_transform=[0])
    with pytest.raises(loraweld.LoraweldError, match="every change of the adapter is smaller"):
        merge(llama, method="preserve", base="eight")
    assert not (llama / "merged").exists()


def test_int8_codes_are_those_of_bitsandbytes(llama: Path) -> None:
    """An untouched weight: codes and SCB of int8_vectorwise_quant, of the float32 values."""
    merge(llama, method="merged_8bit")
    found, plain = load_folder(llama / "merged"), load_folder(llama / "base")
    name = "model.layers.1.self_attn.q_proj.weight"
    # In float16, as the function wants it; the weights here have few bits and small exponents: nothing is lost.
    codes, scb, _ = int8_vectorwise_quant(plain[name].half())
    assert torch.equal(plain[name].half().float(), plain[name].float())
    assert torch.equal(found[name], codes)
    assert torch.equal(found[name.replace("weight", "SCB")], scb)
    opened = open_base(llama / "merged")
    assert torch.equal(decoded(opened, name), int8_vectorwise_dequant(codes, scb).bfloat16())


# The engine


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_for_any_number_of_workers_and_memory(method: str, llama: Path) -> None:
    merge(llama, method=method, workers=1)
    for number, options in enumerate([{"workers": 4}, {"workers": 3, "max_memory": "90MB"}]):
        merge(llama, method=method, out=f"again{number}", **options)
        assert contents(llama / f"again{number}") == contents(llama / "merged")
    assert merge(llama, method=method).was_there


@pytest.mark.slow
@pytest.mark.parametrize("method", ["merged_4bit", "merged_fp8"])
def test_killed_and_resumed_the_bytes_and_the_report_are_the_same(method: str, tmp_path: Path) -> None:
    """What was measured of a finished weight is in the journal."""
    scene = scenes.undisturbed_merge(tmp_path, num_files=2, layers=6)
    shutil.rmtree(scene.out)
    report = scene.merge(save_method=method)
    files = contents(scene.out)
    server = ForkServer()
    sizes = {"item_bytes": scenes.ITEM_BYTES, "checkpoint_bytes": scenes.CHECKPOINT_BYTES}
    inputs = {"adapter": scene.adapter, "base": scene.base, "output": scene.out, "save_method": method, "workers": 1}
    resumed = 0
    for step in range(4, 60, 5):
        shutil.rmtree(scene.out)
        killed = server.merge(**sizes, **inputs, kill_at_step=step).killed
        assert killed or contents(scene.out) == files
        again = server.merge(**sizes, **inputs)
        assert again.error == ""
        assert contents(scene.out) == files
        assert {w["tensor"]: w for w in again.report["fidelity"]} == {
            w["tensor"]: w for w in report.to_json()["fidelity"]
        } or again.report["was_there"]
        resumed += again.report["resumed_bytes"] > 0
    server.close()
    assert resumed > 2


def test_as_given_says_that_the_adapter_saw_other_weights(llama: Path) -> None:
    """An adapter that names a 4-bit base, merged into a 16-bit one without a word: the report has one."""
    merge(llama, method="merged_4bit", out="four")
    config = json.loads((llama / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(llama / "four")
    (llama / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    notes = merge(llama, method="merged_16bit", out="as-given").notes
    assert any("was trained on the 4-bit model" in note and "quantized-from" in note for note in notes)
    folded = merge(llama, method="merged_16bit", merge_base="quantized-from")
    assert any("folded onto" in note and str(llama / "four") in note for note in folded.notes)


def test_layers_of_a_class_of_their_own_are_not_encoded(tmp_path: Path) -> None:
    """transformers replaces `nn.Linear` itself only: Falcon's linear layers would not load as codes."""
    config = tf.FalconConfig(vocab_size=40, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    tf.FalconForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", lora("transformer.h.0.self_attention.dense", (64, 64)))
    with pytest.raises(loraweld.LoraweldError, match="would encode nothing"):
        merge(tmp_path, method="merged_4bit")
