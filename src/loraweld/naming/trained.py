"""Name of a stored tensor → name of the parameter in the model that transformers builds: the way back of `Names`.

PEFT finds modules by these names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from loraweld.naming.architecture import prefix_of
from loraweld.naming.names import Names

# Of families for which transformers notes nothing else, and whose old files leave it out.
_PREFIXES = {"gpt2": "transformer", "bloom": "transformer", "falcon": "transformer", "bert": "bert"}
_HEADS = ("lm_head.", "score.", "classifier.", "qa_outputs.", "cls.")
_BARE_CLASS = re.compile(r"(?<!LMHead)(?<!DoubleHeads)Model$")


class TrainedNames:
    """Gives the names that the parameters of a checkpoint have in its model.

    What a class with a head puts before the names of the model inside, old files leave out.
    """

    def __init__(self, stored: Collection[str], config: Mapping[str, Any]) -> None:
        self._names = Names(stored, config)
        prefix = prefix_of(config) or _PREFIXES.get(str(config.get("model_type") or ""), "")
        prefix += "." if prefix else ""
        is_bare = _BARE_CLASS.search(str(next(iter(config.get("architectures") or ()), "")))
        has_prefix = any(self._names.in_memory(name).startswith(prefix) for name in stored)
        self._prefix = "" if is_bare or has_prefix else prefix

    def of(self, name: str) -> str:
        """Return the trained model's name of the stored tensor `name`."""
        name = self._names.in_memory(name)
        return name if not self._prefix or name.startswith(_HEADS) else self._prefix + name
