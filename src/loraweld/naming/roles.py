"""Which tensors have a row per token, and which belong to a task head: the only ones whose first size may change."""

from __future__ import annotations


def _dotted(*names: str) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)


_EMBEDDING_ENDS = _dotted(
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight"),
    *("embeddings.weight", "tok_embeddings.weight", "tokens_embed.weight", "token_embedding.weight"),
    *("word_embedding.weight",),
)
_HEAD_ENDS = _dotted(
    *("lm_head.weight", "embed_out.weight", "proj_out.weight", "predictions.decoder.weight", "decoder.weight"),
    *("vocab_projector.weight", "generator_lm_head.weight", "output_projection.weight", "pred_layer.proj.weight"),
    *("lm_head.out_proj.weight", "lm_loss.weight"),
)
_HEAD_BIAS_ENDS = _dotted(
    *("lm_head.bias", "predictions.bias", "predictions.decoder.bias", "lm_head.decoder.bias"),
    *("vocab_projector.bias", "generator_lm_head.bias"),
)
_ROW_PER_TOKEN_ENDS = (*_EMBEDDING_ENDS, *_HEAD_ENDS, *_HEAD_BIAS_ENDS)
_TASK_HEADS = frozenset({"score", "classifier", "qa_outputs"})


def is_embedding(name: str) -> bool:
    """True for an input embedding."""
    return _ends(name, _EMBEDDING_ENDS)


def is_head_bias(name: str) -> bool:
    """True for the bias of an output embedding."""
    return _ends(name, _HEAD_BIAS_ENDS)


def has_row_per_token(name: str) -> bool:
    """True for input and output embeddings and the latter's bias."""
    return _ends(name, _ROW_PER_TOKEN_ENDS)


def is_output_embedding(name: str) -> bool:
    """True for the weight that turns hidden states into logits of tokens."""
    return _ends(name, _HEAD_ENDS)


def is_task_head(name: str) -> bool:
    """True for the parameters of a classification or question-answering head."""
    return not _TASK_HEADS.isdisjoint(name.split("."))


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return f".{name}".endswith(ends)
