"""The mechanism of each model of a study: its nodes, what stands beside them, their edges."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tl_entity.methods.compare_mechanisms import MechanismComparison, NodeOverlap
from tl_entity.methods.edges import Edges
from tl_entity.methods.gated_forward import NodesEvaluation
from tl_entity.methods.mechanism_result import Mechanism
from tl_entity.results import Result, plain
from tl_entity.stats import Chance

if TYPE_CHECKING:
    import pandas as pd

CIRCUIT = "circuit"
"""The model's circuit of groups, among what stands beside its mechanism."""


@dataclass(frozen=True)
class FoundMechanism(Result):
    """What a search for a mechanism gave.

    Attributes:
        mechanism: what was found.
        why_not: why nothing could be.
    """

    mechanism: Mechanism | None
    why_not: str | None = None

    def __str__(self) -> str:
        return str(self.mechanism or self.why_not)


@dataclass(frozen=True)
class FoundEdges(Result):
    """What the scoring of a mechanism's edges gave.

    Attributes:
        edges: the edges.
        why_not: why none could be scored.
    """

    edges: Edges | None
    why_not: str | None = None

    def __str__(self) -> str:
        return str(self.edges or self.why_not)


@dataclass(frozen=True)
class MechanismOfModel(Result):
    """The mechanism of a model, beside what else was left alone in it on the same prompts.

    Attributes:
        found: the mechanism.
        beside: how the model answers with the nodes of another model's mechanism, by its role, and
            with its circuit of groups, `CIRCUIT`.
        again: the mechanism found once more from other prompts.
        edges: the edges between its nodes.
    """

    found: FoundMechanism
    beside: Mapping[str, NodesEvaluation] = field(default_factory=dict[str, NodesEvaluation])
    again: FoundMechanism | None = None
    edges: FoundEdges | None = None

    def __str__(self) -> str:
        return str(self.found)

    @property
    def shown(self) -> Mechanism | None:
        """The mechanism, with the circuit of groups as a point of its figure."""
        mechanism = self.found.mechanism
        return mechanism and replace(mechanism, circuit=self.beside.get(CIRCUIT))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each set of nodes that was left alone, with 95 % intervals."""
        import pandas as pd

        if self.shown is None:
            return pd.DataFrame()
        frames = [self.shown.to_dataframe()]
        for role, point in self.beside.items():
            if role != CIRCUIT:
                named = replace(self.shown, curve=(), random=(), circuit=None, found=point)
                frames.append(named.to_dataframe().assign(nodes=f"mechanism of {role}"))
        return pd.concat(frames, ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """What was found, or why nothing was."""
        mechanism = self.found.mechanism
        if mechanism is None:
            return {"why_not": self.found.why_not}
        edges = self.edges
        return {
            "nodes": plain(mechanism.nodes),
            "n_all": mechanism.n_all,
            "roles": list(mechanism.roles),
            "knowing": list(mechanism.knowing),
            "ablation": mechanism.ablation,
            "metric": mechanism.metric,
            "target": mechanism.target,
            "agreement_target": mechanism.agreement_target,
            "prompts": {
                "training": mechanism.n_training,
                "choosing": mechanism.n_choosing,
                "reporting": len(mechanism.found),
            },
            "alone": left_alone(mechanism.found),
            "curve": [left_alone(point) for point in mechanism.curve],
            "random": [left_alone(point) for point in mechanism.random],
            "beside": {role: left_alone(point) for role, point in self.beside.items()},
            "cpr": plain(mechanism.cpr),
            "cmd": plain(mechanism.cmd),
            "edges": None if edges is None or edges.edges is None else _edges(edges.edges),
            "no_edges": None if edges is None else edges.why_not,
        }


@dataclass(frozen=True)
class SameMechanism(Result):
    """Whether two models have the same mechanism.

    Attributes:
        found: nodes and edges that both have, beside chance.
    """

    found: MechanismComparison

    def __str__(self) -> str:
        return str(self.found)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for nodes, for edges, and for the mechanism found again."""
        return self.found.to_dataframe()

    def to_json(self) -> dict[str, Any]:
        """What is shared, gained and lost, and what chance would share."""
        edges = self.found.edges
        return {
            "nodes": _overlap(self.found.nodes),
            "ceiling": {role: _overlap(again) for role, again in self.found.ceiling.items()},
            "edges": edges
            and {
                **{kind: [str(e) for e in getattr(edges, kind)] for kind in _KINDS},
                "jaccard": plain(edges.jaccard),
                **_chance(edges.chance, len(edges.shared)),
            },
        }


_KINDS = ("shared", "gained", "lost")


def left_alone(point: NodesEvaluation) -> dict[str, Any]:
    """How a model answers with some nodes left, for results.json."""
    faithfulness = point.faithfulness
    return {
        "n_nodes": point.n_nodes,
        "accuracy": point.alone.to_json(),
        "model": point.whole.to_json(),
        "faithfulness": plain(faithfulness.value),
        "interval": plain(faithfulness.interval),
        "agreement": point.agreement,
        "agreement_interval": plain(point.agreement_interval),
        "kl": plain(point.mean_kl),
        "kl_interval": plain(point.kl_interval),
    }


def _edges(edges: Edges) -> list[dict[str, Any]]:
    rows: Any = edges.to_dataframe().to_dict("records")
    return plain(rows)


def _overlap(found: NodeOverlap) -> dict[str, Any]:
    return {
        **{kind: plain(getattr(found, kind)) for kind in _KINDS},
        "jaccard": plain(found.jaccard),
        **_chance(found.chance, len(found.shared)),
        "within_roles": _chance(found.chance_in_roles, len(found.shared)),
    }


def _chance(chance: Chance, n_shared: int) -> dict[str, Any]:
    return {
        "shared_by_chance": chance.expected,
        "chance_range": [chance.low, chance.high],
        "p_value": chance.at_least(n_shared),
    }
