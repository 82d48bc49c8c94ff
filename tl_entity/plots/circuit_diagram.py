"""A circuit drawn over a prompt: where its groups sit, what they read, and what they carry."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head
from tl_entity.plots.style import FAINT, INK, SERIES_COLOURS, STYLE

MOST_HEADS_NAMED = 6


@checked
@dataclass(frozen=True)
class Node:
    """A group of heads at a token.

    Attributes:
        name: of the group.
        token: index of its token in the prompt.
        heads: its heads.
        carries: what it carries, in a few words; empty if that is not known.
    """

    name: str
    token: int
    heads: tuple[Head, ...]
    carries: str = ""


@checked
@dataclass(frozen=True)
class Edge:
    """One group's output reaching another group's input, or the answer.

    Attributes:
        source: name of the group that writes.
        target: name of the group that reads; None for the logits.
        into: which input: q, k, v or logits.
    """

    source: str
    target: str | None
    into: str


@checked
def circuit_diagram(
    tokens: Sequence[str], nodes: Sequence[Node], edges: Sequence[Edge], *, title: str
) -> go.Figure:
    """The prompt's tokens along the bottom, the groups above theirs, at the height of their heads'
    layers, joined by the paths that were patched.

    Raises:
        InputError: if a node is at no token, or an edge joins groups that are not there.
    """
    for node in nodes:
        if not 0 <= node.token < len(tokens):
            raise InputError(f"{node.name} is at token {node.token}; there are {len(tokens)}.")
    places = {node.name: (node.token, _height(node)) for node in nodes}
    top = max((height for _, height in places.values()), default=0) + 1.5
    answer = (len(tokens) - 1, top)
    figure = go.Figure()
    for edge in edges:
        ends = [places.get(edge.source), answer if edge.target is None else places.get(edge.target)]
        if None in ends:
            raise InputError(f"An edge joins {edge.source} and {edge.target}; one is not there.")
        _draw_edge(figure, edge.into, ends[0] or answer, ends[1] or answer)
    for node, colour in zip(nodes, [*SERIES_COLOURS] * len(nodes), strict=False):
        _draw_node(figure, node, places[node.name], colour)
    figure.add_scatter(
        x=[answer[0]],
        y=[answer[1]],
        mode="markers+text",
        text=["logits"],
        textposition="top center",
        marker={"size": 12, "symbol": "square", "color": INK},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=520,
        margin={"l": 60, "r": 30, "t": 50, "b": 110},
    )
    figure.update_xaxes(
        tickvals=list(range(len(tokens))),
        ticktext=list(tokens),
        tickangle=-60,
        range=[-1, len(tokens) + 0.5],
    )
    highest = max((head.layer for node in nodes for head in node.heads), default=0)
    figure.update_yaxes(
        title_text="layer",
        range=[-0.6, top + 0.8],
        tickvals=list(range(0, highest + 1, max(1, round(top / 8)))),
    )
    return figure


def _draw_edge(
    figure: go.Figure, into: str, start: tuple[float, float], end: tuple[float, float]
) -> None:
    """An arrow, and which input it leads into."""
    (x0, y0), (x1, y1) = start, end
    figure.add_annotation(
        x=x1,
        y=y1,
        ax=x0,
        ay=y0,
        xref="x",
        yref="y",
        axref="x",
        ayref="y",
        showarrow=True,
        arrowhead=2,
        arrowwidth=1.5,
        arrowcolor=FAINT,
        standoff=16,
        startstandoff=16,
        text="",
    )
    figure.add_annotation(
        x=(x0 + x1) / 2,
        y=(y0 + y1) / 2,
        text=into,
        showarrow=False,
        # Beside an upright arrow: on it, the label of the group below would cover it.
        xanchor="left" if x0 == x1 else "center",
        xshift=4 if x0 == x1 else 0,
        bgcolor="white",
        font={"size": 12, "color": INK},
    )


def _draw_node(figure: go.Figure, node: Node, at: tuple[float, float], colour: str) -> None:
    """A group above its token, with its heads."""
    x, y = at
    figure.add_shape(type="line", x0=x, x1=x, y0=-0.6, y1=y, line={"color": colour, "dash": "dot"})
    named = " ".join(map(str, node.heads[:MOST_HEADS_NAMED])) or "no heads"
    if len(node.heads) > MOST_HEADS_NAMED:
        named += f" and {len(node.heads) - MOST_HEADS_NAMED} more"
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        name=node.name,
        marker={"size": 18, "color": colour, "line": {"color": "white", "width": 2}},
        hovertemplate=f"{node.name}<br>{' '.join(map(str, node.heads))}<extra></extra>",
        showlegend=False,
    )
    figure.add_annotation(
        x=x,
        y=y,
        text=f"<b>{node.name}</b><br>{named}" + (node.carries and f"<br><i>{node.carries}</i>"),
        showarrow=False,
        align="right",
        xanchor="right",
        yanchor="bottom",
        xshift=-10,
        yshift=6,
        bgcolor="white",
        font={"size": 12, "color": INK},
    )


def _height(node: Node) -> float:
    """The mean layer of the heads."""
    return sum(head.layer for head in node.heads) / len(node.heads) if node.heads else 0.0
