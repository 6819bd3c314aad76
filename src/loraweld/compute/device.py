"""The device that arithmetic is done on: the CPU, or an accelerator that torch finds.

It is a value that is handed down to what uses it: the encoders that quantise, and decompositions of whole weights.
"""

from __future__ import annotations

import torch

from loraweld.errors import RequestError

HOST = torch.device("cpu")


def open_device(name: str) -> torch.device:
    """Return the device of this name, as `MergeRequest.device` has it.

    Raises:
        RequestError: torch does not find it.
    """
    found = found_devices()
    if name != HOST.type and not {name, f"{name}:0"} & set(found):
        there = f"finds {', '.join(found)}" if found else "finds no accelerator"
        raise RequestError(
            f"device {name} was asked for, torch {torch.__version__} {there}. Leave the device out for the CPU, or "
            "install the build of torch, and the driver, that this machine's accelerator needs"
        )
    return torch.device(name)


def found_devices() -> list[str]:
    """Return the accelerators that this build of torch can use here."""
    counts = {
        "cuda": torch.cuda.device_count(),
        "xpu": torch.xpu.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    return [f"{kind}:{index}" for kind, count in counts.items() for index in range(count)]
