"""Where a gain lies in the weights, how far grafts carry it, and what is made below a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from tl_entity._typing import checked
from tl_entity.plots.bars import Bar, add_level
from tl_entity.plots.heatmaps import IMPORTANT_TO_HARMFUL
from tl_entity.plots.style import FAINT, INK, SERIES_COLOURS, STYLE

MOST_TICKS = 16
"""An axis with no more values than these has each of them written."""


@checked
@dataclass(frozen=True)
class ShareMap:
    """Shares of the gain by layer and head, or by layer and part.

    Attributes:
        title: what is seen.
        columns: names of the heads or parts.
        shares: NaN where nothing changed.
    """

    title: str
    columns: tuple[str, ...]
    shares: Float[np.ndarray, "layer column"]


@checked
@dataclass(frozen=True)
class Line:
    """Values along an axis, with their intervals.

    Attributes:
        name: what they are.
        x: where.
        bars: value and interval at each.
        dashed: draw it dashed.
        faint: a control, drawn in the background.
        colour: names lines of one colour; its own name if left out.
    """

    name: str
    x: tuple[float, ...]
    bars: tuple[Bar, ...]
    dashed: bool = False
    faint: bool = False
    colour: str | None = None


@checked
def share_maps(maps: Sequence[ShareMap], *, title: str) -> go.Figure:
    """Maps side by side in one scale, the first layer at the bottom; blue brings the gain, red
    costs it, grey did not change."""
    figure = make_subplots(
        rows=1,
        cols=max(1, len(maps)),
        subplot_titles=[panel.title for panel in maps],
        shared_yaxes=True,
        # At least a few columns wide, so that the title above has room.
        column_widths=[max(3, len(panel.columns)) for panel in maps] or None,
        horizontal_spacing=0.03,
    )
    limit = max((float(np.nanmax(np.abs(m.shares), initial=0.0)) for m in maps), default=0.0) or 1.0
    n_layers = max((len(panel.shares) for panel in maps), default=1)
    for index, panel in enumerate(maps):
        figure.add_trace(
            go.Heatmap(
                z=panel.shares,
                x=list(panel.columns),
                y=list(range(len(panel.shares))),
                zmin=-limit,
                zmax=limit,
                colorscale=IMPORTANT_TO_HARMFUL,
                showscale=index == 0,
                colorbar={"title": {"text": "share"}, "thickness": 12, "tickformat": ".2~g"},
                hovertemplate="layer %{y}, " + panel.title + " %{x}: %{z:+.4f}<extra></extra>",
                hoverongaps=False,
                xgap=1 if len(panel.columns) <= 32 else 0,
                ygap=1 if n_layers <= 32 else 0,
                name=panel.title,
            ),
            row=1,
            col=index + 1,
        )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=min(720, max(260, 18 * n_layers + 150)),
        margin={"l": 60, "r": 20, "t": 90, "b": 50},
        plot_bgcolor="#e4e7eb",
        showlegend=False,
    )
    figure.update_xaxes(type="category", tickangle=0)
    figure.update_yaxes(showgrid=False, dtick=1 if n_layers <= 12 else 4)
    figure.update_yaxes(title_text="layer", col=1)
    figure.update_annotations(font_size=13)
    return figure


@checked
def adding_bars(parts: Mapping[str, Bar], whole: Bar, *, title: str, axis: str) -> go.Figure:
    """Parts that add up: each begins where the one before ends, and the whole stands beside them.

    Args:
        parts: by name, in the order drawn.
        whole: what they add up to.
        title: above all.
        axis: what is measured.
    """
    names, bars = [*parts, "gain"], [*parts.values(), whole]
    values = [bar.value for bar in bars]
    # The whole stands on the ground.
    starts = [0.0, *np.cumsum(values[:-1])[:-1].tolist(), 0.0] if parts else [0.0]
    gains, costs = SERIES_COLOURS[0], SERIES_COLOURS[1]
    figure = go.Figure(
        go.Bar(
            x=names,
            y=values,
            base=starts,
            marker_color=[gains if value >= 0 else costs for value in values[:-1]] + [INK],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [bar.high - bar.value for bar in bars],
                "arrayminus": [bar.value - bar.low for bar in bars],
                "thickness": 1.5,
                "width": 4,
                "color": FAINT,
            },
            customdata=[f"{b.value:+.4f} [{b.low:+.4f}, {b.high:+.4f}]" for b in bars],
            hovertemplate="%{x}<br>%{customdata}<extra></extra>",
            name="share",
        )
    )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=380,
        margin={"l": 60, "r": 20, "t": 60, "b": 60},
        showlegend=False,
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text=axis)
    return figure


@checked
def lines(
    found: Sequence[Line],
    *,
    title: str,
    x_axis: str,
    y_axis: str,
    levels: Mapping[str, Bar] | None = None,
    proportion: bool = False,
    logarithmic: bool = False,
) -> go.Figure:
    """Lines with bands for their 95 % intervals.

    Args:
        found: the lines.
        title: above all.
        x_axis: what stands along the axis.
        y_axis: what is measured.
        levels: what the lines are compared with, drawn across the figure.
        proportion: the values are accuracies, from 0 to 1.
        logarithmic: equal steps of the axis are equal ratios.
    """
    figure = go.Figure()
    named = dict.fromkeys(line.colour or line.name for line in found if not line.faint)
    colours = dict(zip(named, [*SERIES_COLOURS] * len(found), strict=False))
    for line in found:
        _add_line(figure, line, FAINT if line.faint else colours[line.colour or line.name], x_axis)
    for name, level in (levels or {}).items():
        add_level(figure, name, level)
    margin: Any = figure.layout.margin  # type: ignore[attr-defined]
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=420,
        margin={"l": 60, "r": margin.r or 20, "t": 50, "b": 110},
    )
    figure.update_xaxes(title_text=x_axis, type="log" if logarithmic else "linear")
    ticks = sorted({x for line in found for x in line.x})
    if logarithmic or len(ticks) <= MOST_TICKS:
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(title_text=y_axis)
    if proportion:
        figure.update_yaxes(range=[0, 1.02], tickformat=".1f", dtick=0.2)
    return figure


def _add_line(figure: go.Figure, line: Line, colour: str, axis: str) -> None:
    low, high = [bar.low for bar in line.bars], [bar.high for bar in line.bars]
    figure.add_scatter(
        x=[*line.x, *line.x[::-1]],
        y=[*high, *low[::-1]],
        mode="lines",
        fill="toself",
        fillcolor=colour,
        opacity=0.12,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=line.name,
    )
    figure.add_scatter(
        x=list(line.x),
        y=[bar.value for bar in line.bars],
        name=line.name,
        legendgroup=line.name,
        mode="lines+markers",
        line={
            "color": colour,
            "width": 1.5 if line.faint else 2.5,
            "dash": "dash" if line.dashed else "solid",
        },
        marker={"size": 5},
        customdata=[f"{bar.value:.3f} [{bar.low:.3f}, {bar.high:.3f}]" for bar in line.bars],
        hovertemplate=axis + " %{x}<br>%{customdata}<extra>%{fullData.name}</extra>",
    )
