"""Quantised layers in memory, where they differ from what files hold.

- bitsandbytes repacks its 4-bit weights for inference on some CPUs.
- compressed-tensors decodes its weights at the first forward pass, and keeps their scales beside them.
- GPTQModel counts the zeros of GPTQ from zero as soon as they are loaded, whatever the file does, and many of its
  kernels put codes in an order of their own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from loraweld.errors import RequestError

# What compressed-tensors keeps scales of: weight_scale, input_zero_point, …
_SCHEMES = ("weight", "input", "output")
# Layers of GPTQModel 7.7 whose codes are in memory as they are in files, all else of its layers is not.
_KERNELS_IN_ORDER = re.compile(r"(Torch|TritonV2|AwqTorch|AwqGEMM|AwqGEMMTriton)(Quant)?Linear")
# These put them in order of their own at the first forward pass of inference.
_KERNELS_UNTIL_INFERENCE = ("TorchAtenLinear", "TorchCpuAvx512Linear")
_ZEROS_FROM_ZERO = 2


@contextmanager
def repacked_states(inner: Any) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield the parts of 4-bit weights that bitsandbytes has repacked; within the block it leaves them so.

    Asked for their state it would unpack the model's own, with other block scales than before. Here the state has the
    codes as they are (`unpacked` in `memory` puts them in order when they are read), and the scales it computes with.
    """
    packed = {path: module.weight for path, module in inner.named_modules() if _is_repacked(module)}
    states = {path: weight.quant_state for path, weight in packed.items()}
    parts = {f"{path}.{name}": part for path, weight in packed.items() for name, part in _unpacked(weight).items()}
    try:
        for weight in packed.values():
            weight.quant_state = None  # what is left to save is the parameter
        yield parts
    finally:
        for path, weight in packed.items():
            weight.quant_state = states[path]


def _is_repacked(module: Any) -> bool:
    weight = getattr(module, "weight", None) if "weight" in getattr(module, "_parameters", {}) else None
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _unpacked(weight: Any) -> dict[str, torch.Tensor]:
    """The parts of a repacked weight, as bitsandbytes writes one whose scales are not quantised."""
    quant_state = copy.copy(weight.quant_state)
    quant_state.absmax = quant_state.absmax.T.reshape(-1).float()
    quant_state.nested, quant_state.offset, quant_state.state2 = False, None, None
    quant_state.dtype = quant_state.original_dtype
    parts: dict[str, torch.Tensor] = quant_state.as_dict(packed=True)
    codes = weight.data.view(quant_state.original_qshape)
    return {"weight": codes, **{f"weight.{name}": part for name, part in parts.items()}}


def repacked_rows(inner: Any) -> dict[int, int]:
    """Return the bytes of a row of each 4-bit weight that bitsandbytes has repacked, by where its codes are."""
    weights = (module.weight for module in inner.modules() if _is_repacked(module))
    return {weight.data_ptr(): int(weight.quant_state.shape[1]) // 2 for weight in weights}


def is_decoded(inner: Any) -> bool:
    """Whether the codes of compressed-tensors have become plain weights, as they do at a model's first forward pass."""
    states = [status.name for module in inner.modules() if (status := _quantisation_status(module)) is not None]
    return bool(states) and "COMPRESSED" not in states


def _quantisation_status(module: Any) -> Any:
    return getattr(module, "quantization_status", None)


def left_of_codes(inner: Any) -> set[str]:
    """The scales and zeros that stay beside weights when compressed-tensors has decoded them."""
    left = set()
    for path, module in inner.named_modules():
        status = _quantisation_status(module)
        if status is not None and status.name != "COMPRESSED":
            names = (*module._parameters, *module._buffers)
            left |= {f"{path}.{name}" for name in names if name.partition("_")[0] in _SCHEMES and "_" in name}
    return left


def check_kernels(inner: Any) -> None:
    """Raises:
    RequestError: a layer of GPTQModel, GPTQ or AWQ, does not have its codes in the order of files.
    """
    for path, module in inner.named_modules():
        kernel = type(module).__name__
        if not _is_packed(module) or _KERNELS_IN_ORDER.fullmatch(kernel):
            continue
        if kernel in _KERNELS_UNTIL_INFERENCE and not module._cpu_transformed:
            continue
        raise RequestError(
            f"layer {path!r} is a {kernel}, which keeps codes in an order of its own; load the model with "
            "GPTQConfig(backend='gptq_torch') or AwqConfig(backend='awq_torch'), or merge its files (loraweld merge)"
        )


def _is_packed(module: Any) -> bool:
    return "qweight" in module._buffers or "qweight" in module._parameters


def zeros_from_zero(inner: Any) -> bool:
    """Whether stored zeros of GPTQ are the zeros themselves, as in the format gptq_v2, not one less.

    Raises:
        RequestError: layers differ in it.
    """
    forms = {int(module.qzero_format()) for module in inner.modules() if hasattr(module, "qzero_format")}
    if len(forms) > 1:
        raise RequestError("layers of the model differ in the form of their zeros (qzero_format); load it anew")
    return forms == {_ZEROS_FROM_ZERO}
