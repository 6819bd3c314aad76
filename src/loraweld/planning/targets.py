"""Which modules a config names as those that were trained.

Source of the matching rules: PEFT 0.21.2, `check_target_module_exists` (tuners_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from loraweld.adapter.config import AdapterConfig
from loraweld.errors import AdapterError
from loraweld.naming.linear import is_expert

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def is_target(module: str, config: AdapterConfig) -> bool:
    """Return whether the config names `module` as one that was trained.

    Raises:
        AdapterError: a pattern of the config is not a valid regular expression.
    """
    if _matches(module, config.exclude_modules, config.path) or not _matches(
        module, config.target_modules, config.path
    ):
        return False
    return config.layers is None or _layer_number(module, config.layers_pattern) in config.layers


def is_target_parameter(module: str, adapted: Container[str], config: AdapterConfig) -> bool:
    """Whether experts were adapted as parameters in other layers, and so in this one; `adapted` are kinds of paths."""
    if not config.target_parameters or not is_expert(f"{module}.") or kind_of(module) not in adapted:
        return False
    return config.layers is None or _layer_number(module, config.layers_pattern) in config.layers


def kind_of(module: str) -> str:
    """Return a path with its numbers left out: what it has in common with those of other layers."""
    return NUMBER.sub("#", module)


def _matches(module: str, targets: tuple[str, ...] | str | None, path: Path) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except re.error as error:
            raise AdapterError(f"{targets!r} is not a valid regular expression ({error})", path=path) from None
    return ends_with(module, targets or ())


def ends_with(module: str, targets: Iterable[str]) -> bool:
    """Return whether one of `targets` is the path `module` or the end of it, from a dot."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _layer_number(module: str, patterns: Sequence[str]) -> int | None:
    """The first number in the path, or the one after a name that one of `patterns` matches."""
    expressions = [rf"\.{pattern}\.(\d+)\." for pattern in patterns] or [NUMBER.pattern]
    found = next((hit for expression in expressions if (hit := re.search(expression, module))), None)
    return int(found[found.lastindex or 0]) if found else None
