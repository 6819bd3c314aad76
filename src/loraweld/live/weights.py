"""A model in memory → the tensors of its checkpoint, by the names that transformers would write.

PEFT's wrapping is taken off, so that what remains is the base as it is in memory: weights that were trained outside
PEFT, resized embeddings, and adapters that are merged into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraweld.errors import RequestError, listing
from loraweld.live.machine import require
from loraweld.live.quantised import check_kernels, left_of_codes, repacked_states
from loraweld.live.spill import Spill

PEFT_PREFIX = "base_model.model."


def base_of(model: Any) -> Any:
    """Return the transformers model, without a PeftModel or a compiled module around it.

    Raises:
        RequestError: there is none inside.
    """
    require("transformers", "safetensors")
    from transformers import PreTrainedModel

    inner = getattr(model, "_orig_mod", model)
    inner = getattr(inner, "module", inner) if not isinstance(inner, PreTrainedModel) else inner
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise RequestError(f"model is a {type(model).__name__}, expected one of transformers, or PEFT around one")
    return inner


def state_of(inner: Any) -> dict[str, torch.Tensor]:
    """Return the state dict of a transformers model, quantised layers as files have them.

    Raises:
        RequestError: a kernel keeps codes in an order of its own.
    """
    check_kernels(inner)
    with repacked_states(inner) as repacked:
        state: dict[str, torch.Tensor] = dict(inner.state_dict())
    state |= repacked
    state |= dict(_offloaded(inner, state))
    left = left_of_codes(inner)
    return {name: value for name, value in state.items() if name not in left}


def _offloaded(inner: Any, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the values of parameters that accelerate keeps on the CPU or in files and brings in for a forward pass.

    Those in files are maps of them: nothing is read here.
    """
    for path, module in inner.named_modules():
        for hook in _hooks(module):
            held: Mapping[str, torch.Tensor] | None = getattr(hook, "weights_map", None)
            if held is None:
                continue
            for name in (*module._parameters, *module._buffers):
                value = state.get(f"{path}.{name}")
                if value is not None and value.device.type == "meta":
                    yield f"{path}.{name}", held[name]


def _hooks(module: Any) -> Sequence[Any]:
    """The hooks of accelerate on a module, of a sequence each."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,)) if hook is not None else ()


def base_state(inner: Any, state: Mapping[str, torch.Tensor], *, trained_copies: bool) -> dict[str, torch.Tensor]:
    """Return the entries of `state`, that of `inner`, which belong to the base, by its own names.

    `trained_copies`: whether modules in `modules_to_save` count as PEFT trained them, not as they were.
    """
    found = dict(state)
    # Inner wrappers first: the names of the outer ones are still what they are in the module tree.
    for path, module in sorted(inner.named_modules(), key=lambda item: -len(item[0])):
        inside = _wrapped_name(module, trained_copies)
        if inside is not None:
            found = _unwrapped(found, f"{path}.", f"{path}.{inside}.")
    return found


def _wrapped_name(module: nn.Module, trained_copies: bool) -> str | None:
    """Where in a wrapper of PEFT the wrapped module is, None if it is no wrapper."""
    if not _is_of_peft(module):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    if isinstance(module, TrainableTokensWrapper):
        return "token_adapter"
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        return f"modules_to_save.{active[0]}" if trained_copies and active else "original_module"
    return None


def _is_of_peft(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def _unwrapped(state: Mapping[str, torch.Tensor], prefix: str, inside: str) -> dict[str, torch.Tensor]:
    """Names below `inside` move up to `prefix`; what else is below it is of the adapter."""
    return {
        prefix + name.removeprefix(inside) if name.startswith(inside) else name: tensor
        for name, tensor in state.items()
        if name.startswith(inside) or not name.startswith(prefix)
    }


def checkpoint_tensors(
    inner: Any, state: Mapping[str, torch.Tensor], *, spilled: Path, limit_bytes: int
) -> dict[str, torch.Tensor]:
    """Return `state` by the checkpoint's names, each parameter once, as `save_pretrained` of transformers does.

    What of it has to be made lies in memory up to `limit_bytes`, then in files in the folder `spilled`.

    Raises:
        RequestError: a parameter has no values here, or shares memory in a way that the model's class does not say.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(getattr(inner, "_keys_to_ignore_on_save", None) or ())
    kept = {name: value for name, value in state.items() if name not in ignored}
    _check_present(kept)
    try:
        kept = remove_tied_weights_from_state_dict(kept, inner)
    except RuntimeError as error:
        raise RequestError(f"the model shares parameters that its class does not tie: {error}") from None
    with Spill(state.values(), spilled, limit_bytes=limit_bytes):
        named = revert_weight_conversion(_without_quantiser(inner), kept)
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


class _Converted:
    """A model with other conversions than its own."""

    def __init__(self, model: Any, conversions: list[Any]) -> None:
        self._model = model
        self._weight_conversions = conversions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _without_quantiser(inner: Any) -> Any:
    """Leave out what a quantiser did to read its own checkpoint: what is in the state now is what is to be saved.

    transformers 5.23 cannot revert some of it, and makes codes again of weights that were loaded dequantised.
    """
    conversions = getattr(inner, "_weight_conversions", None)
    if not any(map(_of_quantiser, conversions or ())):
        return inner
    from transformers.conversion_mapping import get_model_conversion_mapping

    of_class = [one for one in get_model_conversion_mapping(inner, add_legacy=False) if hasattr(one, "operations")]
    plain = {tuple(one._original_target_patterns): one for one in of_class}
    kept = (plain.get(tuple(one._original_target_patterns)) if _of_quantiser(one) else one for one in conversions or ())
    return _Converted(inner, [one for one in kept if one is not None])


def _of_quantiser(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(type(one).__module__.startswith("transformers.integrations.") for one in operations)


def _check_present(state: Mapping[str, object]) -> None:
    away = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.device.type == "meta"]
    if away:
        raise RequestError(
            "parameters of the model have no values in memory (device meta), nor does a hook of accelerate know where "
            "they are; load the model with its values, or give them with "
            f"state_dict:\n{listing(away, limit=8)}"
        )
    spread = [name for name, value in state.items() if type(value).__name__ == "DTensor"]
    if spread:
        raise RequestError(
            "parameters of the model are spread over devices (DTensor); gather them first and give them with "
            f"state_dict:\n{listing(spread, limit=8)}"
        )
