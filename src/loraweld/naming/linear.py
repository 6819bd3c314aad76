"""Which stored weights are those of linear layers that a quantised model may hold as codes.

transformers replaces every `nn.Linear` that the config does not name as skipped. What is not surely one stays as it is,
and is named: a layer left plain costs memory, a layer taken wrongly for a linear one does not load.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from loraweld.naming.families import is_conv1d
from loraweld.naming.roles import has_row_per_token, is_task_head

_EMBEDDING = re.compile(r"(.*embed.*|wte|wpe|shared|relative_attention_bias|.*_emb)")
# Layers that transformers 5.23 never replaces: those that a family computes with in float32 (`_keep_in_fp32_modules`),
# and those of a class of its own, which is not `nn.Linear` itself.
_NEVER_REPLACED = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "longt5", "switch_transformers", "pix2struct"), ("wo",)),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), ("qformer",)),
    "falcon": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "deepseek_v4": ("o_a_proj",),
}
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg", "gating"})


def is_linear(name: str, shape: tuple[int, ...], model_type: str, stored: Container[str]) -> bool:
    """Return whether `name` is the weight of a plain linear layer inside the model: no embedding, head or router.

    `stored` are the names of the model's tensors.
    """
    module, _, last = name.rpartition(".")
    parts = module.split(".")
    return (
        last == "weight"
        and len(shape) == 2
        and not has_row_per_token(name)
        and not is_task_head(name)
        and not _EMBEDDING.fullmatch(parts[-1])
        and _ROUTERS.isdisjoint(parts[-2:])
        and not set(_NEVER_REPLACED.get(model_type, ())) & set(parts)
        and not is_conv1d(model_type, module)
        and f"{module.rpartition('.')[0]}.in_proj_weight" not in stored  # nn.MultiheadAttention
    )


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a weight's module is named as transformers reads a config: by the end of its path or the start."""
    module = name.removesuffix(".weight")
    return any(module.endswith(pattern) or f"{module}.".startswith(f"{pattern}.") for pattern in patterns)


def is_expert(name: str) -> bool:
    """Return whether a weight is one of a layer's experts, which transformers 5 holds as one tensor."""
    return ".experts." in name


def is_table(module: str) -> bool:
    """Return whether a module is named as embeddings are: its weight has a row for each token or position."""
    return _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None
