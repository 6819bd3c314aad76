"""Quantised models in memory, beside those of bitsandbytes: saved as the merge of their files would be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraweld
from encoded_bases import assert_same_bits, codes, pack_rows, packed_zeros, scales
from live_models import auto_of, state_of, with_adapter, write_base
from models import logits, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:tokenizer is None")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()


def rewritten(base: Path, folder: Path, weights: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    """Write a base again with other tensors and the quantisation that they have."""
    shutil.copytree(base, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def fp8_base(name: str, block: int) -> Path:
    """In blocks with a scale each, as DeepSeek publishes its models."""
    base, weights = write_base(name, Path("plain")), {}
    for key, weight in load_file(base / "model.safetensors").items():
        if weight.dim() != 2 or "proj" not in key:
            weights[key] = weight
            continue
        rows, cols = weight.shape
        blocks = weight.float().view(rows // block, block, cols // block, block)
        scale = blocks.abs().amax((1, 3)) / 448
        weights[key] = (blocks / scale[:, None, :, None]).view(rows, cols).to(torch.float8_e4m3fn)
        weights[f"{key}_scale_inv"] = scale
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return rewritten(base, Path("fp8"), weights, settings)


def save_both_ways(peft: PeftModel, base: Path) -> None:
    """Save the model, and merge its files: the same tensors, to the bit.

    They may lie in another order: a merge of files keeps that of its base, which quantised tensors come last in.
    """
    peft.save_pretrained("adapter")
    loraweld.merge("adapter", output="file", base=base, max_shard_size="5GB")
    before = state_of(peft)
    loraweld.save_pretrained_merged(peft, "live")
    found, expected = load_file("live/model.safetensors"), load_file("file/model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)
    assert "quantization_config" not in json.loads(Path("live/config.json").read_text())
    after = state_of(peft)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("name", "block"), [("wide-llama", 64), ("qwen3-moe", 8)])
def test_fp8_that_transformers_has_decoded(name: str, block: int) -> None:
    """Without an accelerator transformers loads plain weights, and would make codes of them again."""
    base = fp8_base(name, block)
    peft = with_adapter(auto_of(name).from_pretrained(base), name)
    expected = logits(peft, {"input_ids": token_ids(96)})
    save_both_ways(peft, base)
    saved = tf.AutoModelForCausalLM.from_pretrained("live", dtype=torch.float32).eval()
    assert (logits(saved, {"input_ids": token_ids(96)}) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("runs", [False, True])
def test_compressed_tensors_before_and_after_a_forward_pass(runs: bool) -> None:
    """The first pass decodes the weights and leaves their scales behind."""
    plain = write_base("wide-llama", Path("plain"))
    with_adapter(tf.AutoModelForCausalLM.from_pretrained(plain), "llama").save_pretrained("first")
    loraweld.merge("first", output="base", base=plain, save_method="merged_fp8")
    model = tf.AutoModelForCausalLM.from_pretrained("base")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    kept = peft.get_base_model().model.layers[0].self_attn.o_proj
    assert kept.weight.dtype == torch.float8_e4m3fn
    if runs:
        logits(peft, {"input_ids": token_ids(96)})
        assert kept.weight.dtype == torch.bfloat16 and hasattr(kept, "weight_scale")
    save_both_ways(peft, Path("base"))


class TorchLinear(nn.Module):
    """A layer of GPTQModel's kernel of that name, by what it keeps; the library itself is compiled for minutes.

    Loaded, its zeros are the zeros themselves whatever they are in the file (`convert_gptq_v1_to_v2_format_module`).
    """

    _cpu_transformed = False

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.register_buffer(name, part)

    def qzero_format(self) -> int:
        return 2


class MarlinLinear(TorchLinear):
    """A kernel with an order of its own."""


class TorchCpuAvx512Linear(TorchLinear):
    """A kernel that has an order of its own after its first pass."""


GROUP = 32


def gptq_model(base: Path, kernel: type[TorchLinear]) -> tuple[Path, PeftModel]:
    """Return a GPTQ base, with zeros as its first format has them, and the model as GPTQModel loads it."""
    generator, weights, layers = torch.Generator().manual_seed(1), {}, {}
    for key, weight in load_file(base / "model.safetensors").items():
        path = key.removesuffix(".weight")
        if not path.endswith("up_proj"):
            weights[key] = weight
            continue
        outputs, inputs = weight.shape
        groups = inputs // GROUP
        zeros = 1 + codes(generator, (groups, outputs), 3)
        parts = {
            "qweight": pack_rows(codes(generator, (outputs, inputs), 4), 4).T.contiguous(),
            "scales": scales(generator, (groups, outputs), torch.bfloat16),
            "g_idx": (torch.arange(inputs) // GROUP).int(),
        }
        weights |= {f"{path}.{name}": part for name, part in parts.items()}
        weights[f"{path}.qzeros"] = packed_zeros(zeros, 4, "gptq")
        layers[path] = kernel({**parts, "qzeros": packed_zeros(zeros, 4, "gptq_v2")})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    folder = rewritten(base, Path("gptq"), weights, settings)
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    model.config.quantization_config = settings
    return folder, with_adapter(model, "llama", target_modules=["q_proj", "down_proj"])


def test_zeros_of_gptq_are_those_in_memory() -> None:
    """Not one more, as the config would have it."""
    base, peft = gptq_model(write_base("wide-llama", Path("plain")), TorchLinear)
    save_both_ways(peft, base)
    assert peft.config.quantization_config.get("checkpoint_format") is None


@pytest.mark.parametrize("kernel", [MarlinLinear, TorchCpuAvx512Linear])
def test_codes_in_an_order_of_the_kernel_are_rejected(
    kernel: type[TorchLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the layer, the kernel and the way out."""
    monkeypatch.setattr(kernel, "_cpu_transformed", True)
    _, peft = gptq_model(write_base("wide-llama", Path("plain")), kernel)
    with pytest.raises(loraweld.RequestError, match=rf"up_proj' is a {kernel.__name__}.*gptq_torch"):
        loraweld.save_pretrained_merged(peft, "live")
    assert not Path("live").exists()
