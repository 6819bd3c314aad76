"""Several adapters at once, and their strength: weights, the methods of PEFT, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import loraweld
from cases import AdapterCase, config, reload_strictly
from exact import BF16, FP16, Format, rounded
from fakes import PREFIX, contents, load_folder
from handmade import (
    EMBEDDING,
    HIDDEN,
    MODULES,
    Q_PROJ,
    VOCAB,
    assert_nearest,
    delta,
    lora,
    loras,
    save_adapter,
    save_llama,
)
from loraweld.cli import main
from models import MODELS, TinyModel, logits

UP_PROJ = MODULES[5]
MODEL_BY_NAME = {model.name: model for model in MODELS}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep transformers from reporting progress, and torch from splitting tiny products over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder: `base`, and the LoRAs `one` (rank 4, scaling 1.5) and `two` (rank 3, scaling 4)."""
    folder = tmp_path / "place"
    save_llama(folder / "base")
    save_adapter(folder / "one", loras(*MODULES))
    save_adapter(folder / "two", other_lora(), lora_alpha=12, layers_to_transform=[0])
    monkeypatch.chdir(folder)
    return folder


def other_lora(rank: int = 3) -> dict[str, Tensor]:
    return {**lora(Q_PROJ, rank=rank, seed=51), **lora(UP_PROJ, rank=rank, seed=52)}


def name_of(options: Mapping[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def merged(*adapters: str, output: str = "out", base: str = "base", **options: Any) -> dict[str, Tensor]:
    loraweld.merge(adapters, base=base, output=output, **options)
    return load_folder(Path(output))


def stored(name: str, base: str = "base") -> Tensor:
    return load_folder(Path(base))[name].double()


# The sum, against float64 arithmetic


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({}, 1.0, 1.0),
        ({"weights": [0.7, 0.3]}, 0.7, 0.3),
        ({"weights": [0.7, -1.2], "combine": "sum"}, 0.7, -1.2),
        ({"weights": [1, 0.5], "scale": -2}, -2.0, -1.0),
        ({"scale": 0.25}, 0.25, 0.25),
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_sum_adds_each_change_times_its_weight(
    options: dict[str, Any], first: float, second: float, dtype: str, place: Path
) -> None:
    """W + Σ w·s·BA in one rounding, for adapters of different rank and scaling, in the modules that each has."""
    found = merged("one", "two", dtype=dtype, **options)
    one, two = loras(*MODULES), other_lora()
    for module in MODULES:
        exact = stored(f"{module}.weight") + first * 1.5 * delta(one, module)
        if module in (Q_PROJ, UP_PROJ):
            exact = exact + second * 4 * delta(two, module)
        assert_nearest(found[f"{module}.weight"], exact)
    assert torch.equal(found["model.norm.weight"].double(), stored("model.norm.weight"))


def test_one_adapter_and_its_strength(place: Path) -> None:
    """scale: the factor of what one adapter changes; weights of one number means the same."""
    found = merged("one", scale=0.5)
    exact = stored(f"{Q_PROJ}.weight") + 0.75 * delta(loras(*MODULES), Q_PROJ)
    assert_nearest(found[f"{Q_PROJ}.weight"], exact)
    assert contents_without_record(place / "out") == contents_without_record(merge_to(place / "w", weights=[0.5]))


def merge_to(output: Path, **options: Any) -> Path:
    loraweld.merge("one", base="base", output=output, **options)
    return output


def contents_without_record(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "loraweld.json"}


def test_a_merge_is_taken_back(place: Path) -> None:
    """The strength -1, applied to the merged model, gives the base within the rounding of the first merge."""
    merged("one", output="there", dtype="float32")
    back = merged("one", base="there", output="back", scale=-1, dtype="float32")
    there = load_folder(Path("there"))
    for name, tensor in load_folder(Path("base")).items():
        step = 2.0**-22 * there[name].abs().max()
        assert (back[name] - tensor.float()).abs().max() <= step


def test_a_merge_into_a_table_is_taken_back(place: Path) -> None:
    """The copy of the base's table in the adapter does not stand in the way: it is not what is taken off."""
    table = load_folder(Path("base"))[f"{EMBEDDING}.weight"]
    tensors = {**embedding_lora(21), f"{EMBEDDING}.base_layer.weight": table}
    save_adapter(place / "table", tensors, r=4, target_modules=["embed_tokens"])
    merged("table", output="there", dtype="float32")
    back = merged("table", base="there", output="back", scale=-1, dtype="float32")
    assert (back[f"{EMBEDDING}.weight"] - table.float()).abs().max() <= 2.0**-22 * table.float().abs().max() * 2


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 7}, {"max_memory": "64MB"}], ids=name_of)
def test_weighted_edits_give_the_same_bytes_always(options: dict[str, Any], place: Path) -> None:
    """Threads and memory do not show in what a weighted DoRA gives."""
    save_adapter(place / "dora", dora(Q_PROJ, seed=9), use_dora=True, layers_to_transform=[0])
    merged("dora", "two", weights=[0.5, -1], dtype="float16")
    merged("dora", "two", weights=[0.5, -1], dtype="float16", output="same", **options)
    assert contents(place / "out") == contents(place / "same")


def test_a_dora_on_an_embedding_is_taken_in_part(place: Path) -> None:
    """The norm runs down the columns of the table; half of the edit lies in the middle."""
    magnitude = 1 + torch.rand(HIDDEN, generator=torch.Generator().manual_seed(4))
    tensors = {**embedding_lora(21), f"{EMBEDDING}.lora_magnitude_vector": magnitude}
    save_adapter(place / "table", tensors, r=4, target_modules=["embed_tokens"], use_dora=True)
    found = merged("table", scale=0.5)[f"{EMBEDDING}.weight"]
    base = stored(f"{EMBEDDING}.weight")
    a, b = (tensor.double() for tensor in embedding_lora(21).values())
    changed = base + 1.5 * (b @ a).T
    changed = changed * (magnitude.double() / changed.norm(dim=0))
    assert_nearest(found, base + 0.5 * (changed - base))


def test_a_weighted_edit_goes_into_codes(place: Path) -> None:
    """An encoded output is made of the same float32 values: it decodes to what a 32-bit merge gives, within a step."""
    save_adapter(place / "dora", dora(Q_PROJ, seed=9), use_dora=True, layers_to_transform=[0])
    plain = merged("dora", scale=0.5, dtype="float32")[f"{Q_PROJ}.weight"]
    codes = merged("dora", scale=0.5, save_method="merged_8bit", output="codes")
    scales = codes[f"{Q_PROJ}.SCB"][:, None] / 127
    assert ((codes[f"{Q_PROJ}.weight"].float() * scales - plain).abs() <= 0.51 * scales + 1e-6).all()


def test_lora_bias_is_weighed_as_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """b + w·s·(bias of B); a trained bias below it is taken in part."""
    monkeypatch.chdir(tmp_path)
    bias = {f"{Q_PROJ}.bias": torch.linspace(-1, 1, HIDDEN).bfloat16()}
    save_llama(tmp_path / "base", more=bias, attention_bias=True)
    added, trained = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3)), torch.linspace(2, 1, HIDDEN)
    parts = {f"{Q_PROJ}.lora_B.bias": added, f"{Q_PROJ}.base_layer.bias": trained}
    only = {"target_modules": [Q_PROJ], "lora_bias": True, "bias": "lora_only"}
    save_adapter(tmp_path / "one", {**lora(Q_PROJ), **parts}, **only)
    found = merged("one", scale=0.5, dtype="float32")
    base = bias[f"{Q_PROJ}.bias"].double()
    exact = base + 0.5 * (trained.double() - base) + 0.5 * 1.5 * added.double()
    assert_nearest(found[f"{Q_PROJ}.bias"], exact)


def dora(module: str, *, seed: int, rank: int = 4) -> dict[str, Tensor]:
    size = lora(module, rank=rank, seed=seed)[f"{module}.lora_B.weight"].shape[0]
    magnitude = 1 + torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return {**lora(module, rank=rank, seed=seed), f"{module}.lora_magnitude_vector": magnitude}


def dora_of(weight: Tensor, tensors: Mapping[str, Tensor], module: str, scaling: float, *, input: Tensor) -> Tensor:
    """Return m / ‖W + Δ‖ · (input + Δ) in float64."""
    change = scaling * delta(tensors, module)
    factor = tensors[f"{module}.lora_magnitude_vector"].double() / (weight + change).norm(dim=1)
    return factor[:, None] * (input + change)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (-0.5, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_dora_and_lora_mix_with_weights(weights: tuple[float, float], dtype: str, place: Path) -> None:
    """What is no plain addition is taken in part, W + w·(W′ − W); a LoRA of another rank then is added to that."""
    tensors = dora(Q_PROJ, seed=9)
    save_adapter(place / "dora", tensors, use_dora=True, layers_to_transform=[0])
    found = merged("dora", "two", weights=weights, dtype=dtype)[f"{Q_PROJ}.weight"]
    base = stored(f"{Q_PROJ}.weight")
    changed = base + weights[0] * (dora_of(base, tensors, Q_PROJ, 1.5, input=base) - base)
    assert_nearest(found, changed + weights[1] * 4 * delta(other_lora(), Q_PROJ))


def test_two_doras_chain_with_weights(place: Path) -> None:
    """The second one acts on what the first has made at its weight; both norms are those of the unedited weight."""
    one, two = dora(Q_PROJ, seed=9), dora(Q_PROJ, seed=10, rank=2)
    for name, tensors in (("d1", one), ("d2", two)):
        save_adapter(place / name, tensors, use_dora=True, layers_to_transform=[0])
    found = merged("d1", "d2", weights=[0.6, 0.4])[f"{Q_PROJ}.weight"]
    base = stored(f"{Q_PROJ}.weight")
    first = base + 0.6 * (dora_of(base, one, Q_PROJ, 1.5, input=base) - base)
    second = first + 0.4 * (dora_of(base, two, Q_PROJ, 3.0, input=first) - first)
    assert_nearest(found, second)


def test_pissa_is_taken_in_part_with_its_residual(place: Path) -> None:
    """Residual and delta are one edit: half of it lies in the middle between the base and the merge at weight 1."""
    save_adapter(place / "pissa", lora(Q_PROJ), init_lora_weights="pissa", layers_to_transform=[0])
    save_llama(place / "base32", torch.float32)
    name = f"{Q_PROJ}.weight"
    half = merged("pissa", base="base32", scale=0.5, dtype="float32")[name].double()
    base = stored(name, "base32")
    u, s, vh = torch.linalg.svd(base)
    residual = base - (u[:, :4] * s[:4]) @ vh[:4]
    exact = base + 0.5 * (residual + 1.5 * delta(lora(Q_PROJ), Q_PROJ) - base)
    assert (half - exact).abs().max() <= 1e-5


# Tensors and rows that are trained as a whole


def test_a_trained_tensor_is_taken_in_part(place: Path) -> None:
    """modules_to_save at the weight w: W + w·(V − W)."""
    norm = torch.linspace(0, 2, HIDDEN)
    save_adapter(place / "norm", {**lora(Q_PROJ), "model.norm.weight": norm}, layers_to_transform=[0])
    found = merged("norm", "one", weights=[0.25, 1], dtype="float32")["model.norm.weight"]
    base = stored("model.norm.weight")
    assert_nearest(found, base + 0.25 * (norm.double() - base))


@pytest.mark.parametrize(("dtype", "form"), [("bfloat16", BF16), ("float16", FP16)])
def test_what_nearly_cancels_is_rounded_once(dtype: str, form: Format, place: Path) -> None:
    """Half way to what is almost -W float32 has too few bits left; the result is the exact value's nearest."""
    name = f"{UP_PROJ}.weight"
    base = stored(name)
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    trained = (noise * 1e-4 - base).float()
    save_adapter(place / "whole", {**lora(Q_PROJ), name: trained}, layers_to_transform=[0])
    found = merged("whole", scale=0.5, dtype=dtype)[name]
    assert torch.equal(found, rounded((base + 0.5 * (trained.double() - base)).numpy(), form))


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_are_taken_in_part(tied: bool, dtype: str, place: Path) -> None:
    """Rows of trained tokens at the weight w; other rows keep their bits, and a tied head stays tied."""
    save_llama(place / "table", tied=tied)
    rows = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(8))
    key = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
    save_adapter(
        place / "tokens", {**lora(Q_PROJ), key: rows}, trainable_token_indices=[3, 17], layers_to_transform=[0]
    )
    found = merged("tokens", base="table", scale=0.4, dtype=dtype)
    exact = stored(f"{EMBEDDING}.weight", "table")
    exact[[3, 17]] += 0.4 * (rows.double() - exact[[3, 17]])
    assert_nearest(found[f"{EMBEDDING}.weight"], exact)
    assert ("lm_head.weight" in found) is not tied


def embedding_lora(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((4, VOCAB), (HIDDEN, 4)))
    return {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}


def test_a_tied_embedding_is_weighed_and_untied(place: Path) -> None:
    """LoRAs on an embedding whose head is tied to it: two tensors, and PEFT's copies of the table play no part."""
    base = save_llama(place / "tied", tied=True)
    table = load_folder(base)[f"{EMBEDDING}.weight"]
    for name, seed in (("e1", 21), ("e2", 22)):
        tensors = {**embedding_lora(seed), f"{EMBEDDING}.base_layer.weight": table}
        save_adapter(place / name, tensors, r=4, target_modules=["embed_tokens"])
    found = merged("e1", "e2", base="tied", weights=[0.7, -0.3])
    exact = table.double()
    for weight, seed in ((0.7, 21), (-0.3, 22)):
        a, b = (tensor.double() for tensor in embedding_lora(seed).values())
        exact = exact + weight * 1.5 * (b @ a).T
    assert_nearest(found[f"{EMBEDDING}.weight"], exact)
    assert torch.equal(found["lm_head.weight"], table)
    assert json.loads((place / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_weight_0_changes_nothing_but_must_fit(place: Path) -> None:
    """An adapter of weight 0 is checked against the base, and the result is that of the others."""
    (place / "one" / "tokenizer_config.json").write_text('{"model_max_length": 5}')
    merged("one", "two", weights=[0, 1])
    merged("two", output="alone")
    assert contents_without_record(place / "out") == contents_without_record(place / "alone")
    save_adapter(place / "misfit", lora("model.layers.9.mlp.up_proj", (24, 16)))
    with pytest.raises(loraweld.MatchError, match=r"layers\.9"):
        merged("misfit", "two", weights=[0, 1], output="other")


def test_all_at_0_is_the_base(place: Path) -> None:
    """The strength 0 writes the base."""
    found = merged("one", scale=0)
    assert all(torch.equal(found[name], tensor) for name, tensor in load_folder(Path("base")).items())


# The methods of PEFT, against PEFT: `add_weighted_adapter`, then the unmerged forward


def linears(model: TinyModel, **options: Any) -> LoraConfig:
    return config(target_modules=list(model.linears), **options)


def trained_pair(
    model: TinyModel, configs: Sequence[LoraConfig], folder: Path
) -> tuple[AdapterCase, PeftModel, tuple[Path, ...]]:
    """Write base and two random adapters, and return the model that has them loaded."""
    model.save(folder / "base")
    case = AdapterCase(name="pair", configs=lambda _: tuple(configs), adapter_names=("a", "b"))
    _, adapters = case.train(model, folder / "base", folder / "adapters")
    return case, case.unmerged(model, folder / "base", adapters), adapters


def assert_as_peft(
    model: TinyModel, folder: Path, peft: PeftModel, adapters: Sequence[Path], weights: list[float], **options: Any
) -> None:
    """Compare the logits of our merge, and of our adapter in PEFT, with those of PEFT's combined adapter."""
    method = {k: v for k, v in options.items() if k != "combine"}
    peft.base_model.add_weighted_adapter(["a", "b"], weights, "both", combination_type=options["combine"], **method)
    peft.base_model.set_adapter("both")
    inputs = model.inputs(model_vocab(peft))
    expected = logits(peft, inputs)
    peft.base_model.set_adapter(["a", "b"])
    with peft.disable_adapter():
        assert (expected - logits(peft, inputs)).abs().max() > 1e-3, "the adapters do nothing"
    loraweld.merge(adapters, base=folder / "base", output=folder / "out", weights=weights, dtype="float32", **options)
    assert (logits(reload_strictly(model.auto, folder / "out"), inputs) - expected).abs().max() <= 1e-5
    loraweld.merge(adapters, output=folder / "lora", weights=weights, save_method="lora", **options)
    again = PeftModel.from_pretrained(model.auto.from_pretrained(folder / "base"), folder / "lora").eval()
    assert (logits(again, inputs) - expected).abs().max() <= 1e-5


def model_vocab(peft: nn.Module) -> int:
    return int(getattr(peft.config, "vocab_size", 0) or 0)


APART = [
    {"combine": "linear"},
    {"combine": "ties", "density": 0.4},
    {"combine": "ties", "density": 0.4, "majority_sign_method": "frequency"},
    {"combine": "ties", "density": 1.0},
    {"combine": "magnitude_prune", "density": 0.3},
]
OF_ANY_RANK = [
    {"combine": "cat"},
    {"combine": "svd"},
    {"combine": "svd", "svd_rank": 2},
    {"combine": "svd", "svd_rank": 7},
    {"combine": "ties_svd", "density": 0.4},
    {"combine": "ties_svd", "density": 0.6, "majority_sign_method": "frequency", "svd_rank": 6},
    {"combine": "magnitude_prune_svd", "density": 0.3},
]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.6]], ids=str)
@pytest.mark.parametrize("options", [*APART, *OF_ANY_RANK], ids=name_of)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_methods_give_what_peft_gives(name: str, options: dict[str, Any], weights: list[float], tmp_path: Path) -> None:
    """Logits within 1e-5 of PEFT's own combination, merged by us and as an adapter for PEFT."""
    model = MODEL_BY_NAME[name]
    rank = 4 if options in APART else 3
    second = config(target_modules=list(model.linears[1:]), r=rank, lora_alpha=5)
    _, peft, adapters = trained_pair(model, [linears(model), second], tmp_path)
    assert_as_peft(model, tmp_path, peft, adapters, weights, **options)


@pytest.mark.parametrize("options", [APART[0], APART[1], OF_ANY_RANK[0], OF_ANY_RANK[1], OF_ANY_RANK[4]], ids=name_of)
@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_methods_on_other_layers(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Convolutions and embeddings, as PEFT combines them."""
    model = MODEL_BY_NAME["vit" if kind == "conv" else "gemma2"]
    targets = [*model.convs, *model.linears] if kind == "conv" else [model.embedding, *model.linears]
    pair = [config(target_modules=targets), config(target_modules=targets, lora_alpha=3)]
    _, peft, adapters = trained_pair(model, pair, tmp_path)
    assert_as_peft(model, tmp_path, peft, adapters, [0.7, 0.4], **options)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_rslora_counts_as_it_was_trained(method: str, tmp_path: Path) -> None:
    """The scaling is Σ w·s·BA: PEFT's forward with scaled adapters, not its combination (sqrt(r) too strong)."""
    model = MODEL_BY_NAME["llama"]
    case, peft, adapters = trained_pair(model, [linears(model, use_rslora=True), linears(model, r=3)], tmp_path)
    for module in peft.modules():
        for name, weight in (("a", 0.7), ("b", -0.3)):
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    inputs = case.inputs(model)
    expected = logits(peft, inputs)
    loraweld.merge(
        adapters,
        base=tmp_path / "base",
        output=tmp_path / "out",
        weights=[0.7, -0.3],
        combine=method,
        dtype="float32",
        **({"svd_rank": 7} if method == "svd" else {}),
    )
    assert (logits(reload_strictly(model.auto, tmp_path / "out"), inputs) - expected).abs().max() <= 1e-5


# The random methods


def factors(folder: Path) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_folder(folder).items()}


def combined(output: str, **options: Any) -> dict[str, Tensor]:
    loraweld.merge(["one", "same"], base="base", output=output, save_method="lora", **options)
    return factors(Path(output))


@pytest.fixture
def same_rank(place: Path) -> Path:
    save_adapter(place / "same", {**lora(Q_PROJ, seed=61)}, lora_alpha=12, layers_to_transform=[0])
    return place


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_follows_from_its_seed(method: str, same_rank: Path) -> None:
    """The same seed gives the same bytes, 0 is the default, another seed gives others."""
    default, zero, other = (
        combined(name, combine=method, density=0.5, **options)
        for name, options in (("d", {}), ("z", {"seed": 0}), ("o", {"seed": 1}))
    )
    assert contents(same_rank / "d") == contents(same_rank / "z")
    assert any(not torch.equal(default[name], other[name]) for name in default)
    assert zero.keys() == other.keys()


def test_dare_drops_at_random_and_rescales(place: Path) -> None:
    """Each element is 0 or the value over the density, the share that stays is the density, adapters differ."""
    density, module = 0.3, "model.layers.0.mlp.up_proj"
    wide = {
        f"{module}.lora_A.weight": torch.ones(64, 1000),
        f"{module}.lora_B.weight": torch.ones(900, 64),
    }
    for name in ("w1", "w2"):
        save_adapter(place / name, wide, lora_alpha=64)
    options = {"base": "any", "save_method": "lora", "combine": "dare_linear", "density": density, "weights": [1, 4]}
    loraweld.merge(["w1", "w2"], output="lora", **options)
    a, b = (factors(place / "lora")[f"{module}.lora_{part}.weight"] * density for part in "AB")
    for tensor in (a, b):
        values, counts = tensor.unique(return_counts=True)
        assert torch.allclose(values, torch.tensor([0.0, 1.0, 2.0, 3.0]), atol=1e-6)
        shares = counts / tensor.numel()
        expected = torch.tensor([0.49, 0.21, 0.21, 0.09])  # of 0, of the first alone, of the second alone, of both
        sigma = (expected * (1 - expected) / tensor.numel()).sqrt()
        assert ((shares - expected).abs() < 5 * sigma).all()


@pytest.mark.parametrize("method", ["dare_linear_svd", "dare_ties_svd"])
def test_dare_without_dropping_is_the_method_without_it(method: str, place: Path) -> None:
    """At the density 1 nothing is drawn: the plain sum, or the mean of those with the elected sign."""
    found = merged("one", "two", combine=method, density=1, svd_rank=16, weights=[0.7, 0.3], dtype="float32")
    deltas = [1.5 * delta(loras(*MODULES), Q_PROJ), 4 * delta(other_lora(), Q_PROJ)]
    if method == "dare_linear_svd":
        change = 0.7 * deltas[0] + 0.3 * deltas[1]
    else:
        agree = [d.sign() == torch.where(sum(deltas) >= 0, 1, -1) for d in deltas]
        change = (0.7 * deltas[0] * agree[0] + 0.3 * deltas[1] * agree[1]) / sum(mask.int() for mask in agree)
    difference = found[f"{Q_PROJ}.weight"].double() - stored(f"{Q_PROJ}.weight") - change
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_apart_is_what_it_says_of_each_factor(method: str, place: Path) -> None:
    """At the density 1: A and B are combined apart, each with the root of w·s, the sign at A."""
    save_adapter(place / "same", lora(Q_PROJ, seed=61), lora_alpha=12, layers_to_transform=[0])
    found = combined("lora", combine=method, density=1, weights=[0.7, -0.3])
    one, two = lora(Q_PROJ, seed=1), lora(Q_PROJ, seed=61)
    for part, sign in (("A", -1), ("B", 1)):
        key = f"{Q_PROJ}.lora_{part}.weight"
        x, y = one[key].double(), two[key].double()
        u, v = (0.7 * 1.5) ** 0.5, sign * (0.3 * 3) ** 0.5
        exact = u * x + v * y
        if method == "dare_ties":
            elected = torch.where(x + y >= 0, 1, -1)
            mask = x.sign() == elected, y.sign() == elected
            exact = (u * x * mask[0] + v * y * mask[1]) / (mask[0].int() + mask[1].int()).clamp(min=1)
        assert (found[key] - exact).abs().max() <= 1e-6


# What goes with a combined adapter, and what it is called


def test_what_one_adapter_alone_has_passes_through(place: Path) -> None:
    """A tensor trained as a whole and trained token rows are those of the adapter that has them."""
    rows, norm = torch.ones(2, HIDDEN), torch.linspace(0, 2, HIDDEN)
    whole = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": rows, "model.norm.weight": norm}
    save_adapter(
        place / "more",
        {**lora(Q_PROJ, seed=71), **whole},
        trainable_token_indices=[3, 17],
        layers_to_transform=[0],
        modules_to_save=["norm"],
    )
    found = merged("more", "two", combine="cat", weights=[0.5, 0.5], dtype="float32")
    assert torch.equal(found["model.norm.weight"], norm)
    assert torch.equal(found[f"{EMBEDDING}.weight"][[3, 17]], rows)
    exact = stored(f"{Q_PROJ}.weight") + 0.5 * 1.5 * delta(lora(Q_PROJ, seed=71), Q_PROJ)
    exact += 0.5 * 4 * delta(other_lora(), Q_PROJ)
    assert_nearest(found[f"{Q_PROJ}.weight"], exact)


def test_record_report_and_plan_name_weights_and_method(place: Path) -> None:
    """loraweld.json, the report and the plan say how the adapters were combined; a plain merge says nothing of it."""
    options = {"base": "base", "weights": [0.7, 0.3], "combine": "dare_ties_svd", "density": 0.5}
    said = {
        "method": "dare_ties_svd",
        "weights": [0.7, 0.3],
        "density": 0.5,
        "seed": 0,
        "majority_sign_method": "total",
    }
    report = loraweld.merge(["one", "two"], output="out", **options)
    record = json.loads((place / "out" / "loraweld.json").read_text())
    assert record["combination"] == said
    assert [adapter["name"] for adapter in record["adapters"]] == ["one", "two"]
    assert report.to_json()["combination"] == said
    assert any("one × 0.7, two × 0.3 (dare_ties_svd, density 0.5, seed 0" in line for line in report.lines())
    assert loraweld.plan(["one", "two"], output="other", **options).to_json()["combination"] == said
    merged("one", output="plain")
    assert "combination" not in json.loads((place / "plain" / "loraweld.json").read_text())


def test_the_fingerprint_depends_on_every_option(place: Path) -> None:
    """Two combinations of the same adapters are two merges: one is not taken for the other."""
    save_adapter(place / "same", lora(Q_PROJ, seed=61), layers_to_transform=[0])
    made = [
        {},
        {"weights": [0.7, 0.3]},
        {"scale": 0.5},
        {"combine": "linear"},
        {"combine": "cat"},
        {"combine": "dare_linear", "density": 0.5},
        {"combine": "dare_linear", "density": 0.6},
        {"combine": "dare_linear", "density": 0.5, "seed": 1},
        {"combine": "ties", "density": 0.5},
        {"combine": "ties", "density": 0.5, "majority_sign_method": "frequency"},
        {"combine": "svd"},
        {"combine": "svd", "weights": [1, 2]},
        {"combine": "svd", "svd_rank": 2},
    ]
    prints = [loraweld.plan(["one", "same"], base="base", output="out", **options).fingerprint for options in made]
    assert len(set(prints)) == len(made)
    merged("one", "same", combine="linear")
    with pytest.raises(loraweld.OutputError):
        merged("one", "same", combine="linear", weights=[2, 1])


def test_a_repeated_combination_is_compared(place: Path) -> None:
    """The combined adapter is made anew, and its merge found to be there, byte for byte."""
    options = {"base": "base", "output": "out", "combine": "ties_svd", "density": 0.5}
    assert not loraweld.merge(["one", "two"], **options).was_there
    assert loraweld.merge(["one", "two"], **options).was_there


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1]}, "1 weights for 2 adapters"),
        ({"weights": [1, 2, 3]}, "3 weights for 2 adapters"),
        ({"weights": [1, float("nan")]}, "weights is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"weights": [1e300, 1], "scale": 1e300}, "weights times scale is inf"),
        ({"combine": "tiess"}, "did you mean ties"),
        ({"combine": "ties"}, "ties needs a density"),
        ({"combine": "dare_linear_svd"}, "needs a density"),
        ({"combine": "ties", "density": 0}, "density is 0"),
        ({"combine": "ties", "density": 1.5}, "density is 1.5"),
        ({"combine": "ties", "density": float("nan")}, "density is nan"),
        ({"density": 0.5}, "density has no effect with combine sum"),
        ({"combine": "cat", "density": 0.5}, "density has no effect with combine cat"),
        ({"combine": "ties", "density": 0.5, "seed": 1}, "seed has no effect with combine ties"),
        ({"seed": 1}, "seed has no effect with combine sum"),
        ({"combine": "dare_ties", "density": 0.5, "seed": -1}, "seed is -1"),
        ({"combine": "cat", "svd_rank": 4}, "svd_rank has no effect with combine cat"),
        ({"combine": "svd", "svd_rank": 0}, "svd_rank is 0"),
        ({"combine": "linear", "majority_sign_method": "total"}, "majority_sign_method has no effect"),
        ({"combine": "ties", "density": 0.5, "majority_sign_method": "most"}, "expected one of total, frequency"),
        ({"save_method": "lora"}, "combine cat is their sum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_belong_together(options: dict[str, Any], message: str, place: Path) -> None:
    """Refused by name before anything is read or written."""
    with pytest.raises(loraweld.RequestError, match=message):
        loraweld.plan(["one", "two"], base="base", output="out", **options)
    assert not (place / "out").exists()


def test_one_adapter_is_not_combined(place: Path) -> None:
    """A method for several adapters, or a strength where only a copy is written, is refused by name."""
    with pytest.raises(loraweld.RequestError, match="two adapters or more"):
        merged("one", combine="cat")
    with pytest.raises(loraweld.RequestError, match="scale have no effect with save_method lora"):
        loraweld.merge("one", output="out", save_method="lora", scale=2)


def other_adapter(kind: str, folder: Path) -> None:
    """Write an adapter that no method but sum takes."""
    options: dict[str, Any] = {"layers_to_transform": [0]}
    tensors = lora(Q_PROJ, seed=81)
    if kind == "dora":
        tensors, options = dora(Q_PROJ, seed=81), {**options, "use_dora": True}
    elif kind == "lora_bias":
        tensors = {**tensors, f"{Q_PROJ}.lora_B.bias": torch.ones(HIDDEN)}
    elif kind == "pissa":
        options["init_lora_weights"] = "pissa"
    elif kind == "target_parameters":
        options["target_parameters"] = ["mlp.experts.gate_up_proj"]
    save_adapter(folder, tensors, **options)


@pytest.mark.parametrize("kind", ["dora", "lora_bias", "pissa", "target_parameters"])
def test_other_than_lora_is_not_combined(kind: str, place: Path) -> None:
    """Refused with the adapter and what it is, also where no base is looked at."""
    other_adapter(kind, place / "other")
    words = {"dora": "is a DoRA", "pissa": "'pissa'"}.get(kind, kind)
    with pytest.raises(loraweld.AdapterError, match=f"other: .*{words}"):
        loraweld.merge(["one", "other"], base="any", output="out", save_method="lora", combine="cat")


@pytest.mark.parametrize("options", APART, ids=name_of)
def test_equal_ranks_are_needed_where_factors_are_combined_apart(options: dict[str, Any], place: Path) -> None:
    """Refused as by PEFT, with the modules and the ranks."""
    with pytest.raises(loraweld.AdapterError, match="up_proj: one has rank 4, two has rank 3"):
        merged("one", "two", **options)


def test_the_base_of_a_combined_adapter(place: Path) -> None:
    """The one that all adapters name, or the one asked for; different names are refused, as for a merge."""
    for name, base in (("n1", "org/this"), ("n2", "org/this"), ("n3", "org/that")):
        save_adapter(place / name, lora(Q_PROJ), base_model_name_or_path=base)
    options = {"save_method": "lora", "combine": "svd"}
    loraweld.merge(["n1", "n2"], output="named", **options)
    loraweld.merge(["n1", "n3"], output="asked", base="org/those", **options)
    for output, base in (("named", "org/this"), ("asked", "org/those")):
        assert json.loads((place / output / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    with pytest.raises(loraweld.RequestError, match="name different bases"):
        loraweld.merge(["n1", "n3"], output="none", **options)


def test_adapters_of_other_layers_is_refused(place: Path) -> None:
    """Adapters whose factors have other sizes cannot be combined."""
    save_adapter(place / "wide", lora(Q_PROJ, (32, 32)))
    with pytest.raises(loraweld.AdapterError, match="different layers"):
        loraweld.merge(["one", "wide"], base="any", output="out", save_method="lora", combine="cat")


def save_norm(folder: Path, value: float, **options: Any) -> None:
    save_adapter(
        folder, {**lora(Q_PROJ, seed=91), "model.norm.weight": torch.full((HIDDEN,), value)}, layers_to_transform=[0]
    )


@pytest.mark.parametrize("options", [{"combine": "cat"}, {"weights": [0.5, 0.5]}, {"weights": [1, 0.5]}], ids=name_of)
def test_two_adapters_that_replace_one_tensor(options: dict[str, Any], place: Path) -> None:
    """Refused with the tensor, whether they are combined or summed with weights; at weight 0 one of them gives way."""
    save_norm(place / "n1", 1.0)
    save_norm(place / "n2", 2.0)
    with pytest.raises(loraweld.LoraweldError, match=r"model\.norm\.weight"):
        merged("n1", "n2", **options)
    found = merged("n1", "n2", output="one-of-them", **{**options, "weights": [0, 1]})
    assert torch.equal(found["model.norm.weight"], torch.full((HIDDEN,), 2.0).bfloat16())


def test_a_tensor_replaced_in_part_has_no_other_edits(place: Path) -> None:
    """What one adapter replaces in part, another one may not edit: the order would decide."""
    save_adapter(
        place / "whole", {**lora(MODULES[1]), f"{Q_PROJ}.weight": torch.ones(HIDDEN, HIDDEN)}, layers_to_transform=[0]
    )
    for adapters in (("whole", "two"), ("two", "whole")):
        weights = [0.5 if name == "whole" else 1 for name in adapters]
        with pytest.raises(loraweld.MatchError, match=r"q_proj\.weight: whole replaces it with a weight other than 1"):
            merged(*adapters, weights=weights)


def test_a_tensor_of_another_shape_is_taken_whole_or_not_at_all(place: Path) -> None:
    """Nothing lies between a resized table and the base's: weights other than 1 and 0 are refused."""
    rows = torch.ones(VOCAB + 2, HIDDEN)
    resized = {f"{EMBEDDING}.weight": rows, "lm_head.weight": rows.clone()}
    save_adapter(place / "resized", {**lora(Q_PROJ), **resized}, layers_to_transform=[0])
    with pytest.raises(loraweld.MatchError, match=r"weight 0\.5.*\n.*lm_head\.weight: \(42, 16\).*\(40, 16\)"):
        merged("resized", scale=0.5)
    assert merged("resized", output="whole")["lm_head.weight"].shape == (VOCAB + 2, HIDDEN)
    assert merged("resized", output="none", scale=0)["lm_head.weight"].shape == (VOCAB, HIDDEN)


def test_a_part_that_is_missing_in_one_adapter_is_seen(place: Path) -> None:
    """Each adapter is checked by its own config: a truncated file does not hide behind the other one."""
    tensors = {name: tensor for name, tensor in loras(*MODULES).items() if "layers.1.mlp.up_proj" not in name}
    save_adapter(place / "cut", tensors)
    with pytest.raises(loraweld.MatchError, match=r"cut: model\.layers\.1\.mlp\.up_proj"):
        merged("one", "cut", combine="cat")


# The command


def run(line: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(line.split())
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_the_command_merges_with_weights(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """loraweld merge A B --weights …: numbers may be negative; the report says what was done."""
    assert run("merge one two --base base -o out --weights 0.7 -0.3 --scale 2") == 0
    assert "one × 1.4, two × -0.6 (sum)" in capfd.readouterr().out
    exact = (
        stored(f"{Q_PROJ}.weight") + 1.4 * 1.5 * delta(loras(*MODULES), Q_PROJ) - 0.6 * 4 * delta(other_lora(), Q_PROJ)
    )
    assert_nearest(load_folder(place / "out")[f"{Q_PROJ}.weight"], exact)


def test_the_command_combines(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All options of a combination, as on the command line and in Python, give the same files."""
    line = (
        "merge one two --base base -o out --combine DARE-ties-svd --weights 0.7 0.3 --density 0.5 --seed 7 "
        "--svd-rank 3 --majority-sign-method frequency"
    )
    assert run(f"{line} --quiet") == 0
    options = {"density": 0.5, "seed": 7, "svd_rank": 3, "majority_sign_method": "frequency"}
    merged("one", "two", output="same", combine="dare_ties_svd", weights=[0.7, 0.3], **options)
    assert contents(place / "out") == contents(place / "same")
    assert run(line.replace("merge", "plan").replace("-o out", "-o new")) == 0
    assert "dare_ties_svd" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--weights 0.7", "1 weights for 2 adapters"),
        ("--scale nan", "scale is nan"),
        ("--combine ties", "needs a density"),
        ("--svd-rank 3", "svd_rank has no effect"),
    ],
)
def test_the_command_refuses(options: str, message: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Usage errors: exit code 2, one message."""
    assert run(f"merge one two --base base -o out {options}") == 2
    assert message in capfd.readouterr().err
