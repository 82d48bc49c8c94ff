"""A mechanism as a graph: every node and edge has its place, width and colour."""

import pytest

from tl_entity import InputError, Node
from tl_entity.plots.mechanism_graph import (
    CHANGE_COLOURS,
    KIND_COLOURS,
    WIDEST,
    Graph,
    GraphEdge,
    compared_graphs,
    mechanism_graph,
)

READER, MOVER, MLP = Node(0, 1, "label"), Node(2, 3, "last"), Node(1, None, "label")
STRONG = GraphEdge(READER, MOVER, "v", -0.5, -0.6, -0.4, True)
WEAK = GraphEdge(MLP, MOVER, "k", 0.02, -0.01, 0.05, False)
OUT = GraphEdge(MOVER, None, "logits", -0.2, -0.3, -0.1, True)
GRAPH = Graph((READER, MLP, MOVER), ("label", "last"), (STRONG, WEAK, OUT))


def lines(figure) -> list:
    return [trace for trace in figure.data if trace.mode == "lines" and trace.x[0] is not None]


def points(figure, name: str) -> list:
    return [trace for trace in figure.data if trace.name == name]


def test_nodes_stand_above_their_roles_at_their_layers() -> None:
    (nodes,) = points(mechanism_graph(GRAPH, title=""), "nodes")
    assert list(nodes.x) == [0, 0, 1] and list(nodes.y) == [0, 1, 2]
    assert [text.split("<")[0] for text in nodes.hovertemplate] == [
        "L0H1@label",
        "MLP1@label",
        "L2H3@last",
    ]


def test_edges_are_as_wide_as_they_are_strong_and_coloured_by_kind() -> None:
    figure = mechanism_graph(GRAPH, title="")
    weak, out, strong = lines(figure)  # the strongest lies on top
    assert strong.line.width == WIDEST > out.line.width > weak.line.width
    assert [edge.line.color for edge in (weak, out, strong)] == [
        KIND_COLOURS[kind] for kind in ("k", "logits", "v")
    ]
    assert weak.line.dash == "dash" and strong.line.dash == "solid"
    assert weak.opacity < strong.opacity
    assert (strong.x[0], strong.y[0], strong.x[-1], strong.y[-1]) == (0, 0, 1, 2)
    (hover,) = points(figure, "edges")
    assert "L0H1@label → v of L2H3@last<br>-0.5000 [-0.6000, -0.4000]" in hover.hovertemplate[2]
    assert "estimated" in hover.hovertemplate[0] and "estimated" not in hover.hovertemplate[2]


def test_nodes_of_one_layer_and_role_stand_apart() -> None:
    nodes = tuple(Node(5, head, "last") for head in range(8))
    (shown,) = points(mechanism_graph(Graph(nodes, ("last",), ()), title=""), "nodes")
    assert len(set(shown.x)) == 8 and max(map(abs, shown.x)) < 0.5


def test_two_mechanisms_show_what_is_kept_lost_and_new() -> None:
    added = Node(1, 0, "the")
    tuned = Graph((READER, MOVER, added), ("the", "label", "last"), (STRONG, OUT))
    figure = compared_graphs(GRAPH, tuned)
    first, second = points(figure, "nodes")
    kept, lost, new = (CHANGE_COLOURS[change] for change in ("kept", "lost", "new"))
    assert list(first.marker.color) == [kept, lost, kept]
    assert list(second.marker.color) == [kept, kept, new]
    # A node stands at the same place in both.
    assert first.x[0] == second.x[0] and first.y[2] == second.y[1]
    assert [edge.line.color for edge in lines(figure)] == [lost, kept, kept, kept, kept]


def test_graphs_that_do_not_hold_together_are_refused() -> None:
    with pytest.raises(InputError, match="has a role that is none of last"):
        Graph((READER,), ("last",), ())
    with pytest.raises(InputError, match="one is not there"):
        Graph((READER,), ("label",), (STRONG,))
