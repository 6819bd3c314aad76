"""The two charts of the page, as HTML that holds its data; plotly draws them in the browser.

Each has a trace for every measure, of which one is seen; the page's script shows another.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from loraweld.page.changes import Cell, Measure, TensorChange, cells, measures

_ROW_PX, _MARGINS_PX, _LEAST_PX, _MOST_PX = 17, 190, 340, 1600
_CONFIG: dict[str, Any] = {"displaylogo": False, "displayModeBar": False, "responsive": True}
# Mid tones, which stand out from white and from black; the page's style colours text and lines.
_CLEAR = "rgba(0,0,0,0)"
_BAR = "#2f7fd1"
_HOVER = {"bgcolor": "#1b2733", "bordercolor": "#1b2733", "font": {"color": "#ffffff"}, "align": "left"}
_SCALE = "Viridis"
_COLORBAR = {"orientation": "h", "thickness": 12, "x": 0.5, "y": 1, "yanchor": "bottom", "ypad": 8}
_NUM_BINS = 40


def plotly_script() -> str:
    """Return the JavaScript of plotly, to be put into the page once."""
    return str(get_plotlyjs())


def heat_map(changes: Sequence[TensorChange]) -> str | None:
    """Return the map of layers and modules; None if no tensor of a layer was measured."""
    known = measures(changes)
    found = {measure.key: cells(changes, measure) for measure in known}
    everywhere = [cell for of_measure in found.values() for cell in of_measure]
    if not everywhere:
        return None
    kinds = list(dict.fromkeys(cell.kind for cell in everywhere))
    layers = sorted({cell.layer for cell in everywhere})
    traces = [_map(measure, found[measure.key], kinds, layers, known) for measure in known]
    _show_first(traces)
    figure = go.Figure(traces)
    height = min(_MOST_PX, max(_LEAST_PX, len(layers) * _ROW_PX + _MARGINS_PX))
    figure.update_xaxes(tickangle=-45, automargin=True, showgrid=False)
    figure.update_yaxes(title="layer", autorange="reversed", automargin=True, showgrid=False, zeroline=False)
    return _drawn(figure, "heat-map", height)


def _map(
    measure: Measure, found: Sequence[Cell], kinds: Sequence[str], layers: Sequence[int], known: Sequence[Measure]
) -> go.Heatmap:
    by_place = {(cell.layer, cell.kind): cell for cell in found}
    rows = [[by_place.get((layer, kind)) for kind in kinds] for layer in layers]
    values = [cell.value for cell in found]
    return go.Heatmap(
        meta=measure.key,
        z=[[cell.value if cell else None for cell in row] for row in rows],
        x=[html.escape(kind) for kind in kinds],
        y=list(layers),
        customdata=[[_hover(cell, measure, known) if cell else "" for cell in row] for row in rows],
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=_SCALE,
        zmin=min([0.0, *values]),
        zmax=measure.top or max(values, default=0.0) or 1.0,
        xgap=1,
        ygap=1,
        colorbar={
            **_COLORBAR,
            "tickformat": measure.tick_format,
            "title": {"text": measure.label.lower(), "side": "top"},
        },
    )


def histogram(changes: Sequence[TensorChange]) -> str | None:
    """Return how many tensors have which value, of those that were to change; None if none was."""
    touched = [change for change in changes if change.is_touched]
    known = measures(touched)
    if not known:
        return None
    traces = [
        go.Histogram(
            meta=measure.key,
            x=[value for change in touched if (value := measure.of(change)) is not None],
            nbinsx=_NUM_BINS,
            marker={"color": _BAR},
            hovertemplate="%{y} tensors at %{x}<extra></extra>",
        )
        for measure in known
    ]
    _show_first(traces)
    figure = go.Figure(traces)
    figure.update_layout(bargap=0.05)
    first = known[0]
    figure.update_xaxes(title=first.label.lower(), tickformat=first.tick_format, automargin=True, showgrid=False)
    figure.update_yaxes(title="tensors", automargin=True, rangemode="tozero", gridcolor="rgba(128,128,128,0.3)")
    return _drawn(figure, "histogram", _LEAST_PX)


def _show_first(traces: Sequence[Any]) -> None:
    for number, trace in enumerate(traces):
        trace.visible, trace.showlegend = number == 0, False


def _hover(cell: Cell, measure: Measure, known: Sequence[Measure]) -> str:
    """What plotly shows of a cell: it reads a few HTML tags, so that names are escaped."""
    lines = [f"<b>{html.escape(cell.change.tensor)}</b>"]
    for one in (measure, *(other for other in known if other is not measure)):
        value = one.of(cell.change)
        if value is not None:
            lines.append(f"{one.label.lower()} {one.show(value)}")
    if cell.num_tensors > 1:
        lines.insert(1, f"the worst of {cell.num_tensors} tensors")
    return "<br>".join(lines)


def _drawn(figure: go.Figure, name: str, height: int) -> str:
    figure.update_layout(
        template="none",
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        hoverlabel=_HOVER,
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 50, "r": 10, "t": 20, "b": 50},
        height=height,
        dragmode=False,
    )
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG, div_id=name))
