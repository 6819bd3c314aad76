"""The memory of a merge does not grow with its largest tensor: looked at from outside, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loraweld
from s3_server import BUCKET, Store

# What the command line promises: the default budget, and what Python and torch take.
MOST_MIB = 512 + 260


def write_hollow_base(folder: Path, tensors: dict[str, tuple[int, ...]], **config: object) -> Path:
    """Write a bfloat16 base whose weights are a hole in the file: all zeros, and no room on the disk."""
    folder.mkdir()
    entries, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + end)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "tie_word_embeddings": False, **config}))
    return folder


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "peft_version": "0.21.2", **config}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return folder


def write_factors(folder: Path, shapes: dict[str, tuple[int, int]], rank: int) -> Path:
    """Write a LoRA of these modules, by name."""
    tensors = {f"{name}.lora_A.weight": torch.randn(rank, shape[1]) for name, shape in shapes.items()}
    tensors |= {f"{name}.lora_B.weight": torch.randn(shape[0], rank) for name, shape in shapes.items()}
    names = sorted({name.rpartition(".")[2] for name in shapes})
    return write_adapter(folder, tensors, r=rank, target_modules=names)


# A process starts with the peak of the one that starts it: between the tests and the merge there is a small one.
OUTSIDE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "loraweld", *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_mib(base: Path, adapter: Path, out: Path) -> float:
    return peak_of("merge", str(adapter), "--base", str(base), "-o", str(out), "--quiet")


def peak_of(*arguments: str) -> float:
    """Return the peak memory of a command, which must succeed."""
    command = [sys.executable, "-c", OUTSIDE, *arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]) / 1024


LAYER_OF_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


@pytest.mark.slow
def test_a_rank_of_256(tmp_path: Path) -> None:
    """Factors sixteen times as large change the peak by a sixth: the right ones of the tensors that threads are at."""
    shapes = {f"model.layers.{n}.{key}": shape for n in range(3) for key, shape in LAYER_OF_8B.items()}
    base = write_hollow_base(tmp_path / "base", {f"{name}.weight": shape for name, shape in shapes.items()})
    peaks = []
    for rank in (16, 256):
        adapter = write_factors(tmp_path / f"r{rank}", shapes, rank)
        peaks.append(peak_mib(base, adapter, tmp_path / f"out{rank}"))
    assert peaks[1] < 1.2 * peaks[0], peaks


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("place", ["folder", "store"])
def test_a_plan_tells_the_peak(place: str, workers: int, tmp_path: Path, s3: Store) -> None:
    """About, also of a merge whose output is sent away."""
    shapes = {f"model.layers.{n}.{key}": shape for n in range(2) for key, shape in LAYER_OF_8B.items()}
    base = write_hollow_base(tmp_path / "base", {f"{name}.weight": shape for name, shape in shapes.items()})
    adapter = write_factors(tmp_path / "adapter", shapes, 16)
    out = tmp_path / "out" if place == "folder" else f"s3://{BUCKET}/out"
    options = ["--base", str(base), "-o", str(out), "--workers", str(workers)]
    planned = loraweld.plan(adapter, base=base, output=out, workers=workers).peak_memory_bytes / 2**20
    assert 0.75 * planned <= peak_of("merge", str(adapter), *options, "--quiet") <= 1.1 * planned


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_two_gigabytes(transposed: bool, tmp_path: Path) -> None:
    """128 experts in one tensor, each with a LoRA."""
    experts, rows, cols = 128, 4096, 2048
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base = write_hollow_base(tmp_path / "base", {name: (experts, rows, cols)}, model_type="qwen3_vl_moe")
    outputs, inputs = (cols, rows) if transposed else (rows, cols)
    factors = {"lora_A": torch.randn(16 * experts, inputs), "lora_B": torch.randn(outputs, 16 * experts)}
    tensors = {f"model.layers.0.mlp.experts.{key}.weight": factor for key, factor in factors.items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, target_parameters=["mlp.experts.gate_up_proj"])
    assert (base / "model.safetensors").stat().st_size > 2e9
    assert peak_mib(base, adapter, tmp_path / "out") <= MOST_MIB
    checked = torch.empty(0)
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little") + 2 * 77 * rows * cols
        file.seek(start)
        checked = torch.frombuffer(bytearray(file.read(2 * rows * cols)), dtype=torch.bfloat16).view(rows, cols)
    delta = factors["lora_B"][:, 77::experts].double() @ factors["lora_A"][77 * 16 : 78 * 16].double()
    assert torch.equal(checked, (delta.T if transposed else delta).to(torch.bfloat16)) or (
        (checked != (delta.T if transposed else delta).to(torch.bfloat16)).float().mean() <= 1e-4
    )


@pytest.mark.slow
def test_an_embedding_of_four_gigabytes(tmp_path: Path) -> None:
    """256k tokens of 8192 numbers, and a head as large, both with a LoRA."""
    tokens, width = 262_144, 8192
    base = write_hollow_base(
        tmp_path / "base", {"model.embed_tokens.weight": (tokens, width)}, model_type="llama", vocab_size=tokens
    )
    tensors = {
        "model.embed_tokens.lora_embedding_A": torch.randn(16, tokens),
        "model.embed_tokens.lora_embedding_B": torch.randn(width, 16),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["embed_tokens"])
    assert (base / "model.safetensors").stat().st_size > 4e9
    assert peak_mib(base, adapter, tmp_path / "out") <= MOST_MIB


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 4096, 2048), (262_144, 4096)])
def test_a_report_on_two_gigabytes(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Base and output are compared some rows at a time, a stack of experts too."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for folder, value in (("base", 1), (("out"), 3)):
        model = write_hollow_base(tmp_path / folder, {name: shape}, model_type="qwen3_vl_moe")
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    page = tmp_path / "page.html"
    peak = peak_of("report", str(tmp_path / "out"), "--base", str(tmp_path / "base"), "-o", str(page), "--quiet")
    assert peak <= MOST_MIB
    assert "200 %" in page.read_text()  # from 1 to 3, all else 0
