"""How steady is a mechanism? Which of its nodes are found again from other prompts, phrasings,
ablations and seeds."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Node, as_node
from tl_entity.methods.edges import HasNodes
from tl_entity.results import ROWS_SHOWN, Result
from tl_entity.stats import Chance, shared_by_all

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FEW = 1 / 3
"""A node found in no more than this share of the searches is noise."""

Standing = Literal["core", "contingent", "noise"]
"""How often a node is found: in all searches, in some, or in few."""

STANDINGS: tuple[Standing, ...] = ("core", "contingent", "noise")


@dataclass(frozen=True)
class MechanismStability(Result):
    """The same model's mechanism found several times.

    Attributes:
        found: the nodes of each search, by its name; the first is what others are compared with.
        changed: what each search changed against the first, such as "seed" or "ablation".
        n_candidates: how many nodes could have been found.
        chance: how many nodes would be in all searches if each search's nodes were drawn anew
            within their own layers and roles, heads and MLPs apart.
    """

    found: Mapping[str, tuple[Node, ...]]
    changed: Mapping[str, str]
    n_candidates: int
    chance: Chance

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.nodes(kind))} {kind}" for kind in STANDINGS)
        text = (
            f"{len(self.found)} searches: {counts} nodes ({self.chance.expected:.1f} core by "
            f"chance, p = {self.p_value:.2g})"
        )
        by_change: dict[str, list[float]] = {}
        for name, jaccard in self.jaccard.items():
            by_change.setdefault(self.changed[name], []).append(jaccard)
        told = (
            f"{change} " + ", ".join(f"{jaccard:.2f}" for jaccard in some)
            for change, some in by_change.items()
        )
        return text + ("; Jaccard with the first by change: " + "; ".join(told)) * bool(by_change)

    @property
    def times(self) -> dict[Node, int]:
        """In how many searches each node was found, the most often found first."""
        return dict(Counter(node for nodes in self.found.values() for node in nodes).most_common())

    def standing(self, node: Node) -> Standing | None:
        """Whether a node is core, contingent or noise; None if no search found it."""
        times = sum(node in nodes for nodes in self.found.values())
        if not times:
            return None
        if times == len(self.found):
            return "core"
        return "noise" if times <= FEW * len(self.found) else "contingent"

    def nodes(self, standing: Standing) -> tuple[Node, ...]:
        """The nodes that stand so."""
        return tuple(node for node in self.times if self.standing(node) == standing)

    @property
    def core(self) -> tuple[Node, ...]:
        """The nodes that every search found."""
        return self.nodes("core")

    @property
    def contingent(self) -> tuple[Node, ...]:
        """The nodes that some searches found and others did not: which they are may hang on the
        prompts, the ablation or on which of two that can stand in for each other comes first."""
        return self.nodes("contingent")

    @property
    def noise(self) -> tuple[Node, ...]:
        """The nodes that few searches found."""
        return self.nodes("noise")

    @property
    def p_value(self) -> float:
        """How probable so many core nodes or more are by chance."""
        return self.chance.at_least(len(self.core))

    @property
    def jaccard(self) -> dict[str, float]:
        """For each further search, what it shares with the first, as a share of what is in either;
        NaN if both are empty."""
        (_, first), *others = self.found.items()
        return {name: _jaccard(first, nodes) for name, nodes in others}

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a node: in how many searches it was found, how it stands, and which searches
        found it; the most often found first."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "node": str(node),
                    "layer": node.layer,
                    "role": node.role,
                    "times": times,
                    "share": times / len(self.found),
                    "standing": self.standing(node),
                    **{name: node in nodes for name, nodes in self.found.items()},
                }
                for node, times in self.times.items()
            ]
        )

    def searches_dataframe(self) -> "pd.DataFrame":
        """One row a search: what it changed, how many nodes it found and how these stand, and what
        it shares with the first."""
        import pandas as pd

        jaccard = self.jaccard
        return pd.DataFrame(
            [
                {
                    "search": name,
                    "changed": self.changed.get(name, ""),
                    "nodes": len(nodes),
                    **dict.fromkeys(STANDINGS, 0),
                    **Counter(map(self.standing, nodes)),
                    "jaccard": jaccard.get(name, float("nan")),
                }
                for name, nodes in self.found.items()
            ]
        )

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """What `searches_dataframe` gives."""
        rows = self.searches_dataframe()
        return rows if n is None else rows.head(n)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """What any two searches share, as a share of what is in either (Jaccard)."""
        from tl_entity.plots.heatmaps import share_heatmap

        each = list(self.found.values())
        counts = ", ".join(f"{len(self.nodes(kind))} {kind}" for kind in STANDINGS)
        return share_heatmap(
            list(self.found),
            list(self.found),
            np.array([[_jaccard(one, other) for other in each] for one in each]),
            title=f"Nodes shared by two searches; {counts}" if title is None else title,
            name="Jaccard",
            joint="and ",
        )


@checked
def mechanism_stability(
    found: Mapping[str, HasNodes | Sequence[Node]],
    *,
    changed: Mapping[str, str] | None = None,
    candidates: Sequence[Node] | None = None,
) -> MechanismStability:
    """Tell the nodes that every search finds from those that hang on how it was made.

    A search is repeated with `find_mechanism`, one thing changed at a time: other prompts, another
    phrasing, another kind of ablation, another seed.

    Args:
        found: the mechanisms, or their nodes, by the name of the search; two at least. The others
            are compared with the first.
        changed: what each further search changed against the first; its name if left out.
        candidates: all nodes that could have been found; those of all mechanisms, every head (and
            MLP) at every role, if left out.

    Raises:
        InputError: if there are fewer than two searches, a node is none of the candidates, or these
            are not known.
    """
    if len(found) < 2:
        raise InputError("One search says nothing about how steady a mechanism is; give several.")
    unknown = set(changed or ()) - set(found)
    if unknown:
        raise InputError(f"There is no search {min(unknown)!r} that could have changed something.")
    nodes = {name: nodes_of(mechanism) for name, mechanism in found.items()}
    if candidates is None:
        each = [candidates_of(mechanism) for mechanism in found.values()]
        possible = list(dict.fromkeys(node for some in each for node in some))
    else:
        possible = list(dict.fromkeys(map(as_node, candidates)))
    check_candidates({node for some in nodes.values() for node in some}, possible)
    others = list(nodes)[1:]
    return MechanismStability(
        found=nodes,
        changed={name: (changed or {}).get(name, name) for name in others},
        n_candidates=len(possible),
        chance=chance_in_cells(
            possible, list(nodes.values()), lambda n: (n.layer, n.head is None, n.role)
        ),
    )


def _jaccard(one: Sequence[Node], other: Sequence[Node]) -> float:
    either = len({*one} | {*other})
    return len({*one} & {*other}) / either if either else float("nan")


@checked
def nodes_of(mechanism: HasNodes | Sequence[Node]) -> tuple[Node, ...]:
    """A mechanism's nodes, each once."""
    nodes = mechanism.nodes if isinstance(mechanism, HasNodes) else mechanism
    return tuple(dict.fromkeys(as_node(node) for node in nodes))


def candidates_of(mechanism: HasNodes | Sequence[Node]) -> list[Node]:
    """Every head, and every MLP if these are nodes, at every role that the mechanism knows of.

    Raises:
        InputError: if it does not know.
    """
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


def check_candidates(nodes: set[Node], candidates: Sequence[Node]) -> None:
    """Make sure that nodes are among the candidates.

    Raises:
        InputError: if one is not.
    """
    missing = nodes - {*candidates}
    if missing:
        raise InputError(f"{min(missing, key=str)} is none of the candidates.")


def chance_in_cells(
    candidates: Sequence[Node],
    choices: Sequence[Sequence[Node]],
    cell: Callable[[Node], Hashable],
) -> Chance:
    """How many nodes would be in all choices if each were drawn anew within its own cells."""
    sizes = Counter(map(cell, dict.fromkeys(candidates)))
    counts = [Counter(map(cell, nodes)) for nodes in choices]
    return reduce(
        Chance.and_also,
        (shared_by_all(n, [count[key] for count in counts]) for key, n in sizes.items()),
        shared_by_all(0, [0]),
    )
