"""Values → HTML. All text goes through the template, which escapes it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from typing import Any

from loraweld._version import __version__
from loraweld.errors import RequestError
from loraweld.page.changes import TensorChange, in_order, measures
from loraweld.page.facts import PageFacts, base_name
from loraweld.page.proof import Proof
from loraweld.page.run_file import Run
from loraweld.report import human_bytes
from loraweld.verification.findings import VerifyReport

_TEMPLATE = "page.html.jinja"
_WARNING = "WARNING: "


def check_installed() -> None:
    """Return if what draws the page is there.

    Raises:
        RequestError: it is not.
    """
    missing = [name for name in ("plotly", "jinja2") if find_spec(name) is None]
    if missing:
        raise RequestError(f"a report needs {' and '.join(missing)}: pip install 'loraweld[report]'")


def render(
    facts: PageFacts, changes: Sequence[TensorChange], *, proof: Proof | None = None, run: Run | None = None
) -> str:
    """Return the page: one file, everything in it.

    Raises:
        RequestError: plotly or jinja2 is not installed.
    """
    check_installed()
    from jinja2 import Environment, StrictUndefined

    from loraweld.page.charts import heat_map, histogram, plotly_script

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": human_bytes}
    template = environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    changes = in_order(changes)
    charts = {"map": heat_map(changes), "histogram": histogram(changes)}
    report = proof.report if proof else None
    notes = _notes(facts, report, run)
    return template.render(
        heading=facts.heading,
        version=__version__,
        summary=list(_summary(facts)),
        has_record=bool(facts.record),
        is_of_unknown_origin=not (facts.record or report or facts.is_comparison),
        adapters=list(_adapters(facts.record)),
        acted=list(_acted(facts.record)),
        plan=list(_plan(facts)),
        run=list(_run(run)) if run else [],
        files=facts.files,
        total=sum(file.num_bytes for file in facts.files),
        against="the first model" if facts.is_comparison else "the base",
        reason=facts.reason,
        unproven=proof.reason if proof else "",
        verdict=_verdict(report, facts) if report else "",
        findings=[str(finding) for finding in report.findings] if report else [],
        warnings=[note.removeprefix(_WARNING) for note in notes if note.startswith(_WARNING)],
        notes=[note for note in notes if not note.startswith(_WARNING)],
        changes=changes,
        measures=measures(changes),
        figures=[*_figures(changes), *(_proof_figures(report) if report else ())],
        charts=charts,
        plotly=plotly_script() if any(charts.values()) else "",
    )


def _notes(facts: PageFacts, report: VerifyReport | None, run: Run | None) -> list[str]:
    """What verification, the search for the base, the record and the run have to say, each once."""
    recorded = map(str, facts.record.get("notes") or ())
    return list(
        dict.fromkeys([*(report.notes if report else ()), *facts.warnings, *recorded, *(run.notes if run else ())])
    )


def _verdict(report: VerifyReport, facts: PageFacts) -> str:
    """Whether all is as it should be."""
    compared = f"{len(report.tensors)} tensors were compared with float64, {report.equal} have the bytes of the base"
    base = facts.found or facts.base
    inputs = " + ".join([base_name(base) if base else report.base, *report.adapters])
    if report.holds:
        return f"The model is {inputs}, rounded or encoded: {compared}."
    known = "as far as loraweld.json and the options given here say how they were merged"
    return f"The model is not {inputs}, {known}: {compared}."


def _plan(facts: PageFacts) -> Iterator[tuple[str, str]]:
    """What the merge had to do: from the record, and from the files."""
    recipes = facts.record.get("recipes") or {}
    if recipes:
        yield "Tensors", ", ".join(f"{count} {kind}" for kind, count in recipes.items())
    if facts.record.get("modules"):
        yield "Changes of modules", str(len(facts.record["modules"]))
    yield "Files", f"{len(facts.files)}, {human_bytes(sum(file.num_bytes for file in facts.files))}"


def _run(run: Run) -> Iterator[tuple[str, str]]:
    """How long it took."""
    if run.was_there:
        yield "Run", "the output was there already and was compared, byte by byte"
    yield "Time", f"{run.seconds:.1f} s"
    if not run.was_there:
        rate = human_bytes(int(run.bytes_written / max(run.seconds, 1e-9)))
        yield "Written", f"{human_bytes(run.bytes_written)}, {rate}/s"
    if run.resumed_bytes:
        yield "Finished by an earlier run", human_bytes(run.resumed_bytes)


def _summary(facts: PageFacts) -> Iterator[tuple[str, str]]:
    """What was merged, one fact a line."""
    record = facts.record
    base = record.get("base") or {}
    if base:
        yield "Base", str(base.get("name"))
        if base.get("commit"):
            yield "Commit of the base", str(base["commit"])
    yield from (
        (label, str(record[key]))
        for label, key in (
            ("Save method", "save_method"),
            ("Dtype", "dtype"),
            ("Made by loraweld", "loraweld_version"),
            ("Fingerprint of the plan", "fingerprint"),
        )
        if record.get(key)
    )
    if record.get("gguf_types"):
        yield "GGUF types", ", ".join(map(str, record["gguf_types"]))
    if record.get("combination"):
        yield "Combination", ", ".join(f"{key} {value}" for key, value in record["combination"].items())
    yield from ((f"Header of {name}", str(digest)) for name, digest in (base.get("headers_sha256") or {}).items())


def _adapters(record: Mapping[str, Any]) -> Iterator[Mapping[str, str]]:
    given = (record.get("combination") or {}).get("weights")
    weights = given if isinstance(given, list) else []
    for index, adapter in enumerate(record.get("adapters") or ()):
        yield {
            "name": str(adapter.get("name")),
            "weight": str(weights[index]) if index < len(weights) else "1",
            "sha256": str(adapter.get("sha256")),
            "config_sha256": str(adapter.get("config_sha256")),
        }


def _acted(record: Mapping[str, Any]) -> Iterator[Mapping[str, object]]:
    """What each adapter did, and to how many modules of which name."""
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for line in record.get("modules") or ():
        counts = groups.setdefault((str(line.get("adapter")), str(line.get("what"))), {})
        name = str(line.get("module") or line.get("tensor")).rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
    for (adapter, what), counts in groups.items():
        modules = ", ".join(f"{name} × {count}" for name, count in counts.items())
        yield {"adapter": adapter, "what": what, "modules": modules}


def _figures(changes: Sequence[TensorChange]) -> Iterator[tuple[str, str, str]]:
    """The middle and the ends of what was measured: what it is, the number, where."""
    measured = [(change.relative_change, change.tensor) for change in changes if change.relative_change is not None]
    if not measured:
        return
    changed = sorted(pair for pair in measured if pair[0])
    yield "Tensors compared", str(len(measured)), ""
    yield "Changed", str(len(changed)), ""
    if changed:
        yield "Median change of those", f"{statistics.median(size for size, _ in changed):.3%}", ""
        yield "Largest change", f"{changed[-1][0]:.3%}", changed[-1][1]


def _proof_figures(report: VerifyReport) -> Iterator[tuple[str, str, str]]:
    """What is left of the change of all weights together."""
    left = report.total
    if left is None:
        return
    yield "Kept of the change", f"{left.kept:.2%}", "all weights together"
    yield "Error of the change", f"{left.error:.2%}", "all weights together"
    if left.lost is not None:
        yield "Rounded away", f"{left.lost:.2%}", "of the elements with a change"
    yield "Cosine", f"{left.cosine:.6f}", "of stored and intended change"
