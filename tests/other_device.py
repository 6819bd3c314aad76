"""A second device without the hardware: tensors that say they lie there and compute what the CPU does.

What torch refuses of an accelerator is refused here: operands on two devices, but for numbers without dimensions, and
`numpy()` of what lies there. Copies to and fro work, in place and out of place. So whatever is computed on this device
has followed it from its first operand to its last result, with the very bits of the CPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "sim"
# The operations that ran there, by name.
ran: Counter[str] = Counter()
# What some of them end with.
fails: dict[str, Exception] = {}
# What may have operands on both: copies.
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_kept: list[torch.library.Library] = []


class There(torch.Tensor):
    """A tensor on the device; `held` has its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, **layout, dtype=held.dtype, device=torch.device(NAME, 0)
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def install() -> bool:
    """Make the device known to torch, once in a process; False if this torch cannot have a device of Python's."""
    make = getattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend", None)
    if make is not None and not _kept:
        make(NAME)
        # For the other tests of this process there is none, whichever come after.
        torch.get_device_module(NAME).is_available = lambda: False
        _kept.append(torch.library.Library("_", "IMPL"))
        _kept[0].fallback(lambda function, *args, **kwargs: _run(function, args, kwargs), "PrivateUse1")
    return make is not None


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values; the result lies where its operands lie, or where it is told to."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(operand.held): operand for operand in operands if isinstance(operand, There)}
    here = [operand for operand in operands if not isinstance(operand, There) and operand.dim()]
    if there and here and function not in _COPIES:
        raise RuntimeError(f"{function}: Expected all tensors to be on the same device, but found {NAME} and cpu")
    target = kwargs.get("device")
    if target is not None:
        stays = torch.device(target).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        stays = isinstance(args[0], There) if function in _COPIES else bool(there)
    name = function.overloadpacket.__name__
    if stays and name in fails:
        raise fails[name]
    ran[name] += stays
    args, kwargs = tree_map_only(There, lambda operand: operand.held, (args, kwargs))
    result = function(*args, **kwargs)
    if not stays:
        return result
    # In place, and with `out`, the operand itself comes back.
    return tree_map_only(torch.Tensor, lambda made: there[id(made)] if id(made) in there else There(made), result)
