"""Which modules a config names as those that were trained.

Source of the matching rules: PEFT 0.21.2, `check_target_module_exists` (tuners_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Container

from loraweld.adapter.config import AdapterConfig
from loraweld.naming.linear import is_expert

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def is_target(module: str, config: AdapterConfig) -> bool:
    """Return whether the config names `module` as one that was trained.

    Raises:
        AdapterError: the expressions of the config take too long.
    """
    if module in config.matching.excluded or module not in config.matching.targets:
        return False
    return _is_in_layers(module, config)


def is_target_parameter(module: str, adapted: Container[str], config: AdapterConfig) -> bool:
    """Whether experts were adapted as parameters in other layers, and so in this one; `adapted` are kinds of paths."""
    if not config.target_parameters or not is_expert(f"{module}.") or kind_of(module) not in adapted:
        return False
    return _is_in_layers(module, config)


def kind_of(module: str) -> str:
    """Return a path with its numbers left out: what it has in common with those of other layers."""
    return NUMBER.sub("#", module)


def _is_in_layers(module: str, config: AdapterConfig) -> bool:
    return config.layers is None or config.matching.layer.of(module) in config.layers
