"""Matrix products in bfloat16 instead of float32: how many results are misrounded, and how long it takes.

A factor is split into bfloat16 parts that add up to it. The products of the parts lie side by side in one product of
more columns, which is summed in float32, added to the weight and rounded once: three products of two parts each, or six
of three, those whose size is above what float32 keeps. It is for processors with matrix instructions (AMX). Prints the
cases as JSON.

    python benchmarks/products.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from loraweld.compute.rounding import round_once

ROWS, COLS, STD = 256, 4096, 0.02
RANKS = (16, 64, 256)
CHANGES = (0.01, 0.1)  # ‖Δ‖ / ‖W‖
SPLITS = (2, 3)


def case(rank: int, change: float, rounds: int) -> dict[str, Any]:
    """Return shares of misrounded elements and nanoseconds an element: of float32, then of each split."""
    weight, left, right = inputs(rank, change)
    exact = weight.double() + left.double() @ right.double()
    expected = round_once(exact.numpy(), torch.bfloat16)
    ways = [partial(in_float32, weight, left, right)]
    ways += [partial(torch.addmm, weight, *side_by_side(left, right, parts)) for parts in SPLITS]
    return {
        "rank": rank,
        "change": change,
        "misrounded": [(way() != expected).double().mean().item() for way in ways],
        "ns": [statistics.median(seconds(way) for _ in range(rounds)) / weight.numel() * 1e9 for way in ways],
    }


def inputs(rank: int, change: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight in bfloat16 and two float32 factors."""
    generator = torch.Generator().manual_seed(rank)
    weight = (torch.randn(ROWS, COLS, generator=generator) * STD).bfloat16()
    left, right = (torch.randn(shape, generator=generator) for shape in ((ROWS, rank), (rank, COLS)))
    return weight, left * (change * STD / (left @ right).std()), right


def in_float32(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add the change as a merge does."""
    return weight.float().addmm_(left, right).bfloat16()


def side_by_side(left: torch.Tensor, right: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors whose product is the sum of the products that count."""
    lefts, rights = split(left, parts), split(right, parts)
    pairs = [(one, other) for one in range(parts) for other in range(parts - one)]
    return torch.cat([lefts[one] for one, _ in pairs], dim=1), torch.cat([rights[other] for _, other in pairs])


def split(values: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Return bfloat16 tensors that add up to the values, the largest first."""
    found = []
    for _ in range(parts):
        found.append(values.bfloat16())
        values = values - found[-1].float()
    return found


def seconds(way: Callable[[], object]) -> float:
    """Return how long it takes, warm."""
    way()
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="bfloat16 products: errors and times.")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps([case(rank, change, args.rounds) for rank in RANKS for change in CHANGES]))


if __name__ == "__main__":
    main()
