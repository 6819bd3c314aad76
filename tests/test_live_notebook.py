"""A notebook's code, from loading to saving: `FastLanguageModel` on a tiny Llama, and the example on a real model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file

import loraweld
from gguf_models import needs_smollm, save_smollm
from live_models import with_adapter, write_base
from loraweld import FastLanguageModel
from loraweld.checkpoint.reader import Reader
from loraweld.live.memory import tensors_as_file
from models import logits, token_ids
from test_live_parameters import tokenizer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:tokenizer is None")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    write_base("wide-llama", tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    return "tiny"


def test_a_notebook(base: str) -> None:
    """The examples of the API's description, one after the other."""
    model, words = FastLanguageModel.from_pretrained(model_name=base, max_seq_length=128, load_in_4bit=True)
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit) and words.model_max_length == 128
    model = FastLanguageModel.get_peft_model(model, r=8)
    FastLanguageModel.for_training(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=token_ids(90), labels=token_ids(90)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    FastLanguageModel.for_inference(model)
    assert not model.training and not model.get_base_model().is_gradient_checkpointing
    model.save_pretrained_merged("out/adapter", words, save_method="lora")
    model.save_pretrained_merged("out/merged", words, max_shard_size="20KB", maximum_memory_usage=0.5)
    model.save_pretrained_merged("out/merged-4bit", words, save_method="merged_4bit")
    dequantised = tf.AutoModelForCausalLM.from_pretrained("out/merged")
    assert dequantised.dtype == torch.bfloat16 and len(list(Path("out/merged").glob("*.safetensors"))) > 1
    expected, found = logits(model, {"input_ids": token_ids(90)}), logits(dequantised, {"input_ids": token_ids(90)})
    assert (found - expected).abs().max() < 0.1
    assert PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), "out/adapter")
    four = tf.AutoModelForCausalLM.from_pretrained("out/merged-4bit", device_map="cpu")
    assert isinstance(four.model.layers[0].mlp.up_proj, Linear4bit)
    assert len(tf.AutoTokenizer.from_pretrained("out/merged-4bit")) == len(words)


@pytest.mark.parametrize("double", [False, True])
def test_weights_that_were_repacked_for_the_cpu(double: bool, base: str) -> None:
    """After inference bitsandbytes may hold another form of its codes: what is saved is the model, which stays so.

    (On CPUs without bfloat16 products it does not, and this holds all the same.)
    """
    settings = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    loaded = tf.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    )
    model = with_adapter(loaded, "wide-llama")
    loraweld.save_pretrained_merged(model, "before", save_method="preserve")
    inputs = {"input_ids": token_ids(90)}
    expected = logits(model, inputs)
    for method in ("merged_16bit", "merged_4bit", "preserve"):
        loraweld.save_pretrained_merged(model, method, save_method=method)
        assert torch.equal(logits(model, inputs), expected)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(*(load_file(f"{folder}/model.safetensors")[name] for folder in ("before", "preserve")))
    found = logits(tf.AutoModelForCausalLM.from_pretrained("merged_16bit").eval(), inputs)
    assert (found - expected).abs().max() < 0.1 < expected.abs().max()


def test_the_parameters_of_loading(base: str) -> None:
    """8 bit, no quantisation, full fine-tuning and the dtype."""
    eight, _ = FastLanguageModel.from_pretrained(base, load_in_8bit=True)
    assert isinstance(eight.model.layers[0].mlp.up_proj, Linear8bitLt)
    plain, _ = FastLanguageModel.from_pretrained(base, dtype="float32", load_in_4bit=False)
    assert plain.dtype == torch.float32
    full, _ = FastLanguageModel.from_pretrained(base, dtype=torch.float16, full_finetuning=True)
    assert full.dtype == torch.float16 and not hasattr(full, "hf_quantizer")
    full.save_pretrained_merged("out")
    assert tf.AutoModelForCausalLM.from_pretrained("out").dtype == torch.float16


def test_the_parameters_of_the_adapter(base: str) -> None:
    """They arrive in PEFT's config; the seed decides the initial values and nothing else."""
    made = []
    for seed in (1, 1, 2):
        model, _ = FastLanguageModel.from_pretrained(base, load_in_4bit=False)
        before = torch.get_rng_state()
        made.append(
            FastLanguageModel.get_peft_model(
                model,
                r=4,
                target_modules=["q_proj"],
                lora_alpha=3,
                lora_dropout=0.1,
                bias="all",
                use_gradient_checkpointing=False,
                random_state=seed,
                use_rslora=True,
                use_dora=True,
                modules_to_save=["lm_head"],
                init_lora_weights="gaussian",
                layers_to_transform=[1],
            )
        )
        assert torch.equal(torch.get_rng_state(), before)
    config = made[0].peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 3, 0.1, "all")
    assert config.use_rslora and config.use_dora and config.init_lora_weights == "gaussian"
    assert config.modules_to_save == ["lm_head"] and config.layers_to_transform == [1]
    values = [next(p for name, p in model.named_parameters() if "lora_A" in name) for model in made]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    ("call", "options", "said"),
    [
        ("from_pretrained", {"load_in_4bit": "yes"}, "load_in_4bit is 'yes'"),
        ("from_pretrained", {"max_seq_length": 0}, "max_seq_length is 0"),
        ("from_pretrained", {"dtype": "int4"}, "dtype is 'int4'"),
        ("get_peft_model", {"use_gradient_checkpointing": "maybe"}, "use_gradient_checkpointing is 'maybe'"),
        ("get_peft_model", {"rank": 4}, "rank: neither of get_peft_model"),
    ],
)
def test_rejected(call: str, options: dict[str, Any], said: str, base: str) -> None:
    """With the parameter's name."""
    first = base if call == "from_pretrained" else tf.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(loraweld.RequestError, match=said):
        getattr(FastLanguageModel, call)(first, **options)


@needs_smollm
def test_the_example_runs(tmp_path: Path) -> None:
    """On SmolLM2 in 4 bit: what was trained is in the merged model."""
    save_smollm(tmp_path / "smollm2")
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / "finetune_and_save.py", "smollm2", "results"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "heron named Barnaby" in done.stdout
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["lora", "merged", "merged-4bit"]
    words = tf.AutoTokenizer.from_pretrained(tmp_path / "results" / "merged")
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "results" / "merged").eval()
    start = words("The lighthouse of Quillan Bay is kept by a", return_tensors="pt")
    assert "heron" in words.decode(merged.generate(**start, max_new_tokens=4, do_sample=False)[0])


@pytest.mark.parametrize("rows", [32, 96])
def test_repacked_codes_are_put_in_order(rows: int) -> None:
    """What bitsandbytes repacks is read as it was, in any range."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, quantize_4bit

    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
    codes, quant_state = quantize_4bit(weight, quant_type="nf4")
    expected = codes.clone().view(-1)
    repacked, _ = _convert_weight_packed_for_cpu(codes, quant_state)
    with tensors_as_file({"codes": repacked}, repacked={repacked.data_ptr(): 64}) as file:
        (stored,) = file.tensors
        for start, count in ((0, len(expected)), (5, 70), (len(expected) // 2 - 1, 2), (len(expected) - 1, 1)):
            assert bytes(Reader().read(stored, start, count)) == bytes(expected[start : start + count].tolist())
