"""A mechanism as a graph: layers up, roles along the prompt, edges by weight and kind."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Node
from tl_entity.plots.style import FAINT, INK, SERIES_COLOURS, STYLE

KIND_COLOURS: dict[str, str] = dict(zip(("q", "k", "v", "logits"), SERIES_COLOURS, strict=False))
"""Colours of edges by the input that they go into."""

CHANGE_COLOURS = {"kept": FAINT, "lost": SERIES_COLOURS[1], "new": SERIES_COLOURS[2]}
"""Colours of nodes and edges of two mechanisms."""

WIDEST, NARROWEST = 7.0, 0.8
"""Width in pixels of the strongest edge, and of the weakest."""

CELL = 0.86
"""How much of a role's column its nodes take up."""

MOST_NAMED = 60
"""With more nodes than these only hovering names them."""

CURVE = 12
"""Straight pieces of which an edge is drawn."""


@dataclass(frozen=True)
class GraphEdge:
    """An edge with its numbers.

    Attributes:
        sender: where it comes from.
        receiver: where it goes; None for the logits.
        input: q, k, v or logits.
        score: its mean score.
        low: lower bound of the score's interval.
        high: upper bound.
        exact: whether the score was run, not estimated.
    """

    sender: Node
    receiver: Node | None
    input: str
    score: float
    low: float
    high: float
    exact: bool

    @property
    def ends(self) -> tuple[Node, Node | None, str]:
        """What makes it the same edge in another model."""
        return self.sender, self.receiver, self.input

    @property
    def says(self) -> str:
        """What hovering over it shows."""
        into = "logits" if self.receiver is None else f"{self.input} of {self.receiver}"
        note = "" if self.exact else "<br>estimated"
        return (
            f"{self.sender} → {into}<br>{self.score:+.4f} [{self.low:.4f}, {self.high:.4f}]{note}"
        )


@checked
@dataclass(frozen=True)
class Graph:
    """Nodes and edges to draw.

    Attributes:
        nodes: the nodes, drawn even where no edge is.
        roles: the columns, in the order of the prompt.
        edges: the edges.

    Raises:
        InputError: if a node's role has no column, or an edge joins nodes that are not there.
    """

    nodes: tuple[Node, ...]
    roles: tuple[str, ...]
    edges: tuple[GraphEdge, ...]

    def __post_init__(self) -> None:
        for node in self.nodes:
            if node.role not in self.roles:
                raise InputError(f"{node} has a role that is none of {', '.join(self.roles)}.")
        there = {*self.nodes, None}
        for edge in self.edges:
            if edge.sender not in there or edge.receiver not in there:
                raise InputError(
                    f"An edge joins {edge.sender} and {edge.receiver}; one is not there."
                )


@checked
def mechanism_graph(
    graph: Graph, *, words: Mapping[str, str] | None = None, title: str
) -> go.Figure:
    """Nodes as points, a row a layer and a column a role; edges as curves, the stronger the wider,
    in the colour of the input that they go into, dashed where they hinder, pale where their score
    is an estimate. The logits are the square at the top.

    Args:
        graph: what to draw.
        words: for each role a word that has it, to stand under its name.
        title: above the figure.
    """
    figure = go.Figure()
    places = _places(graph.nodes, graph.roles)
    colours = {edge.ends: KIND_COLOURS[edge.input] for edge in graph.edges}
    _add_edges(figure, graph.edges, places, colours, _strongest([graph]))
    _add_nodes(figure, graph.nodes, places, dict.fromkeys(graph.nodes, INK))
    shown = [kind for kind in KIND_COLOURS if any(e.input == kind for e in graph.edges)]
    _add_legend(figure, {f"into {kind}": KIND_COLOURS[kind] for kind in shown})
    _finish(figure, [graph], graph.roles, words, title)
    return figure


@checked
def compared_graphs(
    base: Graph,
    tuned: Graph,
    *,
    names: tuple[str, str] = ("base", "fine-tune"),
    words: Mapping[str, str] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Two mechanisms side by side, in the same rows and columns, so that a node stands at the same
    place in both. Nodes and edges that both have are grey; those that only the first has (lost) and
    only the second (new) are coloured.

    Args:
        base: the first mechanism.
        tuned: the second.
        names: of the two, above each.
        words: for each role a word that has it, to stand under its name.
        title: above the figure.
    """
    roles = tuple(dict.fromkeys((*base.roles, *tuned.roles)))
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.03
    )
    places = _places(tuple(dict.fromkeys((*base.nodes, *tuned.nodes))), roles)
    strongest = _strongest([base, tuned])
    for column, (ours, theirs, change) in enumerate(
        ((base, tuned, "lost"), (tuned, base, "new")), start=1
    ):
        both = {edge.ends for edge in theirs.edges}
        edges = {
            edge.ends: CHANGE_COLOURS["kept" if edge.ends in both else change]
            for edge in ours.edges
        }
        nodes = {
            node: CHANGE_COLOURS["kept" if node in theirs.nodes else change] for node in ours.nodes
        }
        _add_edges(figure, ours.edges, places, edges, strongest, column)
        _add_nodes(figure, ours.nodes, places, nodes, column)
    _add_legend(figure, CHANGE_COLOURS)
    if title is None:
        shared = {edge.ends for edge in base.edges} & {edge.ends for edge in tuned.edges}
        title = (
            f"{len(set(base.nodes) & set(tuned.nodes))} nodes of {len(base.nodes)} and "
            f"{len(tuned.nodes)} shared, {len(shared)} edges of {len(base.edges)} and "
            f"{len(tuned.edges)}"
        )
    _finish(figure, [base, tuned], roles, words, title)
    return figure


Places = Mapping[Node | None, tuple[float, float]]


def _places(nodes: Sequence[Node], roles: Sequence[str]) -> Places:
    """Where each node stands; None is the logits. Nodes of one layer and role stand side by side,
    heads first."""
    places: dict[Node | None, tuple[float, float]] = {}
    for column, role in enumerate(roles):
        for layer in {node.layer for node in nodes}:
            cell = sorted(
                (node for node in nodes if (node.layer, node.role) == (layer, role)),
                key=lambda node: (node.head is None, node.head or 0),
            )
            for i, node in enumerate(cell):
                aside = CELL * ((i + 0.5) / len(cell) - 0.5)
                # A little up and down, so that neighbours' names don't run into each other.
                up = 0.16 * (i % 3 - 1) if len(cell) > 2 else 0.0
                places[node] = (column + aside, layer + up)
    top = max((node.layer for node in nodes), default=0) + 1.5
    places[None] = (len(roles) - 1.0, top)
    return places


def _strongest(graphs: Sequence[Graph]) -> float:
    return max((abs(edge.score) for graph in graphs for edge in graph.edges), default=1.0) or 1.0


def _add_edges(
    figure: go.Figure,
    edges: Sequence[GraphEdge],
    places: Places,
    colours: Mapping[Any, str],
    strongest: float,
    column: int | None = None,
) -> None:
    at = {} if column is None else {"row": 1, "col": column}
    middles = []
    # The strongest last, so that they lie on top.
    for edge in sorted(edges, key=lambda edge: abs(edge.score)):
        xs, ys = _curve(places[edge.sender], places[edge.receiver])
        width = NARROWEST + (WIDEST - NARROWEST) * math.sqrt(abs(edge.score) / strongest)
        figure.add_scatter(
            x=xs,
            y=ys,
            mode="lines",
            line={
                "color": colours[edge.ends],
                "width": width,
                "dash": "dash" if edge.score > 0 else "solid",
            },
            opacity=0.75 if edge.exact else 0.3,
            hoverinfo="skip",
            showlegend=False,
            **at,
        )
        middles.append((xs[CURVE // 2], ys[CURVE // 2], edge.says))
    # A line is hard to hit: points along its middle say what it is.
    figure.add_scatter(
        x=[x for x, _, _ in middles],
        y=[y for _, y, _ in middles],
        mode="markers",
        marker={"size": 12, "color": "rgba(0,0,0,0)"},
        hovertemplate=[f"{says}<extra></extra>" for _, _, says in middles],
        name="edges",
        showlegend=False,
        **at,
    )


def _curve(start: tuple[float, float], end: tuple[float, float]) -> tuple[list[float], list[float]]:
    """Up above the sender first, then across: a change stays at its token until it is read."""
    (x0, y0), (x1, y1) = start, end
    bend = (x0, y0 + 0.75 * (y1 - y0))
    steps = [i / CURVE for i in range(CURVE + 1)]

    def along(a: float, b: float, c: float) -> list[float]:
        return [(1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for t in steps]

    return along(x0, bend[0], x1), along(y0, bend[1], y1)


def _add_nodes(
    figure: go.Figure,
    nodes: Sequence[Node],
    places: Places,
    colours: Mapping[Node, str],
    column: int | None = None,
) -> None:
    at = {} if column is None else {"row": 1, "col": column}
    names = ["MLP" if node.head is None else f"{node.head}" for node in nodes]
    figure.add_scatter(
        x=[places[node][0] for node in nodes],
        y=[places[node][1] for node in nodes],
        mode="markers+text" if len(nodes) <= MOST_NAMED else "markers",
        text=names,
        textposition="bottom center",
        textfont={"size": 9, "color": INK},
        marker={
            "size": 9,
            "color": [colours[node] for node in nodes],
            "symbol": ["diamond" if node.head is None else "circle" for node in nodes],
            "line": {"color": "white", "width": 1},
        },
        hovertemplate=[f"{node}<extra></extra>" for node in nodes],
        name="nodes",
        showlegend=False,
        **at,
    )
    figure.add_scatter(
        x=[places[None][0]],
        y=[places[None][1]],
        mode="markers+text",
        text=["logits"],
        textposition="top center",
        marker={"size": 11, "symbol": "square", "color": INK},
        hoverinfo="skip",
        name="logits",
        showlegend=False,
        **at,
    )


def _add_legend(figure: go.Figure, colours: Mapping[str, str]) -> None:
    for name, colour in colours.items():
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name=name, line={"color": colour, "width": 4}
        )


def _finish(
    figure: go.Figure,
    graphs: Sequence[Graph],
    roles: Sequence[str],
    words: Mapping[str, str] | None,
    title: str,
) -> None:
    highest = max((node.layer for graph in graphs for node in graph.nodes), default=0)
    under = [
        f"{role}<br><i>{words[role]}</i>" if words and role in words else role for role in roles
    ]
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=max(480, 170 + 26 * (highest + 2)),
        margin={"l": 60, "r": 20, "t": 80, "b": 130},
    )
    figure.update_xaxes(
        tickvals=list(range(len(roles))),
        ticktext=under,
        tickangle=-50,
        range=[-0.6, len(roles) - 0.4],
    )
    figure.update_yaxes(
        range=[-0.7, highest + 2.2],
        tickvals=list(range(0, highest + 1, max(1, round((highest + 1) / 15)))),
    )
    figure.update_yaxes(title_text="layer", col=1 if len(graphs) > 1 else None)
