"""A small merge whose files may be put in the place of strangers' ones: planned, it succeeds or is refused in words."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import loraweld
from fakes import INDEX_NAME
from handmade import MODULES, loras, save_adapter, save_llama
from loraweld.adapter.keys import parse_key
from loraweld.adapter.tuners import TUNERS
from loraweld.checkpoint.header import header_length, parse_header
from loraweld.checkpoint.stored import check_names
from loraweld.errors import LoraweldError

# What may be put in a stranger's place: name → file of the scene.
FILES = {
    "index": f"base/{INDEX_NAME}",
    "config": "base/config.json",
    "tokenizer": "adapter/tokenizer_config.json",
    "adapter_config": "adapter/adapter_config.json",
    "adapter": "adapter/adapter_model.safetensors",
    "adapter_bin": "adapter/adapter_model.bin",
}
ALLOWED_SECONDS = 5.0
ALLOWED_BYTES = 500 << 20


def make_scene(folder: Path) -> Path:
    """Write a base of two files and an adapter; return their folder."""
    save_llama(folder / "base", num_files=2)
    adapter = save_adapter(
        folder / "adapter",
        loras(*(name for name in MODULES if name.endswith(("q_proj", "up_proj")))),
        rank_pattern={"layers.1.mlp.up_proj": 4},
        alpha_pattern={"q_proj": 3.5},
        base_model_name_or_path="some/base",
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        trainable_token_indices=None,
    )
    (adapter / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"3": {"content": "a"}}}))
    return folder


def plan_with(scene: Path, kind: str, data: bytes) -> None:
    """Plan the merge with `data` as the file of this kind, and put the file back.

    Raises:
        LoraweldError: it is refused.
    """
    path = scene / FILES[kind]
    aside = path.with_name(f".{path.name}.valid")
    if path.exists() and not aside.exists():
        os.link(path, aside)
    weights = scene / FILES["adapter"]
    try:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        if kind == "adapter_bin":
            weights.rename(weights.with_name(".weights"))
        loraweld.plan(scene / "adapter", base=scene / "base", output=scene / "out")
    finally:
        path.unlink(missing_ok=True)
        if aside.exists():
            shutil.copyfile(aside, path)
        if kind == "adapter_bin":
            weights.with_name(".weights").rename(weights)


def parse_file(data: bytes) -> None:
    """Parse a safetensors file's header and its keys, as those of an adapter of each tuner.

    Raises:
        LoraweldError: it is refused.
    """
    length = header_length(data[:8], len(data))
    header = parse_header(data[: 8 + length], len(data))
    check_names((entry.name for entry in header.entries), Path("file"))
    for entry in header.entries:
        for tuner in TUNERS.values():
            parse_key(entry.name, tuner)


def survives(scene: Path, kind: str, data: bytes) -> None:
    """Let `data` be planned or refused; anything else than LoraweldError comes out."""
    with contextlib.suppress(LoraweldError):
        if kind == "header":
            parse_file(data)
        else:
            plan_with(scene, kind, data)
