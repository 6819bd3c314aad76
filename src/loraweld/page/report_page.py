"""An output → its page: open, measure, render, write. Here is the order of the steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraweld.errors import RequestError
from loraweld.page.changes import TensorChange
from loraweld.page.facts import PageFacts, gather_page_facts, unmeasured
from loraweld.page.page_file import free_place, write_page
from loraweld.page.proof import Given, Proof, prove, proven
from loraweld.page.render import render
from loraweld.page.run_file import read_run
from loraweld.report import human_bytes
from loraweld.request import PathLike
from loraweld.verification.findings import VerifyReport

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageReport:
    """The outcome of `loraweld.report_page`: where the page is, and the numbers in it.

    `reason` says why nothing was compared with the base; it is empty if that was found. `proof` is the comparison with
    base + adapter, None if there was none, and `unproven` says why.
    """

    page: Path
    num_bytes: int
    reason: str
    changes: tuple[TensorChange, ...]
    proof: VerifyReport | None = None
    unproven: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: `loraweld report --json`."""
        changes = [asdict(change) | {"shape": list(change.shape)} for change in self.changes]
        proof = self.proof.to_json() if self.proof else {}
        return {
            "page": str(self.page),
            "bytes": self.num_bytes,
            "reason": self.reason or None,
            "changes": changes,
            "unproven": self.unproven or None,
            "proof": {key: value for key, value in proof.items() if key not in ("tensors", "seconds")} or None,
        }

    def lines(self) -> list[str]:
        """Return what was done, for a person."""
        changed = sum(bool(change.relative_change) for change in self.changes)
        what = f"note: not compared. {self.reason}" if self.reason else f"changed tensors: {changed}"
        told = self.proof.lines() if self.proof else [f"note: retention is not known. {self.unproven}"]
        return [f"{self.page}: {human_bytes(self.num_bytes)}", what, *told]


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
    adapter: PathLike | Sequence[PathLike] = (),
    run: PathLike | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[_Work], None] = lambda work: None,
    **options: Any,
) -> PageReport:
    """Write one HTML page, which needs no network, on what a merge made: from what, how much each tensor changed, and
    how much of the adapter's change is left in it.

    Args:
        model: the output of a merge, a folder, a Hub id or a URL.
        output: the file for the page.
        base: the base that it was merged into, a folder, a Hub id or a URL; None looks for the one that the record
            names in the Hub's cache, beside the model and in the current folder. Without one the page shows what the
            record has.
        adapter: the adapter that was merged, or several, in order; () looks for those that the record names, beside the
            model and in the current folder. With them all is compared with base + adapter, as `verify` does.
        run: the file with what `loraweld merge --json` printed, for the time it took.
        overwrite: replace a file that exists.
        token: of the Hub; True or None: the stored login.
        progress: called with the number of bytes that were compared.
        on_plan: called with the work before it begins.
        options: how the adapters were merged, where that is not in loraweld.json, as for `verify`.

    Raises:
        LoraweldError: something the user can fix; `output` is as it was.
    """
    page = free_place(output, overwrite=overwrite)
    given = Given(
        base=base,
        adapters=[adapter] if isinstance(adapter, str | os.PathLike) else list(adapter),
        options=options if token is None else options | {"token": token},
    )
    with _readable():
        facts = gather_page_facts(os.fspath(model), base=None if base is None else os.fspath(base), token=token)
        ran = read_run(Path(run), facts.record) if run is not None else None
        facts, proof, changes = _numbers(facts, given, progress or (lambda count: None), on_plan)
    if ran is not None:
        changes = tuple(ran.add_to(change) for change in changes)
    write_page(page, render(facts, changes, proof=proof, run=ran))
    return PageReport(
        page=page,
        num_bytes=page.stat().st_size,
        reason=facts.reason,
        changes=changes,
        proof=proof.report,
        unproven=proof.reason,
    )


@contextmanager
def _readable() -> Iterator[None]:
    """A name too long, a folder that may not be read."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{str(error.filename)[:200]}: {error.strerror}") from None


def _numbers(
    facts: PageFacts, given: Given, progress: Progress, on_plan: Callable[[_Work], None]
) -> tuple[PageFacts, Proof, tuple[TensorChange, ...]]:
    """Compare with base + adapters where they are at hand, and all else with the base."""
    model = facts.model
    if model is None:
        return facts, Proof(reason=facts.reason), ()
    on_plan(_Work([_Weight(source.stored_bytes) for source in model.tensors.values()]))
    proof = prove(facts, given, progress)
    known: dict[str, TensorChange] = {}
    if proof.report is not None:
        facts = replace(facts, base=proof.base, reason="")  # the base as planned: with its layers repeated, say
        known, progress = proven(proof.report, model), lambda count: None
    if facts.base is None:
        return facts, proof, unmeasured(model)
    from loraweld.page.measure import measure  # torch, which a page without numbers does without

    return facts, proof, measure(facts.base, model, progress, known=known)
