"""Does the adapter file hold what its config says was trained? A truncated file merges only in part otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from loraweld.adapter.edits import ReplaceRows
from loraweld.adapter.files import Adapter
from loraweld.adapter.patterns import suffixes
from loraweld.checkpoint.base import Base
from loraweld.naming.names import Names
from loraweld.naming.tied import Tie
from loraweld.planning.claims import Claim
from loraweld.planning.targets import NUMBER, is_target, is_target_parameter, kind_of


def check_completeness(
    base: Base, names: Names, adapter: Adapter, claims: Sequence[Claim], ties: Sequence[Tie]
) -> list[str]:
    """Return a problem for each thing that the config says was trained, the base has, and the adapter lacks."""
    problems = _missing_targets(base, names, adapter, claims) + _missing_saved(base, adapter, claims, ties)
    rows = any(isinstance(edit, ReplaceRows) for claim in claims for edit in claim.edits)
    if adapter.config.token_indices and not rows:
        problems.append("trainable_token_indices is set, but the file holds no trained rows")
    return [f"{adapter.label}: {problem}" for problem in problems]


def _missing_targets(base: Base, names: Names, adapter: Adapter, claims: Sequence[Claim]) -> list[str]:
    """Modules that PEFT would have adapted, next to others of their kind or of their name that it has adapted.

    Modules of a kind that the trained class may not have had (another tower, a prediction layer) are let be.
    """
    peft_type = adapter.config.peft_type
    sizes = 0 if peft_type == "LN_TUNING" else 1  # the layers of other tuners have matrices
    spelled = _spelling(names, claims)
    stored = [spelled(name).removesuffix(".weight") for name, t in base.tensors.items() if len(t.shape) > sizes]
    ends = (".weight", ".bias") if peft_type == "BEFT" else (".weight",)
    claimed = {spelled(claim.name).removesuffix(end) for claim in claims for end in ends}
    ends_of_paths = {_last(path) for claim in claims for path in (claim.module, claim.name.removesuffix(".weight"))}
    kinds = {kind_of(module) for module in claimed}
    return [
        f"{module}: target_modules names it and the base has it, but the file has no tensors for it"
        for module in stored
        if module not in claimed
        and (kind_of(module) in kinds or _last(module) not in ends_of_paths)
        and (is_target(module, adapter.config) or is_target_parameter(module, kinds, adapter.config))
        and not _is_extra_layer(module, base)
    ]


def _spelling(names: Names, claims: Sequence[Claim]) -> Callable[[str], str]:
    """What the trained class calls a stored tensor: transformers 4 has the name in the file, 5 may have another."""
    is_old = any(f"{claim.module}.weight" == claim.name != names.in_memory(claim.name) for claim in claims)
    return str if is_old else names.in_memory


def _missing_saved(base: Base, adapter: Adapter, claims: Sequence[Claim], ties: Sequence[Tie]) -> list[str]:
    if not adapter.config.modules_to_save:
        return []
    known = {
        end for name in (*base.tensors, *(tie.target for tie in ties)) for end in suffixes(name.rpartition(".")[0])
    }
    modules = {claim.module for claim in claims}
    parts = {part for module in modules for part in _parts(module)}
    return [
        f"{saved}: modules_to_save names it and the base has it, but the file does not hold it"
        for saved in adapter.config.modules_to_save
        if saved in known and saved not in parts
    ]


def _parts(module: str) -> Iterator[str]:
    """Yield all runs of components of a path."""
    for end in suffixes(module):
        yield end
        while "." in end:
            end = end.rpartition(".")[0]
            yield end


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _is_extra_layer(module: str, base: Base) -> bool:
    """Layers past num_hidden_layers (multi-token prediction) are not part of the class that was trained."""
    count = base.config.get("num_hidden_layers")
    number = NUMBER.search(module)
    return isinstance(count, int) and number is not None and int(number[0]) >= count
