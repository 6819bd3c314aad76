"""An adapter that grows tensor by tensor: spooled beside the output, then written in PEFT's format.

Source: PEFT 0.21.2, `LoraConfig`, `get_pattern_key` (utils/other.py), `get_peft_model_state_dict`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from loraweld.adapter.config import CONFIG_NAME
from loraweld.adapter.files import SAFE_NAME
from loraweld.checkpoint.header import build_header
from loraweld.checkpoint.jsonfile import dump_json
from loraweld.dtypes import DTYPES
from loraweld.extraction.report import ExtractedModule, SavedParameter

PREFIX = "base_model.model."
_PIECE_BYTES = 1 << 22


class Sink(Protocol):
    """The verbs of a folder sink that an adapter needs."""

    def create(self, name: str, size: int, *, aligned: bool) -> None: ...

    def write_at(self, name: str, offset: int, buffer: memoryview, count: int) -> None: ...

    def finish(self, name: str, size: int) -> None: ...

    def write_text(self, name: str, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Spool:
    """The tensors of an adapter in the order in which they became known, in one file without a header."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("w+b")
        self._entries: list[_Entry] = []

    def add(self, key: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]) -> int:
        """Append a tensor, its bytes row-major in `pieces`; return how many there were."""
        offset = self._file.tell()
        for piece in pieces:
            self._file.write(piece)
        size = self._file.tell() - offset
        self._entries.append(_Entry(key=PREFIX + key, dtype=dtype, shape=shape, offset=offset, size=size))
        return size

    def write(self, sink: Sink) -> int:
        """Write the safetensors file, wide types first so that each tensor is aligned; return its size."""
        entries = sorted(self._entries, key=lambda entry: (-DTYPES[entry.dtype].bits, entry.key))
        header = build_header(((e.key, e.dtype, e.shape) for e in entries), {"format": "pt"})
        total = len(header) + sum(entry.size for entry in entries)
        sink.create(SAFE_NAME, total, aligned=False)
        place = 0
        for piece in (header, *(piece for entry in entries for piece in self._pieces(entry))):
            sink.write_at(SAFE_NAME, place, memoryview(piece), len(piece))
            place += len(piece)
        sink.finish(SAFE_NAME, total)
        return total

    def close(self) -> None:
        self._file.close()

    def _pieces(self, entry: _Entry) -> Iterator[bytes]:
        self._file.seek(entry.offset)
        left = entry.size
        while left:
            piece = self._file.read(min(left, _PIECE_BYTES))
            left -= len(piece)
            yield piece


def write_config(
    sink: Sink,
    *,
    base: str,
    base_config: Mapping[str, Any],
    modules: Sequence[ExtractedModule],
    saved: Sequence[SavedParameter],
    saved_modules: Sequence[str],
) -> None:
    """Write adapter_config.json for these modules, with alpha = rank, so that the scaling is 1."""
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    patterns = _patterns(modules, rank)
    targets = {module.module for module in modules}
    biases = {s.parameter.rpartition(".")[0] for s in saved if s.how == "bias"}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": _task(base_config),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(targets),
        "modules_to_save": sorted(saved_modules) or None,
        "bias": "none" if not biases else "lora_only" if biases <= targets else "all",
        "fan_in_fan_out": any(module.kind == "conv1d" for module in modules),
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }
    sink.write_text(CONFIG_NAME, dump_json(config))


def _patterns(modules: Sequence[ExtractedModule], rank: int) -> dict[str, int]:
    """One pattern for each other rank: PEFT tries them all on each module."""
    by_rank: dict[int, list[str]] = {}
    for module in modules:
        if module.rank != rank:
            by_rank.setdefault(module.rank, []).append(re.escape(module.module))
    return {f"^({'|'.join(names)})": other for other, names in sorted(by_rank.items())}


def _task(config: Mapping[str, Any]) -> str | None:
    """The task of a language model; those of others would bring modules to save, or inputs that not all models have."""
    name = str(next(iter(config.get("architectures") or ()), ""))
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
