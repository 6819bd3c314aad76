"""Models and adapters written by hand, without any class of transformers or PEFT; calls that fail or are recorded."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraweld.sinks import system
from loraweld.sinks.journal import Journal, Noted

Shapes = Mapping[str, tuple[int, ...]]
Factors = Mapping[str, tuple[Tensor, Tensor]]  # module → (A, B)
PREFIX = "base_model.model."
INDEX_NAME = "model.safetensors.index.json"


def llama_shapes(*, hidden: int = 64, intermediate: int = 96, layers: int = 2, vocab: int = 100) -> Shapes:
    """Return the tensors of an untied Llama with as many key heads as query heads."""
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    linears |= {"mlp.down_proj": (hidden, intermediate)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def random_tensors(shapes: Shapes, dtype: torch.dtype, *, seed: int = 0, std: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * std).to(dtype) for name, shape in shapes.items()}


def random_factors(
    shapes: Shapes, *, rank: int = 4, seed: int = 1, std: float = 0.02
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return float32 factors for each 2-D tensor of `shapes`, whose product has about the deviation `std`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            a = torch.randn(rank, shape[1], generator=generator)
            b = torch.randn(shape[0], rank, generator=generator) * (std / math.sqrt(rank))
            factors[name.removesuffix(".weight")] = (a, b)
    return factors


def save_base(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, *, num_files: int = 1
) -> Path:
    """Write tensors to `num_files` files, with an index if there are several, and a config unless it is None."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    names = names if num_files > 1 else ["model.safetensors"]
    weight_map = {name: names[i * num_files // len(tensors)] for i, name in enumerate(tensors)}
    for file in names:
        chosen = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(chosen, folder / file, metadata={"format": "pt"})
    if num_files > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    return folder


def write_base(folder: Path, tensors: Mapping[str, Tensor], *, num_files: int = 1, model_type: str = "llama") -> Path:
    """Write a base model whose config says just enough."""
    return save_base(folder, tensors, {"model_type": model_type, "tie_word_embeddings": False}, num_files=num_files)


def write_adapter(
    folder: Path,
    factors: Factors,
    *,
    alpha: float = 8,
    more: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write a LoRA in PEFT's format; `more` holds further tensors by their full keys, `config` further options."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(more or {})
    for module, (a, b) in factors.items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    ranks = {module: len(a) for module, (a, _) in factors.items()}
    written = {
        "peft_type": "LORA",
        "r": next(iter(ranks.values())),
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "target_modules": list(factors),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def load_folder(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below `folder` by relative name."""
    paths: Iterable[Path] = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def fail_at_call(function: Callable[..., Any], number: int, error: Exception) -> Callable[..., Any]:
    """Return `function` as it is, but for call `number` (from 0) and all later ones, which raise `error`."""
    calls = itertools.count()

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) >= number:
            raise error
        return function(*args, **options)

    return failing


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that was done to a file or folder, known by its inode whatever its name becomes.

    `kind` is "write" (done), "sync" (begins), "synced" (has ended), "journal" (begins) or "publish" (done).
    """

    kind: str
    inode: int
    offset: int = 0
    size: int = 0
    keys: tuple[str, ...] = ()


class Recorder:
    """Notes writes, syncs, journal lines and renames of folders, in the order in which they happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self._note_writes(monkeypatch)
        for name in ("fsync", "fdatasync"):
            self._note_syncs(monkeypatch, name)
        self._note_journal(monkeypatch)
        self._note_renames(monkeypatch)

    def index_of(self, kind: str, inode: int) -> int:
        """Return the position of the last event of this kind on this file or folder."""
        return max(n for n, event in enumerate(self.events) if (event.kind, event.inode) == (kind, inode))

    def _note(self, kind: str, descriptor: int, **more: Any) -> None:
        info = os.fstat(descriptor)
        self.events.append(Event(kind=kind, inode=info.st_ino, size=info.st_size, **more))

    def _note_writes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pwrite = os.pwrite

        def noted(descriptor: int, data: memoryview, offset: int) -> int:
            count = pwrite(descriptor, data, offset)
            self._note("write", descriptor, offset=offset)
            return count

        monkeypatch.setattr(os, "pwrite", noted)

    def _note_syncs(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        sync = getattr(os, name)

        def noted(descriptor: int) -> None:
            self._note("sync", descriptor)
            sync(descriptor)
            self._note("synced", descriptor)

        monkeypatch.setattr(os, name, noted)

    def _note_journal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        append = Journal.append

        def noted(journal: Journal, items: Noted) -> None:
            self.events.append(Event(kind="journal", inode=0, keys=tuple(items)))
            append(journal, items)

        monkeypatch.setattr(Journal, "append", noted)

    def _note_renames(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replace, exchange = Path.replace, system.exchange

        def noted_replace(path: Path, target: Path) -> Path:
            moved = replace(path, target)
            self.events.append(Event(kind="publish", inode=moved.stat().st_ino))
            return moved

        def noted_exchange(one: Path, other: Path) -> bool:
            done = exchange(one, other)
            self.events.append(Event(kind="publish", inode=other.stat().st_ino))
            return done

        monkeypatch.setattr(Path, "replace", noted_replace)
        monkeypatch.setattr(system, "exchange", noted_exchange)
