"""One weight or bias merged by PEFT's own layer: for tuners whose formula is not written out in `compute/`.

PEFT is given a skeleton: bare layers at the paths of the trained model, whose weights take no memory. The adapter is
attached to it as to a model, then the layer at hand gets its real values, in float32, and merges itself. The rounding
to the output's dtype is left to `rounding`, so it happens once, where PEFT would round the delta and the sum.

Source: PEFT 0.21.2, `peft.mapping_func.get_peft_model`, `peft.utils.save_and_load`.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from loraweld.adapter.edits import Layer, PeftLayer
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.compute.codecs.decoder import open_decoder
from loraweld.compute.module_order import in_order
from loraweld.compute.tensors import read_flat, torch_dtype
from loraweld.errors import AdapterError, listing

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_PREFIX = "base_model.model."
_SHARED = "base_model."
_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
# What of a config says where an adapter goes: the skeleton has nothing but the layers it went to. And FRoD's bar.
_OPTIONS: dict[str, Any] = {
    "bias": "none",
    "exclude_modules": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "progressbar": False,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
}
# One merge at a time: PEFT's layers make several copies of a weight, and a skeleton serves all its layers.
_LOCK = threading.Lock()
_MADE_FROM_THEIR_WEIGHT = {"ADAMSS", "FROD", "OSF", "PSOFT"}
_PEFT_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError),
    *(ArithmeticError, AssertionError, MemoryError, OSError),
)
_FLOAT32_ERROR = 2.0**-23


class PeftLayerKernel:
    """A parameter ← what PEFT merges it to; the whole of it in float32, of which tiles take their rows.

    Behind edits of other adapters it adds what it changes of the stored weight.
    """

    def __init__(self, edit: PeftLayer, source: Source, reader: Reader) -> None:
        values = _read(source, reader)
        merged = merged_parameter(edit, values, _dtype(source), reader)
        self._merged_NC = merged.reshape(source.rows, source.cols)
        self._base_NC = values.view_as(self._merged_NC)
        self._difference = float((self._merged_NC - self._base_NC).abs().max()) if values.numel() else 0.0
        self._largest = float(self._merged_NC.abs().max()) if values.numel() else 0.0

    def span(self, start: int, stop: int) -> PeftLayerKernel:
        return self

    def apply(self, tile_nC: torch.Tensor, base_nC: torch.Tensor, top: int, error: float) -> float:
        merged_nC, stored_nC = (whole[top : top + len(tile_nC)] for whole in (self._merged_NC, self._base_NC))
        if torch.equal(tile_nC, stored_nC):
            tile_nC.copy_(merged_nC)
            return self._difference * _FLOAT32_ERROR
        tile_nC.add_(merged_nC - stored_nC)
        return error + (self._difference + self._largest) * 4 * _FLOAT32_ERROR

    def exact(self, values_K: Floats, rows_K: Ints, cols_K: Ints) -> Floats:
        """Return PEFT's float32 values, it has no others; added to what other adapters have made before."""
        merged_K, stored_K = (
            whole.numpy()[rows_K, cols_K].astype(np.float64) for whole in (self._merged_NC, self._base_NC)
        )
        changed_K: Floats = merged_K + (values_K - stored_K)
        return changed_K


def _dtype(source: Source) -> torch.dtype:
    """The dtype in which PEFT makes a layer: the stored one, float32 on codes."""
    return torch_dtype(source.dtype) if isinstance(source, StoredTensor) else torch.float32


def _read(source: Source, reader: Reader) -> torch.Tensor:
    """Return all values of a weight in float32, in its shape."""
    rows = open_decoder(source, reader).rows(0, source.rows).read(0, source.rows)
    return rows.to(torch.float32, copy=True).reshape(source.shape)


def merged_parameter(edit: PeftLayer, values: torch.Tensor, dtype: torch.dtype, reader: Reader) -> torch.Tensor:
    """Return `edit.parameter` after the merge in float32; `values` is what it is before, stored in `dtype`.

    Raises:
        AdapterError: PEFT cannot make or merge the layer, or its tensors are not those that the adapter has.
    """
    given = {edit.parameter: values.clone()}  # PEFT adds to it in place
    for name, other in (("weight", edit.weight), ("bias", edit.bias)):
        if other is not None:
            given[name] = _read(other, reader)
    with _LOCK, torch.no_grad(), _named(edit.layer.module):
        model = _model(edit, given, dtype)
        layer = model.get_submodule(_PREFIX + edit.layer.module)
        # A layer that is alone has its values already, perhaps changed by what it is made with (KaSA truncates them).
        bare = _put(layer.get_base_layer(), given if edit.others else {})
        _load(model, edit, reader)
        if edit.tuner == "FROD":
            _project_again(layer, dtype)
        layer.merge()
        merged: torch.Tensor = getattr(layer.get_base_layer(), edit.parameter).detach().float().contiguous()
        _put(layer.get_base_layer(), bare)
        layer.merged_adapters.clear()
    return merged


def rehearse(layers: Iterable[tuple[PeftLayer, Source]], reader: Reader) -> None:
    """Attach one layer of each kind to a skeleton without values and load it: what does not fit shows before a byte is
    written. Layers that are made from their weight cannot be made without it.

    Raises:
        AdapterError: PEFT cannot make a layer, or its tensors are not those that the adapter has.
    """
    seen: set[tuple[object, ...]] = set()
    for edit, source in layers:
        layer = edit.layer
        shapes = tuple((name, tensor.shape) for name, tensor in edit.own)
        kind = (re.sub(r"\d+", "#", layer.module), layer.kind, layer.shape, layer.has_bias, shapes, edit.config)
        if kind not in seen and edit.tuner not in _MADE_FROM_THEIR_WEIGHT:
            seen.add(kind)
            with _LOCK, torch.no_grad(), _named(layer.module):
                _load(_model(edit, {}, _dtype(source)), edit, reader)


@contextmanager
def _named(module: str) -> Iterator[None]:
    """Say which module an error of PEFT belongs to, and keep back its advice on how to train."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except _PEFT_ERRORS as error:
        raise AdapterError(f"{module}: PEFT cannot merge this layer: {type(error).__name__}: {error}") from error


def _put(base_layer: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give parameters of a layer other values, and return those it had."""
    had = {name: getattr(base_layer, name).data for name in values}
    for name, value in values.items():
        getattr(base_layer, name).data = value
    return had


def _model(edit: PeftLayer, values: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Layers that depend on the others are made once, together; a layer that is alone is made with its values."""
    if edit.others:
        return _together(edit.config, edit.others, edit.model_config, dtype)
    return _attach(edit.config, [edit.layer], values, dtype).float()


@lru_cache(maxsize=1)
def _together(config: str, layers: tuple[Layer, ...], model_config: str, dtype: torch.dtype) -> Any:
    model = _attach(config, in_order(layers, json.loads(model_config)) if model_config else layers, {}, dtype)
    for layer in layers:
        base_layer = model.get_submodule(_PREFIX + layer.module).get_base_layer()
        for parameter in base_layer.parameters():
            parameter.data = _nothing(
                parameter.shape, torch.float32
            )  # before they would be widened, which takes memory
    return model.float()


def _attach(config: str, layers: Sequence[Layer], values: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Return PEFT's model of a skeleton of `layers`; a layer that is alone has the given values.

    It is made in the base's dtype, as it was in training: what PEFT derives from the weight or draws from a seed was
    rounded to it. The caller widens it to float32.
    """
    from peft import PeftConfig, get_peft_model

    skeleton = nn.Module()
    for layer in layers:
        _place(skeleton, layer.module, _bare_layer(layer, values, dtype))
    made: Any = PeftConfig.from_peft_type(**json.loads(config))  # type: ignore[no-untyped-call]
    for name, value in _OPTIONS.items():
        if hasattr(made, name):
            setattr(made, name, value)
    made.target_modules = {layer.module for layer in layers}
    return get_peft_model(skeleton, made).eval()


def _nothing(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that take no memory."""
    if len(shape) < 2:  # PEFT adds to it in place
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros(1, dtype=dtype).expand(shape)


def _place(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, layer)


def _bare_layer(layer: Layer, values: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Return a layer of the right class and shape, its parameters the given values or nothing."""
    with torch.device("meta"):
        module = _class_of(layer)
    for name, parameter in list(module.named_parameters()):
        value = values[name].to(dtype) if name in values else _nothing(parameter.shape, dtype)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    return module


def _class_of(layer: Layer) -> nn.Module:
    first, second, *kernel = layer.shape
    match layer.kind:
        case "embedding":
            return nn.Embedding(first, second)
        case "conv1d":
            from transformers.pytorch_utils import Conv1D

            return Conv1D(second, first)  # type: ignore[no-untyped-call]
        case "conv":
            convolution: nn.Module = _CONVOLUTIONS[len(layer.shape)](second, first, tuple(kernel), bias=layer.has_bias)
            return convolution
        case _:
            return nn.Linear(second, first, bias=layer.has_bias)


def _load(model: Any, edit: PeftLayer, reader: Reader) -> None:
    """Load the tensors of the edit's layer, each of which PEFT must have asked for, and the other way round."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    module = f"{_PREFIX}{edit.layer.module}."
    own = {module + name: tensor for name, tensor in edit.own}
    shared = {_SHARED + name: tensor for name, tensor in edit.shared}
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_names({name for name in expected if name.startswith(module)}, set(own))
    _check_shared({name for name in expected if not name.startswith(_PREFIX)}, set(shared))
    stored = {name: tensor for name, tensor in (own | shared).items() if name in expected}
    state = {name: read_flat(reader, tensor).reshape(tensor.shape) for name, tensor in stored.items()}
    set_peft_model_state_dict(model, {name: _wide(value) for name, value in state.items()})


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def _check_names(expected: set[str], found: set[str]) -> None:
    if expected != found:
        problems = [f"missing: {name}" for name in sorted(expected - found)]
        problems += [f"unknown to this layer: {name}" for name in sorted(found - expected)]
        raise AdapterError(f"the file does not hold what PEFT's layer of this config has:\n{listing(problems)}")


def _check_shared(expected: set[str], found: set[str]) -> None:
    """A skeleton of one layer asks for its own share; what nobody asks for is not there."""
    missing = sorted(expected - found)
    if missing:
        raise AdapterError(f"the file does not hold what all layers share:\n{listing(missing)}")


def _project_again(layer: Any, dtype: torch.dtype) -> None:
    """FRoD computes U from the weight and the shared V, before the file's V is loaded (frod/layer.py, `update_layer`).

    PEFT keeps U in the dtype of the base.
    """
    (name,) = layer.frod_U
    weight = layer.get_base_layer().weight
    u, _ = layer._calculate_frod_u_and_lambda(layer.frod_V[name], weight.T if layer.fan_in_fan_out else weight)
    layer.frod_U[name] = u.to(dtype).float()
