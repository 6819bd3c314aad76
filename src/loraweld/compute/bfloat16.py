"""Whether products of bfloat16 matrices are as good as those of float32, and faster.

A product of two bfloat16 numbers is exact in float32, and processors that multiply them add up in float32: twice as
fast as float32 numbers with AVX512-BF16, more with AMX. oneDNN, which torch calls for it, adds the sum to another
matrix and rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Fewer torch multiplies in another way (`use_mkldnn_bf16_matmul` in ATen: up to 16³), of which nothing is known here.
LEAST_PRODUCTS = 1 << 13
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
_SMALLEST_NORMAL = 2.0**-126


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it, and torch uses them so that a result is rounded once."""
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older ones have none
    found = capabilities()
    return any(found.get(name) for name in _INSTRUCTIONS) and _is_rounded_once()


def flushed(scaling: float, rank: int, left_norm: float, right_norm: float) -> float:
    """Return a bound of what is lost of a sum of `rank` products, scaled, where numbers below 2⁻¹²⁶ are taken for 0.

    The instructions do so with factors and products (Intel's manual on VDPBF16PS and TDPBF16PS), oneDNN with the rows
    that are added and with results. The norms are those of the two vectors.
    """
    products = math.sqrt(rank) * (left_norm + right_norm) + rank
    return _SMALLEST_NORMAL * (abs(scaling) * products + 2)


def _is_rounded_once() -> bool:
    """Try it on numbers of which float32 holds every sum and bfloat16 hardly one."""
    draw = torch.Generator().manual_seed(0)
    base, left, right = (torch.randint(-99, 100, (64, 64), generator=draw).bfloat16() for _ in range(3))
    expected = base.float().addmm_(left.float(), right.float(), alpha=0.5).bfloat16()
    made = torch.addmm(base, left, right, alpha=0.5, out=torch.empty_like(base))
    return torch.equal(made, expected)
