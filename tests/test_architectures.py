"""Adapters of many architectures, merged: the model that transformers loads answers as PEFT's does."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

import loraweld
from architectures import ARCHITECTURES, RENAMED, WITH_BACKBONE, Architecture, Inputs
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


def attach(architecture: Architecture, model: nn.Module, targets: list[str], output: Path) -> PeftModel:
    torch.manual_seed(zlib.crc32(architecture.name.encode()))
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    train_(peft)
    peft.save_pretrained(output, save_embedding_layers=False)
    return as_merged_(peft, ("default",))


def merged_answers(architecture: Architecture, folder: Path) -> Tensor:
    """Merge the adapter in `folder` into the base in `folder`, and ask the result, loaded by transformers."""
    loraweld.merge(folder / "adapter", base=folder / "base", output=folder / "merged", dtype="float32")
    return answers(reload_strictly(architecture.model, folder / "merged"), architecture.inputs())


@each_architecture
def test_merged_model_loads_and_answers_as_base_with_adapter(architecture: Architecture, tmp_path: Path) -> None:
    """No key is missing, unexpected or of another shape, and the outputs agree."""
    architecture.save(tmp_path / "base")
    model = architecture.model.from_pretrained(tmp_path / "base").eval()
    before = answers(model, architecture.inputs())
    targets = architecture.linears(model)
    for tower in architecture.towers:
        kinds = {path.rpartition(".")[2] for path in targets if path.startswith(tower)}
        assert len(kinds) >= architecture.kinds, f"{tower} has {kinds} only"
    expected = answers(attach(architecture, model, targets, tmp_path / "adapter"), architecture.inputs())
    assert (expected - before).abs().max() > 1e-2, "the adapter does nothing"

    assert (merged_answers(architecture, tmp_path) - expected).abs().max() <= architecture.tolerance


def with_tables(*, tied: bool) -> pytest.MarkDecorator:
    """Architectures that have an embedding of tokens and a head with a row per token, tied to it or not."""
    chosen = [a for a in ARCHITECTURES if a.has_tables and a.is_tied == tied]
    return pytest.mark.parametrize("architecture", chosen, ids=lambda a: a.name)


@with_tables(tied=True)
def test_adapter_on_a_tied_head_makes_it_a_tensor_of_its_own(architecture: Architecture, tmp_path: Path) -> None:
    """The embedding stays as it is; the head is written under a name that transformers reads, and no longer tied."""
    architecture.save(tmp_path / "base")
    model = architecture.model.from_pretrained(tmp_path / "base").eval()
    head = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
    expected = answers(attach(architecture, model, [head], tmp_path / "adapter"), architecture.inputs())

    assert (merged_answers(architecture, tmp_path) - expected).abs().max() <= architecture.tolerance


@with_tables(tied=False)
def test_adapter_on_embedding_and_head_of_their_own(architecture: Architecture, tmp_path: Path) -> None:
    """Both are found under the names that the architecture has for them."""
    architecture.save(tmp_path / "base")
    model = architecture.model.from_pretrained(tmp_path / "base").eval()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    targets = [path for path, module in model.named_modules() if module in tables]
    expected = answers(attach(architecture, model, targets, tmp_path / "adapter"), architecture.inputs())

    assert (merged_answers(architecture, tmp_path) - expected).abs().max() <= architecture.tolerance


def names_on_disk(model: tf.PreTrainedModel, stored: list[str]) -> dict[str, str]:
    """Return parameter → stored name for all that transformers renames, by its own code."""
    renamings = [row for row in get_model_conversion_mapping(model) if isinstance(row, WeightRenaming)]
    found = {rename_source_key(name, renamings, [])[0]: name for name in stored}
    return {name: on_disk for name, on_disk in found.items() if name != on_disk}


@pytest.mark.parametrize("architecture", RENAMED, ids=lambda a: a.name)
def test_adapter_of_transformers_4_gives_the_same_model(architecture: Architecture, tmp_path: Path) -> None:
    """There, layers had the names that the file has; the same values under those names give the same bytes."""
    architecture.save(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    model = architecture.model.from_pretrained(tmp_path / "base").eval()
    on_disk = names_on_disk(model, list(load_file(weights)))
    targets = [path for path in architecture.linears(model) if f"{path}.weight" in on_disk]
    assert targets, "nothing is renamed"
    attach(architecture, model, targets, tmp_path / "adapter")
    rename_adapter(tmp_path / "adapter", tmp_path / "old", on_disk)

    for adapter, output in (("adapter", "merged"), ("old", "merged-old")):
        loraweld.merge(tmp_path / adapter, base=tmp_path / "base", output=tmp_path / output)

    merged, old = ((tmp_path / name / weights.name).read_bytes() for name in ("merged", "merged-old"))
    assert merged == old != weights.read_bytes()


def rename_adapter(folder: Path, output: Path, names: dict[str, str]) -> None:
    """Write the adapter in `folder` to `output` with its layers under the names that `names` has for their weights."""
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, part, rest = key.removeprefix("base_model.model.").partition(".lora_")
        tensors[f"base_model.model.{names[f'{path}.weight'].removesuffix('.weight')}{part}{rest}"] = tensor
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted({key.split(".")[-3] for key in tensors})
    output.mkdir()
    save_file(tensors, output / "adapter_model.safetensors")
    (output / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("architecture", WITH_BACKBONE, ids=lambda a: a.name)
def test_adapter_of_the_model_without_its_head(architecture: Architecture, tmp_path: Path) -> None:
    """Its paths lack the name that the model has inside the class with a head."""
    architecture.save(tmp_path / "base")
    model = tf.AutoModel.from_pretrained(tmp_path / "base").eval()
    assert type(model) is not architecture.model
    inputs = architecture.inputs()
    targets = [path for path in architecture.linears(model) if "pooler" not in path]  # which the head's class may lack
    expected = answers(attach(architecture, model, targets, tmp_path / "adapter"), inputs)

    loraweld.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "merged", dtype="float32")

    reload_strictly(architecture.model, tmp_path / "merged")
    merged = answers(tf.AutoModel.from_pretrained(tmp_path / "merged").eval(), inputs)
    assert (merged - expected).abs().max() <= architecture.tolerance
