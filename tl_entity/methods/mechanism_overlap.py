"""What two mechanisms share, of nodes and of edges, beside what chance would share."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tl_entity._typing import checked
from tl_entity.heads import Node
from tl_entity.hooks.edges import Edge
from tl_entity.methods.edges import Edges
from tl_entity.methods.stability import chance_in_cells, check_candidates
from tl_entity.stats import Chance, overlap_by_chance, overlap_of_choices


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
def node_overlap(
    ours: Sequence[Node], theirs: Sequence[Node], candidates: Sequence[Node]
) -> NodeOverlap:
    """What two mechanisms' nodes share.

    Raises:
        InputError: if one is none of the candidates.
    """
    check_candidates({*ours} | {*theirs}, candidates)
    both = [ours, theirs]
    return NodeOverlap(
        shared=tuple(node for node in ours if node in theirs),
        gained=tuple(node for node in theirs if node not in ours),
        lost=tuple(node for node in ours if node not in theirs),
        chance=chance_in_cells(candidates, both, lambda n: (n.layer, n.head is None)),
        chance_in_roles=chance_in_cells(
            candidates, both, lambda n: (n.layer, n.head is None, n.role)
        ),
    )


@checked
def edge_overlap(base: Edges, tuned: Edges, n: int) -> EdgeOverlap:
    """What the `n` strongest edges of two mechanisms share, of those that are exact and clear of
    zero."""
    ours, theirs = (found.top(n, clear=True) for found in (base, tuned))

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
