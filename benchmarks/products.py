"""Matrix products in bfloat16 instead of float32: how many results are misrounded, and how long it takes.

A factor is split into bfloat16 parts that add up to it. The products of the parts lie side by side in one product of
more columns, which is summed in float32, added to the weight and rounded once: three products of two parts each, or six
of three, those whose size is above what float32 keeps. It is for processors with matrix instructions (AMX).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from loraweld.compute.rounding import round_once
from reporting import Part, conditions, promise, show, table

ROWS, COLS, STD = 256, 4096, 0.02
RANKS = (16, 64, 256)
CHANGES = (0.01, 0.1)  # ‖Δ‖ / ‖W‖
CONDITIONS = f"""\
A tile of {ROWS} × {COLS} normal bfloat16 weights, float32 factors, one thread. Misrounded: not what float64 rounds to,
before any repair of elements in doubt. bfloat16 products are torch's `addmm`; whether they are faster hangs on the
processor: here AMX is {{amx}}."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure float32 and both splits."""
    torch.set_num_threads(1)
    rows, sixes = [], []
    for rank in RANKS:
        for change in CHANGES:
            shares = _misrounded(rank, change)
            sixes.append(shares[2])
            rows.append(
                [f"r {rank}, ‖Δ‖/‖W‖ {change:g}", *(f"{share:.1e}" for share in shares), *_times(rank, args.rounds)]
            )
    header = ["misrounded", "float32", "3 products", "6 products", "float32 ns", "3 products ns", "6 products ns"]
    held = promise(
        "six products misround at most 1e-4", [1e4 * share for share in sixes], "e-4", lambda value: value <= 1
    )
    amx = "there" if torch.cpu._is_amx_tile_supported() else "not there"
    return Part(
        title="bfloat16 products",
        promises=[held],
        blocks=[table(header, rows), *conditions(CONDITIONS.format(amx=amx), work)],
    )


def _inputs(rank: int, change: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    weight = (torch.randn(ROWS, COLS, generator=generator) * STD).bfloat16()
    left, right = (torch.randn(shape, generator=generator) for shape in ((ROWS, rank), (rank, COLS)))
    return weight, left * (change * STD / (left @ right).std()), right


def _misrounded(rank: int, change: float) -> list[float]:
    weight, left, right = _inputs(rank, change)
    exact = weight.double() + left.double() @ right.double()
    expected = round_once(exact.numpy(), torch.bfloat16)
    made = [_float32(weight, left, right), *(torch.addmm(weight, *_split(left, right, parts)) for parts in (2, 3))]
    return [(one != expected).double().mean().item() for one in made]


def _float32(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return weight.float().addmm_(left, right).bfloat16()


def _split(left: torch.Tensor, right: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the products of the parts that count, side by side."""
    lefts, rights = _parts(left, parts), _parts(right, parts)
    pairs = [(one, other) for one in range(parts) for other in range(parts - one)]
    return torch.cat([lefts[one] for one, _ in pairs], dim=1), torch.cat([rights[other] for _, other in pairs])


def _parts(values: torch.Tensor, count: int) -> list[torch.Tensor]:
    found = []
    for _ in range(count):
        found.append(values.bfloat16())
        values = values - found[-1].float()
    return found


def _times(rank: int, rounds: int) -> list[str]:
    weight, left, right = _inputs(rank, CHANGES[0])
    splits = [_split(left, right, parts) for parts in (2, 3)]
    ways = [partial(_float32, weight, left, right), *(partial(torch.addmm, weight, *split) for split in splits)]
    return [show(statistics.median(_seconds(way) for _ in range(rounds)) / weight.numel() * 1e9, 2) for way in ways]


def _seconds(way: Callable[[], object]) -> float:
    way()
    start = time.perf_counter()
    way()
    return time.perf_counter() - start
