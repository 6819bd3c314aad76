"""adapter_config.json as a frozen, validated value, and the one resolver of rank and scaling.

Source: PEFT 0.21.2, `LoraConfig` and `peft.utils.other.get_pattern_key`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraweld.adapter.patterns import Budget, LayerNumber, Names, Pattern, PatternTable
from loraweld.adapter.tuners import TUNERS, UNMERGEABLE, Tuner
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.errors import AdapterError, shortened

CONFIG_NAME = "adapter_config.json"

_CONVERT = (
    "convert it with PEFT: load it on its base and save with "
    "path_initial_model_for_weight_conversion, then merge the converted adapter"
)
# init_lora_weights that change the base when the adapter is attached, in a way that cannot be repeated.
_UNREPEATABLE_INITS = {
    "corda": "its initial factors need the calibration data of the training run",
    "lora_ga": "its base was changed with gradients of the training run",
    "loftq": "its base was replaced by a quantised approximation during training",
}
_PLAIN_INITS = {"true", "false", "gaussian", "orthogonal", "eva", "mica"}
# Options that change the arithmetic, with the reason why an adapter that uses them is refused.
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens; no weight does that",
    "arrow_config": "Arrow routes each token through several adapters; no single weight does that",
    "use_qalora": "QALoRA pools the input in groups; merge it into its GPTQ base with the tool that trained it",
    "enable_lora": "the fused layers of PEFT 0.2 and older (MergedLinear) are not read",
}
# Options that make a LoRA layer of PEFT another layer: KaSA truncates the base, BD-LoRA stores blocks of a factor.
_LAYER_OPTIONS = ("kasa_config", "use_bdlora")
# Names of rank and alpha in the configs of tuners whose formula is in `compute/`; a list of ranks is in LoRA's way.
_SCALES = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
}
_MAX_SIZE = 1 << 16
_DEFAULT_RANKS = {"ADALORA": 12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """What the config's expressions and lists of names say of modules, in bounded time."""

    ranks: PatternTable
    alphas: PatternTable
    targets: Names
    excluded: Names
    feedforward: Pattern | tuple[str, ...]
    layer: LayerNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What an adapter's config says, as far as merging needs it. `init` is lower-case ("true", "pissa", …).

    `rank` and `alpha` are 0 for tuners that PEFT's own layer merges; `raw` has what that layer is made from.
    """

    path: Path
    raw: Mapping[str, Any]
    peft_type: str
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    init: str
    modules_to_save: tuple[str, ...]
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str | None
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    layer_replication: tuple[tuple[int, int], ...]
    token_indices: Mapping[str, tuple[int, ...]]
    target_parameters: tuple[str, ...]
    peft_version: str | None
    task_type: str
    base: str | None
    revision: str | None
    matching: Matching = field(repr=False, compare=False)

    @property
    def tuner(self) -> Tuner:
        return TUNERS[self.peft_type]

    @property
    def uses_peft_layer(self) -> bool:
        """True if the formula is not in `compute/`: PEFT's own layer merges these."""
        return not self.tuner.is_native or any(self.raw.get(option) for option in _LAYER_OPTIONS)

    @property
    def init_alpha(self) -> float:
        """AdaLoRA's factor: alpha, or the initial rank where alpha is not positive (adalora/layer.py)."""
        return (self.alpha if self.alpha > 0 else self.rank) / (self.rank + 1e-5)

    def rank_of(self, module: str) -> int:
        """Return the rank that r and rank_pattern give `module`."""
        key = self.matching.ranks.first(module)
        return self.rank if key is None else self.rank_pattern[key]

    def names_feedforward(self, module: str) -> bool:
        """Return whether IA3 scaled the inputs of `module` (ia3/model.py: a pattern, or ends of paths)."""
        named = self.matching.feedforward
        return named.matches(module) if isinstance(named, Pattern) else module.endswith(named)

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of B·A for `module`: alpha / r, or alpha / sqrt(r) with rsLoRA.

        `rank` is the rank of the stored tensors.

        Raises:
            AdapterError: the config states another rank for this module; alpha / r would be ambiguous.
        """
        expected = self.rank_of(module)
        if expected != rank:
            raise AdapterError(
                f"module {module!r}: the tensors have rank {rank}, r and rank_pattern say {expected}; "
                "the scaling alpha / r would be a guess. Correct the config",
                path=self.path,
            )
        key = self.matching.alphas.first(module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json` of `folder`.

    Raises:
        AdapterError: missing, damaged, of a tuner type or with an option that cannot be merged.
    """
    path = folder / CONFIG_NAME
    raw = read_json_object(path, error=AdapterError)
    peft_type = _peft_type(raw, path)
    _refuse_options(raw, path)
    _refuse_giants(raw, peft_type, path)
    rank, alpha = _scale(raw, peft_type, path)
    patterns = _patterns(raw, peft_type, path)
    return AdapterConfig(
        path=path,
        raw=raw,
        peft_type=peft_type,
        rank=rank,
        alpha=alpha,
        use_rslora=_flag(raw, "use_rslora", path),
        use_dora=_flag(raw, "use_dora", path),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", path),
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
        init=_init(raw.get("init_lora_weights", True), path) if peft_type == "LORA" else "true",
        modules_to_save=tuple(_names(raw.get("modules_to_save"), "modules_to_save", path)),
        target_modules=_targets(raw, "target_modules", path),
        exclude_modules=_targets(raw, "exclude_modules", path),
        layers=_layers(raw.get("layers_to_transform"), path),
        layers_pattern=_layers_pattern(raw, path),
        layer_replication=_layer_replication(raw, path),
        token_indices=_token_indices(raw.get(_TOKENS.get(peft_type, "trainable_token_indices")), path),
        target_parameters=tuple(_names(raw.get("target_parameters"), "target_parameters", path)),
        peft_version=_text(raw, "peft_version", path),
        task_type=_text(raw, "task_type", path) or "",
        base=_text(raw, "base_model_name_or_path", path),
        revision=_text(raw, "revision", path),
        matching=_matching(raw, patterns, path),
    )


_TOKENS = {"TRAINABLE_TOKENS": "token_indices"}


def _peft_type(raw: Mapping[str, Any], path: Path) -> str:
    peft_type: str = _value(raw, "peft_type", str, path)
    if peft_type in UNMERGEABLE:
        raise AdapterError(f"peft_type is {peft_type}, which cannot be merged: {UNMERGEABLE[peft_type]}", path=path)
    if peft_type not in TUNERS:
        known = ", ".join(sorted(TUNERS))
        raise AdapterError(
            f"peft_type is {peft_type[:100]}, which is not known; this version merges {known}", path=path
        )
    return peft_type


def _scale(raw: Mapping[str, Any], peft_type: str, path: Path) -> tuple[int, float]:
    """Rank and alpha of a tuner that has them in its formula."""
    if peft_type not in _SCALES:
        return 0, 0.0
    rank, alpha = _SCALES[peft_type]
    default = _DEFAULT_RANKS.get(peft_type, 8)
    return _rank(_value(raw, rank, int, path, default=default), path), _finite(raw.get(alpha, 8), alpha, path)


def _patterns(raw: Mapping[str, Any], peft_type: str, path: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas of single modules; AdaLoRA's rank_pattern says which ranks were pruned, the file shows that."""
    if peft_type not in _SCALES or peft_type == "ADALORA":
        return {}, {}
    ranks, alphas = (_mapping(raw, f"{what}_pattern", path) for what in ("rank", "alpha"))
    return (
        {key: _rank(value, path) for key, value in ranks.items()},
        {key: _finite(value, "alpha_pattern", path) for key, value in alphas.items()},
    )


def _refuse_options(raw: Mapping[str, Any], path: Path) -> None:
    for option, reason in _REFUSED_OPTIONS.items():
        if raw.get(option):
            raise AdapterError(f"{option} is set: {reason}", path=path)


def _init(value: object, path: Path) -> str:
    """Return the normalised init_lora_weights, refusing those whose base cannot be derived again."""
    init = str(value).lower()
    if init in _PLAIN_INITS or init in ("pissa", "olora"):
        return init
    if init.startswith("pissa_niter"):
        raise AdapterError(
            f"init_lora_weights is {shortened(init)}: its randomised SVD cannot be repeated; {_CONVERT}", path=path
        )
    if init in _UNREPEATABLE_INITS:
        raise AdapterError(f"init_lora_weights is {init!r}: {_UNREPEATABLE_INITS[init]}; {_CONVERT}", path=path)
    raise AdapterError(
        f"init_lora_weights is {shortened(init)}, which is not known; known are "
        f"{', '.join(sorted(_PLAIN_INITS | set(_UNREPEATABLE_INITS) | {'pissa', 'olora'}))}",
        path=path,
    )


def _refuse_giants(raw: Mapping[str, Any], peft_type: str, path: Path) -> None:
    """Sizes in a config that PEFT makes matrices of, before it has seen a weight: they are bounded.

    Raises:
        AdapterError: one of them is larger than any weight is.
    """
    if TUNERS[peft_type].is_native and not any(raw.get(option) for option in _LAYER_OPTIONS):
        return
    for key, value in raw.items():
        is_free = "seed" in key or key.endswith("key") or "frequency" in key  # of random numbers, of a vector
        if isinstance(value, int) and value > _MAX_SIZE and not is_free:
            raise AdapterError(f"{key} is {value}, expected at most {_MAX_SIZE}; file damaged?", path=path)


def _matching(raw: Mapping[str, Any], patterns: Sequence[Mapping[str, Any]], path: Path) -> Matching:
    budget = Budget(path)
    feedforward = _targets(raw, "feedforward_modules", path)
    return Matching(
        ranks=PatternTable(patterns[0], budget),
        alphas=PatternTable(patterns[1], budget),
        targets=Names(_targets(raw, "target_modules", path), budget),
        excluded=Names(_targets(raw, "exclude_modules", path), budget),
        feedforward=Pattern(feedforward, budget) if isinstance(feedforward, str) else feedforward or (),
        layer=LayerNumber(_layers_pattern(raw, path), budget),
    )


def _value(raw: Mapping[str, Any], key: str, kind: type, path: Path, *, default: Any = None) -> Any:
    value = raw.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise AdapterError(f"{key} is {shortened(value)}, expected {kind.__name__}", path=path)
    return value


def _flag(raw: Mapping[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{key} is {shortened(value)}, expected true or false", path=path)
    return bool(value)


def _text(raw: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"{key} is {shortened(value)}, expected a string", path=path)
    return value or None


def _mapping(raw: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{key} is {shortened(value)}, expected an object", path=path)
    return value


def _rank(value: object, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"rank {shortened(value)} is not a positive integer", path=path)
    return value


def _finite(value: object, key: str, path: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(f"{key} holds {shortened(value)}, expected a finite number", path=path)
    return float(value)


def _names(value: object, key: str, path: Path) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{key} is {shortened(value)}, expected a list of names", path=path)
    return value


def _targets(raw: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...] | str | None:
    """A string is a regular expression for the whole path of a module, a list holds ends of paths."""
    value = raw.get(key)
    return value or None if isinstance(value, str) else tuple(_names(value, key, path)) or None


def _layers(value: object, path: Path) -> tuple[int, ...] | None:
    if value is None:
        return None
    numbers: list[Any] = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise AdapterError(f"layers_to_transform is {shortened(value)}, expected layer numbers", path=path)
    return tuple(numbers)


def _layers_pattern(raw: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    found = _targets(raw, "layers_pattern", path)
    return (found,) if isinstance(found, str) else found or ()


def _layer_replication(raw: Mapping[str, Any], path: Path) -> tuple[tuple[int, int], ...]:
    """Ranges [start, stop) of the base's layers, which the trained model has one after the other; () for all as is."""
    value = raw.get("layer_replication") or []
    if not isinstance(value, list) or not all(_is_range(item) for item in value):
        raise AdapterError(
            f"layer_replication is {shortened(value)}, expected ranges [start, stop) with 0 ≤ start < stop", path=path
        )
    if value and str(raw.get("init_lora_weights", True)).lower() in ("pissa", "olora"):
        raise AdapterError(
            "layer_replication together with init_lora_weights pissa or olora: the layers that share a weight took "
            f"their initial factors off it one after the other; {_CONVERT}",
            path=path,
        )
    return tuple((start, stop) for start, stop in value)


def _is_range(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int for number in value)
        and 0 <= value[0] < value[1]
    )


def _token_indices(value: object, path: Path) -> dict[str, tuple[int, ...]]:
    """Return module name → token ids; a bare list means the input embedding and is filed under ""."""
    by_module = {"": value} if isinstance(value, list) else value or {}
    if not isinstance(by_module, dict):
        raise AdapterError(f"trainable_token_indices is {shortened(value)}, expected a list or an object", path=path)
    for ids in by_module.values():
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise AdapterError(f"trainable_token_indices holds {shortened(ids)}, expected token ids", path=path)
        if len(set(ids)) != len(ids):
            raise AdapterError("trainable_token_indices names a token twice", path=path)
    return {module: tuple(ids) for module, ids in by_module.items()}
