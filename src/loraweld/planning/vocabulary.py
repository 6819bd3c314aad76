"""Embedding rows after the merge: one number for the embedding, the head and the config, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping

from loraweld.adapter.edits import AddVector, GrowRows, ReplaceRows, unwrapped
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import MatchError, listing
from loraweld.naming.roles import has_row_per_token, is_embedding, is_head_bias, is_output_embedding
from loraweld.naming.tied import is_tied
from loraweld.planning.changes import Change


def grow_to_tokenizer(base: Base, changes: dict[str, Change], needed: int | None) -> list[str]:
    """Add rows to embedding and head where the tokenizer needs more than they will have; return notes.

    Raises:
        MatchError: rows are missing where they cannot be added (a trained embedding, a head with a bias).
    """
    if needed is None:
        return []
    short = [name for name in _vocabulary_tensors(base, changes) if _rows(base, changes, name) < needed]
    if not short:
        return []
    for name in short:
        change = changes.setdefault(name, Change(name=name))
        has_delta = any(not isinstance(edit, ReplaceRows | AddVector) for edit in unwrapped(change.edits))
        if change.replacement is not None or has_delta or is_head_bias(name):
            raise MatchError(
                f"the tokenizer has {needed} tokens but {name!r} has {_rows(base, changes, name)} rows and cannot "
                "be grown; save the adapter with its resized embeddings, or give the base's --tokenizer"
            )
        change.edits.insert(0, GrowRows(num_rows=needed))
    return [f"the tokenizer has {needed} tokens: {', '.join(short)} grew, untrained rows hold the mean of the others"]


def check_ties_known(base: Base, changes: Mapping[str, Change]) -> None:
    """Without a config nobody says whether a missing head is the embedding.

    Raises:
        MatchError: the embedding changes, there is no head and no config.json.
    """
    changed = [name for name in changes if is_embedding(name)]
    if changed and not base.config and not any(is_output_embedding(name) for name in base.tensors):
        raise MatchError(
            f"{changed[0]!r} changes, the base has no output embedding and {base.folder} has no config.json to say "
            "whether the two are tied; put the model's config.json there"
        )


def check_shared_known(base: Base, changes: Mapping[str, Change]) -> None:
    """Two names may stand for the same values of a pickle; where no known tie says so, the model's class decides.

    Raises:
        MatchError: one of them changes, in a model whose config does not say that nothing is tied.
    """
    if base.has_layout:
        return  # the tensors of a safetensors file lie one after the other, none in the place of another
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in base.tensors.items():
        if isinstance(tensor, StoredTensor) and tensor.num_bytes:
            groups.setdefault(tensor.place, []).append(name)
    shared = [
        " = ".join(names)
        for names in groups.values()
        if len({base.origins.get(name, name) for name in names}) > 1 and not changes.keys().isdisjoint(names)
    ]
    if shared and (is_tied(base.config) or not base.config):
        raise MatchError(
            f"tensors change that {base.folder} holds under several names, and whether they are one parameter in "
            f"{base.model_type or 'a model without config.json'} is not known; merge them with PEFT:\n{listing(shared)}"
        )


def new_vocab_size(base: Base, changes: Mapping[str, Change]) -> int | None:
    """Return the number of embedding rows if the merge changes it.

    Raises:
        MatchError: embedding and head would differ, or rows would be lost.
    """
    rows = {name: _rows(base, changes, name) for name in _vocabulary_tensors(base, changes)}
    changed = {name: count for name, count in rows.items() if _was(base, name) not in (None, count)}
    if not changed:
        return None
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in sorted(rows.items()))
        raise MatchError(
            f"embedding and head would have different numbers of rows ({found}); train and save both, "
            "with modules_to_save or resize_token_embeddings"
        )
    return next(iter(changed.values()))


def _vocabulary_tensors(base: Base, changes: Mapping[str, Change]) -> list[str]:
    found = [name for name in {*base.tensors, *changes} if has_row_per_token(name)]
    sizes = {_was(base, name) for name in found if is_embedding(name)}
    # An embedding of another part of the model (a vision codebook, say) is not the vocabulary.
    main = max((size for size in sizes if size), default=None)
    return sorted(name for name in found if _was(base, name) in (None, main))


def _was(base: Base, name: str) -> int | None:
    return base.tensors[name].rows if name in base.tensors else None


def _rows(base: Base, changes: Mapping[str, Change], name: str) -> int:
    change = changes.get(name)
    if change is not None:
        grown = [edit.num_rows for edit in change.edits if isinstance(edit, GrowRows)]
        if grown:
            return grown[0]
        if change.replacement is not None:
            return change.replacement.rows
    was = _was(base, name)
    # A new tied head without a replacement starts from the embedding as the base has it.
    return was if was is not None else max(base.tensors[n].rows for n in base.tensors if is_embedding(n))
