"""Does a circuit need each of its heads? (Prakash et al. 2024, §3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Group, Head, HeadsAt
from tl_entity.hooks.ablations import Ablation, AblationKind
from tl_entity.methods.circuits import Evaluation, ablation_of, evaluate_circuits
from tl_entity.results import Label, Result, plain
from tl_entity.runs.runner import RunSettings
from tl_entity.stats import Interval, paired_counts, paired_ratio_interval
from tl_entity.tasks.batches import PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

THRESHOLD = 0.01
"""A head is kept from this score up (the paper's)."""

LARGEST_SHARE = 0.3
"""K has at most this share of a group's heads, rounded up (the paper's)."""

Part = tuple[str, frozenset[Head]]
"""A group by name, and some of its heads."""


@dataclass(frozen=True)
class HeadMinimality:
    """What the circuit loses with one of its heads, once those that stand in for it are gone.

    Attributes:
        group: name of the head's group.
        head: the head v.
        removed: K, other heads of the group, in the order in which they were chosen.
        without_removed: F(C \\ K).
        without_head: F(C \\ (K ∪ {v})).
        score: F(C \\ K) / F(C \\ (K ∪ {v})) - 1. Infinite if only the latter is 0; 0 if both are,
            where nothing is left that v could add to.
        interval: 95 % score interval of the score with this K, prompts compared in pairs
            (`paired_ratio_interval`); its upper end may be infinite. That K was chosen for the
            highest score on the same prompts is not in it.
        kept: whether the score reaches the threshold.
    """

    group: str
    head: Head
    removed: tuple[Head, ...]
    without_removed: Evaluation
    without_head: Evaluation
    score: float
    interval: Interval
    kept: bool

    def __str__(self) -> str:
        return (
            f"{self.head} of {self.group}: {self.score:.3f} {self.interval} "
            f"({self.without_removed.accuracy:.3f} to {self.without_head.accuracy:.3f} without "
            f"{' '.join(map(str, self.removed)) or 'others'}), {'kept' if self.kept else 'dropped'}"
        )

    def to_json(self) -> dict[str, Any]:
        """The head, what was removed with it, both accuracies, the score and its interval."""
        return {
            "group": self.group,
            "head": plain(self.head),
            "removed": plain(self.removed),
            "without_removed": self.without_removed.to_json(),
            "without_head": self.without_head.to_json(),
            "score": plain(self.score),
            "interval": plain(self.interval),
            "kept": self.kept,
        }


@dataclass(frozen=True)
class Minimality(Result):
    """Which heads a circuit needs.

    Attributes:
        circuit: the circuit C.
        minimal: what is left of it: the heads whose score reaches the threshold.
        of_circuit: F(C).
        of_minimal: accuracy with only the minimal circuit's heads left.
        heads: every head's score and what it is made of, in the circuit's order.
        parts: for every part of a group that was removed, F of the circuit without it.
        threshold: what a score must reach.
        largest_share: the share of a group that K may have.
        seed: as given; nothing is drawn.
        ablation: the kind of ablation.
    """

    circuit: Circuit
    minimal: Circuit
    of_circuit: Evaluation
    of_minimal: Evaluation
    heads: tuple[HeadMinimality, ...]
    parts: dict[Part, Evaluation]
    threshold: float
    largest_share: float
    seed: int
    ablation: AblationKind

    def __str__(self) -> str:
        return (
            f"{len(self.minimal)} of {len(self.circuit)} heads kept: accuracy "
            f"{self.of_minimal.accuracy:.3f} {self.of_minimal.interval} with them, "
            f"{self.of_circuit.accuracy:.3f} {self.of_circuit.interval} with all"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a head, with K, both accuracies as counts, the score and its interval."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "group": found.group,
                    "head": str(found.head),
                    "removed": " ".join(map(str, found.removed)),
                    "n_prompts": len(found.without_head),
                    "without_removed_correct": int(found.without_removed.correct.sum()),
                    "without_removed": found.without_removed.accuracy,
                    "without_head_correct": int(found.without_head.correct.sum()),
                    "without_head": found.without_head.accuracy,
                    "score": found.score,
                    "low": found.interval.low,
                    "high": found.interval.high,
                    "kept": found.kept,
                }
                for found in self.heads
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The kind of ablation, what is left of the circuit and how it does, one entry a head."""
        return {
            "ablation": self.ablation,
            "entries": [found.to_json() for found in self.heads],
            "circuit": self.of_circuit.to_json(),
            "minimal": self.of_minimal.to_json(),
            "minimal_circuit": plain(self.minimal),
        }

    def plot(self, *, title: str | None = None, label: Label = str) -> "go.Figure":
        """What the circuit loses with each head, a colour a group. What is infinite is as high as
        the figure, and marked: the most needed heads of all.

        Args:
            title: above the figure.
            label: what the groups are called in it.
        """
        from tl_entity.plots.bars import Bar, grouped_bars

        numbers = [(found.score, *found.interval) for found in self.heads]
        # Even the lower end of what is infinite may be so high that nothing else would be seen.
        seen = [n for some in numbers if some[0] < math.inf for n in some if n < math.inf]
        highest = max([1.0, *seen])
        series: dict[str, dict[str, Bar]] = {label(found.group): {} for found in self.heads}
        for found, (value, low, high) in zip(self.heads, numbers, strict=True):
            name = str(found.head) + ("" if found.kept else " (dropped)")
            name += " ∞" if value == math.inf else " ↑" if high == math.inf else ""
            series[label(found.group)][name] = Bar(
                min(value, highest),
                min(low, highest),
                min(high, highest),
                says=f"{value:.1%} [{low:.1%}, {high:.1%}]".replace("inf%", "∞"),
            )
        figure = grouped_bars(
            series, title=str(self) if title is None else title, axis="minimality"
        )
        figure.update_yaxes(range=None, autorange=True, tickformat=".0%", dtick=None)
        return figure.update_layout(barmode="overlay")


@checked
def minimality(
    model: Model,
    prompts: PromptBatch,
    circuit: Circuit,
    *,
    ablation: Ablation | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    seed: int,
    threshold: float = THRESHOLD,
    largest_share: float = LARGEST_SHARE,
    **how: Unpack[RunSettings],
) -> Minimality:
    """Keep the heads that a circuit loses accuracy by (Prakash et al. 2024, §3.3).

    A head v may seem useless because others of its group stand in for it. So its score is taken
    with some of them, K, removed:

        (F(C \\ K) - F(C \\ (K ∪ {v}))) / F(C \\ (K ∪ {v}))

    K is chosen greedily from pairs. Every pair of heads of a group is removed together once. The
    others of the group are ranked by how much more is lost when v goes too,
    F(C \\ {u}) - F(C \\ {u, v}), those with which nothing more is lost left out; of the first
    none, one, two, ... of them, at most `largest_share` of the group, K is the choice with the
    highest score (the smaller one if equal). As the highest of several, a score errs upwards: by
    chance rather a useless head is kept than a needed one dropped. Scores are of exact accuracies,
    never rounded ones.

    Each head is judged within the whole circuit, so heads that stand in for each other are all
    kept. Those dropped are dropped together; `of_minimal` says what that costs.

    Args:
        model: the model.
        prompts: the prompts.
        circuit: the circuit C.
        ablation: as in `evaluate`. It decides which heads seem needed: the paper's mean by token
            index leaves a head that only tells which token it is all that it does.
        mean_outputs: as in `evaluate`.
        seed: kept in the result; nothing is drawn, now that the intervals are no bootstrap.
        threshold: the score that a head must reach to be kept.
        largest_share: share of a group that K may have, rounded up.
        how: as in `evaluate`. One part removed on one prompt is a run.

    Raises:
        InputError: as `evaluate`; or if `largest_share` is no share.
    """
    if not 0 <= largest_share <= 1:
        raise InputError(f"The largest share of a group is from 0 to 1, not {largest_share}.")
    positions = {group.name: group.position for group in circuit}
    ablated = ablation_of(model, ablation, mean_outputs)
    found: dict[Part, Evaluation] = {}

    def evaluate_parts(parts: Sequence[Part]) -> None:
        new = [part for part in dict.fromkeys(parts) if part not in found]
        gone = [{positions[name]: tuple(sorted(heads))} for name, heads in new]
        found.update(zip(new, evaluate_all([circuit] * len(new), gone), strict=True))

    def evaluate_all(circuits: Sequence[Circuit], gone: Sequence[HeadsAt]) -> list[Evaluation]:
        return evaluate_circuits(model, prompts, circuits, removed=gone, ablation=ablated, **how)

    # With nothing removed every group means the same circuit, which is evaluated once.
    (of_circuit,) = evaluate_all([circuit], [{}])
    found.update({(group.name, frozenset()): of_circuit for group in circuit})
    evaluate_parts(
        [
            (group.name, frozenset(some))
            for group in circuit
            for n in (1, 2)
            for some in combinations(group.heads, n)
        ]
    )
    choices = {
        (group.name, head): _ranked(found, group, head, largest_share)
        for group in circuit
        for head in group.heads
    }
    evaluate_parts(
        [
            (name, frozenset(some))
            for (name, head), ranked in choices.items()
            for n in range(1, len(ranked) + 1)
            for some in (ranked[:n], (*ranked[:n], head))
        ]
    )
    heads = tuple(
        _judged(found, name, head, ranked, threshold) for (name, head), ranked in choices.items()
    )
    minimal = _kept(circuit, heads)
    (of_minimal,) = evaluate_all([minimal], [{}])
    return Minimality(
        circuit=circuit,
        minimal=minimal,
        of_circuit=of_circuit,
        of_minimal=of_minimal,
        heads=heads,
        parts=found,
        threshold=threshold,
        largest_share=largest_share,
        seed=seed,
        ablation=ablated.kind,
    )


def _kept(circuit: Circuit, judged: Sequence[HeadMinimality]) -> Circuit:
    """The circuit of those heads that are needed."""
    kept = {(head.group, head.head) for head in judged if head.kept}
    return Circuit(
        tuple(
            group._replace(heads=tuple(head for head in group.heads if (group.name, head) in kept))
            for group in circuit
        )
    )


def _right(found: dict[Part, Evaluation], name: str, *heads: Head) -> int:
    """Prompts answered right without these heads."""
    return int(found[name, frozenset(heads)].correct.sum())


def _ranked(
    found: dict[Part, Evaluation], group: Group, head: Head, largest_share: float
) -> tuple[Head, ...]:
    """The heads that K may have, the first to be removed first."""
    harm = {
        other: _right(found, group.name, other) - _right(found, group.name, other, head)
        for other in group.heads
        if other != head
    }
    harmful = sorted(
        (other for other in harm if harm[other] > 0), key=lambda other: (-harm[other], other)
    )
    # A hair less, so that a product like 0.3 * 10, not quite 3 in binary, is not rounded up to 4.
    return tuple(harmful[: math.ceil(largest_share * len(group.heads) - 1e-9)])


def _judged(
    found: dict[Part, Evaluation],
    name: str,
    head: Head,
    ranked: tuple[Head, ...],
    threshold: float,
) -> HeadMinimality:
    def score(n: int) -> float:
        return relative_loss(
            _right(found, name, *ranked[:n]), _right(found, name, *ranked[:n], head)
        )

    # `max` takes the first of equals, the smallest K.
    removed = ranked[: max(range(len(ranked) + 1), key=score)]
    before = found[name, frozenset(removed)]
    after = found[name, frozenset((*removed, head))]
    right = [found.correct.cpu().numpy() for found in (before, after)]
    ratio = paired_ratio_interval(*paired_counts(*right))
    best = score(len(removed))
    return HeadMinimality(
        group=name,
        head=head,
        removed=removed,
        without_removed=before,
        without_head=after,
        score=best,
        interval=Interval(ratio.low - 1, ratio.high - 1),
        kept=best >= threshold,
    )


@checked
def relative_loss(before: int, after: int) -> float:
    """(before - after) / after of two counts of right answers: infinite if only `after` is 0, and 0
    if both are."""
    if after == 0:
        return math.inf if before > 0 else 0.0
    return (before - after) / after
