"""Is it the same mechanism? The nodes and edges of two models, side by side."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Node
from tl_entity.hooks.edges import Edge
from tl_entity.methods.circuits import Faithfulness
from tl_entity.methods.edges import Edges, HasNodes
from tl_entity.results import Result
from tl_entity.stats import Chance, overlap_by_chance, overlap_of_choices
from tl_entity.tasks.batches import PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

EDGES_COMPARED = 20
"""So many of each model's strongest edges are compared, those that are exact and clear of zero."""


@dataclass(frozen=True)
class _Overlap:
    """What is shared by two sets, and what would be by chance."""

    shared: tuple[Any, ...]
    gained: tuple[Any, ...]
    lost: tuple[Any, ...]
    chance: Chance

    def __str__(self) -> str:
        return (
            f"{len(self.shared)} shared ({self.chance.expected:.1f} by chance, "
            f"p = {self.p_value:.2g}), {len(self.gained)} gained, {len(self.lost)} lost, "
            f"Jaccard {self.jaccard:.2f}"
        )

    @property
    def jaccard(self) -> float:
        """What is shared as a share of what is in either; NaN if there is nothing."""
        either = len(self.shared) + len(self.gained) + len(self.lost)
        return len(self.shared) / either if either else float("nan")

    @property
    def p_value(self) -> float:
        """How probable it is to share so many or more by chance."""
        return self.chance.at_least(len(self.shared))


@dataclass(frozen=True)
class NodeOverlap(_Overlap):
    """Nodes of two mechanisms.

    Attributes:
        shared: nodes in both.
        gained: nodes only in the second.
        lost: nodes only in the first.
        chance: how many would be shared if each mechanism's nodes were drawn anew within their own
            layers, heads and MLPs apart.
        chance_in_roles: the same if they were also drawn within their own roles.
    """

    shared: tuple[Node, ...]
    gained: tuple[Node, ...]
    lost: tuple[Node, ...]
    chance: Chance
    chance_in_roles: Chance

    def __str__(self) -> str:
        return (
            f"{super().__str__()}; drawn within roles too {self.chance_in_roles.expected:.1f} by "
            f"chance, p = {self.p_value_in_roles:.2g}"
        )

    @property
    def p_value_in_roles(self) -> float:
        """How probable it is to share so many or more by chance if which roles matter in which
        layer is no sign of a common mechanism either, as where all of them read the last token."""
        return self.chance_in_roles.at_least(len(self.shared))


@dataclass(frozen=True)
class EdgeOverlap(_Overlap):
    """Strongest edges of two mechanisms.

    Attributes:
        shared: edges in both.
        gained: edges only in the second.
        lost: edges only in the first.
        chance: how many would be shared if each mechanism's were drawn anew among the edges that
            there can be between its nodes, within their own sender's layer, receiver's layer and
            input.
    """

    shared: tuple[Edge, ...]
    gained: tuple[Edge, ...]
    lost: tuple[Edge, ...]
    chance: Chance


@checked
@dataclass(frozen=True)
class MechanismComparison(Result):
    """Two mechanisms compared, a base's and its fine-tune's.

    Attributes:
        nodes: the nodes that they share.
        edges: the edges that they share; None if none were given.
        ceiling: the same model's mechanism found again, by model: what two that are the same share.
        faithfulness: of each mechanism in each model, such as `base in tuned`.
        base_edges: the base's edges; None if none were given.
        tuned_edges: the fine-tune's.
    """

    nodes: NodeOverlap
    edges: EdgeOverlap | None
    ceiling: Mapping[str, NodeOverlap]
    faithfulness: Mapping[str, Faithfulness]
    base_edges: Edges | None
    tuned_edges: Edges | None

    def __str__(self) -> str:
        text = f"nodes: {self.nodes}"
        if self.edges is not None:
            text += f"; edges: {self.edges}"
        for name, found in self.ceiling.items():
            text += f"; {name} found again: Jaccard {found.jaccard:.2f}"
        return text

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for nodes, for edges, and for each mechanism found again: how many there are, are
        shared, gained and lost, and what chance would share."""
        import pandas as pd

        rows: list[tuple[str, NodeOverlap | EdgeOverlap, Chance]] = [
            ("nodes", self.nodes, self.nodes.chance),
            ("nodes, chance within roles", self.nodes, self.nodes.chance_in_roles),
        ]
        if self.edges is not None:
            rows.append(("edges", self.edges, self.edges.chance))
        for name, found in self.ceiling.items():
            rows.append((f"nodes, {name} found again", found, found.chance))
        return pd.DataFrame(
            [
                {
                    "what": name,
                    "first": len(overlap.shared) + len(overlap.lost),
                    "second": len(overlap.shared) + len(overlap.gained),
                    "shared": len(overlap.shared),
                    "gained": len(overlap.gained),
                    "lost": len(overlap.lost),
                    "jaccard": overlap.jaccard,
                    "chance_shared": chance.expected,
                    "chance_low": chance.low,
                    "chance_high": chance.high,
                    "p_value": chance.at_least(len(overlap.shared)),
                }
                for name, overlap, chance in rows
            ]
        )

    def faithfulness_dataframe(self) -> "pd.DataFrame":
        """One row for each mechanism in each model."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "mechanism": name,
                    "accuracy": found.of_circuit.accuracy,
                    "of_model": found.of_model.accuracy,
                    "faithfulness": found.value,
                    "low": found.interval.low,
                    "high": found.interval.high,
                }
                for name, found in self.faithfulness.items()
            ]
        )

    def plot(
        self, *, words: Mapping[str, str] | None = None, title: str | None = None
    ) -> "go.Figure":
        """Both mechanisms side by side, a node at the same place in both: kept grey, lost and new
        in colour; with the edges compared, if there are any.

        Args:
            words: for each role a word that has it, to stand under its name.
            title: above the figure.
        """
        from tl_entity.plots.mechanism_graph import Graph, compared_graphs

        if self.base_edges is not None and self.tuned_edges is not None:
            graphs = [found.graph(EDGES_COMPARED) for found in (self.base_edges, self.tuned_edges)]
        else:
            both = [self.nodes.shared + own for own in (self.nodes.lost, self.nodes.gained)]
            roles = tuple(sorted({node.role for nodes in both for node in nodes}))
            graphs = [Graph(nodes, roles, ()) for nodes in both]
        return compared_graphs(graphs[0], graphs[1], words=words, title=title)


@checked
def compare_mechanisms(
    base: HasNodes | Sequence[Node],
    tuned: HasNodes | Sequence[Node],
    *,
    candidates: Sequence[Node] | None = None,
    edges: tuple[Edges, Edges] | None = None,
    again: Mapping[str, HasNodes | Sequence[Node]] | None = None,
    faithfulness: Mapping[str, Faithfulness] | None = None,
    models: tuple[Model, Model] | None = None,
    prompts: PromptBatch | None = None,
) -> MechanismComparison:
    """Compare the mechanisms of two models.

    Important nodes lie at some depths rather than others in any mechanism of a task, so chance is
    drawn layer by layer: each mechanism keeps its number of nodes in every layer.

    Args:
        base: the base's mechanism, or its nodes.
        tuned: the fine-tune's.
        candidates: all nodes that could have been chosen; those of the base's mechanism, every head
            (and MLP) at every role, if left out.
        edges: the edges of both; of each the strongest twenty that are exact and whose intervals
            leave out zero are compared.
        again: under "base" and "tuned", the same model's mechanism found again from other prompts
            or with another seed: the ceiling.
        faithfulness: what was measured of the mechanisms in models, by name.
        models: both models, to measure how each mechanism does in each of them; goes with
            `prompts`.
        prompts: held-out prompts.

    Raises:
        InputError: if the candidates are not known or lack a node, a mechanism found again is of
            neither model, edges are not between a mechanism's nodes, or models and prompts don't go
            together.
    """
    ours, theirs = _nodes(base), _nodes(tuned)
    possible = _candidates(base) if candidates is None else [Node(*node) for node in candidates]
    if (models is None) != (prompts is None):
        raise InputError("Models and prompts go together: give both or neither.")
    ceiling: dict[str, NodeOverlap] = {}
    for name, found in (again or {}).items():
        if name not in ("base", "tuned"):
            raise InputError(f"{name!r} found again is neither 'base' nor 'tuned'.")
        ceiling[name] = _overlap(ours if name == "base" else theirs, _nodes(found), possible)
    measured = dict(faithfulness or {})
    if models is not None and prompts is not None:
        measured |= _each_in_each((base, tuned), models, prompts)
    for found, nodes, name in zip(edges or (), (ours, theirs), ("base", "fine-tune"), strict=False):
        if not set(found.nodes) <= set(nodes):
            stranger = next(node for node in found.nodes if node not in nodes)
            raise InputError(f"The {name}'s edges have {stranger}, which its mechanism lacks.")
    return MechanismComparison(
        nodes=_overlap(ours, theirs, possible),
        edges=None if edges is None else _edge_overlap(*edges),
        ceiling=ceiling,
        faithfulness=measured,
        base_edges=None if edges is None else edges[0],
        tuned_edges=None if edges is None else edges[1],
    )


def _nodes(mechanism: HasNodes | Sequence[Node]) -> tuple[Node, ...]:
    nodes = mechanism.nodes if isinstance(mechanism, HasNodes) else mechanism
    return tuple(dict.fromkeys(Node(*node) for node in nodes))


def _candidates(mechanism: HasNodes | Sequence[Node]) -> list[Node]:
    """Every head, and every MLP if these are nodes, at every role that the mechanism knows of."""
    shape: Any = mechanism
    try:
        layers, heads, roles = shape.n_layers, shape.n_heads, shape.roles
        with_mlps = shape.with_mlps
    except AttributeError:
        raise InputError(
            "Chance needs all nodes that could have been chosen: give them as candidates."
        ) from None
    kinds = [*range(heads), *([None] if with_mlps else [])]
    return [Node(layer, kind, role) for layer in range(layers) for kind in kinds for role in roles]


def _overlap(
    ours: Sequence[Node], theirs: Sequence[Node], candidates: Sequence[Node]
) -> NodeOverlap:
    missing = ({*ours} | {*theirs}) - {*candidates}
    if missing:
        raise InputError(f"{min(missing, key=str)} is none of the candidates.")

    def chance(cell: Callable[[Node], Hashable]) -> Chance:
        sizes = Counter(map(cell, dict.fromkeys(candidates)))
        one, other = (Counter(map(cell, nodes)) for nodes in (ours, theirs))
        return reduce(
            Chance.and_also,
            (overlap_by_chance(n, one[key], other[key]) for key, n in sizes.items()),
            overlap_by_chance(0, 0, 0),
        )

    return NodeOverlap(
        shared=tuple(node for node in ours if node in theirs),
        gained=tuple(node for node in theirs if node not in ours),
        lost=tuple(node for node in ours if node not in theirs),
        chance=chance(lambda node: (node.layer, node.head is None)),
        chance_in_roles=chance(lambda node: (node.layer, node.head is None, node.role)),
    )


def _edge_overlap(base: Edges, tuned: Edges) -> EdgeOverlap:
    ours, theirs = (found.top(EDGES_COMPARED, clear=True) for found in (base, tuned))

    def cell(edge: Edge) -> Hashable:
        to = None if edge.receiver is None else edge.receiver.layer
        return edge.sender.layer, to, edge.input

    counts = [
        Counter(map(cell, some))
        for some in (base.edges, tuned.edges, ours, theirs, {*base.edges} & {*tuned.edges})
    ]
    cells = dict.fromkeys((*counts[2], *counts[3]))
    chances = (
        overlap_of_choices(
            counts[0][key], counts[2][key], counts[1][key], counts[3][key], counts[4][key]
        )
        for key in cells
    )
    return EdgeOverlap(
        shared=tuple(edge for edge in ours if edge in theirs),
        gained=tuple(edge for edge in theirs if edge not in ours),
        lost=tuple(edge for edge in ours if edge not in theirs),
        chance=reduce(Chance.and_also, chances, overlap_by_chance(0, 0, 0)),
    )


def _each_in_each(
    mechanisms: tuple[Any, Any], models: tuple[Model, Model], prompts: PromptBatch
) -> dict[str, Faithfulness]:
    """Each mechanism alone, in its own model and in the other."""
    names = ("base", "tuned")
    measured: dict[str, Faithfulness] = {}
    for name, mechanism in zip(names, mechanisms, strict=True):
        if not hasattr(mechanism, "evaluate"):
            raise InputError(
                "Plain nodes don't know what was left of the others when they were found: give "
                "mechanisms to have them measured, or their faithfulness."
            )
        for where, model in zip(names, models, strict=True):
            measured[f"{name} in {where}"] = mechanism.evaluate(model, prompts).faithfulness
    return measured
