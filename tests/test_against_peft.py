"""A merged model, reloaded, gives the logits of the unmerged PEFT model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

import loraweld
from cases import AdapterCase, pairs, reload_merged
from models import TinyModel, logits

BaseFolder = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep transformers from reporting progress, and torch from splitting tiny products over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> BaseFolder:
    """Return a function model -> folder with its checkpoint, written at the first call."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder(model: TinyModel, dtype: torch.dtype = torch.float32) -> Path:
        key = (model.name, dtype)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(model.name)
            model.save(folders[key], dtype)
        return folders[key]

    return folder


def each_pair(*case_names: str) -> pytest.MarkDecorator:
    chosen = [pytest.param(model, case, id=f"{model.name}-{case.name}") for model, case in pairs(*case_names)]
    return pytest.mark.parametrize(("model", "case"), chosen)


@each_pair()
def test_logits_equal_those_of_the_unmerged_model(
    model: TinyModel, case: AdapterCase, base_folder: BaseFolder, tmp_path: Path
) -> None:
    """Merged and reloaded without PEFT, a model answers as base + adapter do, within 1e-5 in fp32."""
    base = base_folder(model)
    inputs = case.inputs(model)
    trained, adapters = case.train(model, base, tmp_path / "adapter")
    unmerged = trained if model.name in case.lost_on_reload else case.unmerged(model, base, adapters)
    expected = logits(unmerged, inputs)
    assert (expected - logits(case.load_base(model, base), inputs)).abs().max() > 1e-2, "the adapter does nothing"

    loraweld.merge(adapters, output=tmp_path / "merged", base=base, dtype="float32")

    merged = logits(reload_merged(model, case, tmp_path / "merged"), inputs)
    assert merged.shape == expected.shape
    assert (merged - expected).abs().max() <= 1e-5


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def exact_weight(module: nn.Module, adapter: dict[str, Tensor], path: str, scale: float) -> Tensor:
    """Return W + s·BA of one layer, with the DoRA magnitude if there is one, in float64."""
    transposed = type(module).__name__ == "Conv1D"
    base = module.weight.detach().double()
    w = base.T if transposed else base.flatten(1)
    a, b = (adapter[f"{path}.lora_{x}.weight"].double().flatten(1) for x in "AB")
    merged = w + scale * (b @ a)
    if f"{path}.lora_magnitude_vector" in adapter:
        magnitude = adapter[f"{path}.lora_magnitude_vector"].double().flatten()
        merged = merged * (magnitude / merged.norm(dim=1))[:, None]
    return merged.T if transposed else merged.reshape(base.shape)


def exact_merge(model: TinyModel, base: Path, adapter: Path, output: Path) -> dict[str, Tensor]:
    """Merge in float64, round to the dtype of the base, and return the tensors as transformers names them."""
    merged = model.auto.from_pretrained(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = {
        k.removeprefix("base_model.model."): v for k, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    for path in [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]:
        module = merged.get_submodule(path)
        module.weight.data.copy_(exact_weight(module, tensors, path, scale))
    merged.save_pretrained(output)
    return tensors_of(output)


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """Return how many steps of bf16 lie between two tensors; 1 where only fp32 noise of a sum near 0 does."""
    patterns = [t.contiguous().view(torch.int16).int() for t in (a, b)]
    first, second = (torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in patterns)
    noise = (a.float() - b.float()).abs() < 1e-7
    steps = (first - second).abs()
    return torch.where(noise, steps.clamp(max=1), steps)


def deviation_in_steps(model: TinyModel, case: AdapterCase, base: Path, folder: Path) -> Tensor:
    """Merge a bf16 model and return how far each weight of a targeted layer is from the float64 result."""
    _, adapters = case.train(model, base, folder / "adapter")
    loraweld.merge(adapters, output=folder / "merged", base=base)
    merged, before = tensors_of(folder / "merged"), tensors_of(base)
    exact = exact_merge(model, base, adapters[0], folder / "exact")
    case.unmerged(model, base, adapters).merge_and_unload().save_pretrained(folder / "peft")
    peft = tensors_of(folder / "peft")

    assert merged.keys() == before.keys() == exact.keys() == peft.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    changed = sorted(name for name in exact if not torch.equal(exact[name], before[name]))
    assert sorted(name for name in merged if not torch.equal(merged[name], before[name])) == changed
    assert all(steps_apart(merged[name], peft[name]).max() <= 1 for name in changed)
    return torch.cat([steps_apart(merged[name], exact[name]).flatten() for name in changed])


@pytest.mark.parametrize("case_name", ["linears", "rslora", "dora", "conv", "conv-dora"])
def test_bf16_weights_are_exact_sums_rounded_once(case_name: str, base_folder: BaseFolder, tmp_path: Path) -> None:
    """At most 1 in 10,000 weights differs from float64 arithmetic; what no adapter targets is copied."""
    steps = [
        deviation_in_steps(model, case, base_folder(model, torch.bfloat16), tmp_path / model.name)
        for model, case in pairs(case_name)
        if not model.only
    ]
    for of_model in steps:
        assert of_model.numel()
        assert of_model.max() <= 1
    together = torch.cat(steps)
    assert together.count_nonzero() <= 1e-4 * together.numel()
