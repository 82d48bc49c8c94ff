"""Curves of accuracy over layers, and the losses of a circuit against those of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from tl_entity._typing import checked
from tl_entity.plots.bars import Bar
from tl_entity.plots.style import FAINT, INK, SERIES_COLOURS, STYLE


@checked
@dataclass(frozen=True)
class Curve:
    """Accuracies by layer.

    Attributes:
        name: what was done.
        bars: accuracy and interval for each layer, from 0 up.
        faint: a control, drawn in the background.
    """

    name: str
    bars: tuple[Bar, ...]
    faint: bool = False


@checked
@dataclass(frozen=True)
class Point:
    """Two losses by one thing.

    Attributes:
        name: what was removed.
        x: accuracy that the whole model loses by it.
        y: accuracy that the circuit loses by it.
        series: what it belongs to, which gives the colour.
    """

    name: str
    x: Bar
    y: Bar
    series: str


@checked
def layer_curves(
    curves: Sequence[Curve], *, title: str, whole: Bar | None = None, axis: str = "first layer"
) -> go.Figure:
    """Accuracy by layer, one line a curve, bands for the 95 % intervals.

    Args:
        curves: the curves.
        title: above all.
        whole: accuracy of the unedited model, as a dashed line.
        axis: what the layers are.
    """
    figure = go.Figure()
    colours = dict(
        zip([c.name for c in curves if not c.faint], [*SERIES_COLOURS] * len(curves), strict=False)
    )
    for curve in curves:
        layers = list(range(len(curve.bars)))
        colour = FAINT if curve.faint else colours[curve.name]
        low, high = [bar.low for bar in curve.bars], [bar.high for bar in curve.bars]
        figure.add_scatter(
            x=[*layers, *layers[::-1]],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=curve.name,
        )
        figure.add_scatter(
            x=layers,
            y=[bar.value for bar in curve.bars],
            name=curve.name,
            legendgroup=curve.name,
            mode="lines+markers",
            line={"color": colour, "width": 1.5 if curve.faint else 2.5},
            marker={"size": 5 if curve.faint else 7},
            customdata=[f"{b.value:.3f} [{b.low:.3f}, {b.high:.3f}]" for b in curve.bars],
            hovertemplate=axis + " %{x}<br>%{customdata}<extra>%{fullData.name}</extra>",
        )
    if whole is not None:
        figure.add_hline(
            y=whole.value,
            line={"color": INK, "dash": "dash", "width": 1},
            annotation={"text": "whole model", "font": {"color": INK}, "xanchor": "right"},
        )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=380,
        margin={"l": 60, "r": 20, "t": 50, "b": 95},
    )
    figure.update_xaxes(title_text=axis, dtick=1 if len(curves[0].bars) <= 12 else 4)
    figure.update_yaxes(title_text="accuracy", range=[0, 1.02], tickformat=".1f", dtick=0.2)
    return figure


@checked
def loss_scatter(points: Sequence[Point], *, title: str) -> go.Figure:
    """What a circuit loses against what the model loses, with intervals and the line on which both
    are equal."""
    bars = [bar for point in points for bar in (point.x, point.y)]
    low = min([0.0, *(bar.low for bar in bars)]) - 0.02
    high = max([0.1, *(bar.high for bar in bars)]) + 0.02
    figure = go.Figure()
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line={"color": FAINT, "dash": "dash", "width": 1},
        name="equal",
        hoverinfo="skip",
    )
    by_series: Mapping[str, list[Point]] = {point.series: [] for point in points}
    for point in points:
        by_series[point.series].append(point)
    for (name, some), colour in zip(
        by_series.items(), [*SERIES_COLOURS] * len(points), strict=False
    ):
        figure.add_scatter(
            x=[point.x.value for point in some],
            y=[point.y.value for point in some],
            name=name,
            mode="markers",
            marker={"color": colour, "size": 9},
            error_x=_whiskers([point.x for point in some], colour),
            error_y=_whiskers([point.y for point in some], colour),
            customdata=[point.name for point in some],
            hovertemplate="%{customdata}<br>(%{x:.3f}, %{y:.3f})<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=480,
        margin={"l": 60, "r": 20, "t": 50, "b": 95},
    )
    figure.update_xaxes(
        title_text="accuracy that the model loses",
        range=[low, high],
        showgrid=True,
        gridcolor="#eceff2",
    )
    figure.update_yaxes(title_text="accuracy that the circuit loses", range=[low, high])
    return figure


def _whiskers(bars: Sequence[Bar], colour: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [bar.high - bar.value for bar in bars],
        "arrayminus": [bar.value - bar.low for bar in bars],
        "thickness": 1,
        "width": 0,
        "color": colour,
    }
