"""The tensors of one module of a tuner other than LoRA → the edits of its weight and bias, their shapes checked.

Shape letters: N = rows and C = columns of the matrix view of the stored weight, R = rank, E = elements.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraweld.adapter.config import AdapterConfig
from loraweld.adapter.edits import Edit, Hadamard, Kronecker, Layer, LowRank, PeftLayer, Scale, SingularValues
from loraweld.adapter.files import Adapter
from loraweld.adapter.keys import own_name
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.stored import StoredTensor
from loraweld.dtypes import is_plain_float
from loraweld.errors import AdapterError, MatchError
from loraweld.naming.families import is_conv1d
from loraweld.naming.linear import is_table

Shape = tuple[int, ...]
Parts = Mapping[str, StoredTensor]
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A module that an adapter has tensors for, and the base's weight and bias of it."""

    layer: Layer
    parts: Parts
    weight: Source
    bias: Source | None = None


def make_layer(config: AdapterConfig, module: str, name: str, shape: Shape, has_bias: bool, model_type: str) -> Layer:
    """Return the layer that PEFT saw: the shape tells its class, for matrices the names and the architecture do."""
    return Layer(module=module, kind=_kind(config, module, name, shape, model_type), shape=shape, has_bias=has_bias)


def _kind(config: AdapterConfig, module: str, name: str, shape: Shape, model_type: str) -> str:
    if len(shape) != 2:
        return "conv"
    if is_table(name.removesuffix(".weight")):
        return "embedding"
    flag = is_conv1d(model_type, module)
    transposed = bool(config.raw.get("fan_in_fan_out")) if flag is None else flag
    return "conv1d" if transposed else "linear"


def layer_edits(
    adapter: Adapter, tuned: Tuned, layers: Sequence[Layer], model_config: Mapping[str, object]
) -> dict[str, Edit]:
    """Return the edits by parameter, "weight" and "bias". `layers` are all layers of the adapter, in any order.

    Raises:
        AdapterError: tensors are missing or are not those of the tuner, or PEFT is needed and not installed.
        MatchError: the tensors do not fit the base's weight.
    """
    config = adapter.config
    _check_floats(tuned.parts)
    if not config.uses_peft_layer:
        edits = _native(config, tuned)
        if edits:
            return edits
    return _by_peft(adapter, tuned, layers, model_config)


def _check_floats(parts: Parts) -> None:
    for part, tensor in parts.items():
        if not is_plain_float(tensor.dtype) and "indices" not in part:
            raise AdapterError(f"{part} is stored as {tensor.dtype}, expected a float")


def _native(config: AdapterConfig, tuned: Tuned) -> dict[str, Edit]:
    """The edits of a formula in `compute/`; none where the layer is not of its plain form (cores of convolutions)."""
    match config.peft_type:
        case "ADALORA":
            return {"weight": _adalora(config, tuned)}
        case "LOHA" if not {"hada_t1", "hada_t2"} & set(tuned.parts):
            return {"weight": _loha(config, tuned)}
        case "LOKR" if "lokr_t2" not in tuned.parts and not _has_three_sizes(tuned.parts.get("lokr_w2")):
            return {"weight": _lokr(config, tuned)}
        case "IA3":
            return _ia3(config, tuned)
    return {}


def _adalora(config: AdapterConfig, tuned: Tuned) -> SingularValues:
    a, b, values = _exactly(tuned.parts, "lora_A", "lora_B", "lora_E")
    rows, cols = _matrix(tuned.layer.shape)
    transposed = tuned.layer.kind == "conv1d"
    rank = math.prod(values.shape)
    expected = ((rank, rows), (cols, rank)) if transposed else ((rank, cols), (rows, rank))
    if (a.shape, b.shape) != expected:
        raise MatchError(
            f"lora_A is {a.shape}, lora_B {b.shape} and lora_E {values.shape}, but the weight is {tuned.layer.shape}"
        )
    return SingularValues(
        delta=LowRank(a=a, b=b, scaling=config.init_alpha, transposed=transposed),
        values=values,
    )


def _loha(config: AdapterConfig, tuned: Tuned) -> Hadamard:
    left_1, right_1, left_2, right_2 = _exactly(tuned.parts, *_LOHA)
    rows, cols = _matrix(tuned.layer.shape)
    rank = right_1.shape[0]
    if (left_1.shape, left_2.shape) != ((rows, rank),) * 2 or (right_1.shape, right_2.shape) != ((rank, cols),) * 2:
        found = ", ".join(f"{name} {tensor.shape}" for name, tensor in sorted(tuned.parts.items()))
        raise MatchError(f"{found} do not fit the weight, {tuned.layer.shape}")
    return Hadamard(pairs=((left_1, right_1), (left_2, right_2)), scaling=config.scaling(tuned.layer.module, rank))


def _lokr(config: AdapterConfig, tuned: Tuned) -> Kronecker:
    first, second = (_factor(tuned.parts, name) for name in ("lokr_w1", "lokr_w2"))
    used = {tensor.name for tensor in (*first, *second)}
    if used != {tensor.name for tensor in tuned.parts.values()}:
        raise AdapterError(f"has the parts {', '.join(sorted(tuned.parts))}, which do not belong together")
    made = [_matrix((factor[0].rows, factor[-1].cols)) for factor in (first, second)]
    if tuple(math.prod(sizes) for sizes in zip(*made, strict=True)) != _matrix(tuned.layer.shape):
        raise MatchError(f"factors of {made[0]} and {made[1]} do not make a weight of {tuned.layer.shape}")
    return Kronecker(first=first, second=second, scaling=_lokr_scaling(config, tuned.layer.module, first, second))


def _has_three_sizes(factor: StoredTensor | None) -> bool:
    """A factor of a Conv1d: `torch.kron` pads the other one in front, so PEFT's product is not that of the matrices."""
    return factor is not None and len(factor.shape) == 3


def _lokr_scaling(config: AdapterConfig, module: str, *factors: tuple[StoredTensor, ...]) -> float:
    """alpha / r; the rank shows only in a factor that is a product."""
    ranks = {factor[1].shape[0] for factor in factors if len(factor) == 2} or {config.rank_of(module)}
    if len(ranks) > 1:
        raise AdapterError(f"the factors have the ranks {sorted(ranks)}, expected one")
    return config.scaling(module, ranks.pop())


def _factor(parts: Parts, name: str) -> tuple[StoredTensor, ...]:
    if name in parts:
        return (parts[name],)
    left, right = _need(parts, f"{name}_a", f"{name}_b")
    if left.cols != right.rows:
        raise AdapterError(f"{name}_a {left.shape} and {name}_b {right.shape} do not chain")
    return left, right


def _ia3(config: AdapterConfig, tuned: Tuned) -> dict[str, Edit]:
    """Feedforward layers are scaled by input, others by output, their bias too."""
    (factors,) = _exactly(tuned.parts, "ia3_l")
    layer = tuned.layer
    outputs, inputs = layer.shape[:2] if layer.kind != "conv1d" else layer.shape[1::-1]
    by_input = _is_feedforward(config, layer, factors)
    if math.prod(factors.shape) != (inputs if by_input else outputs):
        raise MatchError(f"ia3_l is {factors.shape}, but the weight is {layer.shape}")
    by_column = by_input != (layer.kind == "conv1d")
    edits: dict[str, Edit] = {"weight": Scale(factors=factors, by_column=by_column)}
    if layer.has_bias and not by_input:
        edits["bias"] = Scale(factors=factors, by_column=False)
    return edits


def _is_feedforward(config: AdapterConfig, layer: Layer, factors: StoredTensor) -> bool:
    """A vector of a linear layer lies along what it scales; that of a convolution does not show it, the config does."""
    if layer.kind != "conv" and factors.shape != (1, 1):
        return factors.shape[0] == 1
    return config.names_feedforward(layer.module)


def _exactly(parts: Parts, *names: str) -> list[StoredTensor]:
    extra = sorted(set(parts) - set(names))
    if extra:
        raise AdapterError(f"has {', '.join(extra)} besides {', '.join(names)}, which do not belong together")
    return _need(parts, *names)


def _need(parts: Parts, *names: str) -> list[StoredTensor]:
    missing = sorted(set(names) - set(parts))
    if missing:
        raise AdapterError(f"has {', '.join(sorted(parts))} but no {', '.join(missing)}; file incomplete?")
    return [parts[name] for name in names]


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _by_peft(
    adapter: Adapter, tuned: Tuned, layers: Sequence[Layer], model_config: Mapping[str, object]
) -> dict[str, Edit]:
    config, tuner = adapter.config, adapter.config.tuner
    check_packages(config)
    _refuse_unmergeable(config, tuned.layer)
    changes = (*tuner.changes, "bias") if "lora_bias" in tuned.parts else tuner.changes
    if ("lora_bias" in tuned.parts or "weight" not in changes) and not tuned.layer.has_bias:
        raise MatchError("was trained with a bias, but the base layer has none")
    changed = [name for name in changes if name == "weight" or tuned.layer.has_bias]
    return {
        parameter: PeftLayer(
            tuner=config.peft_type,
            config=json.dumps(config.raw, sort_keys=True),
            layer=tuned.layer,
            parameter=parameter,
            own=tuple((own_name(tensor.name, tuned.layer.module), tensor) for tensor in tuned.parts.values()),
            shared=tuple(adapter.shared.items()),
            others=tuple(layers) if tuner.needs_all_layers else (),
            model_config=json.dumps(model_config, sort_keys=True) if tuner.needs_order else "",
            weight=tuned.weight if parameter == "bias" else None,
            bias=tuned.bias if parameter == "weight" and tuner.needs_base else None,
        )
        for parameter in changed
    }


def _refuse_unmergeable(config: AdapterConfig, layer: Layer) -> None:
    """Single cases of mergeable tuners that no weight, or not this file, holds."""
    if config.peft_type == "OFT" and math.prod(layer.shape[2:]) > 1:
        raise MatchError(
            "OFT on a convolution rotates overlapping patches and adds them up in PEFT's forward pass (unfold and fold "
            "of oft/layer.py); no weight does that, and PEFT's own merge is another function"
        )
    if config.peft_type == "FROD" and not config.raw.get("save_projection", True):
        raise AdapterError(
            "FRoD's projection was not saved (save_projection is false): it follows from the weights of all layers of "
            "a kind together, by a decomposition that differs between machines. Save it with the projection"
        )


def check_packages(config: AdapterConfig) -> None:
    """Make sure that what PEFT's layer needs is installed, without importing it.

    Raises:
        AdapterError: it is not; says what to install.
    """
    missing = [
        name for name in ("peft", "transformers", *config.tuner.packages) if importlib.util.find_spec(name) is None
    ]
    if missing:
        install = "pip install 'loraweld[peft]'" + (" scikit-learn" if "sklearn" in missing else "")
        raise AdapterError(
            f"{config.peft_type} is merged by PEFT's own layer, and {', '.join(missing)} is not installed; {install}",
            path=config.path,
        )
