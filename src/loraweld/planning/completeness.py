"""Does the adapter file hold what its config says was trained? A truncated file merges only in part otherwise.

Source of the matching rule: PEFT 0.21.2, `check_target_module_exists`; only lists of names are checked, a
regular expression or an explicit choice of layers says itself which modules are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import Base
from loraweld.planning.claims import Claim

_EXPLICIT_CHOICES = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_completeness(base: Base, adapter: Adapter, claims: Sequence[Claim]) -> list[str]:
    """Return a problem for each module that the config targets, the base has, and the adapter lacks."""
    targets = adapter.config.target_modules
    if not isinstance(targets, tuple) or any(adapter.config.raw.get(key) for key in _EXPLICIT_CHOICES):
        return []
    stored = [name.removesuffix(".weight") for name, t in base.tensors.items() if len(t.shape) > 1]
    claimed = {claim.name.removesuffix(".weight") for claim in claims}
    absent = [
        f"{adapter.label}: target {target!r} is in adapter_config.json and in the base, but not in the file"
        for target in targets
        if not any(_matches(claim.module, target) or _matches(claim.name, target) for claim in claims)
        and any(_matches(module, target) for module in stored)
    ]
    kinds = {_kind(module) for module in claimed}
    partial = [
        f"{adapter.label}: {module}: other layers of its kind have tensors in the file, this one has none"
        for module in stored
        if module not in claimed
        and _kind(module) in kinds
        and any(_matches(module, target) for target in targets)
        and not _is_extra_layer(module, base)
    ]
    return absent + partial


def _matches(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _kind(module: str) -> str:
    return _NUMBER.sub("#", module)


def _is_extra_layer(module: str, base: Base) -> bool:
    """Layers past num_hidden_layers (multi-token prediction) are not part of the class that was trained."""
    count = base.config.get("num_hidden_layers")
    number = _NUMBER.search(module)
    return isinstance(count, int) and number is not None and int(number[0]) >= count
