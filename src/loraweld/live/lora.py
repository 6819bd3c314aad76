"""`save_method="lora"`: the adapter of a model in memory, as PEFT writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraweld.adapter.files import PICKLE_NAME, SAFE_NAME
from loraweld.errors import RequestError
from loraweld.live.adapters import adapter_tensors, save_adapter_config
from loraweld.live.parameters import SaveOptions
from loraweld.live.weights import PEFT_PREFIX

if TYPE_CHECKING:
    from loraweld.live.save import LiveModel


def adapter_files(live: LiveModel, options: SaveOptions, folder: Path) -> Path:
    """Write the active adapter's config and weights to `folder`.

    Raises:
        RequestError: the model has no adapter, or several are active.
    """
    name = _only_adapter(live)
    folder.mkdir()
    tensors = adapter_tensors(live.inner, name, state=live.state, embeddings="auto")
    if not options.save_peft_format:
        tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    if options.safe_serialization:
        from safetensors.torch import save_file

        save_file(tensors, folder / SAFE_NAME, metadata={"format": "pt"})
    else:
        options.save_function(tensors, str(folder / PICKLE_NAME))
    save_adapter_config(live.inner, name, folder)
    return folder


def _only_adapter(live: LiveModel) -> str:
    present = list(getattr(live.inner, "peft_config", {}))
    names = list(live.adapters.active or live.adapters.merged)
    names = names or (present if len(present) == 1 else [])
    if not present:
        raise RequestError("save_method is 'lora', but the model has no adapter")
    if len(names) != 1:
        raise RequestError(
            f"save_method 'lora' writes one adapter, active are {names or 'none'} of {present}; "
            "choose one with set_adapter"
        )
    return names[0]
