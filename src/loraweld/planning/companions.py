"""The files beside the weights: which are copied from the base, which the adapter overrides, tokenizer size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.checkpoint.opening import check_stays_inside
from loraweld.errors import CheckpointError
from loraweld.planning.merge_plan import SmallFile

# Other forms of the base's weights: copied unmerged they would be a second, wrong model in the folder.
_WEIGHT_PATTERNS = (
    *(
        "*.safetensors",
        "*.safetensors.index*.json",
        "*.bin",
        "*.bin.index.json",
        "*.pt",
        "*.pth",
        "*.ckpt*",
        "*.npz",
    ),
    *(
        "*.gguf",
        "*.ggml",
        "*.h5",
        "*.msgpack",
        "*.ot",
        "*.onnx",
        "*.onnx_data",
        "*.tflite",
        "*.mlmodel",
        "*.mlpackage",
    ),
)
_SKIPPED_FOLDERS = {"original", "onnx", "openvino", "coreml", "runs", "__pycache__"}
_OF_QUANTISATION = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}
_NOT_COPIED = {"config.json", "loraweld.json", "adapter_config.json"}
# What a fine-tune may have changed beside the weights: tokenizer, chat template, processor, generation.
_OVERRIDES = (
    *("tokenizer*.json", "tokenizer.model", "*.tiktoken", "*.spm", "spiece.model", "sentencepiece*.model"),
    *(
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
    ),
    *("*preprocessor_config.json", "*processor_config.json", "generation_config.json", "normalizer.json"),
)
_TOKENIZER_FILES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")
_MAX_FOLDERS = 20  # one inside the other
_ID = re.compile(r"[0-9]{1,12}")
_CHAT_TEMPLATE_FOLDER = "additional_chat_templates"


def companion_files(base: Path, overrides: list[Path], *, was_quantised: bool) -> tuple[list[SmallFile], list[str]]:
    """Return the files to copy, later folders of `overrides` winning, and the base's files left out.

    What describes a quantisation that the output no longer has is not copied.
    """
    not_copied = _NOT_COPIED | (_OF_QUANTISATION if was_quantised else set())
    chosen: dict[str, Path] = {}
    left_out: list[str] = []
    for path in _walk(base, base):
        name = path.relative_to(base).as_posix()
        if any(fnmatch(path.name, pattern) for pattern in _WEIGHT_PATTERNS):
            left_out.append(name)
        elif name not in not_copied:
            chosen[name] = path
    left_out += [f"{path.name}/" for path in sorted(base.iterdir()) if path.is_dir() and _is_left_out(path)]
    for folder in overrides:
        chosen |= {path.relative_to(folder).as_posix(): path for path in override_files(folder)}
    return [SmallFile(name=name, source=path) for name, path in sorted(chosen.items())], left_out


def override_files(folder: Path) -> list[Path]:
    """Return the files in `folder` that a fine-tune ships beside its weights."""
    top = [path for path in folder.iterdir() if path.is_file()]
    chosen = [path for path in top if any(fnmatch(path.name, pattern) for pattern in _OVERRIDES)]
    chosen += [path for path in (folder / _CHAT_TEMPLATE_FOLDER).glob("*.jinja") if path.is_file()]
    for path in chosen:
        check_stays_inside(path, folder)
    return sorted(chosen)


def tokenizer_size(folder: Path) -> int | None:
    """Return the number of embedding rows the tokenizer in `folder` needs, None if it has none there."""
    ids = [token_id for name in _TOKENIZER_FILES for token_id in _token_ids(folder / name)]
    return max(ids) + 1 if ids else None


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    """Files below `folder`, without hidden ones and without folders of other formats.

    Raises:
        CheckpointError: a link leads out of `root`, or folders are nested without end.
    """
    if len(folder.relative_to(root).parts) > _MAX_FOLDERS:
        raise CheckpointError(f"holds folders nested deeper than {_MAX_FOLDERS}; is it a model's?", path=root)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            check_stays_inside(path, root)
            yield path
        elif path.is_dir() and not _is_left_out(path):
            yield from _walk(path, root)


def _is_left_out(folder: Path) -> bool:
    return folder.is_symlink() or folder.name in _SKIPPED_FOLDERS or folder.name.startswith("checkpoint-")


def _token_ids(path: Path) -> Iterator[int]:
    if not path.is_file():
        return
    content = read_json_object(path, unique_names=False)  # a vocabulary may name a token twice: the last one counts
    if path.name == "added_tokens.json":
        found: list[Any] = list(content.values())
    elif path.name == "tokenizer_config.json":
        added = content.get("added_tokens_decoder")
        found = [int(key) for key in added if _ID.fullmatch(key)] if isinstance(added, dict) else []
    else:
        model, added = content.get("model"), content.get("added_tokens")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        found = list(vocab.values()) if isinstance(vocab, dict) else []
        found += range(len(vocab)) if isinstance(vocab, list) else ()
        found += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    yield from (token_id for token_id in found if type(token_id) is int)
