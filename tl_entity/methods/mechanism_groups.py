"""The groups that a mechanism is made of: nodes with like role and edges, called by what they read,
where they write and what they carry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Node
from tl_entity.hooks.edges import Edge
from tl_entity.methods.edges import Edges, HasNodes
from tl_entity.methods.group_information import (
    Patched,
    attention_by_role,
    patch_nodes,
    selected_nodes,
)
from tl_entity.methods.node_profiles import LIKE, alike_nodes, clear_edges
from tl_entity.methods.stability import nodes_of
from tl_entity.results import ROWS_SHOWN, Result
from tl_entity.tasks.batches import PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SMALLEST = 0.01
"""Edges that change the answer's probability by less than this share of it are left out."""


class GroupEdge(NamedTuple):
    """What a group reads from, or writes into.

    Attributes:
        end: the group, or the role where a node is of no group, or `logits`.
        input: which input is read or written.
        score: sum of the edges' scores.
    """

    end: str
    input: str
    score: float


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one role with like edges.

    Attributes:
        name: where it writes most, such as `label into v of query_label`; a number behind it tells
            apart groups of which that is true, the stronger first.
        role: of its nodes.
        nodes: the nodes.
        attends: mean attention from its tokens on those of each role.
        reads: what reaches it, the strongest first.
        writes: what it reaches, the strongest first.
        patched: how often its outputs bring the target of each desideratum.
    """

    name: str
    role: str
    nodes: tuple[Node, ...]
    attends: Mapping[str, float]
    reads: tuple[GroupEdge, ...]
    writes: tuple[GroupEdge, ...]
    patched: tuple[Patched, ...]

    @property
    def strength(self) -> float:
        """Sum of the scores of the edges that lead from it; below zero it helps."""
        return sum(edge.score for edge in self.writes)

    @property
    def looks_at(self) -> str:
        """The role attended to most; empty if it attends to nothing."""
        return max(self.attends, key=lambda role: self.attends[role], default="")


@dataclass(frozen=True)
class MechanismGroups(Result):
    """A mechanism as groups of nodes.

    Attributes:
        groups: the groups, the one with the strongest edges first.
        others: nodes of the mechanism without an edge that is exact, clear of zero and at least
            `smallest`.
        unpatched: how often the target is answered with nothing patched.
        selected: for each desideratum the nodes that DCM selects; empty if it was not asked for.
        smallest: the least size of an edge that counts.
        like: from which likeness nodes were put together.
    """

    groups: tuple[NodeGroup, ...]
    others: tuple[Node, ...]
    unpatched: tuple[Patched, ...]
    selected: Mapping[str, tuple[Node, ...]]
    smallest: float
    like: float

    def __str__(self) -> str:
        n_nodes = sum(len(group.nodes) for group in self.groups)
        text = (
            f"{len(self.groups)} groups of {n_nodes} nodes, {len(self.others)} further nodes "
            f"without an edge of {self.smallest:g} that is clear"
        )
        return text + "".join(f"; {self.say(group)}" for group in self.groups[:5])

    def __getitem__(self, name: str) -> NodeGroup:
        """The group of this name.

        Raises:
            KeyError: if there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def say(self, group: NodeGroup) -> str:
        """A group in words: its nodes, what they look at, where they write, what they carry."""
        heads = " ".join(str(node).split("@")[0] for node in group.nodes)
        looks = f", looking at {group.looks_at}" if group.looks_at else ""
        carried = self.carries(group)
        return f"{group.name} ({heads}{looks}{f'; carries {carried}' if carried else ''})"

    def carries(self, group: NodeGroup) -> str:
        """The desideratum whose target the group brings, with `to be found by` where that is how;
        empty where none stands out. One does whose interval lies above that of the run with nothing
        patched and above those of all other desiderata."""
        by_itself = {found.desideratum: found.interval.high for found in self.unpatched}
        best = max(group.patched, key=lambda found: found.share, default=None)
        if best is None or best.interval.low <= by_itself[best.desideratum]:
            return ""
        rivals = [some for some in group.patched if some.desideratum != best.desideratum]
        if any(best.interval.low <= rival.interval.high for rival in rivals):
            return ""
        name = best.desideratum.replace("_", " ")
        return f"{name} to be found by" if best.way == "found" else name

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a group: its nodes, what it looks at, reads, writes and carries, and how often it
        brings each target."""
        import pandas as pd

        def listed(edges: Sequence[GroupEdge]) -> str:
            return "; ".join(f"{e.input} {e.end} {e.score:+.3f}" for e in edges[:3])

        return pd.DataFrame(
            [
                {
                    "group": group.name,
                    "n_nodes": len(group.nodes),
                    "nodes": " ".join(str(node).split("@")[0] for node in group.nodes),
                    "strength": group.strength,
                    "looks_at": group.looks_at,
                    "weight": group.attends.get(group.looks_at, float("nan")),
                    "reads": listed(group.reads),
                    "writes": listed(group.writes),
                    "carries": self.carries(group),
                    **{f"{p.desideratum}, {p.way}": p.share for p in group.patched},
                    **{
                        f"DCM {name}": sum(node in nodes for node in group.nodes)
                        for name, nodes in self.selected.items()
                    },
                }
                for group in self.groups
            ]
        )

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The `n` strongest groups, without the single targets."""
        columns = ["group", "nodes", "strength", "looks_at", "reads", "writes", "carries"]
        rows = self.to_dataframe().reindex(columns=columns)
        return rows if n is None else rows.head(n)

    def beside(self, circuit: Circuit, roles: Mapping[str, str] | None = None) -> "pd.DataFrame":
        """For each group of a known circuit, the group here that shares most with it.

        Args:
            circuit: the circuit.
            roles: for a named position of the circuit, the role that is blind to what is asked,
                such as `{"previous_query_label": "label"}`; other positions are roles themselves.

        Raises:
            InputError: if there are no groups.
        """
        import pandas as pd

        if not self.groups:
            raise InputError("No nodes were put together, so no group can be compared.")
        rows: list[dict[str, object]] = []
        for known in circuit:
            role = (roles or {}).get(known.position, known.position)
            nodes = {Node(head.layer, head.head, role) for head in known.heads}
            best = max(self.groups, key=lambda group, of=nodes: _jaccard(of, group.nodes))
            rows.append(
                {
                    "known": known.name,
                    "heads": " ".join(map(str, known.heads)),
                    "group": best.name,
                    "shared": len(nodes & {*best.nodes}),
                    "missed": " ".join(str(n) for n in sorted(nodes - {*best.nodes})),
                    "more": " ".join(str(n) for n in best.nodes if n not in nodes),
                    "carries": self.carries(best),
                }
            )
        return pd.DataFrame(rows)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """How often each group (rows) brings the target of each desideratum (columns)."""
        from tl_entity.plots.heatmaps import share_heatmap

        columns = list(
            dict.fromkeys((p.desideratum, p.way) for g in self.groups for p in g.patched)
        )
        shares = np.full((len(self.groups), len(columns)), np.nan)
        for i, group in enumerate(self.groups):
            for found in group.patched:
                shares[i, columns.index((found.desideratum, found.way))] = found.share
        return share_heatmap(
            [group.name for group in self.groups],
            [f"{name.replace('_', ' ')}, {way}" for name, way in columns],
            shares,
            title="Answers with the target, by group patched" if title is None else title,
            name="share",
        )


@checked
def mechanism_groups(
    model: Model,
    prompts: PromptBatch,
    mechanism: HasNodes | Sequence[Node],
    edges: Edges,
    *,
    draws: Mapping[str, PairBatch] | None = None,
    like: float = LIKE,
    smallest: float = SMALLEST,
    dcm: bool = False,
) -> MechanismGroups:
    """Put a mechanism's nodes together by role and edges, and say what each group does.

    Only edges count that are exact, clear of zero and not small: run more of them with `top_n` of
    `mechanism_edges`. How nodes are put together is said at `alike_nodes`.

    Args:
        model: the model.
        prompts: prompts to see what is attended to.
        mechanism: its nodes, or anything that has `nodes`.
        edges: its edges.
        draws: pairs of each desideratum by name, as `desideratum_pairs` makes, to see what groups
            carry; nothing is said of that without.
        like: from which likeness up nodes are put together.
        smallest: the least size of an edge that counts.
        dcm: whether masks are trained too, to see which of the nodes carry each desideratum.

    Raises:
        InputError: if an edge is between nodes that the mechanism lacks, or as `patch_nodes`.
    """
    nodes = nodes_of(mechanism)
    stranger = next((node for node in edges.nodes if node not in nodes), None)
    if stranger is not None:
        raise InputError(f"The edges have {stranger}, which the mechanism lacks.")
    scores = {edge: score for edge, score in clear_edges(edges).items() if abs(score) >= smallest}
    draws = draws or {}
    alike = alike_nodes(nodes, scores, like=like)
    names = _names(alike, scores)
    end_of = {node: name for name, group in names.items() for node in group}
    groups = [
        NodeGroup(
            name=name,
            role=some[0].role,
            nodes=some,
            attends=attention_by_role(model, prompts, some),
            reads=_reads(some, scores, end_of),
            writes=_writes(some, scores, end_of),
            patched=patch_nodes(model, draws, some),
        )
        for name, some in names.items()
    ]
    return MechanismGroups(
        groups=tuple(groups),
        others=tuple(node for node in nodes if node not in end_of),
        unpatched=patch_nodes(model, draws, ()),
        selected=selected_nodes(model, draws, nodes) if dcm else {},
        smallest=smallest,
        like=like,
    )


def _names(
    groups: Sequence[tuple[Node, ...]], scores: Mapping[Edge, float]
) -> dict[str, tuple[Node, ...]]:
    """The groups by name, the one with the strongest edges first."""

    def strength(group: tuple[Node, ...]) -> float:
        return sum(abs(score) for edge, score in scores.items() if edge.sender in group)

    found: dict[str, tuple[Node, ...]] = {}
    for group in sorted(groups, key=strength, reverse=True):
        role = group[0].role
        into = _writes(group, scores, {})
        name = f"{role}, writing nowhere" if not into else f"{role} into {_where(into[0])}"
        before = sum(other.partition(" (")[0] == name for other in found)
        found[f"{name} ({before + 1})" if before else name] = group
    return found


def _where(edge: GroupEdge) -> str:
    return "the logits" if edge.input == "logits" else f"{edge.input} of {edge.end}"


def _writes(
    group: Sequence[Node], scores: Mapping[Edge, float], end_of: Mapping[Node, str]
) -> tuple[GroupEdge, ...]:
    return _summed(
        [
            ("logits" if e.receiver is None else end_of.get(e.receiver, e.receiver.role), e, score)
            for e, score in scores.items()
            if e.sender in group
        ]
    )


def _reads(
    group: Sequence[Node], scores: Mapping[Edge, float], end_of: Mapping[Node, str]
) -> tuple[GroupEdge, ...]:
    return _summed(
        [
            (end_of.get(edge.sender, edge.sender.role), edge, score)
            for edge, score in scores.items()
            if edge.receiver in group
        ]
    )


def _summed(edges: Sequence[tuple[str, Edge, float]]) -> tuple[GroupEdge, ...]:
    total: dict[tuple[str, str], float] = {}
    for end, edge, score in edges:
        total[end, edge.input] = total.get((end, edge.input), 0.0) + score
    found = [GroupEdge(end, into, score) for (end, into), score in total.items()]
    return tuple(sorted(found, key=lambda edge: -abs(edge.score)))


def _jaccard(nodes: set[Node], group: Sequence[Node]) -> float:
    return len(nodes & {*group}) / len(nodes | {*group})
