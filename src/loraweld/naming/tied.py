"""Which parameters share one stored tensor, per architecture.

A tied parameter is not on disk; it is the tensor of its source. Source: `_tied_weights_keys` of the classes of
transformers 5.23 and the defaults of their configs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_TEXT_HEADS = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForSpeechSeq2Seq",
    "DoubleHeadsModel",
)
_MASKED_HEADS = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")
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
# Families whose config leaves the flag out and means true (or, unlike these, means false).
_UNTIED_BY_DEFAULT = {
    *(
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "phi",
        "phi3",
        "olmo",
        "olmo2",
    ),
    *(
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_neox",
        "gptj",
        "falcon",
        "stablelm",
    ),
    *("granitemoe", "internlm2", "smollm3", "llama4_text", "mistral3", "pixtral", "persimmon", "starcoder2"),
}
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
    if not is_tied(config):
        return ()
    head = _architecture(config)
    ties: list[Tie] = []
    if head.endswith(_TEXT_HEADS) or not head:
        target = "proj_out.weight" if config.get("model_type") == "whisper" else "lm_head.weight"
        ties += [Tie(target, source) for source in _EMBEDDINGS if source in stored][:1]
    for prefix in ("", "model."):
        for side in ("encoder", "decoder"):
            ties.append(Tie(f"{prefix}{side}.embed_tokens.weight", f"{prefix}shared.weight"))
    if head.endswith(_MASKED_HEADS):
        ties += _masked_head_ties(stored)
    return tuple(tie for tie in ties if tie.source in stored)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the config ties the output embedding to the input embedding."""
    if config.get("model_type") in _FLAG_MEANS_MORE:
        return True
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        if isinstance(level.get("tie_word_embeddings"), bool):
            return bool(level["tie_word_embeddings"])
    return bool(config) and config.get("model_type") not in _UNTIED_BY_DEFAULT


def flag_is_free(config: Mapping[str, Any]) -> bool:
    """Return whether `tie_word_embeddings` of this family may be set without changing anything else."""
    return config.get("model_type") not in _FLAG_MEANS_MORE


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _masked_head_ties(stored: Collection[str]) -> list[Tie]:
    """The decoder of a BERT-like head shares the word embeddings, and its bias the head's own bias."""
    words = [name for name in stored if name.endswith(".embeddings.word_embeddings.weight")]
    ties = []
    for head in ("cls.predictions", "lm_head", "predictions"):
        if f"{head}.bias" in stored:
            ties += [Tie(f"{head}.decoder.weight", source) for source in words[:1]]
            ties.append(Tie(f"{head}.decoder.bias", f"{head}.bias", alias=True))
    for head in ("vocab_projector", "generator_lm_head"):  # DistilBERT, ELECTRA: their bias is their own
        if f"{head}.bias" in stored:
            ties += [Tie(f"{head}.weight", source) for source in words[:1]]
    return ties
