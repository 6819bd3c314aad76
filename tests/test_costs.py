"""What a merge costs, in counts that do not depend on the machine's speed: bytes read and written, pages touched.

Two merges of one kind are compared, a small one and a large one: what Python and torch take to start is in both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fakes import llama_shapes, random_factors, random_tensors, write_adapter, write_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="NO COSTS ARE COUNTED: Linux's /proc is needed"),
]
SIZES = {"hidden": 1024, "intermediate": 2816, "vocab": 4096}
SMALL, LARGE = 8, 24  # even the small one fills the buffers of all threads


@dataclass(frozen=True)
class Cost:
    """Of one run: bytes by read and write calls, and pages that were touched for the first time."""

    read: int
    written: int
    faults: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.read - other.read, self.written - other.written, self.faults - other.faults)


def cost_of(*arguments: str | Path) -> Cost:
    command = [sys.executable, "-m", "loraweld", "merge", *map(str, arguments), "--quiet"]
    with subprocess.Popen(command) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
        counters = {name: int(value) for name, value in (line.split(": ") for line in lines)}
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return Cost(counters["rchar"], counters["wchar"], usage.ru_minflt)


def inputs(folder: Path, layers: int, targets: tuple[str, ...]) -> tuple[Path, Path, int, int]:
    """Write a base and an adapter; return both with their bytes."""
    shapes = llama_shapes(layers=layers, **SIZES)
    base = write_base(folder / f"base{layers}", random_tensors(shapes, torch.bfloat16), num_files=2)
    chosen = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0].endswith(targets)}
    adapter = write_adapter(folder / f"adapter{layers}", random_factors(chosen))
    sizes = (sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (base, adapter))
    return base, adapter, *sizes


def difference(folder: Path, targets: tuple[str, ...], *options: str) -> tuple[Cost, int, int]:
    """Return what the large merge cost more than the small one, and how much larger its base and its adapter are."""
    costs, bases, adapters = [], [], []
    for layers in (SMALL, LARGE):
        base, adapter, base_bytes, adapter_bytes = inputs(folder, layers, targets)
        costs.append(cost_of(adapter, "--base", base, "-o", folder / f"out{layers}", *options))
        bases.append(base_bytes)
        adapters.append(adapter_bytes)
    return costs[1] - costs[0], bases[1] - bases[0], adapters[1] - adapters[0]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("proj",)])
def test_each_byte_is_read_once_and_written_once(targets: tuple[str, ...], tmp_path: Path) -> None:
    """Of the adapter twice: its checksum is in the record. At most 2 % more in all."""
    cost, base, adapter = difference(tmp_path, targets)
    assert base <= cost.read <= 1.02 * (base + 2 * adapter)
    assert base <= cost.written <= 1.02 * base


def test_no_page_is_touched_for_the_first_time_while_the_model_streams(tmp_path: Path) -> None:
    """A new tensor for each weight would touch 262,144 pages a gigabyte."""
    cost, base, _ = difference(tmp_path, ("proj",))
    assert cost.faults <= 20_000 * base / 1e9


def test_decoding_costs_no_more_pages(tmp_path: Path) -> None:
    """From 16 bit to codes and scales."""
    cost, base, _ = difference(tmp_path, ("proj",), "--save-method", "merged_4bit")
    assert cost.faults <= 40_000 * base / 1e9
    assert cost.written <= 0.6 * base
