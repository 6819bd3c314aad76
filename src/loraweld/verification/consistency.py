"""Do config.json, the tokenizer and the tensors of an output say the same? From headers alone.

What the base itself says at odds with its tensors is no fault of the merge: tensors are compared with those expected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.recognise import quantization_settings
from loraweld.dtypes import FLOAT_CODE_BY_NAME, NAME_BY_FLOAT_CODE
from loraweld.errors import CheckpointError
from loraweld.naming.roles import is_embedding, is_output_embedding
from loraweld.naming.tied import is_tied
from loraweld.planning.companions import tokenizer_size
from loraweld.verification.findings import Finding
from loraweld.verification.opened import Opened

_CONFIG = "config.json"
# Numbers that a merge takes over from the base, or sets: a config that has them must have these.
_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "rope_theta", "hidden_act"),
    *("num_experts", "num_local_experts", "max_position_embeddings", "sliding_window", "attention_bias"),
)


def consistency(opened: Opened, planned: Mapping[str, Any], base: Path) -> Iterator[Finding]:
    """Yield what is wrong; `planned` is the config that the merge should have, `base` the folder of the base."""
    config = opened.config
    if not config:
        if planned:
            yield _finding("config", "is missing or empty; copy the base's")
        return
    for level, wanted in _levels(config, planned):
        yield from _vocabulary(opened, level, wanted)
        yield from _numbers(level, wanted)
    yield from _dtype(opened, config, planned)
    yield from _ties(opened, config, planned)
    yield from _quantization(opened, config)
    yield from _tokenizer(opened, base)


def _finding(check: str, message: str, where: str = _CONFIG) -> Finding:
    return Finding(check=check, where=where, message=message)


def _levels(
    config: Mapping[str, Any], planned: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The config and that of the text model in it, each with the planned one."""
    yield config, planned
    text, wanted = config.get("text_config"), planned.get("text_config")
    if isinstance(text, dict):
        yield text, wanted if isinstance(wanted, dict) else {}


def _embedding_rows(opened: Opened) -> int | None:
    """Rows of the vocabulary: the largest embedding's, else the head's."""
    for fits in (is_embedding, is_output_embedding):
        rows = [tensor.rows for name, tensor in opened.tensors.items() if fits(name) and len(tensor.shape) == 2]
        if rows:
            return max(rows)
    return None


def _vocabulary(opened: Opened, level: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Finding]:
    rows, said = _embedding_rows(opened), level.get("vocab_size")
    if rows is not None and isinstance(said, int) and said not in (rows, wanted.get("vocab_size")):
        yield _finding("vocab_size", f"says {said}, the embedding has {rows} rows; set vocab_size to {rows}")


def _numbers(level: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Finding]:
    for key in _KEYS:
        if key == "vocab_size" or level.get(key) is None or wanted.get(key) is None:
            continue  # what is the default is left out by transformers
        if level[key] != wanted[key]:
            yield _finding(key, f"says {key} {level[key]!r}, expected {wanted[key]!r}, as the base has it")


def _said_dtype(config: Mapping[str, Any]) -> str | None:
    return FLOAT_CODE_BY_NAME.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))


def _dtype(opened: Opened, config: Mapping[str, Any], planned: Mapping[str, Any]) -> Iterator[Finding]:
    said = _said_dtype(config)
    main = opened.main_dtype
    encoded = any(isinstance(tensor, EncodedTensor) for tensor in opened.tensors.values())
    if said not in (None, main, _said_dtype(planned)) and not encoded:
        assert said is not None
        yield _finding(
            "dtype", f"says {NAME_BY_FLOAT_CODE[said]}, the tensors are {NAME_BY_FLOAT_CODE.get(main, main)}"
        )


def _ties(opened: Opened, config: Mapping[str, Any], planned: Mapping[str, Any]) -> Iterator[Finding]:
    has_head = any(map(is_output_embedding, opened.tensors))
    if not planned or is_tied(config) == is_tied(planned) or (has_head and not is_tied(config)):
        return  # a head that is stored on its own, with the values of the embedding, is the same model
    message = (
        "ties the head to the embedding, but they are to be two tensors, of which one would be lost; set it to false"
        if is_tied(config)
        else "says that the head is a tensor of its own, but it is tied to the embedding; set it to true"
    )
    yield _finding("tie_word_embeddings", message)


def _quantization(opened: Opened, config: Mapping[str, Any]) -> Iterator[Finding]:
    settings = quantization_settings(config)
    encoded = [tensor for tensor in opened.tensors.values() if isinstance(tensor, EncodedTensor)]
    damaged = any(finding.check == "encoding" for finding in opened.findings)
    if settings and not encoded and not damaged:
        method = settings.get("quant_method")
        yield _finding(
            "quantization_config", f"says {method}, but every weight is stored plain; take it out of the config"
        )
    if encoded and not settings:
        kinds = sorted({tensor.encoding.kind for tensor in encoded})
        yield _finding("quantization_config", f"is missing, but weights are stored as {', '.join(kinds)}")
    four = [tensor for tensor in encoded if isinstance(tensor.encoding, Bnb4)]
    if settings.get("quant_method") == "bitsandbytes" and encoded:
        if bool(settings.get("load_in_4bit")) != bool(four):
            yield _finding("quantization_config", f"says load_in_4bit {settings.get('load_in_4bit')}, the codes differ")
        said = settings.get("bnb_4bit_quant_type")
        wrong = [t for t in four if isinstance(t.encoding, Bnb4) and said not in (None, t.encoding.quant_type)]
        if wrong:
            yield _finding("quantization_config", f"says bnb_4bit_quant_type {said}, {wrong[0].name} has other codes")


def _tokenizer(opened: Opened, base: Path) -> Iterator[Finding]:
    rows = _embedding_rows(opened)
    try:
        needed = tokenizer_size(opened.folder)
    except CheckpointError as error:
        yield _finding("tokenizer", f"cannot be read: {error}", "tokenizer")
        return
    if rows is not None and needed is not None and needed > rows and needed != tokenizer_size(base):
        message = f"has tokens up to {needed - 1}, the embedding has {rows} rows; grow it, or ship the right tokenizer"
        yield _finding("tokenizer", message, "tokenizer")
