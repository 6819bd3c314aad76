"""The two charts of the page, as HTML that holds its data; plotly draws them in the browser."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from loraweld.page.changes import Cell, TensorChange, cells, percent

_ROW_PX, _MARGINS_PX, _LEAST_PX, _MOST_PX = 17, 190, 340, 1600
_CONFIG: dict[str, Any] = {"displaylogo": False, "displayModeBar": False, "responsive": True}
# Mid tones, which stand out from white and from black; the page's style colours text and lines.
_CLEAR = "rgba(0,0,0,0)"
_BAR = "#2f7fd1"
_HOVER = {"bgcolor": "#1b2733", "bordercolor": "#1b2733", "font": {"color": "#ffffff"}}
_SCALE = "Viridis"
_COLORBAR = {
    "orientation": "h",
    "thickness": 12,
    "tickformat": ".2~%",
    "title": {"text": "relative change", "side": "top"},
    "x": 0.5,
    "y": 1,
    "yanchor": "bottom",
    "ypad": 8,
}
_NUM_BINS = 40


def plotly_script() -> str:
    """Return the JavaScript of plotly, to be put into the page once."""
    return str(get_plotlyjs())


def heat_map(changes: Sequence[TensorChange]) -> str | None:
    """Return the map of layers and modules; None if no tensor of a layer was measured."""
    found = cells(changes)
    if not found:
        return None
    kinds = list(dict.fromkeys(cell.kind for cell in found))
    layers = sorted({cell.layer for cell in found})
    by_place = {(cell.layer, cell.kind): cell for cell in found}
    rows = [[by_place.get((layer, kind)) for kind in kinds] for layer in layers]
    figure = go.Figure(
        go.Heatmap(
            z=[[cell.largest if cell else None for cell in row] for row in rows],
            x=[html.escape(kind) for kind in kinds],
            y=layers,
            customdata=[[_hover(cell) if cell else "" for cell in row] for row in rows],
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=_SCALE,
            zmin=0,
            xgap=1,
            ygap=1,
            colorbar=_COLORBAR,
        )
    )
    height = min(_MOST_PX, max(_LEAST_PX, len(layers) * _ROW_PX + _MARGINS_PX))
    figure.update_xaxes(tickangle=-45, automargin=True, showgrid=False)
    figure.update_yaxes(title="layer", autorange="reversed", automargin=True, showgrid=False, zeroline=False)
    return _drawn(figure, "heat-map", height)


def histogram(changes: Sequence[TensorChange]) -> str | None:
    """Return how many tensors changed by how much; None if none of them did."""
    values = [change.relative_change for change in changes if change.relative_change]
    if not values:
        return None
    figure = go.Figure(
        go.Histogram(
            x=values,
            nbinsx=_NUM_BINS,
            marker={"color": _BAR},
            hovertemplate="%{y} tensors at %{x}<extra></extra>",
        )
    )
    figure.update_layout(bargap=0.05)
    figure.update_xaxes(title="relative change", tickformat=".2~%", automargin=True, showgrid=False)
    figure.update_yaxes(title="tensors", automargin=True, rangemode="tozero", gridcolor="rgba(128,128,128,0.3)")
    return _drawn(figure, "histogram", _LEAST_PX)


def _hover(cell: Cell) -> str:
    """What plotly shows of a cell: it reads a few HTML tags, so that names are escaped."""
    lines = [f"<b>{html.escape(cell.tensor)}</b>", f"relative change {percent(cell.largest)}"]
    if cell.num_tensors > 1:
        lines.append(f"the largest of {cell.num_tensors} tensors")
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
