"""Heatmaps: a score for every head of a model, and what heads attend to.

Red and blue on white are told apart by colour-blind readers too; backgrounds are light.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from tl_entity._typing import checked
from tl_entity.heads import Head
from tl_entity.plots.score_maps import IMPORTANT_TO_HARMFUL, colour_bar
from tl_entity.plots.score_maps import colour_limit as colour_limit
from tl_entity.plots.score_maps import shared_limits as shared_limits
from tl_entity.plots.style import INK, STYLE, UNREACHABLE

SHADES = [[0.0, "#ffffff"], [0.5, "#6baed6"], [1.0, "#08306b"]]
"""Colours of weights from 0 to 1."""

MOST_TICKS = 12

MOST_COLUMNS_WRITTEN = 16
"""Tables of more columns have no numbers in their cells."""

_PANELS_A_ROW = 2

_GAP = 100  # between rows of panels: room for the axis above and the title below, in pixels


@checked
@dataclass(frozen=True)
class HeadMap:
    """A score for every head of a model, and what is to be marked in it.

    Attributes:
        title: what is seen; empty where it is said beside the figure.
        scores: low is important; 0 is no effect.
        intervals: lower and upper bound of each score.
        chosen: heads outlined.
        known: heads known to matter, marked by a dot.
        elsewhere: heads chosen that belong to another group, outlined by dashes.
        top_layer: heads in this layer and above are hatched, as they cannot reach the receivers.
        metric: what the scores are, for the colour bar.
        bound: where colours are darkest at most; None for the largest score there is.
    """

    title: str
    scores: Float[np.ndarray, "layer head"]
    intervals: Float[np.ndarray, "layer head 2"] | None = None
    chosen: tuple[Head, ...] = ()
    known: tuple[Head, ...] = ()
    elsewhere: tuple[Head, ...] = ()
    top_layer: int | None = None
    metric: str = "score"
    bound: float | None = 1.0


@checked
def head_heatmap(panel: HeadMap, *, limit: float | None = None) -> go.Figure:
    """Layer by head, the first layer at the bottom.

    Args:
        panel: what to show.
        limit: the score at which colours are darkest, in both directions; see `colour_limit`.
    """
    layers, heads = panel.scores.shape
    figure = go.Figure()
    _add_panel(figure, panel, limit or colour_limit([panel]), {})
    figure.update_layout(
        template=STYLE,
        title_text=panel.title,
        height=_panel_height(layers, heads) + (110 if panel.title else 75),
        margin={"l": 55, "r": 10, "t": 50 if panel.title else 15, "b": 50},
        showlegend=False,
    )
    return figure


@checked
def stage_heatmaps(
    panels: Sequence[HeadMap], *, title: str, limits: Sequence[float] | None = None
) -> go.Figure:
    """Small multiples, such as the stages of a discovery.

    Args:
        panels: what to show; two a row.
        title: above all.
        limits: each panel's colour limit. Left out, the panels share one, unless their own differ
            so much that a shared one would leave some of them blank.
    """
    limits = list(limits) if limits is not None else shared_limits([[panel] for panel in panels])
    columns = min(_PANELS_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    one_scale = len(set(limits)) == 1
    layers, heads = panels[0].scores.shape
    panel_height = _panel_height(layers, heads)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[panel.title for panel in panels],
        horizontal_spacing=0.1 if one_scale else 0.16,
        vertical_spacing=_GAP / (rows * panel_height + (rows - 1) * _GAP),
    )
    for index, (panel, limit) in enumerate(zip(panels, limits, strict=True)):
        row, column = index // columns + 1, index % columns + 1
        if one_scale:
            bar = {"x": 1.05} if index == 0 else None
        else:
            axes: Any = figure.get_subplot(row, column)
            (_, right), (low, high) = axes.xaxis.domain, axes.yaxis.domain
            bar = {"x": right + 0.005, "y": (low + high) / 2, "len": high - low}
        _add_panel(figure, panel, limit, bar, row=row, col=column)
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=rows * panel_height + (rows - 1) * _GAP + 150,
        margin={"l": 60, "r": 20, "t": 90, "b": 60},
        showlegend=False,
    )
    figure.update_annotations(font_size=13)
    return figure


@checked
def attention_heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    weights: Float[np.ndarray, "row column"],
    *,
    title: str,
) -> go.Figure:
    """Mean attention weight of heads (rows) on named positions (columns); NaN leaves a gap."""
    return share_heatmap(rows, columns, weights, title=title, name="weight", joint="to ")


@checked
def share_heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Float[np.ndarray, "row column"],
    *,
    title: str,
    name: str,
    joint: str = "",
) -> go.Figure:
    """Shares from 0 to 1 as a table of shaded cells, read from top to bottom; NaN leaves a gap.

    Args:
        rows: names of the rows.
        columns: names of the columns.
        shares: the shares.
        title: above all.
        name: what the shares are.
        joint: what stands ahead of a column's name in a sentence with its row's.
    """
    if not rows:
        figure = go.Figure()
        figure.update_layout(
            template=STYLE,
            title_text=title,
            height=220,
            margin={"l": 60, "r": 20, "t": 50, "b": 40},
        )
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False)
        return figure.add_annotation(text="there are none", showarrow=False)
    few = len(rows) <= 40 and len(columns) <= MOST_COLUMNS_WRITTEN
    text = [["" if math.isnan(w) else f"{w:.2f}" for w in row] for row in shares.tolist()]
    figure = go.Figure(
        go.Heatmap(
            z=shares[::-1],
            x=list(columns),
            y=list(range(len(rows))),
            zmin=0,
            zmax=1,
            colorscale=SHADES,
            xgap=1,
            ygap=1,
            text=text[::-1],
            texttemplate="%{text}" if few else None,
            customdata=[[row] * len(columns) for row in rows][::-1],
            hovertemplate="%{customdata}<br>" + joint + "%{x}: %{z:.3f}<extra></extra>",
            hoverongaps=False,
            colorbar={"title": {"text": name}, "thickness": 12},
        )
    )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        # Many columns have their names written aslant, which takes room below.
        height=max(220, (110 if len(columns) <= 8 else 190) + (24 if few else 14) * len(rows)),
        margin={"l": 60, "r": 20, "t": 50, "b": 40},
        plot_bgcolor="#f3f4f6",
    )
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=list(rows)[::-1], showgrid=False)
    return figure


def _add_panel(
    figure: go.Figure,
    panel: HeadMap,
    limit: float,
    bar: dict[str, Any] | None,
    **place: Any,
) -> None:
    layers, heads = panel.scores.shape
    figure.add_trace(
        go.Heatmap(
            z=panel.scores,
            zmin=-limit,
            zmax=limit,
            colorscale=IMPORTANT_TO_HARMFUL,
            customdata=_hover(panel),
            hovertemplate="%{customdata}<extra></extra>",
            showscale=bar is not None,
            colorbar={**colour_bar(panel.metric), **(bar or {})},
            xgap=1 if heads <= 32 else 0,
            ygap=1 if layers <= 32 else 0,
            name="scores",
        ),
        **place,
    )
    _add_unreachable(figure, panel, place)
    _add_marks(figure, panel, place)
    # Seen in the gaps between cells, as a grid.
    figure.update_layout(plot_bgcolor="#e4e7eb")
    figure.update_xaxes(
        title_text="head",
        title_standoff=4,
        range=[-0.5, heads - 0.5],
        dtick=_tick_step(heads),
        constrain="domain",
        showline=True,
        mirror=True,
        linecolor=UNREACHABLE,
        **place,
    )
    figure.update_yaxes(
        title_text="layer",
        title_standoff=4,
        range=[-0.5, layers - 0.5],
        dtick=_tick_step(layers),
        showgrid=False,
        showline=True,
        mirror=True,
        linecolor=UNREACHABLE,
        **place,
    )


def _add_unreachable(figure: go.Figure, panel: HeadMap, place: dict[str, Any]) -> None:
    """Hatches over the layers that cannot reach the receivers."""
    layers, heads = panel.scores.shape
    if panel.top_layer is not None and panel.top_layer < layers:
        low, high = panel.top_layer - 0.5, layers - 0.5
        figure.add_trace(
            go.Scatter(
                x=[-0.5, heads - 0.5, heads - 0.5, -0.5, -0.5],
                y=[low, low, high, high, low],
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillpattern={
                    "shape": "/",
                    "fgcolor": UNREACHABLE,
                    "bgcolor": "#f7f8fa",
                    "fillmode": "replace",
                    "size": 7,
                    "solidity": 0.25,
                },
                hoverinfo="skip",
                showlegend=False,
                name="cannot reach",
            ),
            **place,
        )


def _add_marks(figure: go.Figure, panel: HeadMap, place: dict[str, Any]) -> None:
    """Outlines of the heads chosen, dots on those known."""
    heads = panel.scores.shape[1]
    for name, some, dash in (
        ("chosen", panel.chosen, "solid"),
        ("chosen, in another group", panel.elsewhere, "dot"),
    ):
        if some:
            width = 2.5 if heads <= 32 else 1.5
            outlines = _outlines(some, {"color": "#000000", "width": width, "dash": dash}, name)
            figure.add_trace(outlines, **place)
    if panel.known:
        figure.add_trace(
            go.Scatter(
                x=[head.head for head in panel.known],
                y=[head.layer for head in panel.known],
                mode="markers",
                # Seen on pale and on dark cells.
                marker={
                    "size": 8 if heads <= 32 else 5,
                    "color": "white",
                    "line": {"color": INK, "width": 1.5},
                },
                hoverinfo="skip",
                showlegend=False,
                name="known",
            ),
            **place,
        )


def _outlines(heads: Sequence[Head], line: dict[str, Any], name: str) -> go.Scatter:
    """A square round each head, drawn in the units of the axes so that it fits at every size."""
    x: list[float | None] = []
    y: list[float | None] = []
    for head in heads:
        left, right, low, high = (
            head.head - 0.5,
            head.head + 0.5,
            head.layer - 0.5,
            head.layer + 0.5,
        )
        x += [left, right, right, left, left, None]
        y += [low, low, high, high, low, None]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line=line,
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
        name=name,
    )


def _hover(panel: HeadMap) -> list[list[str]]:
    layers, heads = panel.scores.shape
    texts = []
    for layer in range(layers):
        row = []
        for index in range(heads):
            head = Head(layer, index)
            lines = [f"<b>{head}</b>", f"{panel.metric} {panel.scores[layer, index]:+.4f}"]
            if panel.top_layer is not None and layer >= panel.top_layer:
                lines = [lines[0], "cannot reach the receivers: 0"]
            elif panel.intervals is not None:
                low, high = panel.intervals[layer, index]
                lines.append(f"95 % interval {low:+.4f} to {high:+.4f}")
            lines += ["chosen"] * (head in panel.chosen) + ["planted"] * (head in panel.known)
            lines += ["chosen, belongs to another group"] * (head in panel.elsewhere)
            row.append("<br>".join(lines))
        texts.append(row)
    return texts


def _panel_height(layers: int, heads: int) -> float:
    cell = min(34.0, max(7.0, 400 / heads))
    return min(620.0, max(150.0, layers * cell))


def _tick_step(count: int) -> int:
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100) if count / step <= MOST_TICKS)
