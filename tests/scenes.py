"""A merge to be disturbed: its inputs, the place for its output, and the files that must be there in the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import loraweld
from fakes import contents, llama_shapes, random_factors, random_tensors, write_adapter, write_base
from loraweld.report import MergeReport

Files = dict[str, bytes]
# Many items, each in several portions, and many checkpoints for a small model.
ITEM_BYTES = 16 << 10
BUFFER_BYTES = 8 << 10
CHECKPOINT_BYTES = 32 << 10


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Inputs and a place for the output, with the files that an undisturbed merge makes."""

    base: Path
    adapter: Path
    out: Path
    files: Files

    @property
    def staging(self) -> Path:
        """Where the output grows, as documented."""
        return self.out.with_name(f".{self.out.name}.loraweld")

    def merge(self, **options: object) -> MergeReport:
        return loraweld.merge(self.adapter, output=self.out, base=self.base, **options)

    def state(self) -> Files | None:
        """The files of the output; None while it is absent. Nothing else may be in sight."""
        seen = [path for path in self.out.parent.iterdir() if not path.name.startswith(".")]
        assert seen in ([], [self.out])
        return contents(self.out) if seen else None

    def check_finished(self) -> None:
        """The output is there, to the byte, and nothing is left beside it."""
        assert self.state() == self.files
        assert list(self.out.parent.iterdir()) == [self.out]


def undisturbed_merge(folder: Path, *, num_files: int, layers: int, **sizes: int) -> Scene:
    """Merge a base of which no adapter touches the last layer, and so perhaps not the last file."""
    shapes = llama_shapes(layers=layers, **sizes)
    base = write_base(folder / "base", random_tensors(shapes, torch.bfloat16), num_files=num_files)
    (base / "tokenizer.json").write_text("{}")
    linears = {name: shape for name, shape in shapes.items() if "proj" in name and f"layers.{layers - 1}." not in name}
    adapter = write_adapter(folder / "adapter", random_factors(linears))
    loraweld.merge(adapter, output=folder / "out", base=base)
    return Scene(base=base, adapter=adapter, out=folder / "out", files=contents(folder / "out"))
