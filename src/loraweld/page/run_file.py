"""What `loraweld merge --json` told of a run: an output cannot hold it, since it is the same for every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.errors import RequestError
from loraweld.page.changes import TensorChange

_TYPES: dict[str, type | tuple[type, ...]] = {
    "seconds": (int, float),
    "bytes_written": int,
    "resumed_bytes": int,
    "was_there": bool,
    "notes": list,
    "fidelity": list,
    "recipes": dict,
    "modules": list,
}
# What record and run both say of a merge.
_SHARED = ("save_method", "dtype", "recipes", "modules")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of a merge; `fidelity`: by tensor the error of its codes and what they kept of the change."""

    seconds: float
    bytes_written: int
    resumed_bytes: int
    was_there: bool
    notes: tuple[str, ...]
    fidelity: Mapping[str, tuple[float | None, float | None]]

    def add_to(self, change: TensorChange) -> TensorChange:
        """Return a change with what was measured while its weight was encoded, where nobody has measured it since."""
        error, kept = self.fidelity.get(change.tensor, (None, None))
        return replace(
            change,
            error=error if change.error is None else change.error,
            kept=kept if change.kept is None else change.kept,
        )


def read_run(path: Path, record: Mapping[str, Any]) -> Run:
    """Read the JSON that a merge printed, and make sure that it is of the merge with this record.

    Raises:
        RequestError: it is something else, or of another merge.
    """
    if not path.is_file():
        raise RequestError(f"--run {path} is not a file; expected what `loraweld merge … --json` printed")
    found = read_json_object(path)
    wrong = [key for key, kind in _TYPES.items() if not isinstance(found.get(key), kind)]
    weights = [] if "fidelity" in wrong else found["fidelity"]
    if wrong or not all(isinstance(weight, dict) for weight in weights):
        raise RequestError(
            f"{path} is not what `loraweld merge … --json` printed: wrong types of {', '.join(wrong) or 'fidelity'}"
        )
    other = [key for key in _SHARED if found.get(key) != record.get(key)]
    if other:
        raise RequestError(f"{path} is of another merge than the output's loraweld.json: other {', '.join(other)}")
    return Run(
        seconds=float(found["seconds"]),
        bytes_written=found["bytes_written"],
        resumed_bytes=found["resumed_bytes"],
        was_there=found["was_there"],
        notes=tuple(map(str, found["notes"])),
        fidelity={
            str(weight.get("tensor")): (_number(weight.get("relative_error")), _number(weight.get("kept")))
            for weight in weights
        },
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
