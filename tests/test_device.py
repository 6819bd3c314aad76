"""`--device`: what is moved to an accelerator follows it from end to end, and what cannot be done there is refused.

No accelerator is needed for that: `other_device` is one that has the arithmetic of the CPU. Where torch finds a real
one, its results are verified too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loraweld
import other_device
from encoded_bases import LAYER, compressed_config, integer_scheme, of_layer
from fakes import load_folder, save_base
from handmade import MODULES, lora, loras, save_adapter, save_llama
from loraweld import request
from loraweld.checkpoint.encodings.bnb4 import CODEBOOKS
from loraweld.cli import main
from loraweld.compute import device, device_trial
from loraweld.compute.codecs.bnb4_encode import Codebook
from loraweld.errors import OutputError, RequestError
from loraweld.request import make_request

ACCELERATORS = device.found_devices()
on_accelerators = pytest.mark.skipif(not ACCELERATORS, reason="torch finds no accelerator here: nothing ran on one")
QUANTISED: dict[str, dict[str, Any]] = {
    "nf4": {"save_method": "merged_4bit"},
    "fp4": {"save_method": "merged_4bit", "quant_type": "fp4", "double_quant": False},
    "absmax": {"save_method": "merged_4bit", "quantizer": "absmax", "blocksize": 256},
    "int8": {"save_method": "merged_8bit"},
    "fp8": {"save_method": "merged_fp8"},
}


def llama(place: Path, **config: Any) -> Path:
    save_llama(place / "base")
    save_adapter(place / "adapter", loras(*MODULES), **config)
    return place


def integers_with_zeros(place: Path) -> Path:
    """A base in int8 whose zeros lie far from the middle: some codes decode to the same bits of bfloat16."""
    generator = torch.Generator().manual_seed(5)
    parts = {
        "weight": torch.randint(-128, 128, (24, 16), generator=generator).to(torch.int8),
        "weight_scale": torch.rand(24, 1, generator=generator).bfloat16(),
        "weight_zero_point": torch.full((24, 1), -120, dtype=torch.int8),
    }
    scheme = integer_scheme(8, group=None, symmetric=False)
    save_base(place / "base", of_layer(parts), compressed_config(torch.bfloat16, scheme, format="int-quantized"))
    save_adapter(place / "adapter", lora(LAYER))
    return place


def merge(place: Path, out: str, **options: Any) -> loraweld.MergeReport:
    return loraweld.merge(place / "adapter", output=place / out, base=place / "base", **options)


def exit_code(*line: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, line)])
    return int(ended.value.code or 0)


def weights(place: Path, out: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (place / out).glob("*.safetensors")}


# A device without the hardware


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a device that is found, and asks for nothing but torch."""
    if not other_device.install():
        pytest.skip(f"torch {torch.__version__} has no devices made in Python")
    monkeypatch.setattr(request, "DEVICES", (*request.DEVICES, other_device.NAME))
    monkeypatch.setattr(device, "found_devices", lambda: [f"{other_device.NAME}:0"])
    other_device.ran.clear()
    return other_device.NAME


@pytest.mark.parametrize("options", QUANTISED.values(), ids=QUANTISED)
def test_quantising_follows_the_device(options: dict[str, Any], sim: str, tmp_path: Path) -> None:
    """Tables, scales and codes lie where the rows do: the simulated device gives the bytes of the CPU."""
    llama(tmp_path)
    report = merge(tmp_path, "there", device=sim, verify=True, **options)
    assert other_device.ran.total() > 100
    assert f"on device {sim}: 14 weights quantised, 0 decomposed; all else on the CPU" in report.notes
    other_device.ran.clear()
    merge(tmp_path, "here", **options)
    assert weights(tmp_path, "there") == weights(tmp_path, "here")
    assert not other_device.ran.total()


@pytest.mark.parametrize("values", CODEBOOKS.values(), ids=CODEBOOKS)
def test_a_value_in_the_middle_of_two_codes_goes_where_the_cpu_has_it(values: tuple[float, ...], sim: str) -> None:
    """The CPU looks codes up in a table; elsewhere they are found by the borders between them."""
    ordered = torch.tensor(sorted(values))
    borders = (ordered[:-1] + ordered[1:]) / 2
    near = [torch.nextafter(borders, torch.tensor(end)) for end in (-9.0, 9.0)]
    blocks = torch.cat([borders, *near, ordered, torch.linspace(-1, 1, 3)]).view(-1, 64)
    packed = []
    for name in ("cpu", sim):
        where = torch.device(name)
        codes = torch.empty(blocks.numel() // 2, dtype=torch.uint8, device=where)
        Codebook(values, where).pack(blocks.to(where), torch.ones(len(blocks), device=where), codes, clips=False)
        packed.append(codes.cpu())
    assert torch.equal(*packed)


def test_going_back_to_an_encoding_follows_the_device(sim: str, tmp_path: Path) -> None:
    """The base's scales, zeros and codes too."""
    integers_with_zeros(tmp_path)
    merge(tmp_path, "there", device=sim, save_method="preserve")
    assert other_device.ran.total()
    merge(tmp_path, "here", save_method="preserve")
    assert weights(tmp_path, "there") == weights(tmp_path, "here")


@pytest.mark.parametrize(("init", "operation"), [("pissa", "_linalg_svd"), ("olora", "linalg_qr")])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_decompositions_follow_the_device(
    init: str, operation: str, scale: float | None, sim: str, tmp_path: Path
) -> None:
    """By themselves, and inside an edit that has a weight."""
    llama(tmp_path, init_lora_weights=init)
    report = merge(tmp_path, "there", device=sim, scale=scale)
    assert other_device.ran[operation] == 14 + 1  # a small one first, before a byte is written
    assert f"on device {sim}: 0 weights quantised, 14 decomposed; all else on the CPU" in report.notes
    merge(tmp_path, "here", scale=scale)
    assert weights(tmp_path, "there") == weights(tmp_path, "here")


def test_rows_in_16_bit_stay_on_the_cpu_and_the_plan_says_so(sim: str, tmp_path: Path) -> None:
    llama(tmp_path)
    report = merge(tmp_path, "there", device=sim)
    assert not other_device.ran.total()
    assert any(f"device {sim} has nothing to do" in note for note in report.notes)


def test_a_merge_in_parts_keeps_its_device(sim: str, tmp_path: Path) -> None:
    """The saved plan names it; each part asks for it."""
    llama(tmp_path)
    plan = tmp_path / "plan.json"
    sides = tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "there"
    assert not exit_code("plan", *sides, "--save-method", "merged_8bit", "--device", sim, "--save", plan)
    for number in (1, 2):
        assert not exit_code("run", plan, "--part", f"{number}/2")
    assert not exit_code("publish", plan)
    assert other_device.ran.total() > 100
    merge(tmp_path, "here", save_method="merged_8bit")
    assert load_folder(tmp_path / "there").keys() == load_folder(tmp_path / "here").keys()
    for name, tensor in load_folder(tmp_path / "there").items():
        assert torch.equal(tensor, load_folder(tmp_path / "here")[name]), name


# What is recorded, and what is refused


def test_the_cpu_is_the_default_and_leaves_no_trace(tmp_path: Path) -> None:
    llama(tmp_path)
    merge(tmp_path, "named", device="cpu", save_method="merged_4bit")
    merge(tmp_path, "default", save_method="merged_4bit")
    for file in (tmp_path / "default").iterdir():
        assert file.read_bytes() == (tmp_path / "named" / file.name).read_bytes()


def test_a_run_on_another_device_is_another_run(tmp_path: Path) -> None:
    """Last bits may differ: the fingerprint, which a run is continued by, is that of the device too."""
    llama(tmp_path)
    plans = [
        loraweld.plan(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base", device=name)
        for name in ("cpu", "cuda", "cuda:1")
    ]
    assert len({made.fingerprint for made in plans}) == 3
    assert [made.to_json()["device"] for made in plans] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "meta", "", "cuda:1234"])
def test_a_name_that_is_none_is_a_usage_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="expected one of cpu, cuda, cuda:N, mps, xpu"):
        make_request("adapter", output="out", device=name)
    assert exit_code("merge", "adapter", "-o", tmp_path / "out", f"--device={name}") == 2
    assert "device is" in capsys.readouterr().err


@pytest.mark.parametrize("there", [[], ["xpu:0"]])
@pytest.mark.parametrize("name", ["cuda", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused_before_a_byte_is_written(
    name: str, there: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For whatever is merged, with what torch finds and what to do; a plan can be made without it."""
    monkeypatch.setattr(device, "found_devices", lambda: there)
    llama(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    asked = tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out", "--device", name
    assert exit_code("plan", *asked) == 0
    capsys.readouterr()
    assert exit_code("merge", *asked) == 1
    message = capsys.readouterr().err
    found = "finds xpu:0" if there else "finds no accelerator"
    for words in (f"device {name} was asked for", f"torch {torch.__version__} {found}", "Leave the device out"):
        assert words in message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(bool(ACCELERATORS), reason="there is an accelerator")
@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_a_build_of_torch_without_the_device_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"device {name} was asked for, torch .* finds no accelerator"):
        merge(llama(tmp_path), "out", device=name, save_method="merged_4bit")


@pytest.mark.parametrize(
    ("lacks", "options", "config"),
    [
        ("bucketize", {"save_method": "merged_4bit"}, {}),
        ("round_", {"save_method": "merged_8bit"}, {}),
        ("linalg_qr", {}, {"init_lora_weights": "olora"}),
    ],
)
def test_a_device_without_an_operation_is_refused_before_a_byte_is_written(
    lacks: str,
    options: dict[str, Any],
    config: dict[str, Any],
    sim: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As mps has no FP8: a few rows are tried."""
    monkeypatch.setitem(other_device.fails, lacks, NotImplementedError(f"{lacks} is not implemented for {sim}"))
    before = sorted(llama(tmp_path, **config).rglob("*"))
    with pytest.raises(RequestError, match=rf"device {sim}:?0? cannot .* not implemented .*Leave the device out"):
        merge(tmp_path, "out", device=sim, **options)
    assert sorted(tmp_path.rglob("*")) == before


class Later(dict[str, Exception]):
    """Failures of operations that go well `count` times first."""

    def __init__(self, count: int, **fails: Exception) -> None:
        super().__init__(fails)
        self.count = count

    def __contains__(self, name: object) -> bool:
        fails = super().__contains__(name)
        self.count -= fails
        return fails and self.count < 0


def test_a_device_without_memory_is_no_traceback(sim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be filled by another process in the middle of a run; what is finished then is not made again."""
    monkeypatch.setattr(device_trial, "try_device", lambda *given: None)
    options: dict[str, Any] = {"device": sim, "save_method": "merged_4bit"}
    llama(tmp_path)
    merge(tmp_path, "whole", **options)
    with monkeypatch.context() as full:
        full.setattr(other_device, "fails", Later(9, bucketize=torch.cuda.OutOfMemoryError("tried to allocate 20 MiB")))
        said = f"device {sim} has no memory left: tried to allocate 20 MiB. .*fewer workers"
        with pytest.raises(OutputError, match=said):
            merge(tmp_path, "out", workers=1, **options)
    assert not (tmp_path / "out").exists()
    assert merge(tmp_path, "out", **options).resumed_bytes
    assert weights(tmp_path, "out") == weights(tmp_path, "whole")


def test_an_adapter_alone_has_nothing_to_compute(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="device have no effect with save_method lora"):
        merge(llama(tmp_path), "out", device="cuda", save_method="lora")


# Where there is one


@on_accelerators
@pytest.mark.parametrize("name", ACCELERATORS or ["none"])
@pytest.mark.parametrize("options", QUANTISED.values(), ids=QUANTISED)
def test_what_an_accelerator_quantises_is_verified(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    merge(llama(tmp_path), "out", device=name.removesuffix(":0"), **options)
    assert loraweld.verify(tmp_path / "out", base=tmp_path / "base", adapter=tmp_path / "adapter").holds


@on_accelerators
@pytest.mark.parametrize("name", ACCELERATORS or ["none"])
def test_rows_in_16_bit_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    llama(tmp_path)
    for out, where in (("there", name.removesuffix(":0")), ("here", "cpu")):
        merge(tmp_path, out, device=where)
    assert weights(tmp_path, "there") == weights(tmp_path, "here")
