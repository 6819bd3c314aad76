"""Two models → the page on how they differ."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

from loraweld.checkpoint.base import Base
from loraweld.naming.places import places
from loraweld.page.changes import TensorChange
from loraweld.page.facts import gather_compared
from loraweld.page.measure import told
from loraweld.page.page_file import free_place, write_page
from loraweld.page.render import render
from loraweld.request import PathLike
from loraweld.verification.compare import CompareReport, TensorDifference, compare

_SHOWN = 20


def compare_page(
    first: PathLike, second: PathLike, *, output: PathLike = "compare.html", overwrite: bool = False
) -> CompareReport:
    """Compare two models as `loraweld.compare` does, and write one HTML page on it, as `loraweld.report_page` does.

    Args:
        first: a folder or a Hub id; it takes the place of the base.
        second: a folder or a Hub id.
        output: the file for the page.
        overwrite: replace a file that exists.

    Raises:
        LoraweldError: something the user can fix; `output` is as it was.
    """
    page = free_place(output, overwrite=overwrite)
    report = compare(first, second)
    facts = gather_compared(os.fspath(first), os.fspath(second))
    changes = tuple(_changes(report, facts.model)) if facts.model is not None else ()
    warnings = (*_names("missing in the second model", report.missing), *_names("not in the first", report.extra))
    write_page(page, render(replace(facts, warnings=warnings), changes))
    return report


def _changes(report: CompareReport, model: Base) -> Iterator[TensorChange]:
    where, extra = places(list(model.tensors)), set(report.extra)
    differing = {one.tensor: one for one in report.differing}
    for name, source in model.tensors.items():
        new = TensorDifference(tensor=name, what="not in the first") if name in extra else None
        found = differing.get(name, new)
        change = told(name, where[name], source, found)
        yield replace(change, largest=found.largest, alike=found.cosine) if found is not None else change


def _names(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} tensors are {what}: {', '.join(names[:_SHOWN])}{more}"]
