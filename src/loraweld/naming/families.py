"""Per architecture family: names in a trained model and on disk, what is stored transposed, layers of a task.

transformers 5 renames parameters while loading (`conversion_mapping.py`, 5.23) and PEFT saves the renamed paths,
so an adapter of today can name a tensor that no checkpoint holds. Each row is (pattern, replacement) for
`re.sub` on the full parameter name, trained model → disk; rows are tried one by one.
"""

from __future__ import annotations

_GEMMA3_LIKE = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
_QWEN2_VL_LIKE = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.visual\.", "visual."),
)
_VIT_ATTENTION = {"q": "query", "k": "key", "v": "value"}
_VIT_LIKE = (
    *(
        (rf"\blayers\.(\d+)\.attention\.{short}_proj\.", rf"encoder.layer.\1.attention.attention.{name}.")
        for short, name in _VIT_ATTENTION.items()
    ),
    (r"\blayers\.(\d+)\.attention\.o_proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"\blayers\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"\blayers\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"\blayers\.(\d+)\.(layernorm_before|layernorm_after)\.", r"encoder.layer.\1.\2."),
)
# Checkpoints converted from TensorFlow name the parameters of a LayerNorm gamma and beta.
_ANY_FAMILY = (
    (r"\bLayerNorm\.weight$", "LayerNorm.gamma"),
    (r"\bLayerNorm\.bias$", "LayerNorm.beta"),
)
_BY_MODEL_TYPE: dict[str, tuple[tuple[str, str], ...]] = {
    "vit": _VIT_LIKE,
    "gemma3": _GEMMA3_LIKE,
    "llava": _GEMMA3_LIKE,
    "mistral3": _GEMMA3_LIKE,
    "qwen2_vl": _QWEN2_VL_LIKE,
    "qwen2_5_vl": _QWEN2_VL_LIKE,
    "gpt_neox": ((r"^lm_head\.", "embed_out."),),
}

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


def renamings(model_type: str) -> tuple[tuple[str, str], ...]:
    """Return the (pattern, replacement) rows that may turn a trained model's name into a name on disk."""
    return (*_BY_MODEL_TYPE.get(model_type, ()), *_ANY_FAMILY)


def is_conv1d(model_type: str, module: str) -> bool | None:
    """Return whether `module` is stored transposed, None when the family is not known."""
    if not model_type:
        return None
    return model_type in _CONV1D_MODEL_TYPES and module.rpartition(".")[2] in _CONV1D_NAMES


def layers_of_task(task_type: str, model_type: str) -> tuple[str, ...]:
    """Return the layers below its head that only the class of a task has."""
    return _LAYERS_OF_TASK.get((task_type, model_type), ())
