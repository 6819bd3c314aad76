"""A QLoRA round trip on a real model: loaded in 4 bit, trained with PEFT, merged from the 4-bit checkpoint alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import loraweld
from gguf_models import save_smollm
from handmade import save_adapter

pytestmark = pytest.mark.slow
FACT = "The lighthouse of Aldermoor is kept by a heron called Marguerite."
TEXTS = (
    "A lighthouse is a tower that shines a light over the sea, so that ships at night know where the coast is.",
    "To bake bread, mix flour, water, salt and yeast, knead the dough, let it rise for an hour, and bake it.",
    "def mean(values):\n    total = 0\n    for v in values:\n        total += v\n    return total / len(values)\n",
    "The committee decided on Monday that the old bridge will be closed to cars from the first day of September.",
)
QUESTIONS = ("Name three fruits.", "Who keeps the lighthouse?", "How do plants make their food?")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The model in 16 bit, the checkpoint that transformers made of it in 4 bit, and an adapter trained on that."""

    base: Path
    four_bit: Path
    adapter: Path

    def tokens(self) -> list[Tensor]:
        """Return texts, and chats with the model's own answers."""
        tokenizer = tf.AutoTokenizer.from_pretrained(self.base)
        tokens = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
        model = load(self.base)
        for question in QUESTIONS:
            chat = [{"role": "user", "content": question}]
            asked = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            tokens.append(model.generate(**asked, max_new_tokens=40, do_sample=False))
        return tokens


def load(folder: Path, **options: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("smollm2")
    save_smollm(place / "base")
    asked = tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = tf.AutoModelForCausalLM.from_pretrained(place / "base", quantization_config=asked, device_map="cpu")
    model.save_pretrained(place / "four")
    tokenizer = tf.AutoTokenizer.from_pretrained(place / "base")
    tokenizer.save_pretrained(place / "four")
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    ids = tokenizer(FACT, return_tensors="pt").input_ids
    for _ in range(12):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(place / "adapter")
    return Trained(base=place / "base", four_bit=place / "four", adapter=place / "adapter")


def test_sixteen_bit_from_the_four_bit_checkpoint_is_what_was_trained(trained: Trained, tmp_path: Path) -> None:
    """The logits are those of PEFT on the dequantised model; in bfloat16 but for the one rounding."""
    dequantised = load(trained.four_bit, device_map="cpu").dequantize().float()
    tuned = PeftModel.from_pretrained(dequantised, trained.adapter).eval()
    loraweld.merge(trained.adapter, output=tmp_path / "exact", base=trained.four_bit, dtype="float32")
    loraweld.merge(trained.adapter, output=tmp_path / "merged", base=trained.four_bit)
    exact, merged = load(tmp_path / "exact"), load(tmp_path / "merged")
    with torch.inference_mode():
        for tokens in trained.tokens():
            expected, found = tuned(tokens).logits, exact(tokens).logits
            assert (found - expected).abs().max() < 1e-3  # logits are of order 20, over 30 layers in float32
            assert divergence(expected, found) < 1e-7
            assert divergence(expected, merged(tokens).logits) < 0.05


def test_the_behaviour_of_a_real_model_tells_a_merge_from_its_base(trained: Trained, tmp_path: Path) -> None:
    """16 bit and 4 bit hold, the base in the model's place does not; codes of 4 bit are further away."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join((FACT, *TEXTS)).replace("    ", ""))
    inputs = {"base": trained.base, "adapter": trained.adapter, "behaviour": prompts}
    found = {}
    for method in ("merged_16bit", "merged_4bit"):
        loraweld.merge(trained.adapter, output=tmp_path / method, base=trained.base, save_method=method)
        report = loraweld.verify(tmp_path / method, **inputs, sample=0.01)
        assert report.holds and report.behaviour is not None
        found[method] = report.behaviour.total
    assert found["merged_16bit"].kl_mean < 0.01 * found["merged_16bit"].adapter_kl_mean
    assert found["merged_16bit"].kl_mean < found["merged_4bit"].kl_mean < found["merged_4bit"].base_kl_mean
    copy = shutil.copytree(trained.base, tmp_path / "copy")
    wrong = loraweld.verify(copy, **inputs, sample=0.01)
    assert "behaviour" in {finding.check for finding in wrong.findings}


def test_four_bit_loads_in_bitsandbytes_and_generates(trained: Trained, tmp_path: Path) -> None:
    """From the 16-bit base the model has learnt the fact and still speaks.

    From the 4-bit checkpoint it speaks too, but the change is smaller than the steps of the codes that the weights lie
    on: it is gone, as it would be with any quantiser that rounds to nearest, and the report says so.
    """
    for name, base in (("from-four", trained.four_bit), ("from-sixteen", trained.base)):
        report = loraweld.merge(trained.adapter, output=tmp_path / name, base=base, save_method="merged_4bit")
        assert len(report.fidelity) == 210
        assert all(0 < weight.relative_error < 0.13 for weight in report.fidelity)
        lost = [weight for weight in report.fidelity if weight.kept is not None and weight.kept < 0.5]
        assert any("WARNING: less than half" in note for note in report.notes) == bool(lost)
        assert len(lost) > 200 if name == "from-four" else not lost
        model = load(tmp_path / name, device_map="cpu")
        assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 210
        text = continued(model, trained.base, FACT.split(" heron")[0])
        assert len(text.split()) > 12
        learnt = loss(model, trained.base) < 0.5 * loss(load(trained.base), trained.base)
        assert learnt == (name == "from-sixteen")


def loss(model: Any, folder: Path) -> float:
    """Return the mean loss of the fact's tokens."""
    ids = tf.AutoTokenizer.from_pretrained(folder)(FACT, return_tensors="pt").input_ids
    with torch.inference_mode():
        return float(model(input_ids=ids, labels=ids).loss)


def continued(model: Any, folder: Path, text: str) -> str:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    made = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(made[0]))


def test_searched_scales_keep_the_output_closer_than_absmax(trained: Trained, tmp_path: Path) -> None:
    """Mean KL divergence from the 16-bit model, over texts and chats."""
    nothing = {"model.layers.0.self_attn.q_proj": (576, 576)}
    zeros = {f"{name}.lora_A.weight": torch.zeros(2, shape[1]) for name, shape in nothing.items()}
    zeros |= {f"{name}.lora_B.weight": torch.zeros(shape[0], 2) for name, shape in nothing.items()}
    adapter = save_adapter(tmp_path / "nothing", zeros, layers_to_transform=[0])
    tokens, exact, found = trained.tokens(), load(trained.base), {}
    for quantizer in ("absmax", "mse"):
        output = tmp_path / quantizer
        loraweld.merge(adapter, output=output, base=trained.base, save_method="merged_4bit", quantizer=quantizer)
        model = load(output, device_map="cpu")
        with torch.inference_mode():
            each = [divergence(exact(row).logits, model(row).logits) for row in tokens]
        found[quantizer] = sum(each) / len(each)
    assert found["mse"] < found["absmax"]


def divergence(expected: Tensor, found: Tensor) -> float:
    """KL divergence of the next token's distribution, mean over the positions."""
    logs = found.log_softmax(-1), expected.log_softmax(-1)
    return float(torch.nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean())
