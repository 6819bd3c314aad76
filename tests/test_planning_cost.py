"""What planning costs for each tensor, counted in calls of functions: their number hangs on no machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from cProfile import Profile
from pathlib import Path
from typing import Any

import pytest
import torch

import loraweld
from fakes import write_adapter
from synthetic_experts import EXPERTS, WIDTH, write_base
from synthetic_experts import write_adapter as write_fused

SHARDS = 8
LAYERS = 1, 2, 4


def write_pairs(folder: Path, modules: Iterable[str], **config: Any) -> None:
    pairs = {module: (torch.zeros(4, WIDTH), torch.zeros(WIDTH, 4)) for module in modules}
    write_adapter(folder, pairs, rank_pattern={}, **config)


def write_attention(folder: Path, layers: int) -> None:
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(layers) for name in "qv"]
    write_pairs(folder, modules, target_modules=["q_proj", "v_proj"])


def write_each(folder: Path, layers: int) -> None:
    """A pair for each projection of each expert, as transformers 4 trains them."""
    names = ["gate_proj", "up_proj", "down_proj"]
    places = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(layers) for expert in range(EXPERTS)]
    modules = [f"{place}.{name}" for place in places for name in names]
    write_pairs(folder, modules, target_modules=names, modules_to_save=["other"])


def calls(folder: Path, layers: int, write: Callable[[Path, int], None], options: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of tensors of a base, and of the calls that planning a merge and describing the plan take."""
    count = write_base(folder / "base", layers, SHARDS)
    write(folder / "adapter", layers)
    with Profile() as profile:
        plan = loraweld.plan(folder / "adapter", base=folder / "base", output=folder / "out", **options)
        plan.to_json()
    return count, sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize(
    ("write", "options", "most"),
    [
        pytest.param(write_fused, {}, 400, id="fused"),
        pytest.param(write_fused, {"save_method": "merged_fp8"}, 610, id="fused-to-fp8"),
        pytest.param(write_fused, {"max_shard_size": "1MB", "rounding": "stochastic"}, 480, id="repacked"),
        pytest.param(write_attention, {}, 220, id="attention"),
        pytest.param(write_attention, {"save_method": "merged_4bit"}, 255, id="attention-to-4-bit"),
        pytest.param(write_each, {}, 800, id="each"),
    ],
)
def test_calls_grow_as_the_tensors_do(
    tmp_path: Path, write: Callable[[Path, int], None], options: Mapping[str, Any], most: int
) -> None:
    """2n more tensors take twice the calls of n more, and one takes at most `most`, a fifth more than was counted."""
    calls(tmp_path / "first", 1, write, options)  # imports, and what is read once
    small, middle, large = (calls(tmp_path / str(layers), layers, write, options) for layers in LAYERS)
    added, twice_added = middle[1] - small[1], large[1] - middle[1]
    assert large[0] - middle[0] == 2 * (middle[0] - small[0])
    assert twice_added <= 2.02 * added
    assert added <= most * (middle[0] - small[0])
