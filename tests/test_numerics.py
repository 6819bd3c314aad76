"""Merged weights against base + adapter in float64, rounded once; the same bytes however the work is cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import loraweld
from exact import FORMATS, FP16, Format, rounded, steps_apart
from fakes import (
    PREFIX,
    Factors,
    Shapes,
    contents,
    load_folder,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)
from loraweld.compute import factors as factors_module
from loraweld.errors import NumericsError
from loraweld.planning import memory

each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@pytest.fixture(params=["float32", "bfloat16", "bfloat16, multiplied in float32"])
def stored_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What an adapter is stored in; processors differ in how they multiply bfloat16 (see test_low_rank.py)."""
    if "multiplied" in request.param:
        monkeypatch.setattr(factors_module, "multiplies_bfloat16", lambda: False)
    return torch.float32 if request.param == "float32" else torch.bfloat16


def stored(factors: Factors, dtype: torch.dtype) -> Factors:
    return {module: (a.to(dtype), b.to(dtype)) for module, (a, b) in factors.items()}


# One row, one column, odd sizes, more rows than a tile, wide, narrow: about 2.6 million elements.
SHAPES: Shapes = {
    f"model.layers.{number}.linear.weight": shape
    for number, shape in enumerate(
        [(1, 1), (1, 4096), (4096, 1), (2, 3), (333, 1001), (4097, 257), (7, 60_001), (30_011, 13), (640, 640)]
    )
}
LAYER = "model.layers.0.linear"
SHAPE = (512, 1024)


def exact_sum(base: Tensor, factors: tuple[Tensor, Tensor], scale: float) -> np.ndarray:
    a, b = (factor.double().numpy() for factor in factors)
    return base.double().numpy() + scale * (b @ a)


def merge_one(folder: Path, base: Tensor, factors: tuple[Tensor, Tensor], **options: object) -> Tensor:
    """Merge a model of one layer with a scaling of 1."""
    write_base(folder / "base", {f"{LAYER}.weight": base})
    write_adapter(folder / "adapter", {LAYER: factors}, alpha=len(factors[0]))
    loraweld.merge(folder / "adapter", output=folder / "out", base=folder / "base", **options)
    return load_folder(folder / "out")[f"{LAYER}.weight"]


def check_promise(distances: Tensor) -> None:
    """At least 99.99 % of the elements are the correctly rounded value, none is further than one step."""
    assert distances.max() <= 1
    assert distances.count_nonzero() <= 1e-4 * len(distances)


@each_format
@pytest.mark.parametrize(("rank", "alpha", "options"), [(1, 1, {}), (16, 11, {"use_rslora": True}), (64, 64, {})])
def test_weights_are_the_exact_sum_rounded_once(
    form: Format, rank: int, alpha: float, options: Mapping[str, bool], stored_as: torch.dtype, tmp_path: Path
) -> None:
    """For a delta as large as the base, so that many elements cancel, and for a scaling float32 has not exactly."""
    scale = alpha / rank**0.5 if options else alpha / rank
    base = random_tensors(SHAPES, form.dtype)
    factors = stored(random_factors(SHAPES, rank=rank, std=0.02 / scale), stored_as)
    write_base(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", factors, alpha=alpha, **options)
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base")
    merged = load_folder(tmp_path / "out")
    exact = {f"{module}.weight": exact_sum(base[f"{module}.weight"], pair, scale) for module, pair in factors.items()}
    assert merged.keys() == base.keys() == exact.keys()
    distances = [steps_apart(merged[name], rounded(values, form)).flatten() for name, values in exact.items()]
    check_promise(torch.cat(distances))


@each_format
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_is_rounded_to_once(form: Format, stored: torch.dtype, tmp_path: Path) -> None:
    """A base stored in one dtype and written in another: edited and plain tensors alike are rounded once."""
    shapes = {f"{LAYER}.weight": (1001, 777), "model.norm.weight": (50_001,)}
    base = random_tensors(shapes, stored)
    base["model.norm.weight"][:20_000] *= 1e-4  # down to the subnormal numbers of fp16
    factors = random_factors(shapes, rank=8)
    write_base(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", factors, alpha=8)
    name = str(form.dtype).removeprefix("torch.")
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base", dtype=name)
    merged = load_folder(tmp_path / "out")
    exact = rounded(exact_sum(base[f"{LAYER}.weight"], factors[LAYER], 1.0), form)
    check_promise(steps_apart(merged[f"{LAYER}.weight"], exact).flatten())
    plain = rounded(base["model.norm.weight"].double().numpy(), form)
    assert steps_apart(merged["model.norm.weight"], plain).max() == 0


@each_format
def test_tensors_stored_transposed_keep_the_promise(form: Format, stored_as: torch.dtype, tmp_path: Path) -> None:
    """GPT-2 stores (in, out): the same sums, the factors change sides."""
    shapes = {f"h.{n}.c_fc.weight": shape for n, shape in enumerate([(1, 3000), (3000, 1), (701, 1003), (512, 512)])}
    base = random_tensors(shapes, form.dtype)
    factors = stored(random_factors({name: shape[::-1] for name, shape in shapes.items()}, rank=8), stored_as)
    write_base(tmp_path / "base", base, model_type="gpt2")
    write_adapter(tmp_path / "adapter", factors, alpha=8, fan_in_fan_out=True)
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base")
    merged = load_folder(tmp_path / "out")
    exact = {f"{module}.weight": exact_sum(base[f"{module}.weight"].T, pair, 1.0).T for module, pair in factors.items()}
    check_promise(torch.cat([steps_apart(merged[n], rounded(values, form)).flatten() for n, values in exact.items()]))


@pytest.mark.parametrize("exponent", [-120, -127, -130])
@pytest.mark.parametrize("other", [0, 20, 100])
def test_factors_below_the_normal_numbers_count(
    exponent: int, other: int, stored_as: torch.dtype, tmp_path: Path
) -> None:
    """Processors take them for 0 when they multiply bfloat16, and their squares are not in float32."""
    ((a, b),) = random_factors({LAYER: SHAPE}, rank=16, std=1.0).values()
    a, b = (a * 2.0**other).to(stored_as), (b * 2.0**exponent).to(stored_as)
    base = (random_tensors({LAYER: SHAPE}, torch.float32, std=1.0)[LAYER] * 2.0 ** (other + exponent)).bfloat16()
    base[::2] = 0
    exact = rounded(exact_sum(base, (a, b), 1.0), FORMATS["bf16"])
    check_promise(steps_apart(merge_one(tmp_path, base, (a, b)), exact).flatten())


@pytest.mark.parametrize("alpha", [8, 1e-34])
def test_weights_below_the_normal_numbers_stay(alpha: float, stored_as: torch.dtype, tmp_path: Path) -> None:
    """Also where the delta is nothing, or as small as they are."""
    height = memory.tile_height(1024)
    shape, first = (height + 300, 1024), height + 76  # nothing is added to the first tile, and to some of the second
    base = random_tensors({LAYER: shape}, torch.bfloat16)[LAYER]
    base[::7] = 2.0**-130
    ((a, b),) = random_factors({LAYER: shape}, rank=8).values()
    b[:first] = 0
    b[first::14] *= 2.0**-125
    pair = a.to(stored_as), b.to(stored_as)
    write_base(tmp_path / "base", {f"{LAYER}.weight": base})
    write_adapter(tmp_path / "adapter", {LAYER: pair}, alpha=alpha)
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base")
    merged = load_folder(tmp_path / "out")[f"{LAYER}.weight"]
    exact = rounded(exact_sum(base, pair, alpha / 8), FORMATS["bf16"])
    check_promise(steps_apart(merged, exact).flatten())
    assert torch.equal(merged[:first].view(torch.int16), base[:first].view(torch.int16))


def test_two_adapters_are_summed_before_the_only_rounding(tmp_path: Path) -> None:
    """Large deltas that cancel each other leave a small one, exact to a step; two merges in a row lose it."""
    base = random_tensors({f"{LAYER}.weight": SHAPE}, torch.bfloat16)
    (large,) = random_factors({LAYER: SHAPE}, rank=8, std=1.0).values()
    (small,) = random_factors({LAYER: SHAPE}, rank=4, seed=2).values()
    back = (torch.cat([large[0], small[0]]), torch.cat([-large[1], small[1]], dim=1))
    write_base(tmp_path / "base", base)
    there = write_adapter(tmp_path / "there", {LAYER: large}, alpha=8)
    back_again = write_adapter(tmp_path / "back", {LAYER: back}, alpha=12)
    loraweld.merge([there, back_again], output=tmp_path / "both", base=tmp_path / "base")
    loraweld.merge(there, output=tmp_path / "first", base=tmp_path / "base")
    loraweld.merge(back_again, output=tmp_path / "second", base=tmp_path / "first")
    exact = rounded(exact_sum(base[f"{LAYER}.weight"], small, 1.0), FORMATS["bf16"])
    both, second = (load_folder(tmp_path / name)[f"{LAYER}.weight"] for name in ("both", "second"))
    assert steps_apart(both, exact).max() <= 1 < steps_apart(second, exact).max()


@each_format
@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("signs", ["mixed", "equal"])
def test_cancellation_costs_no_more_than_one_step(
    form: Format, rank: int, signs: str, stored_as: torch.dtype, tmp_path: Path
) -> None:
    """The base is minus the rounded delta: float32 is off by several steps of the tiny difference, the result is not.

    With factors of one sign the partial sums, and with them float32's error, are as large as they can be.
    """
    ((a, b),) = random_factors({LAYER: SHAPE}, rank=rank, std=1.0).values()
    if signs == "equal":
        a, b = 1 + 0.1 * a.abs(), (1 + 0.1 * b.abs()) / rank
    a, b = a.to(stored_as), b.to(stored_as)
    base = rounded(-exact_sum(torch.zeros(SHAPE), (a, b), 1.0), form)
    exact = rounded(exact_sum(base, (a, b), 1.0), form)
    if stored_as == torch.float32:  # the few bits of bfloat16 factors of one sign add up exactly
        plain = (base.float() + b @ a).to(form.dtype)
        assert steps_apart(plain, exact).max() > 1
    assert steps_apart(merge_one(tmp_path, base, (a, b)), exact).max() <= 1


def dora_exact(base: Tensor, factors: tuple[Tensor, Tensor], magnitude: Tensor) -> np.ndarray:
    changed = exact_sum(base, factors, 1.0)
    return changed * (magnitude.double().numpy() / np.linalg.norm(changed, axis=1))[:, None]


@each_format
def test_a_large_magnitude_does_not_enlarge_the_error(form: Format, tmp_path: Path) -> None:
    """DoRA multiplies what cancelled: still no element is further than one step from the exact value."""
    ((a, b),) = random_factors({LAYER: SHAPE}, rank=16, std=0.05).values()
    base = rounded(-exact_sum(torch.zeros(SHAPE), (a, b), 1.0), form)
    base[:, ::7] += 0.01
    magnitude = torch.linspace(1, 400, SHAPE[0])
    write_base(tmp_path / "base", {f"{LAYER}.weight": base})
    more = {f"{PREFIX}{LAYER}.lora_magnitude_vector": magnitude}
    write_adapter(tmp_path / "adapter", {LAYER: (a, b)}, alpha=16, more=more, use_dora=True)
    loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base")
    merged = load_folder(tmp_path / "out")[f"{LAYER}.weight"]
    assert steps_apart(merged, rounded(dora_exact(base, (a, b), magnitude), form)).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "code", "wanted"), [(torch.float16, "auto", "bfloat16"), (torch.bfloat16, "float16", "bfloat16")]
)
def test_overflow_names_the_tensor_and_the_dtype_that_holds_it(
    dtype: torch.dtype, code: str, wanted: str, tmp_path: Path
) -> None:
    """60000 + 10000 has no value in fp16: refused, whatever the base's dtype; nothing is published."""
    base = torch.full((4, 6), 1.0, dtype=dtype)
    base[2, 3] = 60_000.0
    with pytest.raises(NumericsError, match=rf"{LAYER}\.weight.*rows.*float16.*{wanted}"):
        merge_one(tmp_path, base, (torch.full((1, 6), 100.0), torch.full((4, 1), 100.0)), dtype=code)
    assert not (tmp_path / "out").exists()


def test_an_untouched_tensor_that_overflows_in_the_new_dtype_is_refused(tmp_path: Path) -> None:
    """Conversion alone can overflow too; the other tensors being fine does not help."""
    tensors = random_tensors({f"{LAYER}.weight": (4, 6), "model.norm.weight": (6,)}, torch.bfloat16)
    tensors["model.norm.weight"][1] = 1e6
    write_base(tmp_path / "base", tensors)
    write_adapter(tmp_path / "adapter", random_factors({LAYER: (4, 6)}))
    with pytest.raises(NumericsError, match=r"model\.norm\.weight.*float16"):
        loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base", dtype="float16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "saved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_that_are_not_finite_are_refused(value: float, part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """One NaN or infinity anywhere in an adapter ends the merge, with the name of the tensor it would spoil."""
    shapes = {f"{LAYER}.weight": (300, 500), "model.norm.weight": (500,)}
    saved = {f"{PREFIX}model.norm.weight": torch.ones(500, dtype=dtype)}
    ((a, b),) = random_factors({LAYER: shapes[f"{LAYER}.weight"]}).values()
    {"lora_A.weight": a, "lora_B.weight": b, "saved": saved[f"{PREFIX}model.norm.weight"]}[part].view(-1)[-1] = value
    write_base(tmp_path / "base", random_tensors(shapes, dtype))
    write_adapter(tmp_path / "adapter", {LAYER: (a, b)}, more=saved, modules_to_save=["norm"])
    spoilt = "model.norm.weight" if part == "saved" else f"{LAYER}.weight"
    with pytest.raises(NumericsError, match=f"{spoilt}.*not finite"):
        loraweld.merge(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base", dtype=str(dtype)[6:])
    assert not (tmp_path / "out").exists()


def uneven_model(folder: Path, form: Format, stored_as: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A base whose tensors straddle items at odd offsets, and an adapter whose rows differ 1000-fold in size."""
    shapes: Shapes = {"model.layers.1.linear.weight": (4097, 301), "model.layers.2.linear.weight": (11, 90_001)}
    shapes |= {"model.layers.3.linear.weight": (40_001, 120), "model.layers.4.linear.weight": (3, 5)}
    factors = random_factors(shapes, rank=16)
    generator = torch.Generator().manual_seed(7)
    for _, b in factors.values():
        b *= 2 * 10.0 ** -(3 * torch.rand(len(b), 1, generator=generator))
        b[::9973] *= 30
    odd = {f"model.layers.{n}.flags": torch.arange(251 + n, dtype=torch.uint8) for n in range(6)}
    tensors = {**odd, **random_tensors(shapes, form.dtype)}
    adapter = write_adapter(folder / "adapter", stored(factors, stored_as))
    return write_base(folder / "base", dict(sorted(tensors.items()))), adapter


def item_size(megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ITEM_BYTES", megabytes << 20)


@each_format
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(
    form: Format, stored_as: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker or four, little memory or much, items of 1, 3 or 16 MiB, the same command twice: the same files."""
    base, adapter = uneven_model(tmp_path, form, stored_as)
    cuts = [(1, "512MB", 16), (4, "512MB", 16), (4, "64MB", 16), (1, "64MB", 1), (3, "512MB", 1), (4, "512MB", 3)]
    made = []
    for number, (workers, max_memory, megabytes) in enumerate(cuts):
        item_size(megabytes, monkeypatch)
        output = tmp_path / f"out{number}"
        loraweld.merge(adapter, output=output, base=base, workers=workers, max_memory=max_memory)
        made.append(contents(output))
    assert all(files == made[0] for files in made[1:])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_threads_are_left_as_they_were(threads: int, tmp_path: Path) -> None:
    """A merge has threads of its own; how many torch uses before and after it is the caller's business."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = random_tensors({LAYER: (6, 5)}, torch.bfloat16)[LAYER]
        merge_one(tmp_path, base, random_factors({LAYER: (6, 5)})[LAYER])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_odd_tensors_come_through_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not edited keeps its bytes, and what is edited is right, at offsets that no float is aligned to."""
    item_size(1, monkeypatch)
    base, adapter = uneven_model(tmp_path, FP16)
    loraweld.merge(adapter, output=tmp_path / "out", base=base)
    before, after = load_folder(base), load_folder(tmp_path / "out")
    factors: Factors = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): (a, load_folder(adapter)[name.replace("_A", "_B")])
        for name, a in load_folder(adapter).items()
        if name.endswith("lora_A.weight")
    }
    for name, tensor in after.items():
        if name.endswith("flags"):
            assert torch.equal(tensor, before[name])
        else:
            pair = factors[name.removesuffix(".weight")]
            exact = rounded(exact_sum(before[name], pair, 8 / 16), FP16)
            check_promise(steps_apart(tensor, exact).flatten())
