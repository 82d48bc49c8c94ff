"""Bars of shares between 0 and 1, each with its interval."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go

from tl_entity._typing import checked
from tl_entity.plots.style import FAINT, INK, STYLE

LEVEL = "level"
"""Names the annotations of `add_level`."""

LEVEL_CHARACTERS, LEVEL_SIZE, LEVEL_MARGIN = 18, 12, 120
"""Characters in a line of a level's name, their size in pixels, and the least margin for them."""


CATEGORY_CHARACTERS = 20
"""Characters in a line of a category's name: longer ones would stand aslant."""


@dataclass(frozen=True)
class Bar:
    """A share between 0 and 1 with its bounds, and, if it is a mean, the points it is of; `says`
    stands beside it in place of the numbers, where these can't be drawn."""

    value: float
    low: float
    high: float
    points: tuple[float, ...] = field(default=())
    says: str = ""


@checked
def accuracy_bars(
    series: Mapping[str, Mapping[int, Bar]], *, title: str, chance: bool = True
) -> go.Figure:
    """Accuracy by number of boxes, side by side for several models, with 95 % intervals.

    Args:
        series: by model, by number of boxes.
        title: above all.
        chance: also show 1 / boxes, what naming any of the objects at random would give.
    """
    figure = go.Figure()
    for name, bars in series.items():
        _add_bars(figure, name, [str(boxes) for boxes in bars], list(bars.values()))
    boxes = sorted({number for bars in series.values() for number in bars})
    if chance:
        figure.add_scatter(
            x=[str(number) for number in boxes],
            y=[1 / number for number in boxes],
            name="any of the objects (1 / boxes)",
            mode="markers",
            marker={"symbol": "line-ew", "size": 26, "line": {"width": 2, "color": INK}},
            hovertemplate="%{x} boxes: %{y:.3f}<extra>any of the objects</extra>",
        )
    _finish_bars(figure, title, "accuracy")
    figure.update_xaxes(title_text="boxes in the prompt", type="category")
    return figure


@checked
def grouped_bars(
    series: Mapping[str, Mapping[str, Bar]], *, title: str, axis: str = "accuracy"
) -> go.Figure:
    """Bars with their intervals, one group of bars a category, one colour a series.

    Args:
        series: by series, by category.
        title: above all.
        axis: what is measured.
    """
    figure = go.Figure()
    for name, bars in series.items():
        _add_bars(figure, name, list(bars), list(bars.values()))
    _finish_bars(figure, title, axis)
    categories = list(dict.fromkeys(name for bars in series.values() for name in bars))
    figure.update_xaxes(
        tickvals=categories,
        ticktext=["<br>".join(wrap(name, CATEGORY_CHARACTERS)) for name in categories],
    )
    return figure


@checked
def add_level(figure: go.Figure, name: str, level: Bar, *, colour: str = INK) -> None:
    """A dashed line across the figure for something that all bars are compared with, and its
    interval as a band.

    Its name stands on the right, in lines short enough for a narrow page; the margin is as wide as
    they are. Of several levels, which may be close to each other, the highest has its name above
    its line and the others below theirs.
    """
    figure.add_hrect(
        y0=level.low, y1=level.high, fillcolor=colour, opacity=0.08, line_width=0, layer="below"
    )
    figure.add_hline(y=level.value, line={"color": colour, "dash": "dash", "width": 1.5})
    lines = [*wrap(name, LEVEL_CHARACTERS), f"{level.value:.3f}"]
    figure.add_annotation(
        text="<br>".join(lines),
        name=LEVEL,
        x=1.005,
        xref="paper",
        y=level.value,
        xanchor="left",
        align="left",
        showarrow=False,
        font={"color": colour, "size": LEVEL_SIZE},
    )
    layout: Any = figure.layout
    levels = sorted(
        (note for note in layout.annotations if note.name == LEVEL), key=lambda note: note.y
    )
    for note in levels if len(levels) > 1 else []:
        note.yanchor = "bottom" if note is levels[-1] else "top"
    # A character is about 0.6 of its size wide.
    widest = max(map(len, lines)) * 0.6 * LEVEL_SIZE + 20
    figure.update_layout(margin_r=max(layout.margin.r or 0, LEVEL_MARGIN, round(widest)))


@checked
def overlap_bars(
    found: Mapping[str, float],
    chance: Mapping[str, Bar],
    *,
    title: str,
    ceiling: Mapping[str, float] | None = None,
) -> go.Figure:
    """Jaccard indices, each beside what chance would give and what the same model gives twice.

    Args:
        found: by category; what has no value is left out.
        chance: the same by chance: the mean, and the range of 95 % of random choices.
        title: above all.
        ceiling: the same of one model's circuit found twice, if it was.
    """

    def bare(value: float) -> Bar:
        # It has no interval: nothing is drawn but the value.
        return Bar(value, value, value, says=f"{value:.3f}")

    kept = [name for name, value in found.items() if not math.isnan(value)]
    series = {"both circuits": {name: bare(found[name]) for name in kept}}
    if ceiling:
        twice = {name: ceiling[name] for name in kept if not math.isnan(ceiling[name])}
        series["the base found twice"] = {name: bare(value) for name, value in twice.items()}
    figure = grouped_bars(series, title=title, axis="Jaccard index")
    figure.update_traces(error_y_visible=False)
    _add_bars(figure, "drawn at random", kept, [chance[name] for name in kept])
    figure.update_traces(marker_color=FAINT, selector={"name": "drawn at random"})
    return figure


def _add_bars(figure: go.Figure, name: str, categories: list[str], bars: list[Bar]) -> None:
    figure.add_bar(
        x=categories,
        y=[bar.value for bar in bars],
        name=name,
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [bar.high - bar.value for bar in bars],
            "arrayminus": [bar.value - bar.low for bar in bars],
            "thickness": 1.5,
            "width": 4,
            "color": INK,
        },
        customdata=[
            (bar.says or f"{bar.value:.3f} [{bar.low:.3f}, {bar.high:.3f}]")
            + (f"<br>{len(bar.points)} values" if bar.points else "")
            for bar in bars
        ],
        hovertemplate="%{x}<br>%{customdata}<extra>%{fullData.name}</extra>",
    )


def _finish_bars(figure: go.Figure, title: str, axis: str) -> None:
    figure.update_layout(
        template=STYLE,
        title_text=title,
        barmode="group",
        height=380,
        # The legend above: names of categories may be long, and stand aslant below.
        margin={"l": 60, "r": 20, "t": 110, "b": 50},
        legend={"traceorder": "normal", "y": 1.0, "yanchor": "bottom"},
    )
    figure.update_yaxes(title_text=axis, range=[0, 1.02], tickformat=".1f", dtick=0.2)
