"""loraweld: merge an adapter into its base model and write one standalone model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from loraweld._version import __version__

if TYPE_CHECKING:
    from loraweld.api import merge, plan
    from loraweld.errors import (
        AdapterError,
        CheckpointError,
        LoraweldError,
        MatchError,
        NumericsError,
        OutputError,
        RequestError,
        VerificationError,
    )
    from loraweld.extraction.extract import extract
    from loraweld.inspection import inspect
    from loraweld.live.attach import attach
    from loraweld.live.fast_language_model import FastLanguageModel
    from loraweld.live.methods import (
        push_to_hub_gguf,
        push_to_hub_merged,
        save_pretrained_gguf,
        save_pretrained_merged,
    )
    from loraweld.page.compare_page import compare_page
    from loraweld.page.report_page import report_page
    from loraweld.verification.compare import compare
    from loraweld.verification.verify import verify

__all__ = [
    "AdapterError",
    "CheckpointError",
    "FastLanguageModel",
    "LoraweldError",
    "MatchError",
    "NumericsError",
    "OutputError",
    "RequestError",
    "VerificationError",
    "__version__",
    "attach",
    "compare",
    "compare_page",
    "extract",
    "inspect",
    "merge",
    "plan",
    "push_to_hub_gguf",
    "push_to_hub_merged",
    "report_page",
    "save_pretrained_gguf",
    "save_pretrained_merged",
    "verify",
]

_HOMES = {
    "merge": "loraweld.api",
    "plan": "loraweld.api",
    "extract": "loraweld.extraction.extract",
    "inspect": "loraweld.inspection",
    "report_page": "loraweld.page.report_page",
    "verify": "loraweld.verification.verify",
    "compare": "loraweld.verification.compare",
    "compare_page": "loraweld.page.compare_page",
    "FastLanguageModel": "loraweld.live.fast_language_model",
    "attach": "loraweld.live.attach",
    "push_to_hub_gguf": "loraweld.live.methods",
    "push_to_hub_merged": "loraweld.live.methods",
    "save_pretrained_gguf": "loraweld.live.methods",
    "save_pretrained_merged": "loraweld.live.methods",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `import loraweld` costs nothing, `--help` is instant."""
    if name not in __all__:
        raise AttributeError(f"module 'loraweld' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "loraweld.errors")), name)
