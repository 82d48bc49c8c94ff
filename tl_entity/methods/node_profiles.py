"""Nodes of a mechanism put together by what they do: like role, like edges."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Node
from tl_entity.hooks.edges import Edge
from tl_entity.methods.edges import Edges

LIKE = 0.4
"""Nodes are put together from this likeness up. Two with the same edges are that much alike if one
is six times as strong as the other."""

ROUNDS = 5
"""How often groups are made anew by the groups that their edges lead to, at most."""

Profile = Mapping[Hashable, float]
"""What a node reads and writes: summed scores of its edges by direction, input, and what is at the
other end."""


def clear_edges(edges: Edges) -> dict[Edge, float]:
    """The scores of the edges that are exact and whose intervals leave out zero."""
    low, high = edges.intervals.T
    kept = edges.exact.cpu().numpy() & ((low > 0) | (high < 0))
    scores = edges.score.tolist()
    return {edges.edges[i]: scores[i] for i in np.flatnonzero(kept).tolist()}


@checked
def alike_nodes(
    nodes: Sequence[Node], scores: Mapping[Edge, float], *, like: float = LIKE
) -> list[tuple[Node, ...]]:
    """Groups of nodes of one role with like edges; a node without edges is in none.

    At first a node's profile is by the roles at its edges' other ends. The groups that come of it
    take the roles' place, and groups are made anew, until they stay. Within a role the two groups
    that are most alike are joined, by the mean likeness of their nodes, as long as that is at least
    `like`. Likeness of two profiles is their cosine, times the root of the ratio of their lengths.

    Args:
        nodes: the nodes.
        scores: of edges between them.
        like: from which likeness up nodes are put together.

    Raises:
        InputError: if the likeness is not between 0 and 1, or an edge is between other nodes.
    """
    if not 0 < like <= 1:
        raise InputError(f"Nodes are alike by a number in (0, 1], not {like}.")
    for edge in scores:
        if not {edge.sender, edge.receiver} <= {*nodes, None}:
            raise InputError(f"The edge {edge} is between nodes that are none of those given.")
    at_end: dict[Node, Hashable] = {node: node.role for node in nodes}
    groups: list[tuple[Node, ...]] = []
    for _ in range(ROUNDS):
        profiles = _profiles(nodes, scores, at_end)
        before, groups = groups, _joined(profiles, like)
        if groups == before:
            break
        at_end |= {node: (node.role, i) for i, group in enumerate(groups) for node in group}
    return groups


def _profiles(
    nodes: Sequence[Node], scores: Mapping[Edge, float], at_end: Mapping[Node, Hashable]
) -> dict[Node, Profile]:
    found: dict[Node, dict[Hashable, float]] = {node: {} for node in nodes}
    for (sender, receiver, into), score in scores.items():
        end = "logits" if receiver is None else at_end[receiver]
        _add(found[sender], ("writes", into, end), score)
        if receiver is not None:
            _add(found[receiver], ("reads", into, at_end[sender]), score)
    return {node: profile for node, profile in found.items() if profile}


def _add(profile: dict[Hashable, float], key: Hashable, score: float) -> None:
    profile[key] = profile.get(key, 0.0) + score


def likeness(one: Profile, other: Profile) -> float:
    """The cosine of two profiles, times the root of the ratio of their lengths."""
    lengths = [float(np.linalg.norm(list(some.values()))) for some in (one, other)]
    if not min(lengths):
        return 0.0
    product = sum(score * other.get(key, 0.0) for key, score in one.items())
    return product / (lengths[0] * lengths[1]) * (min(lengths) / max(lengths)) ** 0.5


def _joined(profiles: Mapping[Node, Profile], like: float) -> list[tuple[Node, ...]]:
    groups: list[tuple[Node, ...]] = []
    for role in dict.fromkeys(node.role for node in profiles):
        nodes = sorted((n for n in profiles if n.role == role), key=str)
        alike = np.array([[likeness(profiles[a], profiles[b]) for b in nodes] for a in nodes])
        parts = [[i] for i in range(len(nodes))]
        while len(parts) > 1:
            means = np.array([[alike[np.ix_(a, b)].mean() for b in parts] for a in parts])
            np.fill_diagonal(means, -np.inf)
            i, j = sorted(np.unravel_index(means.argmax(), means.shape))
            if means[i, j] < like:
                break
            parts[i] = sorted(parts[i] + parts.pop(j))
        groups += [tuple(nodes[k] for k in part) for part in parts]
    return groups
