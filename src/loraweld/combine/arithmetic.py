"""The arithmetic of combining LoRA adapters, one module at a time.

Shape letters: O = output features, I = input features, R = rank, K = rank of the result. A convolution's kernel counts
among its inputs.

Sources: TIES, arXiv:2306.01708; DARE, arXiv:2311.03099; PEFT 0.21.2, `LoraModel.add_weighted_adapter` and
utils/merge_utils.py, whose results these are. Two things differ. The scaling of an adapter with rsLoRA counts as it is
(PEFT's new adapter inherits `use_rslora`, and is sqrt(r) too strong). And DARE's random choice follows from a seed, the
adapter's place, the module's name and the factor, not from the state of torch's generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from loraweld.checkpoint.header import build_header
from loraweld.checkpoint.mounted import open_stored
from loraweld.checkpoint.stored import StoredTensor, read_bytes
from loraweld.combine.methods import Combination
from loraweld.combine.modules import CombinedModule, Term
from loraweld.dtypes import DTYPES
from loraweld.torch_settings import plain_arithmetic

_PREFIX = "base_model.model."
_PIECE_BYTES = 1 << 24


def write_combination(
    path: Path, modules: Sequence[CombinedModule], kept: Sequence[StoredTensor], combination: Combination
) -> None:
    """Write the combined adapter to the safetensors file `path`, factors in float32, `kept` tensors as they are.

    In memory there is one module at a time.
    """
    entries = [
        (f"{_PREFIX}{module.path}{end}", "F32", shape)
        for module in modules
        for end, shape in zip(module.ends, module.shapes, strict=True)
    ]
    entries += [(_key(tensor), tensor.dtype, tensor.shape) for tensor in kept]
    with path.open("wb") as file, plain_arithmetic():
        file.write(build_header(entries, {"format": "pt"}))
        for module in modules:
            for factor, shape in zip(combine_module(module, combination), module.shapes, strict=True):
                file.write(factor.reshape(shape).contiguous().numpy().tobytes())
        for tensor in kept:
            _copy(tensor, file)


def combine_module(module: CombinedModule, combination: Combination) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of the new adapter, (K, I, …) and (O, K, …), in float32."""
    if combination.method == "cat":
        return _concatenated(module.terms)
    if combination.method == "svd":
        return _product_factors(module.terms, module.rank)
    if combination.uses_deltas:
        return _delta_factors(module, combination)
    return _apart(module, combination)


def _concatenated(terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁, B₂, …]: the sum itself."""
    a = torch.cat([_values(term.a).double() * (term.weight * term.scaling) for term in terms]).float()
    return a, torch.cat([_values(term.b) for term in terms], dim=1)


def _apart(module: CombinedModule, combination: Combination) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine all A, and all B, each with the root of its w·s; the sign goes to A.

    So the product has cross terms Bᵢ·Aⱼ: that is what these names mean.
    """
    factors = [term.weight * term.scaling for term in module.terms]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    names = [f"{term.number}\0{module.path}\0" for term in module.terms]
    a = _combined([_values(term.a) for term in module.terms], signed, combination, [f"{name}A" for name in names])
    b = _combined([_values(term.b) for term in module.terms], roots, combination, [f"{name}B" for name in names])
    return a, b


def _delta_factors(module: CombinedModule, combination: Combination) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine the deltas s·B·A, each (O, I), and return the leading `rank` singular triplets of the result."""
    deltas = [(_matrix(term.b) @ _matrix(term.a)).mul_(term.scaling) for term in module.terms]
    names = [f"{term.number}\0{module.path}\0BA" for term in module.terms]
    delta_OI = _combined(deltas, [term.weight for term in module.terms], combination, names)
    del deltas
    u, s, vh = torch.linalg.svd(delta_OI, full_matrices=False)
    return _leading(u, s, vh, module.rank)


def _product_factors(terms: Sequence[Term], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leading singular triplets of Σ w·s·B·A, without ever making it: L·R = Q₁(T₁T₂ᵀ)Q₂ᵀ, in float64."""
    left_OR = torch.cat([_matrix(term.b).double() for term in terms], dim=1)
    right_RI = torch.cat([_matrix(term.a).double() * (term.weight * term.scaling) for term in terms])
    q_left, t_left = torch.linalg.qr(left_OR)
    q_right, t_right = torch.linalg.qr(right_RI.T)
    u, s, vh = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
    return _leading(q_left @ u, s, vh @ q_right.T, rank)


def _leading(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A = V, B = U·S; the largest element of each column of U is positive, so that signs do not hang on the library."""
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return (vh * signs[:, None]).float(), (u * (signs * s)).float()


def _combined(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], combination: Combination, names: Sequence[str]
) -> torch.Tensor:
    """Prune the tensors, if the method does, and add them up: weighted, or as the mean of those of the elected sign."""
    pruned = [_pruned(tensor, combination, name) for tensor, name in zip(tensors, names, strict=True)]
    if combination.majority_sign_method is None:
        return _sum([tensor * weight for tensor, weight in zip(pruned, weights, strict=True)])
    votes = pruned if combination.majority_sign_method == "total" else [tensor.sign() for tensor in pruned]
    elected = torch.where(_sum(votes) >= 0, 1.0, -1.0)
    agrees = [tensor.sign() == elected for tensor in pruned]
    total = _sum([tensor * weight * mask for tensor, weight, mask in zip(pruned, weights, agrees, strict=True)])
    return total / _sum([mask.float() for mask in agrees]).clamp_(min=1.0)


def _pruned(tensor: torch.Tensor, combination: Combination, name: str) -> torch.Tensor:
    density = combination.density
    if density is None or density == 1:
        return tensor
    if combination.seed is None:
        return _largest(tensor, density)
    return _dropped(tensor, density, f"{combination.seed}\0{name}")


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the `density` of largest magnitude."""
    mask = torch.zeros(tensor.numel())
    mask[torch.topk(tensor.abs().flatten(), k=int(density * tensor.numel()))[1]] = 1
    return tensor * mask.view(tensor.shape)


def _dropped(tensor: torch.Tensor, density: float, name: str) -> torch.Tensor:
    """Keep each element with the probability `density`, and divide by it: the expected value stays.

    The choice follows from `name`.
    """
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return tensor * (torch.rand(tensor.shape, generator=generator) < density) / density


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _values(tensor: StoredTensor) -> torch.Tensor:
    """Return a stored tensor in float32."""
    dtype = getattr(torch, DTYPES[tensor.dtype].torch_name)
    return torch.frombuffer(bytearray(read_bytes(tensor)), dtype=dtype).view(tensor.shape).float()


def _matrix(tensor: StoredTensor) -> torch.Tensor:
    return _values(tensor).flatten(1)


def _key(tensor: StoredTensor) -> str:
    return _PREFIX + tensor.name.removeprefix("_orig_mod.").removeprefix(_PREFIX)


def _copy(tensor: StoredTensor, target: BinaryIO) -> None:
    with open_stored(tensor.path) as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.num_bytes, _PIECE_BYTES):
            target.write(file.read(min(_PIECE_BYTES, tensor.num_bytes - start)))
