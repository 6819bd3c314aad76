"""Where the tensors go that have to be made to give parameters their checkpoint's names: memory, then files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Spill(TorchFunctionMode):
    """While it is active views stay views; what is not one of `parameters` is kept up to a limit, then put into files.

    transformers splits and fuses parameters when it loads a model. To undo a fusion is to look at parts. To undo a
    split takes a copy, of as much as the model holds of such parameters: up to `limit_bytes` of them stay in the
    machine's memory, the others become maps of files in `folder`, as do all that are made on an accelerator.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], folder: Path, *, limit_bytes: int) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        self._folder = folder
        self._left = limit_bytes
        self._files = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]  # what is read later is read in any layout
        result = func(*args, **(kwargs or {}))
        if type(result) is not torch.Tensor or not result.numel():
            return result
        with torch._C.DisableTorchFunction():
            return self._kept(result)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place in self._known:
            return tensor
        num_bytes = tensor.numel() * tensor.element_size()
        if tensor.device.type == "cpu" and num_bytes <= self._left:
            self._left -= num_bytes
        else:
            tensor = self._in_file(tensor)
        self._known.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _in_file(self, tensor: torch.Tensor) -> torch.Tensor:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / str(self._files)
        self._files += 1
        flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return flat.view(tensor.shape).copy_(tensor)
