"""LoRA factors + the tensor they were trained on → one edit, with every check of their shapes.

Shape letters: O = output features, I = input features, R = rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraweld.adapter.config import AdapterConfig
from loraweld.adapter.edits import Dora, Edit, LowRank, Residual
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import AdapterError, MatchError
from loraweld.naming.families import is_conv1d

Shape = tuple[int, ...]


def linear_edits(
    config: AdapterConfig, module: str, parts: Mapping[str, StoredTensor], target: Shape, model_type: str
) -> list[Edit]:
    """Return the edits of a linear, Conv1D or convolution layer stored with the shape `target`."""
    a, b = _pair(parts, "lora_A", "lora_B")
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"lora_A {a.shape} and lora_B {b.shape} have different ranks")
    transposed = _is_transposed(target, a.shape, b.shape, is_conv1d(model_type, module), config.fan_in_fan_out)
    return _edits(
        config,
        module,
        parts,
        LowRank(a=a, b=b, scaling=config.scaling(module, a.shape[0]), transposed=transposed),
    )


def embedding_edits(config: AdapterConfig, module: str, parts: Mapping[str, StoredTensor], target: Shape) -> list[Edit]:
    """Return the edits of an embedding stored with the shape `target` (vocabulary, O)."""
    a, b = _pair(parts, "embedding_A", "embedding_B")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"lora_embedding_A {a.shape} and lora_embedding_B {b.shape} do not chain")
    if (a.shape[1], b.shape[0]) != target:
        raise MatchError(_misfit(a.shape, b.shape, target))
    delta = LowRank(a=a, b=b, scaling=config.scaling(module, a.shape[0]), transposed=True)
    return _with_magnitude(config, delta, parts)


def _edits(config: AdapterConfig, module: str, parts: Mapping[str, StoredTensor], delta: LowRank) -> list[Edit]:
    edits = _with_magnitude(config, delta, parts)
    if config.init in ("pissa", "olora"):
        if len(delta.a.shape) != 2 or (config.init == "olora" and delta.transposed):
            raise AdapterError(f"init_lora_weights {config.init!r} on this kind of layer cannot be derived again")
        edits.insert(
            0,
            Residual(method=config.init, rank=delta.rank, scaling=delta.scaling, transposed=delta.transposed),
        )
    return edits


def _with_magnitude(config: AdapterConfig, delta: LowRank, parts: Mapping[str, StoredTensor]) -> list[Edit]:
    """A magnitude vector makes the delta a DoRA; config and file must agree that there is one."""
    magnitude = parts.get("magnitude")
    if (magnitude is not None) != config.use_dora:
        found = "a magnitude vector" if magnitude is not None else "no magnitude vector"
        raise AdapterError(f"use_dora is {config.use_dora} but the file has {found}")
    if magnitude is None:
        return [delta]
    features = delta.b.shape[0]
    if magnitude.rows * magnitude.cols != features:
        raise AdapterError(f"magnitude {magnitude.shape} does not fit {features} output features")
    return [Dora(delta=delta, magnitude=magnitude)]


def _pair(parts: Mapping[str, StoredTensor], *names: str) -> list[StoredTensor]:
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterError(f"has {', '.join(sorted(parts))} but no {', '.join(missing)}; file incomplete?")
    return [parts[name] for name in names]


def _is_transposed(target: Shape, a: Shape, b: Shape, conv1d: bool | None, flag: bool) -> bool:
    """Return whether the tensor is stored as (I, O).

    The shape tells, except for a square matrix: then the architecture does, and for an unknown one the
    config's `fan_in_fan_out`. (PEFT saves that flag as the last layer had it: GPT-2's c_attn with lm_head
    says false. So it comes last.)
    """
    if len(target) > 2:
        if (*b[:1], *a[1:]) != target or b[1:] != (a[0], *(1 for _ in target[2:])):
            grouped = len(a) == len(target) and a[1] != target[1]
            hint = "; a grouped convolution mixes its groups under LoRA and has no merged weight" if grouped else ""
            raise MatchError(_misfit(a, b, target) + hint)
        return False
    if len(a) != 2 or len(b) != 2 or len(target) != 2 or sorted(target) != sorted((a[1], b[0])):
        raise MatchError(_misfit(a, b, target))
    if target[0] != target[1]:
        return target == (a[1], b[0])
    return flag if conv1d is None else conv1d


def _misfit(a: Shape, b: Shape, target: Shape) -> str:
    return f"A is {a}, B is {b}, but the base tensor is {target}"
