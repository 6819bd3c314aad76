"""An Ollama Modelfile: the .gguf file, the chat format where it can be proven, the stop tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraweld.checkpoint.jsonfile import read_json_if_there
from loraweld.errors import CheckpointError
from loraweld.export.chat_format import ChatFormat, chat_format, token_text


def modelfile(model: Path, file_name: str) -> str:
    """Return the text of a Modelfile for `file_name` beside it, made from the model folder's chat template and tokens.

    Raises:
        CheckpointError: a JSON file of the folder is damaged.
    """
    config = read_json_if_there(model / "tokenizer_config.json")
    template = _chat_template(model, config)
    chat = None if template is None else chat_format(template, config)
    lines = ["# In this folder: ollama create NAME -f Modelfile", f"FROM ./{file_name}", ""]
    if template is None:
        lines.append("# The model has no chat template.")
    elif chat is None or not chat.is_writable:
        lines.append("# No TEMPLATE: the model's chat template is none that can be translated with certainty.")
        lines.append("# ollama then looks for one that fits the chat template inside the .gguf.")
    else:
        lines.append("# The model's chat template, for text: without tools and images.")
        if chat.system is None:
            lines.append("# It knows no system message.")
        lines.append(f'TEMPLATE """{chat.go_template()}"""')
    lines += [f"PARAMETER stop {_quoted(token)}" for token in _stop_tokens(model, config, chat)]
    return "\n".join(lines) + "\n"


def _chat_template(model: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template from where transformers looks for it; of several the one called default."""
    own_file = model / "chat_template.jinja"
    if own_file.is_file():
        try:
            return own_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read: {error}", path=own_file) from None
    found = config.get("chat_template") or read_json_if_there(model / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = next((item.get("template") for item in _objects(found) if item.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _stop_tokens(model: Path, config: Mapping[str, Any], chat: ChatFormat | None) -> list[str]:
    """Return the texts of the end tokens, and of the special token that ends an answer in a chat."""
    texts = _special_tokens(model, config)
    ids = read_json_if_there(model / "generation_config.json").get(
        "eos_token_id", read_json_if_there(model / "config.json").get("eos_token_id")
    )
    stops = [token_text(config.get("eos_token"))]
    stops += [texts.get(i, "") for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    if chat is not None:
        stops += [text for text in texts.values() if chat.following.lstrip().startswith(text)]
    return [text for text in dict.fromkeys(stops) if text]


def _special_tokens(model: Path, config: Mapping[str, Any]) -> dict[int, str]:
    """Return the texts of the special tokens by their ids."""
    entries = _objects(read_json_if_there(model / "tokenizer.json").get("added_tokens"))
    texts = {item["id"]: token_text(item) for item in entries if item.get("special") and type(item.get("id")) is int}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        texts |= {int(i): token_text(item) for i, item in decoder.items() if i.isdigit()}
    return {i: text for i, text in texts.items() if text.strip()}


def _objects(found: object) -> list[dict[str, Any]]:
    """Return the objects of a list; whatever else a stranger's file has there is passed over."""
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
