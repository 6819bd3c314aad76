"""A model in memory is saved as the merge of its files would be, to the byte, and is left as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import loraweld
from cases import AdapterCase, pairs
from live_models import BUILDERS, auto_of, live_llama, state_of, with_adapter, write_base
from loraweld.live import save
from loraweld.live.spill import Spill
from loraweld.live.weights import base_state, checkpoint_tensors
from loraweld.live.weights import state_of as state_in_memory
from models import TinyModel, logits, token_ids

NO_TOKENIZER = pytest.mark.filterwarnings("ignore:tokenizer is None")
pytestmark = NO_TOKENIZER


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, as that of the temporary location, are in the test's folder."""
    monkeypatch.chdir(tmp_path)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("name", "method"),
    # bitsandbytes does not quantise the Conv1D layers of GPT-2.
    [*((name, "merged_16bit") for name in BUILDERS), *((name, "merged_4bit") for name in BUILDERS if name != "gpt2")],
)
def test_files_are_those_of_the_file_interface(name: str, method: str, tmp_path: Path) -> None:
    """The weights of a live save and of a merge of the same base and adapter are the same bytes."""
    base = write_base(name, tmp_path / "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if name == "qwen3-moe" else None
    peft = with_adapter(auto_of(name).from_pretrained(base), name, target_parameters=experts)
    peft.save_pretrained(tmp_path / "adapter")
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "file", base=base, save_method=method, max_shard_size="5GB")
    loraweld.save_pretrained_merged(peft, tmp_path / "live", save_method=method)
    assert weights(tmp_path / "live") == weights(tmp_path / "file")
    assert not (tmp_path / "_unsloth_temporary_saved_buffers").exists()


def test_parts_that_accelerate_has_offloaded_are_read_from_where_they_are(tmp_path: Path) -> None:
    """Layers in files: the bytes are those of the file interface, and the model still computes as before."""
    base = write_base("llama", tmp_path / "base")
    layers = tf.AutoConfig.from_pretrained(base).num_hidden_layers
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places |= {f"model.layers.{layer}": "disk" for layer in range(1, layers)}
    model = tf.AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=str(tmp_path / "offloaded"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[0], init_lora_weights=False)
    peft = get_peft_model(model, config)
    before = logits(peft, {"input_ids": token_ids(96)})
    peft.save_pretrained(tmp_path / "adapter")
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "file", base=base, max_shard_size="5GB")
    loraweld.save_pretrained_merged(peft, tmp_path / "live")
    assert weights(tmp_path / "live") == weights(tmp_path / "file")
    assert torch.equal(logits(peft, {"input_ids": token_ids(96)}), before)


@pytest.mark.filterwarnings("ignore:for base_model.*no-op")  # PEFT loads the values once more afterwards
def test_an_adapter_that_accelerate_has_offloaded_is_read_from_where_it_is(tmp_path: Path) -> None:
    """PEFT spreads an adapter that it loads as its base is spread."""
    base = write_base("llama", tmp_path / "base")
    with_adapter(tf.AutoModelForCausalLM.from_pretrained(base), "llama").save_pretrained(tmp_path / "adapter")
    layers = tf.AutoConfig.from_pretrained(base).num_hidden_layers
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places |= {f"model.layers.{layer}": "disk" for layer in range(1, layers)}
    model = tf.AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=str(tmp_path / "offloaded"))
    inside = {f"base_model.model.{path}": place for path, place in places.items()}
    peft = PeftModel.from_pretrained(model, tmp_path / "adapter", device_map=inside, offload_dir=str(tmp_path / "off"))
    assert any("lora" in name and parameter.device.type == "meta" for name, parameter in peft.named_parameters())
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "file", base=base, max_shard_size="5GB")
    loraweld.save_pretrained_merged(peft, tmp_path / "live")
    assert weights(tmp_path / "live") == weights(tmp_path / "file")


@pytest.mark.parametrize("name", list(BUILDERS))
def test_nothing_is_copied_to_give_it_its_name(name: str, tmp_path: Path) -> None:
    """The experts that transformers has fused are views of its parameters."""
    model = auto_of(name).from_pretrained(write_base(name, tmp_path / "base"))
    state = state_in_memory(model)
    places = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    base = base_state(model, state, trained_copies=False)
    found = checkpoint_tensors(model, base, spilled=tmp_path / "spilled", limit_bytes=0)
    assert {tensor.untyped_storage().data_ptr() for tensor in found.values()} <= places
    saved = load_file(tmp_path / "base" / "model.safetensors")
    assert found.keys() == saved.keys() and all(torch.equal(found[key], saved[key]) for key in saved)
    assert not (tmp_path / "spilled").exists()


def fused_on_disk() -> tf.PreTrainedModel:
    """A model whose queries, keys and values are one tensor in its checkpoint, and three in memory."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return tf.NomicBertModel(tf.NomicBertConfig(**sizes, vocab_size=96))


@pytest.mark.parametrize(("free", "spills"), [(16 << 30, False), (600 * 10**6, True)])
def test_what_has_to_be_fused_lies_in_files_where_memory_is_short(
    free: int, spills: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of transformers either way, and the files are gone afterwards."""
    model = fused_on_disk()
    model.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert any("Wqkv" in name for name in names) and not any("q_proj" in name for name in names)
    model = tf.AutoModel.from_pretrained(tmp_path / "base")
    seen: list[Path] = []
    in_file = Spill._in_file
    monkeypatch.setattr(Spill, "_in_file", lambda self, tensor: seen.append(self._folder) or in_file(self, tensor))
    monkeypatch.setattr(save, "free_memory_bytes", lambda: free)
    loraweld.save_pretrained_merged(model, "out", save_method="preserve", temporary_location="short")
    assert bool(seen) is spills and all(folder.is_relative_to("short") for folder in seen)
    assert not Path("short").exists()
    assert all(
        torch.equal(tensor, load_file("out/model.safetensors")[name])
        for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()
    )


def each_pair() -> pytest.MarkDecorator:
    # Not where PEFT's own forward fails: it ties T5's embedding modules to the copy of the head.
    chosen = [
        pytest.param(model, case, id=f"{model.name}-{case.name}")
        for model, case in pairs()
        if (model.name, case.name) != ("t5", "save-embedding-and-head-tied")
    ]
    return pytest.mark.parametrize(("model", "case"), chosen)


@each_pair()
def test_logits_of_the_output_are_those_of_the_live_model(model: TinyModel, case: AdapterCase, tmp_path: Path) -> None:
    """For every way to use an adapter: reloaded without PEFT, the saved model answers as the live one."""
    model.save(tmp_path / "base", torch.float32)
    live, _ = case.train(model, tmp_path / "base", tmp_path / "adapter")
    expected = logits(live, case.inputs(model))
    before = state_of(live)
    loraweld.save_pretrained_merged(live, tmp_path / "live", save_method="preserve")
    after = state_of(live)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    reloaded = type(live.get_base_model()).from_pretrained(tmp_path / "live", dtype=torch.float32).eval()
    assert (logits(reloaded, case.inputs(model)) - expected).abs().max() <= 1e-5


def test_saving_twice_gives_the_same_bytes_and_leaves_the_model(tmp_path: Path) -> None:
    """Training mode, gradients' flags, active adapter and every value are as before; the second save replaces."""
    peft = live_llama(tmp_path / "base").train()
    flags = {name: parameter.requires_grad for name, parameter in peft.named_parameters()}
    config, state = peft.config.to_dict(), state_of(peft)
    peft.save_pretrained_merged("out")
    first = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    peft.save_pretrained_merged("out")
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == first
    assert peft.training and peft.active_adapters == ["default"] and peft.config.to_dict() == config
    assert flags == {name: parameter.requires_grad for name, parameter in peft.named_parameters()}
    assert all(torch.equal(value, state[name]) for name, value in state_of(peft).items())


def test_weights_trained_outside_of_peft_are_saved(tmp_path: Path) -> None:
    """The model in memory is the truth, not the folder that it came from."""
    peft = live_llama(tmp_path / "base")
    peft.get_base_model().model.norm.weight.data.fill_(0.5)
    peft.save_pretrained_merged("out")
    assert torch.equal(load_file("out/model.safetensors")["model.norm.weight"], torch.full((32,), 0.5).bfloat16())


def test_a_model_without_adapter_is_saved_as_it_is(tmp_path: Path) -> None:
    """The methods are there before an adapter is."""
    write_base("llama", tmp_path / "base")
    model = loraweld.attach(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained_merged("out")
    saved, base = load_file("out/model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    assert saved.keys() == base.keys() and all(torch.equal(saved[name], base[name]) for name in base)


def test_an_adapter_attached_afterwards_counts(tmp_path: Path) -> None:
    """Methods on the base find an adapter that plain PEFT put into it; through PEFT's wrapper they are found too."""
    write_base("llama", tmp_path / "base")
    model = loraweld.attach(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    peft = with_adapter(model, "llama")
    peft.save_pretrained_merged("through")
    loraweld.save_pretrained_merged(peft, "function")
    assert weights(Path("through")) == weights(Path("function"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert any(not torch.equal(value, base[name]) for name, value in load_file("through/model.safetensors").items())


def test_merged_adapters_are_not_merged_again(tmp_path: Path) -> None:
    """What PEFT has merged into the weights is written as it is."""
    peft = live_llama(tmp_path / "base")
    expected = logits(peft, {"input_ids": token_ids(96)})
    peft.merge_adapter()
    peft.save_pretrained_merged("out")
    saved = load_file("out/model.safetensors")
    q_proj = peft.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(saved["model.layers.0.self_attn.q_proj.weight"], q_proj.base_layer.weight)
    reloaded = tf.AutoModelForCausalLM.from_pretrained("out").eval()
    assert (logits(reloaded, {"input_ids": token_ids(96)}) - expected).abs().max() < 0.1


def test_disabled_adapters_do_not_count(tmp_path: Path) -> None:
    """The model computes without them, and so does what is saved."""
    peft = live_llama(tmp_path / "base")
    with peft.disable_adapter():
        peft.save_pretrained_merged("out")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(value, base[name]) for name, value in load_file("out/model.safetensors").items())


def test_changed_scalings_count(tmp_path: Path) -> None:
    """A scaling that was set by hand is that of the forward pass, so it is that of the merge."""
    peft = live_llama(tmp_path / "base")
    for module in peft.modules():
        if hasattr(module, "set_scale") and "default" in getattr(module, "scaling", {}):
            module.set_scale("default", 0.3)
    peft = peft.float()
    expected = logits(peft, {"input_ids": token_ids(96)})
    peft.save_pretrained_merged("out", save_method="preserve")
    reloaded = tf.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    assert (logits(reloaded, {"input_ids": token_ids(96)}) - expected).abs().max() <= 1e-5
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "float32"


def test_views_are_saved_as_the_values_they_show(tmp_path: Path) -> None:
    """A parameter that is a transposed view is read in its own order."""
    peft = live_llama(tmp_path / "base")
    weight = peft.get_base_model().model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    peft.save_pretrained_merged("out")
    base = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(load_file("out/model.safetensors")[name], base[name])


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit", "preserve", "merged_8bit"])
@pytest.mark.parametrize("double", [False, True])
def test_a_4_bit_model_is_saved_as_its_files_would_be(method: str, double: bool, tmp_path: Path) -> None:
    """Codes and scales in memory are those of the checkpoint; decoded, edited and encoded alike."""
    write_base("llama", tmp_path / "plain")
    settings = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    options = {"device_map": "cpu", "dtype": torch.bfloat16}
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, **options)
    model.save_pretrained(tmp_path / "base")
    peft = with_adapter(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options), "llama")
    peft.save_pretrained(tmp_path / "adapter")
    extra = {"double_quant": double} if method == "merged_4bit" else {}
    loraweld.merge(
        tmp_path / "adapter",
        output=tmp_path / "file",
        base=tmp_path / "base",
        save_method=method,
        max_shard_size="5GB",
        **extra,
    )
    loraweld.save_pretrained_merged(peft, tmp_path / "live", save_method=method)
    assert weights(tmp_path / "live") == weights(tmp_path / "file")
    assert isinstance(peft.get_base_model().model.layers[0].mlp.up_proj, torch.nn.Module)
    found = json.loads((tmp_path / "live" / "config.json").read_text()).get("quantization_config")
    assert (found is None) == (method == "merged_16bit")


def test_an_8_bit_model_is_saved_as_its_files_would_be(tmp_path: Path) -> None:
    """The same of LLM.int8()."""
    write_base("llama", tmp_path / "plain")
    settings = tf.BitsAndBytesConfig(load_in_8bit=True)
    options = {"device_map": "cpu", "dtype": torch.bfloat16}
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, **options)
    model.save_pretrained(tmp_path / "base")
    peft = with_adapter(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options), "llama")
    peft.save_pretrained(tmp_path / "adapter")
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "file", base=tmp_path / "base", max_shard_size="5GB")
    loraweld.save_pretrained_merged(peft, tmp_path / "live")
    assert weights(tmp_path / "live") == weights(tmp_path / "file")
