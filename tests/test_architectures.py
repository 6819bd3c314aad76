"""Adapters of many architectures, merged: the model that transformers loads answers as PEFT's does."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import loraweld
from architectures import ARCHITECTURES, Architecture, Inputs
from cases import as_merged_, reload_strictly, train_

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep transformers from reporting progress, and torch from splitting tiny products over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def answers(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return all float outputs that say something of the input, one after the other."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**inputs)
    names = ("logits", "logits_per_image", "last_hidden_state", "text_embeds", "image_embeds")
    found = [output[name].flatten() for name in names if output.get(name) is not None]
    assert found, f"no answer in {list(output)}"
    return torch.cat(found)


def train(architecture: Architecture, base: Path, output: Path) -> PeftModel:
    """Write a random adapter on all linear layers to `output`; return the model with it, not merged."""
    torch.manual_seed(zlib.crc32(architecture.name.encode()))
    model = architecture.model.from_pretrained(base).eval()
    linears = architecture.linears(model)
    for tower in architecture.towers:
        assert len({path.rpartition(".")[2] for path in linears if path.startswith(tower)}) >= architecture.kinds, (
            "too few layers"
        )
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=linears))
    train_(peft)
    peft.save_pretrained(output, save_embedding_layers=False)
    return as_merged_(peft, ("default",))


@each_architecture
def test_merged_model_loads_and_answers_as_base_with_adapter(architecture: Architecture, tmp_path: Path) -> None:
    """No key is missing, unexpected or of another shape, and the outputs agree."""
    architecture.save(tmp_path / "base")
    inputs = architecture.inputs()
    expected = answers(train(architecture, tmp_path / "base", tmp_path / "adapter"), inputs)
    base = answers(architecture.model.from_pretrained(tmp_path / "base").eval(), inputs)
    assert (expected - base).abs().max() > 1e-2, "the adapter does nothing"

    loraweld.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "merged", dtype="float32")

    merged = answers(reload_strictly(architecture.model, tmp_path / "merged"), inputs)
    assert (merged - expected).abs().max() <= architecture.tolerance
