"""A mechanism: how faithful it is at every size, and which heads act where."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_entity._typing import checked
from tl_entity.heads import Node
from tl_entity.plots.bars import Bar
from tl_entity.plots.style import FAINT, INK, SERIES_COLOURS, STYLE

SHADES_OF_NODES = [[0.0, "#f4f6f8"], [0.01, "#c6dbef"], [1.0, "#6baed6"]]
"""Colours of numbers of heads; a cell without any is grey, and text is read on all."""

ROW_HEIGHT, COLUMN_WIDTH = 24, 64
"""Of a node map, in pixels."""

HEADS_WRITTEN = 3
"""Heads written in a cell of a node map; of more, their number stands there."""


@checked
def size_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, Bar]]]], *, chosen: int, title: str
) -> go.Figure:
    """Several measures over the number of nodes, side by side, with 95 % intervals.

    Args:
        panels: for each measure, for each series its values by number of nodes. The first series is
            drawn as a line.
        chosen: the number of nodes that is marked.
        title: above all.
    """
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels))
    for column, (measure, series) in enumerate(panels.items(), start=1):
        for (name, points), colour in zip(
            series.items(), (SERIES_COLOURS[0], FAINT, SERIES_COLOURS[1]), strict=False
        ):
            points = sorted(points, key=lambda point: point[0])
            bars = [bar for _, bar in points]
            is_line = name == next(iter(series))
            figure.add_scatter(
                x=[size for size, _ in points],
                y=[bar.value for bar in bars],
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers" if is_line else "markers",
                line={"color": colour, "width": 2.5},
                marker={"size": 7, "symbol": "circle" if is_line else "diamond"},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [bar.high - bar.value for bar in bars],
                    "arrayminus": [bar.value - bar.low for bar in bars],
                    "thickness": 1,
                    "width": 0,
                },
                customdata=[f"{b.value:.3f} [{b.low:.3f}, {b.high:.3f}]" for b in bars],
                hovertemplate="%{x} nodes<br>"
                + measure
                + " %{customdata}<extra>%{fullData.name}</extra>",
                row=1,
                col=column,
            )
        figure.add_shape(
            type="line",
            x0=chosen,
            x1=chosen,
            y0=0,
            y1=1,
            xref="x" if column == 1 else f"x{column}",
            yref="y domain" if column == 1 else f"y{column} domain",
            line={"color": INK, "dash": "dot", "width": 1},
        )
    figure.update_layout(
        template=STYLE, title_text=title, height=360, margin={"l": 60, "r": 20, "t": 80, "b": 95}
    )
    figure.update_xaxes(title_text="nodes kept", rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    return figure


@checked
def node_map(
    columns: Sequence[tuple[str, Sequence[Node]]], n_layers: int, *, title: str
) -> go.Figure:
    """Layers up, roles or words along; in each cell the heads that act there, darker the more.

    Args:
        columns: from left to right, what each is called and its nodes. Names may come twice.
        n_layers: how many layers there are.
        title: above all.
    """
    counts = [[0] * len(columns) for _ in range(n_layers)]
    written = [[""] * len(columns) for _ in range(n_layers)]
    named = [[""] * len(columns) for _ in range(n_layers)]
    for column, (name, nodes) in enumerate(columns):
        for layer in range(n_layers):
            here = [node for node in nodes if node.layer == layer]
            marks = ["M" if node.head is None else str(node.head) for node in here]
            counts[layer][column] = len(here)
            few = len(here) <= HEADS_WRITTEN
            written[layer][column] = " ".join(marks) if few else f"{len(here)} heads"
            named[layer][column] = f"{name}, layer {layer}: " + (", ".join(map(str, here)) or "-")
    figure = go.Figure(
        go.Heatmap(
            z=counts,
            text=written,
            texttemplate="%{text}",
            customdata=named,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=SHADES_OF_NODES,
            zmin=0,
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=ROW_HEIGHT * n_layers + 150,
        width=max(480, COLUMN_WIDTH * len(columns) + 90),
        margin={"l": 60, "r": 20, "t": 50, "b": 90},
    )
    ticks = list(range(len(columns)))
    figure.update_xaxes(tickvals=ticks, ticktext=[name for name, _ in columns])
    figure.update_yaxes(title_text="layer", dtick=1)
    return figure
