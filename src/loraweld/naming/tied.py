"""Which parameters share one stored tensor, per architecture.

A tied parameter is not on disk; it is the tensor of its source. Source: `_tied_weights_keys` of the classes of
transformers and the defaults of their configs, which are in `renamings.json`; of a class that is not there (one that
a repository brings along) the usual names are tried.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loraweld.naming.architecture import class_name, declared_ties, is_known, level_of, ties_by_default
from loraweld.naming.names import Names

_TEXT_HEADS = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForSpeechSeq2Seq",
    "DoubleHeadsModel",
)
_EMBEDDINGS = (
    "shared.weight",
    "model.shared.weight",
    "model.decoder.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.text_model.embed_tokens.weight",
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "transformer.word_embeddings.weight",
    "transformer.tokens_embed.weight",
    "gpt_neox.embed_in.weight",
    "backbone.embeddings.weight",
)
# Model types outside transformers whose config leaves the flag out and means false.
_UNTIED_ELSEWHERE = {"internlm2"}
# Families whose forward pass reads the flag for something else: it is left as it is, the tensors on disk decide.
_FLAG_MEANS_MORE = {"t5", "mt5", "umt5", "switch_transformers", "longt5"}


@dataclass(frozen=True, slots=True)
class Tie:
    """Parameter `target` is not stored; the model takes it from the stored tensor `source`.

    An `alias` is the same parameter under two names: what happens to one happens to the other.
    """

    target: str
    source: str
    alias: bool = False


def find_ties(stored: Collection[str], config: Mapping[str, Any]) -> tuple[Tie, ...]:
    """Return the ties of a base with the tensors `stored`, from its config and its architecture."""
    return tuple(tie for tie in known_ties(stored, config) if tie.target not in stored)


def known_ties(stored: Collection[str], config: Mapping[str, Any]) -> tuple[Tie, ...]:
    """Return the ties that a model of this config has, whether their targets are stored or not."""
    if not is_known(class_name(config)):
        return _usual_ties(stored, config) if is_tied(config) else ()
    pairs = [pair for key, group in declared_ties(config) if is_tied(config, key) for pair in group.items()]
    names = Names(stored if pairs else (), config)
    found = ((names.exact(target) or target, names.find(source)) for target, source in pairs)
    return tuple(Tie(target, source, alias=target.endswith(".bias")) for target, source in found if source is not None)


def is_tied(config: Mapping[str, Any], key: str = "") -> bool:
    """Return whether the config, that of the part at `key`, ties the output embedding to the input embedding."""
    level = level_of(config, key)
    model_type = str(level.get("model_type") or "")
    if model_type in _FLAG_MEANS_MORE:
        return True
    for said in (level, level_of(level, "text_config")):
        if isinstance(said.get("tie_word_embeddings"), bool):
            return bool(said["tie_word_embeddings"])
    return bool(config) and model_type not in _UNTIED_ELSEWHERE and ties_by_default(model_type)


def flag_is_free(config: Mapping[str, Any]) -> bool:
    """Return whether `tie_word_embeddings` of this family may be set without changing anything else."""
    return config.get("model_type") not in _FLAG_MEANS_MORE


def _usual_ties(stored: Collection[str], config: Mapping[str, Any]) -> tuple[Tie, ...]:
    head = class_name(config)
    ties: list[Tie] = []
    if head.endswith(_TEXT_HEADS) or not config.get("architectures"):
        ties += [Tie("lm_head.weight", source) for source in _EMBEDDINGS if source in stored][:1]
    for prefix in ("", "model."):
        for side in ("encoder", "decoder"):
            ties.append(Tie(f"{prefix}{side}.embed_tokens.weight", f"{prefix}shared.weight"))
    return tuple(tie for tie in ties if tie.source in stored)
