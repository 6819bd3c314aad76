"""Stochastic rounding: random bits by their definition, neighbours and means by fractions, whole merges by float64."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraweld
from exact import BF16, FORMATS, FP16, Format, nearest_even, rounded, steps_apart
from fakes import contents, fail_at_call, load_folder, random_factors, random_tensors, write_adapter, write_base
from loraweld.compute.random_bits import PIECE_ELEMENTS, RandomBits
from loraweld.compute.rounding import Rounder
from loraweld.compute.stochastic import StochasticRounder
from loraweld.errors import NumericsError, OutputError, RequestError
from loraweld.planning import memory
from loraweld.planning.merge_plan import Draw
from loraweld.report import MergeReport
from loraweld.sinks.folder import FolderSink
from loraweld.verification.findings import TensorResult, VerifyReport
from strategies import near_ties
from test_numerics import exact_sum, uneven_model

each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
NAME = "model.layers.0.linear.weight"
LAYER = NAME.removesuffix(".weight")
SEEDS = st.integers(0, 2**63 - 1)
finite_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


# The random bits


def split_mix(state: int) -> int:
    """One output of SplitMix64 as its authors give it, in whole numbers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def bits_of_element(seed: int, name: str, element: int) -> int:
    """The 16 bits of one element, as docs/numerics.md defines them."""
    start = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
    word = split_mix(start + element // 4 * 0x9E3779B97F4A7C15)
    return word >> 16 * (element % 4) & 0xFFFF


def all_bits(seed: int, name: str, count: int, first: int = 0) -> np.ndarray:
    return RandomBits(Draw(seed, name)).at(np.arange(first, first + count))


def test_the_generator_is_split_mix() -> None:
    """The first outputs from 0 are the published ones (Vigna, splitmix64.c; Java's SplittableRandom)."""
    assert [split_mix(n * 0x9E3779B97F4A7C15) for n in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@given(seed=SEEDS, name=st.text(max_size=8), first=st.integers(0, 2**40), count=st.integers(1, 70))
def test_random_bits_are_a_function_of_seed_name_and_element(seed: int, name: str, first: int, count: int) -> None:
    """One by one or in a run from anywhere: what whole numbers give, on every machine."""
    expected = [bits_of_element(seed, name, element) for element in range(first, first + count)]
    assert RandomBits(Draw(seed, name)).run(first, count).tolist() == expected
    assert all_bits(seed, name, count, first).tolist() == expected


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1])


def test_random_bits_look_independent() -> None:
    """Uniform in their high and low bytes; neighbours, seeds, and tensors with names alike are uncorrelated."""
    count = 1 << 20
    bits = all_bits(0, NAME, count)
    for byte in (bits >> 8, bits & 0xFF):
        expected = count / 256
        chi_square = float(((np.bincount(byte, minlength=256) - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    others = [bits[lag:] for lag in (1, 2, 3, 4, 5, 8, 2048)]
    others += [all_bits(1, NAME, count), all_bits(0, NAME.replace("0", "1"), count)]
    for other in others:
        assert abs(correlation(bits[: len(other)], other)) < 5 / math.sqrt(len(other))


# One value


def neighbours(value: Fraction, form: Format) -> tuple[Fraction, Fraction]:
    """The two values of a format beside an exact one, the nearer to zero first; both itself if the format has it.

    Without a bound of the exponent: the farther one may be where infinity begins.
    """
    size = abs(value)
    exponent = form.min_exponent
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    step = Fraction(2) ** (exponent - form.precision + 1)
    whole = size // step
    sign = -1 if value < 0 else 1
    return sign * whole * step, sign * (whole + (size % step != 0)) * step


def largest(form: Format) -> Fraction:
    return (2 - Fraction(2) ** (1 - form.precision)) * Fraction(2) ** form.max_exponent


def round_many(value: float, form: Format, seed: int, count: int = 1) -> Tensor:
    """Round a float32 value in `count` places of a tensor."""
    out = torch.empty(1, count, dtype=form.dtype)
    StochasticRounder(form.dtype, Draw(seed, NAME)).round(torch.full((1, count), value), out, 0.0)
    return out[0]


@each_format
@given(value=finite_float32, seed=SEEDS)
@example(value=0.0, seed=0)
@example(value=-0.0, seed=0)
@example(value=2.0**-149, seed=1)
@example(value=-(2.0**-126) * 1.5, seed=1)
@example(value=2.0**-14 * (1 - 2.0**-20), seed=1)  # between subnormal and normal fp16
@example(value=2.0**-24 * 0.75, seed=1)
@example(value=65519.99609375, seed=1)  # over the largest fp16; the nearest is finite
@example(value=float(np.float32(3.3961e38)), seed=1)  # the same in bf16
def test_a_value_becomes_one_of_its_neighbours(form: Format, value: float, seed: int) -> None:
    """And is refused just where rounding to nearest refuses it; past the largest value the nearest is taken."""
    exact = Fraction(value)
    if nearest_even(exact, form) is None:
        with pytest.raises(NumericsError, match="too large"):
            round_many(value, form, seed)
        return
    made = round_many(value, form, seed).item()
    allowed = {Fraction(one) for one in neighbours(exact, form) if abs(one) <= largest(form)}
    assert Fraction(made) in allowed
    assert math.copysign(1, made) == math.copysign(1, value)


@each_format
def test_every_value_of_the_format_stays(form: Format) -> None:
    """All 2**16 patterns but infinities and NaNs, both zeros and the subnormal numbers among them, to the bit."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(form.dtype)
    values = values[values.isfinite()].view(2, -1)
    for seed in range(5):
        out = torch.empty_like(values)
        StochasticRounder(form.dtype, Draw(seed, NAME)).round(values.float(), out, 0.0)
        assert torch.equal(out.view(torch.int16), values.view(torch.int16))


@each_format
@given(value=finite_float32, seed=st.integers(0, 1000))
@example(value=1 + 2.0**-12, seed=0)  # a tie in fp16
@example(value=-(1 + 2.0**-9 * 1.75), seed=0)
@example(value=2.0**-24 * 0.3, seed=0)
@example(value=1e-40, seed=0)
@example(value=1e-45, seed=0)
def test_the_choice_is_by_distance_bit_by_bit(form: Format, value: float, seed: int) -> None:
    """Of 64 places those go away from zero whose bits, counted from one, reach over the rest of the step."""
    exact = Fraction(value)
    near, far = neighbours(exact, form)
    if abs(far) > largest(form):
        return
    share = (exact - near) / (far - near) if far != near else Fraction(0)
    drawn = [Fraction(bits_of_element(seed, NAME, element)) for element in range(64)]
    expected = [far if share + (bits + Fraction(1, 2)) / 2**16 >= 1 else near for bits in drawn]
    assert [Fraction(made) for made in round_many(value, form, seed, 64).tolist()] == expected


@each_format
@given(data=st.data(), seed=SEEDS, first=st.integers(0, 2**40))
def test_float64_is_rounded_by_the_same_rule(form: Format, data: st.DataObject, seed: int, first: int) -> None:
    """What is computed again goes to a neighbour of the exact value, by the bits of its own place."""
    values = np.array(data.draw(st.lists(near_ties(form), min_size=1, max_size=20)))
    flat = np.arange(first, first + len(values))
    made = StochasticRounder(form.dtype, Draw(seed, NAME)).exact(values, flat)
    for element, value, result in zip(flat.tolist(), values.tolist(), made.tolist(), strict=True):
        near, far = neighbours(Fraction(value), form)
        share = (Fraction(value) - near) / (far - near) if far != near else Fraction(0)
        is_far = share + (bits_of_element(seed, NAME, element) + Fraction(1, 2)) / 2**16 >= 1
        assert Fraction(result) == (far if is_far and abs(far) <= largest(form) else near)


@each_format
def test_the_mean_is_the_value_itself(form: Format) -> None:
    """Over 4,000 seeds, for values of all sizes and signs: within five deviations, whose size follows from the step."""
    generator = torch.Generator().manual_seed(3)
    size = 2.0 ** torch.randint(form.min_exponent - form.precision + 2, form.max_exponent, (400,), generator=generator)
    values = (size * (1 + torch.rand(400, generator=generator)) * torch.randn(400, generator=generator).sign()).float()
    values[:4] = torch.tensor([0.02 + 1e-6, -(0.02 + 1e-6), 1 + 2.0**-13, -(1 + 2.0**-9)])
    values = values[values.abs() < float(largest(form))]
    seeds = 4000
    total = torch.zeros(len(values), dtype=torch.float64)
    out = torch.empty(1, len(values), dtype=form.dtype)
    for seed in range(seeds):
        StochasticRounder(form.dtype, Draw(seed, NAME)).round(values.view(1, -1), out, 0.0)
        total += out[0].double()
    for value, mean in zip(values.tolist(), (total / seeds).tolist(), strict=True):
        near, far = (float(one) for one in neighbours(Fraction(value), form))
        step = abs(far - near)
        share = abs(value - near) / step if step else 0.0
        bound = 5 * step * math.sqrt(share * (1 - share) / seeds) + step * 2.0**-17
        assert abs(mean - value) <= bound, value


@each_format
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_or_kept(form: Format, value: float) -> None:
    """As by rounding to nearest; the other values of such a tile are rounded by chance all the same."""
    tile = torch.full((3, 500), 1 + 2.0**-12)
    tile[1, 2] = value
    tile[2, 7:9] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaNs with all bits set
    out = torch.empty(tile.shape, dtype=form.dtype)
    draw = Draw(0, NAME)
    with pytest.raises(NumericsError, match="not finite"):
        StochasticRounder(form.dtype, draw).round(tile, out, 0.0)
    rounder = StochasticRounder(form.dtype, draw, allow_nonfinite=True)
    rounder.round(tile, out, 1.0)
    assert rounder.saw_nonfinite
    assert torch.equal(out.isnan(), tile.isnan())
    assert torch.equal(out.isinf(), tile.isinf())
    assert out[out.isfinite()].unique().double().tolist() == [1.0, 1.0 + float(torch.finfo(form.dtype).eps)]


@each_format
def test_a_tile_of_many_pieces_has_the_bits_of_its_places(form: Format) -> None:
    """A tile from the middle of a tensor, longer than what is rounded at a time, equals its elements one by one."""
    tile = random_tensors({NAME: (3, PIECE_ELEMENTS - 5)}, torch.float32)[NAME]
    tile[1] *= 1e-3  # down to the subnormal numbers of fp16
    out = torch.empty(tile.shape, dtype=form.dtype)
    rounder = StochasticRounder(form.dtype, Draw(9, NAME))
    rounder.round(tile, out, 0.0, 1_000_003)
    flat = np.arange(1_000_003, 1_000_003 + tile.numel())
    assert torch.equal(out.flatten(), rounder.exact(tile.flatten().double().numpy(), flat))


# Whole merges


def merged(folder: Path, output: str, **options: object) -> dict[str, Tensor]:
    loraweld.merge(folder / "adapter", output=folder / output, base=folder / "base", **options)
    return load_folder(folder / output)


@each_format
@pytest.mark.parametrize("std", [0.02, 1e-5], ids=["cancelling", "below a step"])
def test_a_merge_is_unbiased_and_beside_float64(form: Format, std: float, tmp_path: Path) -> None:
    """Elements lie beside the exact sum, 40 seeds have its mean, and the change is there where nearest loses it."""
    base = random_tensors({NAME: (257, 301)}, form.dtype)
    factors = random_factors({NAME: (257, 301)}, rank=8, std=std)
    write_base(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", factors, alpha=8)
    exact = exact_sum(base[NAME], factors[LAYER], 1.0)
    change = exact - base[NAME].double().numpy()
    _, exponents = np.frexp(exact)
    steps = np.ldexp(1.0, np.maximum(exponents - 1, form.min_exponent) - form.precision + 1)
    seeds = 40
    total = np.zeros_like(exact)
    for seed in range(seeds):
        made = merged(tmp_path, f"out{seed}", rounding="stochastic", seed=seed)[NAME]
        error = made.double().numpy() - exact
        assert (np.abs(error) < steps * (1 + 1e-3) + 1e-7 * std).all()
        total += error
    share = np.abs(exact) / steps % 1
    deviation = steps * np.sqrt(share * (1 - share) / seeds)
    assert (np.abs(total / seeds) < 6 * deviation + 0.03 * steps).all()
    kept = 1 + float((total / seeds * change).sum() / (change**2).sum())
    chance = float(np.sqrt((deviation**2 * change**2).sum()) / (change**2).sum())
    assert abs(kept - 1) < 5 * chance
    nearest = rounded(exact, form).double().numpy() - exact
    lost = 1 + float((nearest * change).sum() / (change**2).sum())
    assert (lost < 0.5) == (form is BF16 and std == 1e-5)


@each_format
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(
    form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers, memory, item borders that cut elements and rows: the same files; another seed gives others."""
    base, adapter = uneven_model(tmp_path, form)
    made = []
    for number, (workers, max_memory, megabytes) in enumerate([(1, "512MB", 16), (4, "64MB", 16), (3, "512MB", 1)]):
        monkeypatch.setattr(memory, "ITEM_BYTES", megabytes << 20)
        options = {"workers": workers, "max_memory": max_memory, "rounding": "stochastic", "seed": 5}
        loraweld.merge(adapter, output=tmp_path / f"out{number}", base=base, **options)
        made.append(contents(tmp_path / f"out{number}"))
    assert all(files == made[0] for files in made[1:])
    loraweld.merge(adapter, output=tmp_path / "other", base=base, rounding="stochastic", seed=6)
    assert contents(tmp_path / "other")["model.safetensors"] != made[0]["model.safetensors"]


def test_a_run_that_stopped_continues_by_its_own_seed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on and has the bytes of a run in one piece; another seed starts afresh."""
    base, adapter = uneven_model(tmp_path, BF16)
    monkeypatch.setattr(memory, "ITEM_BYTES", 1 << 20)

    def merge(output: str, seed: int) -> MergeReport:
        return loraweld.merge(adapter, output=tmp_path / output, base=base, workers=1, rounding="stochastic", seed=seed)

    for output in ("same", "other"):
        with monkeypatch.context() as patch:
            patch.setattr(FolderSink, "write_at", fail_at_call(FolderSink.write_at, 5, OSError(5, "broken")))
            with pytest.raises(OutputError, match="the same command continues"):
                merge(output, 1)
    whole = {seed: merge(f"whole{seed}", seed) for seed in (1, 2)}
    assert merge("same", 1).resumed_bytes > 0
    assert merge("other", 2).resumed_bytes == 0
    for output, seed in (("same", 1), ("other", 2)):
        assert contents(tmp_path / output) == contents(whole[seed].output)


def test_only_what_the_adapter_changes_is_drawn(tmp_path: Path) -> None:
    """A float32 base in bfloat16: untouched tensors are the nearest; of a trained one the same rows as ever change."""
    shapes = {NAME: (64, 64), "model.norm.weight": (5000,)}
    base = random_tensors(shapes, torch.float32)
    trained = random_tensors({"head": (7, 64)}, torch.float32, seed=4)["head"]
    base["lm_head.weight"] = torch.zeros(7, 64)
    write_base(tmp_path / "base", base)
    factors = random_factors({NAME: (64, 64)})
    factors[LAYER][1][32:] = 0
    more = {"base_model.model.lm_head.weight": trained}
    write_adapter(tmp_path / "adapter", factors, more=more, modules_to_save=["lm_head"])
    nearest = merged(tmp_path, "nearest")
    drawn = merged(tmp_path, "drawn", rounding="stochastic", seed=1)
    assert torch.equal(drawn["model.norm.weight"], nearest["model.norm.weight"])
    for name in (NAME, "lm_head.weight"):
        apart = steps_apart(drawn[name], nearest[name])
        assert apart.max() == 1
        assert 0.1 < apart.double().mean() < 0.4  # a quarter of the values go to the farther neighbour


def test_what_does_not_change_keeps_its_bytes(tmp_path: Path) -> None:
    """Rows whose delta is zero are the base's (-0 + 0 is 0, as to nearest), whatever the seed."""
    base = random_tensors({NAME: (64, 512)}, torch.float16, std=1e-4)  # half of them subnormal
    write_base(tmp_path / "base", base)
    factors = random_factors({NAME: (64, 512)}, std=1e-7)
    factors[LAYER][1][10:] = 0
    write_adapter(tmp_path / "adapter", factors)
    made = merged(tmp_path, "out", rounding="stochastic", seed=3)[NAME]
    assert torch.equal(made[10:], base[NAME][10:])
    assert torch.equal(made[10:].view(torch.int16), merged(tmp_path, "nearest")[NAME][10:].view(torch.int16))
    assert not torch.equal(made[:10], base[NAME][:10])


def test_a_parameter_stored_under_two_names_is_the_same_under_both(tmp_path: Path) -> None:
    """A head that is tied and stored: both are drawn by the name of the one."""
    table = random_tensors({NAME: (50, 64)}, torch.bfloat16)[NAME]
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    folder = write_base(tmp_path / "base", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    a, b = random_factors({"lm_head": (50, 64)}, std=1e-3)["lm_head"]
    sides = {"lora_embedding_A": b.T.clone(), "lora_embedding_B": a.T.clone()}
    more = {f"base_model.model.model.embed_tokens.{name}": side for name, side in sides.items()}
    modules = ["embed_tokens", "lm_head"]
    write_adapter(tmp_path / "adapter", {"lm_head": (a, b)}, more=more, target_modules=modules)
    made = merged(tmp_path, "out", rounding="stochastic", seed=3)
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])
    assert not torch.equal(made["lm_head.weight"], table)


def small_model(folder: Path) -> None:
    """Three layers of 96 × 96 in bfloat16, and an adapter whose change is about a quarter of a step."""
    shapes = {f"model.layers.{n}.linear.weight": (96, 96) for n in range(3)}
    write_base(folder / "base", random_tensors(shapes, torch.bfloat16))
    write_adapter(folder / "adapter", random_factors(shapes, std=2e-5), alpha=8)


def test_seed_and_rounding_are_recorded_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    """loraweld.json and reports name them; a run by another seed is another merge, a merge to nearest has neither."""
    small_model(tmp_path)
    inputs = {"base": tmp_path / "base", "output": tmp_path / "out"}
    plans = [loraweld.plan(tmp_path / "adapter", **inputs)]
    plans += [loraweld.plan(tmp_path / "adapter", **inputs, rounding="stochastic", seed=seed) for seed in (None, 0, 7)]
    assert plans[1].fingerprint == plans[2].fingerprint
    assert len({plan.fingerprint for plan in plans}) == 3
    report = loraweld.merge(tmp_path / "adapter", **inputs, rounding="Stochastic", seed=7)
    said = {"method": "stochastic", "seed": 7}
    assert report.to_json()["rounding"] == plans[3].to_json()["rounding"] == said
    assert "rounded stochastically (seed 7)" in "\n".join(report.lines())
    assert json.loads((tmp_path / "out" / "loraweld.json").read_text())["rounding"] == said
    again = loraweld.merge(tmp_path / "adapter", **inputs, rounding="stochastic", seed=7)
    assert again.was_there
    plain = loraweld.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "plain")
    assert plain.to_json()["rounding"] is None
    assert "rounding" not in json.loads((tmp_path / "plain" / "loraweld.json").read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"save_method": "merged_4bit"}, ["rounding", "merged_4bit", "only with merged_16bit"]),
        ({"save_method": "preserve"}, ["rounding", "preserve"]),
        ({"save_method": "gguf"}, ["rounding", "gguf"]),
        ({"save_method": "lora"}, ["rounding", "lora"]),
        ({"dtype": "float32"}, ["rounding", "float32"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"seed": 1.5}, ["seed is 1.5"]),
        ({"rounding": "stochastc"}, ["did you mean stochastic"]),
        ({"rounding": "nearest", "seed": 1}, ["seed has no effect", "rounding stochastic"]),
    ],
    ids=str,
)
def test_where_it_means_nothing_it_is_refused(options: dict[str, object], words: list[str], tmp_path: Path) -> None:
    """Encoded, exported and float32 outputs, seeds that are none or that nothing uses."""
    small_model(tmp_path)
    with pytest.raises(RequestError) as refused:
        given = {"rounding": "stochastic", **options}
        loraweld.plan(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out", **given)
    assert [word for word in words if word not in str(refused.value)] == []


def test_dare_and_the_rounding_share_the_seed(tmp_path: Path) -> None:
    """One option for both; the record holds it for both, and verification finds both by it."""
    small_model(tmp_path)
    adapters = [tmp_path / "adapter", write_adapter(tmp_path / "b", random_factors({NAME: (96, 96)}, std=1e-3))]
    options = {"base": tmp_path / "base", "combine": "dare_linear", "density": 0.5, "rounding": "stochastic"}
    loraweld.merge(adapters, output=tmp_path / "out", seed=11, **options)
    record = json.loads((tmp_path / "out" / "loraweld.json").read_text())
    assert record["combination"]["seed"] == record["rounding"]["seed"] == 11
    assert loraweld.verify(tmp_path / "out", base=tmp_path / "base", adapter=adapters).findings == ()


# Verification


def verify(folder: Path, **options: object) -> VerifyReport:
    return loraweld.verify(folder / "out", base=folder / "base", adapter=folder / "adapter", **options)


def store(folder: Path, name: str, value: Tensor) -> None:
    file = folder / "out" / "model.safetensors"
    save_file({**load_file(file), name: value}, file, {"format": "pt"})


def drawn_again(folder: Path, factor: float, seed: int = 7) -> Tensor:
    """What a merge that takes the change of the first layer `factor` times, and rounds by the seed, writes there."""
    (folder / "wrong").mkdir()
    factors = random_factors({f"model.layers.{n}.linear.weight": (96, 96) for n in range(3)}, std=2e-5)
    write_adapter(folder / "wrong" / "adapter", factors, alpha=8 * factor)
    wrong = {"base": folder / "base", "output": folder / "wrong" / "out"}
    loraweld.merge(folder / "wrong" / "adapter", **wrong, rounding="stochastic", seed=seed)
    return load_folder(folder / "wrong" / "out")[NAME]


@each_format
@pytest.mark.parametrize("std", [2e-5, 0.02], ids=["below a step", "cancelling"])
def test_verify_computes_every_element_again(form: Format, std: float, tmp_path: Path) -> None:
    """By the record's seed: hardly an element differs from float64 rounded by the same bits. `merge --verify` too."""
    shapes = {NAME: (257, 1001)}
    write_base(tmp_path / "base", random_tensors(shapes, form.dtype))
    write_adapter(tmp_path / "adapter", random_factors(shapes, rank=8, std=std), alpha=8)
    merged(tmp_path, "out", rounding="stochastic", seed=7, verify=True)
    report = verify(tmp_path)
    assert report.findings == ()
    (result,) = report.tensors
    assert result.rounded == "stochastically"
    assert result.misrounded < 5e-4
    assert result.retention is not None
    assert result.retention.kept == pytest.approx(1, abs=0.1)


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "delta missing": (lambda f: store(f, NAME, load_folder(f / "base")[NAME]), "the adapter's change is missing"),
    "merged twice": (lambda f: store(f, NAME, drawn_again(f, 2)), "merged twice"),
    "alpha ignored": (lambda f: store(f, NAME, drawn_again(f, 0.5)), "alpha / rank was ignored"),
    "subtracted": (lambda f: store(f, NAME, drawn_again(f, -1)), "subtracted"),
    "another seed": (lambda f: store(f, NAME, drawn_again(f, 1, seed=8)), "rounded by chance"),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_planted_defects_are_found(defect: str, tmp_path: Path) -> None:
    """Of a change that is a quarter of a step, in one module of three, all elements within a step of the right ones."""
    small_model(tmp_path)
    merged(tmp_path, "out", rounding="stochastic", seed=7)
    assert verify(tmp_path).findings == ()
    plant, words = PLANTED[defect]
    plant(tmp_path)
    found = verify(tmp_path).findings
    assert [(finding.check, finding.where) for finding in found] == [("value", NAME), ("checksum", NAME)]
    assert words in found[0].message


def rounded_as(report: VerifyReport) -> set[str]:
    results: tuple[TensorResult, ...] = report.tensors
    return {result.rounded for result in results}


def test_an_output_without_its_record_is_told_for_what_it_is(tmp_path: Path) -> None:
    """It is not said to be rounded to nearest; with the options of the merge it holds, by another seed it does not."""
    small_model(tmp_path)
    merged(tmp_path, "out", rounding="stochastic", seed=7)
    (tmp_path / "out" / "loraweld.json").unlink()
    report = verify(tmp_path)
    assert not report.holds
    assert rounded_as(report) == {"wrong"}
    for finding in report.findings:
        assert "not the nearest BF16 value" in finding.message
        assert "--rounding stochastic" in finding.message
    assert verify(tmp_path, rounding="stochastic", seed=7).findings == ()
    other = verify(tmp_path, rounding="stochastic", seed=8)
    assert len(other.findings) == 3
    assert all("seed 8" in finding.message for finding in other.findings)


def test_an_output_rounded_to_nearest_is_not_that_of_a_seed(tmp_path: Path) -> None:
    """And is told to be what it is; by its own record it holds."""
    small_model(tmp_path)
    merged(tmp_path, "out")
    assert rounded_as(verify(tmp_path)) == {"once"}
    found = verify(tmp_path, rounding="stochastic").findings
    assert len(found) == 3
    assert all("rounded to nearest" in finding.message for finding in found)


def test_warnings_of_lost_changes_name_the_cure(tmp_path: Path) -> None:
    """A change of a twentieth of a step is mostly lost to the nearest value: the report says what keeps it."""
    write_base(tmp_path / "base", random_tensors({NAME: (96, 96)}, torch.bfloat16))
    write_adapter(tmp_path / "adapter", random_factors({NAME: (96, 96)}, std=2e-6), alpha=8)
    merged(tmp_path, "out")
    (note,) = [note for note in verify(tmp_path).notes if "less than half" in note]
    for words in ("--rounding stochastic --seed N", "--dtype float32", "--scale"):
        assert words in note


def test_rounding_to_nearest_is_as_it_was(tmp_path: Path) -> None:
    """Asked for or not, what nothing draws has the plain rounding."""
    tile = random_tensors({NAME: (50, 70)}, torch.float32)[NAME]
    out = torch.empty(tile.shape, dtype=torch.float16)
    Rounder(torch.float16).round(tile, out, 0.0)
    assert torch.equal(out, rounded(tile.double().numpy(), FP16))
    small_model(tmp_path)
    assert merged(tmp_path, "a").keys() == merged(tmp_path, "b", rounding="nearest").keys()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
