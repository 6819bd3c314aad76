"""README.md of a model: the metadata that the user gave, and what is known of the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraweld.errors import RequestError


def card_text(
    *,
    name: str,
    base: str | None,
    origin: Path | None,
    tags: Sequence[str],
    datasets: Sequence[str],
    method: str,
    existing: str | None = None,
) -> str:
    """Return the card: the existing one with its text and what is new in its metadata, or a short one.

    Raises:
        RequestError: the existing card's metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    known = _base_metadata(base, origin, method)
    if existing is None:
        what = "The adapter of a fine-tune" if method == "lora" else "A fine-tune, merged into its base"
        existing = f"# {name}\n\n{what}, saved with [loraweld](https://pypi.org/project/loraweld/).\n"
        card = ModelCard(f"---\n{{}}\n---\n\n{existing}", ignore_metadata_errors=True)
    else:
        try:
            card = ModelCard(existing)
        except ValueError as error:
            raise RequestError(f"README.md of the repository has metadata that cannot be read: {error}") from None
    for key, value in known.items():
        if getattr(card.data, key, None) is None:
            setattr(card.data, key, value)
    for key, values in (("tags", tags), ("datasets", datasets)):
        if values:
            setattr(card.data, key, _union(getattr(card.data, key, None), values))
    return str(card)


def _union(old: object, new: Sequence[str]) -> list[str]:
    found = [old] if isinstance(old, str) else list(old) if isinstance(old, list) else []
    return list(dict.fromkeys([*found, *new]))


def _base_metadata(base: str | None, origin: Path | None, method: str) -> dict[str, Any]:
    """The base's name where it is one of the Hub, its licence where its own card says one."""
    known: dict[str, Any] = {"library_name": "peft" if method == "lora" else "transformers"}
    if base and not Path(base).expanduser().exists() and base.count("/") <= 1:
        known["base_model"] = base
    if origin is not None and (origin / "README.md").is_file():
        from huggingface_hub import metadata_load

        try:
            metadata = metadata_load(origin / "README.md") or {}
        except ValueError:
            metadata = {}
        known |= {key: metadata[key] for key in ("license", "license_name", "license_link") if metadata.get(key)}
    return known
