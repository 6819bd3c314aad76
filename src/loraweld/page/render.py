"""Values → HTML. All text goes through the template, which escapes it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from typing import Any

from loraweld._version import __version__
from loraweld.errors import RequestError
from loraweld.page.changes import TensorChange, in_order, percent
from loraweld.page.facts import PageFacts
from loraweld.report import human_bytes

_TEMPLATE = "page.html.jinja"


def check_installed() -> None:
    """Return if what draws the page is there.

    Raises:
        RequestError: it is not.
    """
    missing = [name for name in ("plotly", "jinja2") if find_spec(name) is None]
    if missing:
        raise RequestError(f"a report needs {' and '.join(missing)}: pip install 'loraweld[report]'")


def render(facts: PageFacts, changes: Sequence[TensorChange]) -> str:
    """Return the page: one file, everything in it.

    Raises:
        RequestError: plotly or jinja2 is not installed.
    """
    check_installed()
    from jinja2 import Environment, StrictUndefined

    from loraweld.page.charts import heat_map, histogram, plotly_script

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": human_bytes, "percent": percent}
    template = environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    changes = in_order(changes)
    charts = {"map": heat_map(changes), "histogram": histogram(changes)}
    return template.render(
        title=facts.title,
        version=__version__,
        summary=list(_summary(facts)),
        has_record=bool(facts.record),
        adapters=list(_adapters(facts.record)),
        acted=list(_acted(facts.record)),
        files=facts.files,
        total=sum(file.num_bytes for file in facts.files),
        reason=facts.reason,
        notes=[*facts.warnings, *map(str, facts.record.get("notes") or ())],
        changes=changes,
        figures=list(_figures(changes)),
        shows_codes=any(change.kept is not None or change.error is not None for change in changes),
        charts=charts,
        plotly=plotly_script() if any(charts.values()) else "",
    )


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
    if record.get("recipes"):
        yield "Tensors", ", ".join(f"{count} {kind}" for kind, count in record["recipes"].items())
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
