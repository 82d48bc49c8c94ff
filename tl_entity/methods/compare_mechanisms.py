"""Is it the same mechanism? The nodes and edges of two models, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Node
from tl_entity.methods.circuits import Faithfulness
from tl_entity.methods.edges import Edges, HasNodes
from tl_entity.methods.mechanism_overlap import (
    EdgeOverlap,
    NodeOverlap,
    edge_overlap,
    node_overlap,
)
from tl_entity.methods.mechanism_result import Mechanism
from tl_entity.methods.nodes_evaluation import NodesEvaluation
from tl_entity.methods.stability import (
    STANDINGS,
    MechanismStability,
    candidates_of,
    mechanism_stability,
    nodes_of,
)
from tl_entity.results import Result
from tl_entity.stats import Chance
from tl_entity.tasks.batches import PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

EDGES_COMPARED = 20
"""So many of each model's strongest edges are compared, those that are exact and clear of zero."""

FIRST_SEARCH = "first"
"""Names the search that gave the mechanism compared, beside one that was made again."""


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
        stability: by model, which nodes are found again and again.
        inside: what was measured of each mechanism in each model, and after it of draws of as many
            random nodes of the same layers and roles.
    """

    nodes: NodeOverlap
    edges: EdgeOverlap | None
    ceiling: Mapping[str, NodeOverlap]
    faithfulness: Mapping[str, Faithfulness]
    base_edges: Edges | None
    tuned_edges: Edges | None
    stability: Mapping[str, MechanismStability] = field(
        default_factory=dict[str, MechanismStability]
    )
    inside: Mapping[str, tuple[NodesEvaluation, ...]] = field(
        default_factory=dict[str, tuple[NodesEvaluation, ...]]
    )

    def __str__(self) -> str:
        text = f"nodes: {self.nodes}"
        if self.edges is not None:
            text += f"; edges: {self.edges}"
        for name, found in self.ceiling.items():
            text += f"; {name} found again: Jaccard {found.jaccard:.2f}"
        for name, found in self.stability.items():
            counts = (f"{len(found.nodes(standing))} {standing}" for standing in STANDINGS)
            text += f"; {name} in {len(found.found)} searches: {', '.join(counts)}"
        if (settled := self.settled) is not None:
            counts = (f"{len(nodes)} {name}" for name, nodes in settled.items())
            text += f"; settled by these searches: {', '.join(counts)}"
        return text

    @property
    def settled(self) -> dict[str, tuple[Node, ...]] | None:
        """What holds whichever of the searches is taken: nodes that are core in both models are
        kept, those that are core in one and that no search finds in the other are lost or gained.
        None if the searches were not repeated in both."""
        base, tuned = (self.stability.get(name) for name in ("base", "tuned"))
        if base is None or tuned is None:
            return None
        return {
            "kept": tuple(node for node in base.core if node in tuned.core),
            "lost": tuple(node for node in base.core if tuned.standing(node) is None),
            "gained": tuple(node for node in tuned.core if base.standing(node) is None),
        }

    def nodes_dataframe(self) -> "pd.DataFrame":
        """One row a node of either mechanism: whether it is shared, lost or gained, and how it
        stands in each model's repeated searches, if there were any."""
        import pandas as pd

        overlap = self.nodes
        groups = {"shared": overlap.shared, "lost": overlap.lost, "gained": overlap.gained}
        rows = [(group, node) for group, nodes in groups.items() for node in nodes]
        return pd.DataFrame(
            [
                {
                    "node": str(node),
                    "layer": node.layer,
                    "role": node.role,
                    "is": group,
                    **{
                        f"{model} standing": found.standing(node) or "never found"
                        for model, found in self.stability.items()
                    },
                }
                for group, node in rows
            ]
        )

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
        """One row for each mechanism in each model; where it was measured here, with agreement, KL
        and the most faithful of the random draws."""
        import pandas as pd

        def beside(each: Sequence[NodesEvaluation]) -> dict[str, float]:
            found, *random = each
            return {
                "agreement": found.agreement,
                "KL": found.mean_kl,
                "random": max((draw.faithfulness.value for draw in random), default=float("nan")),
            }

        return pd.DataFrame(
            [
                {
                    "mechanism": name,
                    "accuracy": found.of_circuit.accuracy,
                    "of_model": found.of_model.accuracy,
                    "faithfulness": found.value,
                    "low": found.interval.low,
                    "high": found.interval.high,
                    **(beside(self.inside[name]) if name in self.inside else {}),
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
    again: Mapping[str, HasNodes | Sequence[Node] | MechanismStability] | None = None,
    faithfulness: Mapping[str, Faithfulness] | None = None,
    models: tuple[Model, Model] | None = None,
    prompts: PromptBatch | None = None,
    n_random: int = 3,
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
            or with another seed: the ceiling. Several searches go in as `mechanism_stability` gives
            them, the mechanism itself the first.
        faithfulness: what was measured of the mechanisms in models, by name.
        models: both models, to measure how each mechanism does in each of them; goes with
            `prompts`.
        prompts: held-out prompts.
        n_random: draws of as many random nodes that each mechanism stands beside in each model;
            each takes as long as the mechanism itself.

    Raises:
        InputError: if the candidates are not known or lack a node, a mechanism found again is of
            neither model, edges are not between a mechanism's nodes, or models and prompts don't go
            together.
    """
    ours, theirs = nodes_of(base), nodes_of(tuned)
    possible = candidates_of(base) if candidates is None else [Node(*node) for node in candidates]
    if (models is None) != (prompts is None):
        raise InputError("Models and prompts go together: give both or neither.")
    ceiling: dict[str, NodeOverlap] = {}
    stability: dict[str, MechanismStability] = {}
    for name, found in (again or {}).items():
        if name not in ("base", "tuned"):
            raise InputError(f"{name!r} found again is neither 'base' nor 'tuned'.")
        nodes = ours if name == "base" else theirs
        stability[name] = _stability(nodes, found, possible)
        for search, others in list(stability[name].found.items())[1:]:
            # Another phrasing has roles of its own.
            could = list(dict.fromkeys([*possible, *others]))
            key = f"{name}, {search}" if isinstance(found, MechanismStability) else name
            ceiling[key] = node_overlap(nodes, others, could)
    measured = dict(faithfulness or {})
    inside: dict[str, tuple[NodesEvaluation, ...]] = {}
    if models is not None and prompts is not None:
        for key, alone, each in _each_in_each((base, tuned), models, prompts, n_random):
            measured[key] = alone
            if each:
                inside[key] = each
    for found, nodes, name in zip(edges or (), (ours, theirs), ("base", "fine-tune"), strict=False):
        if not set(found.nodes) <= set(nodes):
            stranger = next(node for node in found.nodes if node not in nodes)
            raise InputError(f"The {name}'s edges have {stranger}, which its mechanism lacks.")
    return MechanismComparison(
        nodes=node_overlap(ours, theirs, possible),
        edges=None if edges is None else edge_overlap(*edges, EDGES_COMPARED),
        ceiling=ceiling,
        faithfulness=measured,
        base_edges=None if edges is None else edges[0],
        tuned_edges=None if edges is None else edges[1],
        stability=stability,
        inside=inside,
    )


def _stability(
    nodes: Sequence[Node],
    again: HasNodes | Sequence[Node] | MechanismStability,
    candidates: Sequence[Node],
) -> MechanismStability:
    if not isinstance(again, MechanismStability):
        found = {FIRST_SEARCH: nodes, "again": nodes_of(again)}
        return mechanism_stability(found, candidates=candidates)
    name, first = next(iter(again.found.items()))
    if {*first} != {*nodes}:
        raise InputError(
            f"The first of the repeated searches, {name!r}, has other nodes than the mechanism "
            "that is compared; give the mechanism itself as the first."
        )
    return again


def _each_in_each(
    mechanisms: tuple[Any, Any],
    models: tuple[Model, Model],
    prompts: PromptBatch,
    n_random: int,
) -> Iterator[tuple[str, Faithfulness, tuple[NodesEvaluation, ...]]]:
    """Each mechanism alone, in its own model and in the other; and if it can draw random nodes of
    the same layers and roles, all that was measured of it and of these."""
    names = ("base", "tuned")
    for name, mechanism in zip(names, mechanisms, strict=True):
        if not hasattr(mechanism, "evaluate"):
            raise InputError(
                "Plain nodes don't know what was left of the others when they were found: give "
                "mechanisms to have them measured, or their faithfulness."
            )
        for where, model in zip(names, models, strict=True):
            if isinstance(mechanism, Mechanism):
                each = mechanism.evaluate_beside_random(model, prompts, n_random=n_random)
                yield f"{name} in {where}", each[0].faithfulness, each
            else:
                found = mechanism.evaluate(model, prompts)
                yield f"{name} in {where}", found.faithfulness, ()
