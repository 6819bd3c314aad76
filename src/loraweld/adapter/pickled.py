"""adapter_model.bin → safetensors, through `torch.load(weights_only=True)` and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from loraweld.checkpoint.header import build_header
from loraweld.checkpoint.opening import open_regular
from loraweld.checkpoint.pickled import load_tensors
from loraweld.errors import AdapterError, CheckpointError

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


def convert_pickle(path: Path, target: Path) -> Path:
    """Write the tensors of the pickle at `path` to the safetensors file `target` and return `target`.

    Raises:
        AdapterError: not a pickle of plain tensors.
    """
    try:
        with open_regular(path) as file:
            state = load_tensors(file, device="cpu")
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}", path=path) from None
    except CheckpointError as error:
        raise AdapterError(str(error), path=None if error.path else path) from None
    _write(state, path, target)
    return target


def _write(state: dict[str, torch.Tensor], path: Path, target: Path) -> None:
    for name, tensor in state.items():
        if tensor.dtype not in _CODES:
            raise AdapterError(f"tensor {name!r} is {tensor.dtype}; adapters hold floats", path=path)
    entries = [(name, _CODES[t.dtype], tuple(t.shape)) for name, t in state.items()]
    with target.open("wb") as file:
        file.write(build_header(entries, {"format": "pt"}))
        for tensor in state.values():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
