"""Per architecture family: what is stored transposed, layers of a task."""

from __future__ import annotations

# Model types whose linear layers are transformers' Conv1D, with the weight stored as (in, out). Their heads
# (lm_head, score) are ordinary. Only square weights need this table; others show it by their shape.
_CONV1D_MODEL_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}

# Layers that the class of a task has below its head and the class of a language model has not (transformers 5.23).
# PEFT saves them only where modules_to_save names them: its own defaults are classifier, score and qa_outputs.
_POOLED = ("bert", "ernie", "gte", "mobilebert", "nomic_bert", "rembert", "roc_bert", "tapas")
_SEQ2SEQ = ("bart", "bigbird_pegasus", "mbart", "mvp", "plbart", "t5", "mt5", "umt5")
_LAYERS_OF_TASK: dict[tuple[str, str], tuple[str, ...]] = {
    **{("SEQ_CLS", family): (f"{family}.pooler.dense",) for family in _POOLED},
    **{("SEQ_CLS", family): ("classification_head.dense", "classification_head.out_proj") for family in _SEQ2SEQ},
    ("SEQ_CLS", "albert"): ("albert.pooler",),
    ("SEQ_CLS", "deberta"): ("pooler.dense",),
    ("SEQ_CLS", "deberta-v2"): ("pooler.dense",),
    ("SEQ_CLS", "eurobert"): ("dense",),
    ("SEQ_CLS", "flaubert"): ("sequence_summary.summary",),
    ("SEQ_CLS", "megatron-bert"): ("bert.pooler.dense",),
    ("SEQ_CLS", "modernbert-decoder"): ("head.dense", "head.norm"),
    ("SEQ_CLS", "modernvbert"): ("head.dense", "head.norm"),
    ("SEQ_CLS", "xlm"): ("sequence_summary.summary",),
    ("SEQ_CLS", "xlnet"): ("sequence_summary.summary", "logits_proj"),
    ("TOKEN_CLS", "modernvbert"): ("head.dense", "head.norm"),
    ("QUESTION_ANS", "big_bird"): (
        *("qa_classifier.intermediate.dense", "qa_classifier.output.dense", "qa_classifier.output.LayerNorm"),
    ),
}


def is_conv1d(model_type: str, module: str) -> bool | None:
    """Return whether `module` is stored transposed, None when the family is not known."""
    if not model_type:
        return None
    return model_type in _CONV1D_MODEL_TYPES and module.rpartition(".")[2] in _CONV1D_NAMES


def layers_of_task(task_type: str, model_type: str) -> tuple[str, ...]:
    """Return the layers below its head that only the class of a task has."""
    return _LAYERS_OF_TASK.get((task_type, model_type), ())
