"""What a merge did: a value for programs, a few lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from loraweld.combine.methods import Combination
from loraweld.hub.upload import Pushed
from loraweld.planning.merge_plan import MergePlan, ModuleLine, OutputFile, rounding_json

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFidelity:
    """What encoding has done to an edited weight.

    `relative_error`: norm of the error over that of the weight. `kept`: the part of the adapter's change that the
    stored weight has, 1 for all of it; None where the adapter changes nothing.
    """

    tensor: str
    relative_error: float
    kept: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What only a run can tell."""

    resumed_bytes: int
    notes: tuple[str, ...] = ()
    fidelity: tuple[WeightFidelity, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """The outcome of `loraweld.merge`. Sizes in bytes, time in seconds. `output` is a URL if an object store has it.

    `resumed_bytes` were finished by an earlier run of the same command; `was_there` says that the output
    already held exactly this result and was compared, not written.
    """

    output: Path | str
    base: str
    adapters: tuple[str, ...]
    save_method: str
    dtype: str
    files: tuple[str, ...]
    recipes: dict[str, int]
    modules: tuple[ModuleLine, ...]
    notes: tuple[str, ...]
    fidelity: tuple[WeightFidelity, ...]
    bytes_written: int
    resumed_bytes: int
    was_there: bool
    seconds: float
    pushed: Pushed | None = None
    combination: Combination | None = None
    rounding_seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values: `loraweld merge --json`."""
        return {
            "output": str(self.output),
            "base": self.base,
            "adapters": list(self.adapters),
            "combination": self.combination.to_json() if self.combination else None,
            "save_method": self.save_method,
            "dtype": self.dtype,
            "rounding": rounding_json(self.rounding_seed),
            "files": list(self.files),
            "recipes": dict(self.recipes),
            "modules": [
                {"adapter": m.adapter, "module": m.module, "tensor": m.tensor, "what": m.what} for m in self.modules
            ],
            "notes": list(self.notes),
            "fidelity": [asdict(weight) for weight in self.fidelity],
            "bytes_written": self.bytes_written,
            "resumed_bytes": self.resumed_bytes,
            "was_there": self.was_there,
            "seconds": round(self.seconds, 3),
            "pushed": asdict(self.pushed) if self.pushed else None,
        }

    def lines(self) -> list[str]:
        """Return the report for a person."""
        if self.was_there:
            compared = f"{self.output} already holds exactly this merge (compared byte by byte)"
            return [compared, *_pushed_lines(self.pushed)]
        rate = self.bytes_written / max(self.seconds, 1e-9)
        return [
            f"{self.output}: {human_bytes(self.bytes_written)} in {self.seconds:.1f} s ({human_bytes(int(rate))}/s)",
            *_pushed_lines(self.pushed),
            f"base {self.base}, adapter {_adapters(self.adapters, self.combination)}, {self.dtype}"
            f"{_rounding(self.rounding_seed)}",
            f"tensors: {counts(self.recipes)}",
            *_module_lines(self.modules),
            *fidelity_lines(self.fidelity),
            *(f"note: {note}" for note in self.notes),
        ]


def _pushed_lines(pushed: Pushed | None) -> list[str]:
    """Where the model is, and what did not have to be sent."""
    if pushed is None:
        return []
    saved = [
        f"{human_bytes(count)} {what}"
        for count, what in ((pushed.resumed_bytes, "sent by earlier runs"), (pushed.copied_bytes, "copied on the Hub"))
        if count
    ]
    return [f"pushed: {pushed.url} ({', '.join([f'{human_bytes(pushed.sent_bytes)} sent', *saved])})"]


def lost_change_notes(fidelity: Sequence[WeightFidelity]) -> list[str]:
    """Warn of weights in whose codes less than half of the adapter's change is left."""
    lost = sorted((weight.kept, weight.tensor) for weight in fidelity if weight.kept is not None and weight.kept < 0.5)
    if not lost:
        return []
    shown = ", ".join(f"{tensor} {kept:.0%}" for kept, tensor in lost[:_SHOWN])
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return [
        f"WARNING: less than half of the adapter's change is left in {len(lost)} of {len(fidelity)} weights, because "
        f"it is smaller than the steps of their codes: {shown}{more}. To keep it, save with "
        "--save-method merged_16bit, in an encoding of more bits, or with a larger --scale"
    ]


def fidelity_lines(fidelity: Sequence[WeightFidelity]) -> list[str]:
    """The middle and the worst of what encoding has done, over the edited weights."""
    if not fidelity:
        return []
    errors = sorted(weight.relative_error for weight in fidelity)
    kept = sorted(weight.kept for weight in fidelity if weight.kept is not None)
    lines = [f"encoding added {median(errors):.2%} of a weight's norm as error (median; worst {errors[-1]:.2%})"]
    if kept:
        lines.append(f"of the adapter's change the codes keep {median(kept):.0%} (median; least {kept[0]:.0%})")
    return lines


def counts(recipes: dict[str, int]) -> str:
    """Return "3 edit, 5 copy", most frequent first."""
    ordered = sorted(recipes.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {kind}" for kind, count in ordered)


def human_bytes(count: int) -> str:
    """Return a size as people read it, in decimal units."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def _module_lines(modules: Sequence[ModuleLine]) -> list[str]:
    """One line per adapter and method: which kinds of modules, how many."""
    kinds: dict[tuple[str, str], dict[str, int]] = {}
    for line in modules:
        by_name = kinds.setdefault((line.adapter, line.what), {})
        name = line.module.rpartition(".")[2] or line.tensor
        by_name[name] = by_name.get(name, 0) + 1
    return [
        f"{adapter}: {what}: " + ", ".join(f"{name} ×{count}" for name, count in by_name.items())
        for (adapter, what), by_name in kinds.items()
    ]


def plan_lines(made: MergePlan) -> list[str]:
    """Return a plan for a person."""
    return [
        f"base {made.base}, adapter {_adapters(made.adapters, made.combination)} → {made.place} "
        f"({made.save_method}, {made.dtype}{_rounding(made.rounding_seed)})",
        *map(_file_line, made.files),
        f"tensors: {counts(dict(made.recipes_by_kind))}",
        *_module_lines(made.modules),
        f"reads {human_bytes(made.bytes_read)}, writes {human_bytes(made.bytes_written)}, "
        f"{_disk_needed(made)}{human_bytes(made.free_disk_bytes)} free",
        f"peak memory about {human_bytes(made.peak_memory_bytes)} with {made.workers} workers",
        *(f"note: {note}" for note in made.notes),
    ]


def _adapters(names: Sequence[str], combination: Combination | None) -> str:
    """Return "a × 0.7, b × 0.3 (ties, density 0.5)"; of adapters that are only added their names."""
    if combination is None:
        return ", ".join(names)
    weighed = (f"{name} × {weight:g}" for name, weight in zip(names, combination.weights, strict=True))
    return f"{', '.join(weighed)} ({combination})"


def _rounding(seed: int | None) -> str:
    return "" if seed is None else f", rounded stochastically (seed {seed})"


def _file_line(file: OutputFile) -> str:
    size = "" if file.num_bytes is None else f"  {'about ' * file.is_estimate}{human_bytes(file.num_bytes)}"
    return f"  {file.name}{size}{', made by the converter' * file.is_estimate}"


def _disk_needed(made: MergePlan) -> str:
    """What the disk must hold meanwhile, if that is more than the output."""
    return f"needs {human_bytes(made.disk_bytes)} meanwhile, " if made.disk_bytes > made.bytes_written else ""


def inspect_lines(found: dict[str, Any]) -> list[str]:
    """Return what `inspect` found for a person, one fact per line."""
    return [
        f"{key}: {_fact(value)}" for key, value in found.items() if value not in (None, [], {}) and key != "merged_from"
    ]


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_fact(item) if isinstance(item, dict) else str(item) for item in value)
    return str(value)
