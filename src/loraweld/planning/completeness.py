"""Does the adapter file hold what its config says was trained? A truncated file merges only in part otherwise.

Source of the matching rules: PEFT 0.21.2, `check_target_module_exists` (tuners_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from loraweld.adapter.config import AdapterConfig
from loraweld.adapter.edits import ReplaceRows
from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import Base
from loraweld.errors import AdapterError
from loraweld.naming.names import Names
from loraweld.naming.tied import Tie
from loraweld.planning.claims import Claim

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_completeness(base: Base, adapter: Adapter, claims: Sequence[Claim], ties: Sequence[Tie]) -> list[str]:
    """Return a problem for each thing that the config says was trained, the base has, and the adapter lacks."""
    problems = _missing_targets(base, adapter, claims) + _missing_saved(base, adapter, claims, ties)
    rows = any(isinstance(edit, ReplaceRows) for claim in claims for edit in claim.edits)
    if adapter.config.token_indices and not rows:
        problems.append("trainable_token_indices is set, but the file holds no trained rows")
    return [f"{adapter.label}: {problem}" for problem in problems]


def _missing_targets(base: Base, adapter: Adapter, claims: Sequence[Claim]) -> list[str]:
    """Modules that PEFT would have adapted, next to others of their kind or of their name that it has adapted.

    Modules of a kind that the trained class may not have had (another tower, a prediction layer) are let be.
    """
    spelled = _spelling(base, claims)
    stored = [spelled(name).removesuffix(".weight") for name, t in base.tensors.items() if len(t.shape) > 1]
    claimed = {spelled(claim.name).removesuffix(".weight") for claim in claims}
    names = {_last(path) for claim in claims for path in (claim.module, claim.name.removesuffix(".weight"))}
    kinds = {_kind(module) for module in claimed}
    return [
        f"{module}: target_modules names it and the base has it, but the file has no tensors for it"
        for module in stored
        if module not in claimed
        and (_kind(module) in kinds or _last(module) not in names)
        and _is_target(module, adapter.config)
        and not _is_extra_layer(module, base)
    ]


def _spelling(base: Base, claims: Sequence[Claim]) -> Callable[[str], str]:
    """What the trained class calls a stored tensor: transformers 4 has the name in the file, 5 may have another."""
    in_memory = Names(base.tensors, base.config).in_memory
    is_old = any(f"{claim.module}.weight" == claim.name != in_memory(claim.name) for claim in claims)
    return str if is_old else in_memory


def _missing_saved(base: Base, adapter: Adapter, claims: Sequence[Claim], ties: Sequence[Tie]) -> list[str]:
    known = [name.rpartition(".")[0] for name in (*base.tensors, *(tie.target for tie in ties))]
    return [
        f"{saved}: modules_to_save names it and the base has it, but the file does not hold it"
        for saved in adapter.config.modules_to_save
        if any(_ends(module, [saved]) for module in known)
        and not any(f".{saved}." in f".{claim.module}." for claim in claims)
    ]


def _is_target(module: str, config: AdapterConfig) -> bool:
    if _matches(module, config.exclude_modules, config.path) or not _matches(
        module, config.target_modules, config.path
    ):
        return False
    return config.layers is None or _layer_number(module, config.layers_pattern) in config.layers


def _matches(module: str, targets: tuple[str, ...] | str | None, path: Path) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except re.error as error:
            raise AdapterError(f"{targets!r} is not a valid regular expression ({error})", path=path) from None
    return _ends(module, targets or ())


def _ends(module: str, targets: Iterable[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _layer_number(module: str, patterns: Sequence[str]) -> int | None:
    """The first number in the path, or the one after a name that one of `patterns` matches."""
    expressions = [rf"\.{pattern}\.(\d+)\." for pattern in patterns] or [_NUMBER.pattern]
    found = next((hit for expression in expressions if (hit := re.search(expression, module))), None)
    return int(found[found.lastindex or 0]) if found else None


def _kind(module: str) -> str:
    return _NUMBER.sub("#", module)


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _is_extra_layer(module: str, base: Base) -> bool:
    """Layers past num_hidden_layers (multi-token prediction) are not part of the class that was trained."""
    count = base.config.get("num_hidden_layers")
    number = _NUMBER.search(module)
    return isinstance(count, int) and number is not None and int(number[0]) >= count
