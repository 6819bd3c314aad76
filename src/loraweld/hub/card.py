"""README.md of a model: what is known of it and of its base, nothing invented.

Source of the keys: the Hub's documentation of model cards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraweld.errors import RequestError
from loraweld.hub.repository import CARD_NAME

# What a fine-tune has from its base, where the base's own card says it.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_WHAT = {
    "lora": "The adapter of a fine-tune",
    "merged_4bit": "A fine-tune, merged into its base and quantised to 4 bit (bitsandbytes)",
    "merged_8bit": "A fine-tune, merged into its base and quantised to 8 bit (bitsandbytes)",
    "merged_fp8": "A fine-tune, merged into its base and quantised to FP8 (compressed-tensors)",
    "gguf": "A fine-tune, merged into its base and converted to GGUF",
}
_LOADING = {
    "lora": """from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("{name}")""",
    "gguf": """from llama_cpp import Llama

model = Llama.from_pretrained("{name}", filename="*.gguf")""",
}
_LOADING_MERGED = """from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card can say. `base` and `adapters` by their names on the Hub, or as the user called them.

    `base_folder` is where the base's own card may lie; `existing` the text of a card that is there already.
    """

    name: str
    base: str | None
    base_folder: Path | None
    adapters: tuple[str, ...]
    architecture: str
    method: str
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    existing: str | None = None


def card_text(facts: CardFacts, fidelity: Sequence[str] = ()) -> str:
    """Return the card: the existing one with its text and what is new in its metadata, or a short one.

    Raises:
        RequestError: the existing card's metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    if facts.existing is None:
        card = ModelCard(f"---\n{{}}\n---\n\n{_body(facts, fidelity)}", ignore_metadata_errors=True)
    else:
        try:
            card = ModelCard(facts.existing)
        except ValueError as error:
            raise RequestError(f"README.md of the repository has metadata that cannot be read: {error}") from None
    for key, value in _known(facts).items():
        if getattr(card.data, key, None) is None:
            setattr(card.data, key, value)
    for key, values in (("tags", facts.tags), ("datasets", facts.datasets)):
        if values:
            setattr(card.data, key, _union(getattr(card.data, key, None), values))
    return str(card)


def _body(facts: CardFacts, fidelity: Sequence[str]) -> str:
    parts = [f"# {facts.name.rpartition('/')[2]}", f"{_WHAT.get(facts.method, 'A fine-tune, merged into its base')}."]
    rows = [("Base", _link(facts.base)), ("Adapter", ", ".join(filter(None, map(_link, facts.adapters))))]
    parts.append("\n".join(f"- {key}: {value}" for key, value in rows if value))
    loading = _LOADING.get(facts.method, _LOADING_MERGED)
    parts.append("```python\n" + loading.format(name=facts.name, auto=_auto_class(facts.architecture)) + "\n```")
    if fidelity:
        parts.append("\n".join(f"- {line}" for line in fidelity))
    parts.append("Made with [loraweld](https://pypi.org/project/loraweld/); `loraweld.json` says from what.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _link(name: str | None) -> str:
    if not name:
        return ""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Whether a base or an adapter is one of the Hub, as far as its name tells."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).expanduser().exists()


def _auto_class(architecture: str) -> str:
    for ending, auto in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForTokenClassification", "AutoModelForTokenClassification"),
        ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
    ):
        if architecture.endswith(ending):
            is_text = architecture.startswith(("T5", "MT5", "UMT5", "Bart", "MBart", "Pegasus", "Marian", "LongT5"))
            return "AutoModelForSeq2SeqLM" if auto == "AutoModelForImageTextToText" and is_text else auto
    return "AutoModel"


def _union(old: object, new: Sequence[str]) -> list[str]:
    found = [old] if isinstance(old, str) else list(old) if isinstance(old, list) else []
    return list(dict.fromkeys([*found, *new]))


def _known(facts: CardFacts) -> dict[str, Any]:
    """The base where it is one of the Hub, and what its own card says of licence and languages."""
    known: dict[str, Any] = {"library_name": "peft" if facts.method == "lora" else "transformers"}
    if facts.base and is_hub_id(facts.base):
        known |= {"base_model": facts.base, "base_model_relation": _relation(facts)}
    base = _metadata(facts.base_folder)
    return known | {key: base[key] for key in _INHERITED if base.get(key)}


def _relation(facts: CardFacts) -> str:
    if facts.method == "lora":
        return "adapter"
    return "merge" if len(facts.adapters) > 1 else "finetune"


def _metadata(folder: Path | None) -> Mapping[str, Any]:
    if folder is None or not (folder / CARD_NAME).is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / CARD_NAME) or {}
    except ValueError:
        return {}
