"""What is measured of a base and its fine-tune before anything is said of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tl_entity.heads import Node
from tl_entity.results import Result
from tl_entity.stats import Changes, Interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Share:
    """A share of the prompts in both models.

    Attributes:
        base: in the base model.
        tuned: in the fine-tune.
        difference: fine-tune less base.
        interval: 95 % interval of the difference, prompts compared in pairs.
    """

    base: float
    tuned: float
    difference: float
    interval: Interval


@dataclass(frozen=True)
class Alone:
    """How a model answers with only a mechanism's nodes left, on prompts that did not find them.

    Attributes:
        n_nodes: how many are left.
        n_all: how many there are.
        faithfulness: accuracy as a share of the whole model's.
        faithfulness_interval: 95 % interval.
        agreement: share of prompts answered as the whole model does.
        agreement_interval: 95 % interval.
        nodes: which are left.
    """

    n_nodes: int
    n_all: int
    faithfulness: float
    faithfulness_interval: Interval
    agreement: float
    agreement_interval: Interval
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class NodeChange:
    """A node whose share of the work is another in one model than in the other.

    Attributes:
        node: the node.
        base: its share of all effects in the base.
        tuned: in the fine-tune.
        p_value: that it is no more than `RATIO` times as much in one as in the other; of all nodes
            at once, by Benjamini and Hochberg (1995).
    """

    node: Node
    base: float
    tuned: float
    p_value: float


@dataclass(frozen=True)
class NodesCompared:
    """Which nodes do the work in either model.

    Attributes:
        changes: shares lost and new.
        common: what the shares have in common, the sum of the smaller of both over all nodes.
        by_chance: what they would have if the heads of each layer changed places.
        p_value: how probable it is by chance to have this much in common.
        nodes: the nodes that do most of the work in either, those that changed most first.
    """

    changes: Changes
    common: float
    by_chance: float
    p_value: float
    nodes: tuple[NodeChange, ...]


@dataclass(frozen=True)
class GainParts:
    """Where in the weights the gain lies.

    Attributes:
        gain: in the metric, on all prompts.
        gain_interval: 95 % interval.
        parts: for each part of the weights its share of the gain, and the 95 % interval.
        error: of the integration, as a share of the gain.
    """

    gain: float
    gain_interval: Interval
    parts: Mapping[str, tuple[float, Interval]]
    error: float


@dataclass(frozen=True)
class PairEvidence(Result):
    """All that the answers of `judge_pair` rest on.

    Attributes:
        n: prompts.
        better: answered right.
        ability: answered right if only the tokens of the answer's role could be named; None if
            it is not known which these are.
        errors: for each kind of wrong answer how often it is given.
        base_alone: the base's mechanism in the base.
        tuned_alone: the fine-tune's in the fine-tune.
        base_in_tuned: the base's mechanism in the fine-tune.
        tuned_in_base: the fine-tune's in the base.
        nodes: which nodes do the work.
        edges: which senders each receiver's input is from; groups are inputs of receivers.
        information: what is carried; groups are roles.
        gain: where it lies.
        missing: for what could not be measured, the reason.
    """

    n: int
    better: Share
    ability: Share | None
    errors: Mapping[str, Share]
    base_alone: Alone | None
    tuned_alone: Alone | None
    base_in_tuned: Alone | None
    tuned_in_base: Alone | None
    nodes: NodesCompared | None
    edges: Changes | None
    information: Changes | None
    gain: GainParts | None
    missing: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"{self.n} prompts: {self.better.base:.3f} right in the base, {self.better.tuned:.3f} "
            f"in the fine-tune; {len(self.missing)} things could not be measured"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each number, with its interval."""
        import pandas as pd

        rows: list[tuple[str, float, Interval]] = [
            ("gain in accuracy", self.better.difference, self.better.interval)
        ]
        if self.ability is not None:
            rows.append(("gain in ability", self.ability.difference, self.ability.interval))
        rows += [(f"errors: {k}", e.difference, e.interval) for k, e in self.errors.items()]
        for name, alone in self.mechanisms.items():
            rows.append((f"faithfulness: {name}", alone.faithfulness, alone.faithfulness_interval))
            rows.append((f"agreement: {name}", alone.agreement, alone.agreement_interval))
        for name, found in self.changes.items():
            rows.append((f"{name} lost", found.lost, found.lost_interval))
            rows.append((f"{name} new", found.new, found.new_interval))
        if self.gain is not None:
            rows += [(f"gain in {name}", *part) for name, part in self.gain.parts.items()]
        return pd.DataFrame(
            [{"of": name, "value": v, "low": i.low, "high": i.high} for name, v, i in rows]
        )

    @property
    def mechanisms(self) -> dict[str, Alone]:
        """Each mechanism in each model, where it was found."""
        named = {
            "base in base": self.base_alone,
            "fine-tune in fine-tune": self.tuned_alone,
            "base in fine-tune": self.base_in_tuned,
            "fine-tune in base": self.tuned_in_base,
        }
        return {name: alone for name, alone in named.items() if alone is not None}

    @property
    def changes(self) -> dict[str, Changes]:
        """What was lost and new, of what was compared."""
        named = {
            "nodes": None if self.nodes is None else self.nodes.changes,
            "edges": self.edges,
            "information": self.information,
        }
        return {name: found for name, found in named.items() if found is not None}
