"""An output → its page: open, measure, render, write. Here is the order of the steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraweld.errors import OutputError, RequestError
from loraweld.page.changes import TensorChange
from loraweld.page.facts import PageFacts, gather_page_facts, unmeasured
from loraweld.page.render import check_installed, render
from loraweld.report import human_bytes
from loraweld.request import PathLike

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageReport:
    """The outcome of `loraweld.report_page`: where the page is, and the numbers in it.

    `reason` says why nothing was compared; it is empty if the base was found.
    """

    page: Path
    num_bytes: int
    reason: str
    changes: tuple[TensorChange, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: `loraweld report --json`."""
        changes = [asdict(change) | {"shape": list(change.shape)} for change in self.changes]
        return {"page": str(self.page), "bytes": self.num_bytes, "reason": self.reason or None, "changes": changes}

    def lines(self) -> list[str]:
        """Return what was done, for a person."""
        changed = sum(bool(change.relative_change) for change in self.changes)
        what = f"note: not compared. {self.reason}" if self.reason else f"changed tensors: {changed}"
        return [f"{self.page}: {human_bytes(self.num_bytes)}", what]


@dataclass(frozen=True, slots=True)
class _Work:
    """What a progress bar has to know of the run."""

    weights: Sequence[_Weight]


@dataclass(frozen=True, slots=True)
class _Weight:
    num_bytes: int


def report_page(
    model: PathLike,
    *,
    output: PathLike = "report.html",
    base: PathLike | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[_Work], None] = lambda work: None,
) -> PageReport:
    """Write one HTML page, which needs no network, on what a merge made: from what, and how much each tensor changed.

    Args:
        model: the output of a merge, a folder, a Hub id or a URL.
        output: the file for the page.
        base: the base that it was merged into, a folder, a Hub id or a URL; None looks for the one that the record
            names in the Hub's cache, beside the model and in the current folder. Without one the page shows what the
            record has.
        overwrite: replace a file that exists.
        token: of the Hub; True or None: the stored login.
        progress: called with the number of bytes that were compared.
        on_plan: called with the work before it begins.

    Raises:
        LoraweldError: something the user can fix; `output` is as it was.
    """
    check_installed()
    page = Path(output)
    if page.is_dir() or (page.exists() and not overwrite):
        raise OutputError("exists; give --overwrite to replace it, or another name", path=page)
    try:
        facts = gather_page_facts(os.fspath(model), base=None if base is None else os.fspath(base), token=token)
        changes = _changes(facts, progress or (lambda count: None), on_plan)
    except OSError as error:  # a name too long, a folder that may not be read
        raise RequestError(f"{str(error.filename)[:200]}: {error.strerror}") from None
    text = render(facts, changes)
    _write(page, text)
    return PageReport(page=page, num_bytes=page.stat().st_size, reason=facts.reason, changes=changes)


def _changes(facts: PageFacts, progress: Progress, on_plan: Callable[[_Work], None]) -> tuple[TensorChange, ...]:
    if facts.model is None:
        return ()
    if facts.base is None:
        return unmeasured(facts.model)
    from loraweld.page.measure import measure  # torch, which a page without numbers does without

    on_plan(_Work([_Weight(source.stored_bytes) for source in facts.model.tensors.values()]))
    return measure(facts.base, facts.model, progress)


def _write(page: Path, text: str) -> None:
    """Write beside the page, then rename: there is never half of it."""
    part = page.with_name(f".{page.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(page)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"cannot be written: {error.strerror}", path=page) from None
