"""The best approximation of a matrix by one of low rank: its truncated singular value decomposition.

Of all matrices of rank r the sum of the r leading σ·u·vᵀ is nearest (Eckart & Young 1936). Small matrices are
decomposed in float64; of large ones the leading directions are found by a randomised range finder with power
iterations (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1), from the same random numbers each time.

Shape letters: N = rows, C = columns, K = directions looked at, R = rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Up to this smaller side the exact decomposition takes seconds at most; a 4096 × 14336 one would take minutes.
EXACT_SIDE = 512
OVERSAMPLING = 10
POWER_ITERATIONS = 4
_SEED = 0x5EED


@dataclass(frozen=True, slots=True)
class Truncated:
    """left_NR · right_RC, float32, each with the square root of the singular values.

    `squared_norm` is that of the whole matrix, `squared_kept` that of the product.
    """

    left_NR: torch.Tensor
    right_RC: torch.Tensor
    squared_norm: float
    squared_kept: float


def working_dtype(rows: int, cols: int, rank: int) -> torch.dtype:
    """Return the dtype in which a matrix of this size is decomposed: float64 exactly, float32 by sampling."""
    return torch.float64 if _is_exact(rows, cols, rank) else torch.float32


def truncate(matrix_NC: torch.Tensor, *, rank: int, energy: float | None = None) -> Truncated:
    """Return the leading part of a finite matrix that is not zero.

    Args:
        matrix_NC: in its `working_dtype`; left unchanged.
        rank: the largest rank, or the smaller side if that is less.
        energy: share of the squared Frobenius norm that is enough; None: take as much as `rank` allows.
    """
    squared = float(torch.linalg.vector_norm(matrix_NC, dtype=torch.float64)) ** 2
    u_NK, s_K, v_KC = _leading(matrix_NC, rank)
    count = _count(s_K, rank, squared * energy if energy is not None else None)
    root_R = s_K[:count].sqrt()
    left_NR, right_RC = u_NK[:, :count] * root_R, root_R[:, None] * v_KC[:count]
    signs_R = _signs(left_NR)
    return Truncated(
        left_NR=(left_NR * signs_R).float().contiguous(),
        right_RC=(right_RC * signs_R[:, None]).float().contiguous(),
        squared_norm=squared,
        squared_kept=min(squared, float(s_K[:count].square().sum())),
    )


def _is_exact(rows: int, cols: int, rank: int) -> bool:
    """Sampling pays where few directions of many are wanted."""
    side = min(rows, cols)
    return side <= EXACT_SIDE or 2 * (rank + OVERSAMPLING) > side


def _leading(matrix_NC: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular vectors and values in float64, largest first: all of them, or at least `rank`."""
    rows, cols = matrix_NC.shape
    if _is_exact(rows, cols, rank):
        u_NK, s_K, v_KC = torch.linalg.svd(matrix_NC.double(), full_matrices=False)
        return u_NK, s_K, v_KC
    q_NK = _range(matrix_NC, rank + OVERSAMPLING)
    # Qᵀ·M is wide: of its QR decomposition only the square part has to be decomposed further, which is much faster.
    p_CK, r_KK = torch.linalg.qr((q_NK.T @ matrix_NC).double().T)
    u_KK, s_K, v_KK = torch.linalg.svd(r_KK.T)
    return q_NK.double() @ u_KK, s_K, v_KK @ p_CK.T


def _range(matrix_NC: torch.Tensor, count: int) -> torch.Tensor:
    """Return an orthonormal basis, (N, K), of what the matrix does to random directions, sharpened by its powers."""
    generator = torch.Generator().manual_seed(_SEED)
    probe_CK = torch.randn(matrix_NC.shape[1], count, generator=generator, dtype=matrix_NC.dtype)
    q_NK = _orthonormal(matrix_NC @ probe_CK)
    for _ in range(POWER_ITERATIONS):
        q_NK = _orthonormal(matrix_NC @ _orthonormal(matrix_NC.T @ q_NK))
    return q_NK


def _orthonormal(columns_NK: torch.Tensor) -> torch.Tensor:
    q_NK: torch.Tensor = torch.linalg.qr(columns_NK)[0]
    return q_NK


def _count(s_K: torch.Tensor, rank: int, enough: float | None) -> int:
    """How many singular values to take: none that are zero but for rounding, and no more than enough."""
    noise = float(s_K[0]) * len(s_K) * torch.finfo(torch.float64).eps
    count = max(1, min(rank, int((s_K > noise).sum())))
    if enough is None:
        return count
    reached = int((s_K.square().cumsum(0) < enough).sum()) + 1
    return min(count, reached)


def _signs(left_NR: torch.Tensor) -> torch.Tensor:
    """±1 for each column, so that its largest entry is positive: the decomposition leaves the sign open."""
    largest_R = left_NR.abs().argmax(0)
    picked_R = left_NR.gather(0, largest_R[None])[0]
    return torch.where(picked_R < 0, -1.0, 1.0).to(left_NR.dtype)
