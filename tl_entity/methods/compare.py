"""Is it the same circuit? The heads found in a base model and in its fine-tune, side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Float64

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Group, Head
from tl_entity.methods.circuits import Faithfulness
from tl_entity.methods.discovery import Discovery
from tl_entity.methods.path_patching import HeadScores
from tl_entity.results import Result
from tl_entity.stats import (
    Bootstrap,
    Chance,
    Interval,
    overlap_by_chance,
    percentile_interval,
    spearman,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

WHOLE_CIRCUIT = "whole circuit"
"""Names the comparison of all groups together."""

BOOTSTRAP_DRAWS = 2_000
"""Resamplings of the pairs; each redoes the choice of heads from a whole score map."""

Place = tuple[str, Head]
"""A head at a named position."""


@dataclass(frozen=True)
class Overlap:
    """Heads of one group, or of all, in two circuits.

    The base's heads count as what there is to be found: precision is the share of the tuned model's
    heads that the base has too, recall the share of the base's that the tuned model has too.
    Intervals are 95 %, percentiles over bootstrap draws in which heads are chosen anew. Two maps
    that are resampled differ by more than they do themselves, so the intervals of precision, recall
    and Jaccard index lie rather too low than too high and may leave out the value.

    That of the rank correlation may lie to either side of it. The correlation is of all heads that
    can reach, and where most of them do next to nothing, their order is chance and hangs on a few
    pairs with large scores: it says little about the heads chosen. The percentiles are not shifted
    by the draws' bias: where two maps have a few strong heads and little else in common, intervals
    so corrected are too narrow to hold the true correlation in 95 % of cases.

    Attributes:
        name: the group, or `WHOLE_CIRCUIT`.
        shared: heads in both.
        new: heads only in the tuned model's circuit.
        lost: heads only in the base's.
        precision_interval: of the precision.
        recall_interval: of the recall.
        jaccard_interval: of the Jaccard index.
        population: heads that both could have chosen.
        chance: how many heads would be shared if both chose at random among these.
        correlation: Spearman's rank correlation of the two score maps over these heads; NaN for the
            whole circuit.
        correlation_interval: of the correlation.
    """

    name: str
    shared: tuple[Place, ...]
    new: tuple[Place, ...]
    lost: tuple[Place, ...]
    precision_interval: Interval
    recall_interval: Interval
    jaccard_interval: Interval
    population: int
    chance: Chance
    correlation: float
    correlation_interval: Interval

    def __str__(self) -> str:
        text = (
            f"{self.name}: {len(self.shared)} heads shared ({self.chance.expected:.1f} by chance), "
            f"{len(self.new)} new, {len(self.lost)} lost, "
            f"Jaccard {self.jaccard:.2f} {self.jaccard_interval} ({self.chance_jaccard:.2f} by "
            f"chance, p = {self.p_value:.2g})"
        )
        if math.isnan(self.correlation):
            return text
        return f"{text}, rank correlation {self.correlation:.2f} {self.correlation_interval}"

    @property
    def precision(self) -> float:
        """Share of the tuned model's heads that are in the base's circuit; NaN if it has none."""
        return _share(len(self.shared), len(self.shared) + len(self.new))

    @property
    def recall(self) -> float:
        """Share of the base's heads that are in the tuned model's circuit; NaN if it has none."""
        return _share(len(self.shared), len(self.shared) + len(self.lost))

    @property
    def jaccard(self) -> float:
        """Shared heads as a share of those in either; NaN if there are none."""
        return self._jaccard_of(len(self.shared))

    @property
    def chance_jaccard(self) -> float:
        """The Jaccard index to be expected by chance."""
        return math.fsum(
            p * self._jaccard_of(shared) for shared, p in enumerate(self.chance.probabilities)
        )

    @property
    def chance_interval(self) -> Interval:
        """The Jaccard indices between which 95 % of random choices lie."""
        return Interval(self._jaccard_of(self.chance.low), self._jaccard_of(self.chance.high))

    @property
    def p_value(self) -> float:
        """How probable it is to share this many heads or more by chance."""
        return self.chance.at_least(len(self.shared))

    def _jaccard_of(self, shared: int) -> float:
        """The Jaccard index of circuits of these sizes that share so many heads."""
        return _share(shared, 2 * len(self.shared) + len(self.new) + len(self.lost) - shared)


@dataclass(frozen=True)
class ComparedHead:
    """A head's place in two score maps of one group.

    Attributes:
        group: the group.
        position: its named position.
        head: the head.
        base_score: mean score in the base; NaN if it can't reach a receiver there.
        tuned_score: the same in the tuned model.
        base_rank: rank among the heads that can reach, 1 the most important; None as above.
        tuned_rank: the same in the tuned model.
        in_base: whether the base's circuit has it in this group.
        in_tuned: whether the tuned model's has.
    """

    group: str
    position: str
    head: Head
    base_score: float
    tuned_score: float
    base_rank: int | None
    tuned_rank: int | None
    in_base: bool
    in_tuned: bool


@dataclass(frozen=True)
class Comparison(Result):
    """Two discoveries compared.

    Attributes:
        groups: each group's overlap.
        whole: that of both circuits, heads told apart by position, not by group.
        heads: every head that is in a group of either, with its place in both maps.
        faithfulness: what was measured of circuits in models, by name, such as the base's circuit
            inside the tuned model.
        paired: whether both discoveries were on the same pairs, which were then resampled together.
        seed: of the bootstrap.
    """

    groups: tuple[Overlap, ...]
    whole: Overlap
    heads: tuple[ComparedHead, ...]
    faithfulness: Mapping[str, Faithfulness]
    paired: bool
    seed: int

    def __str__(self) -> str:
        return str(self.whole)

    def __getitem__(self, name: str) -> Overlap:
        """The overlap of a group, or of `WHOLE_CIRCUIT`.

        Raises:
            KeyError: if there is none.
        """
        for overlap in (*self.groups, self.whole):
            if overlap.name == name:
                return overlap
        raise KeyError(name)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a group, the whole circuit last: counts, measures, intervals, chance levels."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "group": overlap.name,
                    "base_heads": len(overlap.shared) + len(overlap.lost),
                    "tuned_heads": len(overlap.shared) + len(overlap.new),
                    "shared": len(overlap.shared),
                    "new": " ".join(f"{head}" for _, head in overlap.new),
                    "lost": " ".join(f"{head}" for _, head in overlap.lost),
                    **_with_interval("precision", overlap.precision, overlap.precision_interval),
                    **_with_interval("recall", overlap.recall, overlap.recall_interval),
                    **_with_interval("jaccard", overlap.jaccard, overlap.jaccard_interval),
                    "population": overlap.population,
                    "chance_shared": overlap.chance.expected,
                    "chance_low": overlap.chance.low,
                    "chance_high": overlap.chance.high,
                    **_with_interval(
                        "chance_jaccard", overlap.chance_jaccard, overlap.chance_interval
                    ),
                    "p_value": overlap.p_value,
                    **_with_interval(
                        "correlation", overlap.correlation, overlap.correlation_interval
                    ),
                }
                for overlap in (*self.groups, self.whole)
            ]
        )

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Jaccard index of each group's heads with its interval, beside what chance would give:
        the mean, and the range of 95 % of random choices."""
        from tl_entity.plots.bars import Bar, overlap_bars

        overlaps = {overlap.name: overlap for overlap in (*self.groups, self.whole)}
        return overlap_bars(
            {name: Bar(o.jaccard, *o.jaccard_interval) for name, o in overlaps.items()},
            {name: Bar(o.chance_jaccard, *o.chance_interval) for name, o in overlaps.items()},
            title=f"{len(self.whole.shared)} heads in both circuits, "
            f"{self.whole.chance.expected:.1f} by chance"
            if title is None
            else title,
        )

    def heads_dataframe(self) -> "pd.DataFrame":
        """One row for each head that is in a group of either circuit: scores and ranks in both."""
        import pandas as pd

        rows = [{**vars(compared), "head": str(compared.head)} for compared in self.heads]
        columns = list(ComparedHead.__dataclass_fields__)
        return pd.DataFrame(rows, columns=columns).astype(
            {"base_rank": "Int64", "tuned_rank": "Int64"}
        )

    def faithfulness_dataframe(self) -> "pd.DataFrame":
        """One row for each circuit in a model: accuracies, their ratio and its interval."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "circuit": name,
                    "circuit_accuracy": found.of_circuit.accuracy,
                    "model_accuracy": found.of_model.accuracy,
                    "n_prompts": len(found.of_model),
                    **_with_interval("faithfulness", found.value, found.interval),
                }
                for name, found in self.faithfulness.items()
            ]
        )


@checked
def compare(
    found_base: Discovery,
    found_tuned: Discovery,
    *,
    seed: int,
    sizes: Mapping[str, int] | None = None,
    paired: bool = False,
    faithfulness: Mapping[str, Faithfulness] | None = None,
    draws: int = BOOTSTRAP_DRAWS,
) -> Comparison:
    """Compare the circuits found in a base model and in its fine-tune, group by group and whole.

    The chance level is hypergeometric: a head can be shared only if it can reach a receiver in both
    models, so each circuit's heads among those are thought drawn anew, without replacement. For the
    whole circuit, heads are told apart by position, whatever their group; where groups at one
    position reach up to different layers, heads are thought drawn anew between these layers, and
    what is shared by chance is put together.

    For the intervals, pairs are resampled, every score map is averaged anew and the heads are
    chosen anew, as in the discovery; the receivers that later stages patched into stay as they
    were. Discoveries on the same pairs are resampled together (`paired`), others each by itself.

    Args:
        found_base: the discovery in the base.
        found_tuned: the discovery in the tuned model.
        seed: of the bootstrap.
        sizes: heads each group kept, as given to `discover_circuit`; if left out, the fewest that
            give these circuits, which is too few where the last head of a group was left to
            another group at the same position.
        paired: whether both discoveries were on the same pairs, in the same order; they don't know.
        faithfulness: circuits measured in models, by name, to be shown with the rest.
        draws: bootstrap draws.

    Raises:
        InputError: if the discoveries have other groups, positions or model sizes, a circuit's
            heads are not the first of its score maps, or they are called paired and are on
            different numbers of pairs.
    """
    _check_alike(found_base, found_tuned)
    n_base, n_tuned = (
        len(next(iter(found.scores.values())).clean_values) for found in (found_base, found_tuned)
    )
    if paired and n_base != n_tuned:
        raise InputError(f"{n_base} and {n_tuned} pairs are not the same pairs.")
    first = Bootstrap.draw(n_base, seed=seed, draws=draws)
    second = first if paired else Bootstrap.draw(n_tuned, seed=seed + 1, draws=draws)
    base = _Side.of(found_base, sizes, first)
    tuned = _Side.of(found_tuned, sizes, second)
    return Comparison(
        groups=tuple(_group_overlap(group, base, tuned) for group in found_base.circuit),
        whole=_whole_overlap(base, tuned),
        heads=tuple(
            compared
            for group in found_base.circuit
            for compared in _compared(group, found_base, found_tuned)
        ),
        faithfulness=dict(faithfulness or {}),
        paired=paired,
        seed=seed,
    )


@dataclass(frozen=True)
class _Resampled:
    """A score map, flattened in order of layer and head.

    Attributes:
        mean: the scores.
        drawn: the scores of every bootstrap draw.
        width: how many can reach a receiver; the first ones, being in the lower layers.
        n_heads: heads in a layer.
    """

    mean: Float64[np.ndarray, " head"]
    drawn: Float64[np.ndarray, "draws head"]
    width: int
    n_heads: int

    @classmethod
    def of(cls, scores: HeadScores, bootstrap: Bootstrap) -> "_Resampled":
        _, n_heads, _ = scores.per_example.shape
        flat = scores.per_example.flatten(0, 1).double().cpu().numpy()
        # As the discovery ranks them: means in the scores' own precision.
        mean = scores.scores.flatten().double().cpu().numpy()
        return cls(mean, bootstrap.means(flat).T, scores.top_layer * n_heads, n_heads)


@dataclass(frozen=True)
class _Side:
    """A discovery with the heads that each bootstrap draw would have chosen.

    Attributes:
        found: the discovery.
        maps: each group's score map.
        drawn: each group's heads in every draw.
    """

    found: Discovery
    maps: Mapping[str, _Resampled]
    drawn: Mapping[str, Bool[np.ndarray, "draws head"]]

    @classmethod
    def of(cls, found: Discovery, sizes: Mapping[str, int] | None, bootstrap: Bootstrap) -> "_Side":
        kept = _sizes(found, sizes)
        maps = {name: _Resampled.of(scores, bootstrap) for name, scores in found.scores.items()}
        drawn: dict[str, np.ndarray] = {}
        taken: dict[str, np.ndarray] = {}
        # A head chosen in two groups at one position belongs to the later one (`choose_heads`).
        for group in reversed(found.circuit.groups):
            first = _first(maps[group.name], kept[group.name])
            before = taken.get(group.position, np.zeros_like(first))
            drawn[group.name] = first & ~before
            taken[group.position] = first | before
        return cls(found, maps, drawn)

    def at(self, position: str) -> list[str]:
        """The groups at a position."""
        return [group.name for group in self.found.circuit if group.position == position]

    def width(self, names: Sequence[str]) -> int:
        """How many heads can be chosen in one of these groups; the first ones, in order."""
        return max(self.maps[name].width for name in names)

    def places(self, names: Sequence[str]) -> set[Place]:
        """The heads found in these groups."""
        return {
            (group.position, head)
            for group in self.found.circuit
            if group.name in names
            for head in group.heads
        }


def _first(scores: _Resampled, size: int) -> Bool[np.ndarray, "draws head"]:
    """Which heads are among the `size` most important that can reach, in each draw."""
    first = np.zeros(scores.drawn.shape, dtype=bool)
    ranked = scores.drawn[:, : scores.width].argsort(-1, kind="stable")
    np.put_along_axis(first, ranked[:, :size], True, -1)
    return first


def _sizes(found: Discovery, given: Mapping[str, int] | None) -> dict[str, int]:
    """How many of the most important heads each group kept."""
    sizes: dict[str, int] = {}
    taken: dict[str, set[Head]] = {}
    for group in reversed(found.circuit.groups):
        ranked = found.scores[group.name].ranked()
        others = taken.setdefault(group.position, set())
        strange = [head for head in group.heads if head not in ranked]
        if strange:
            raise InputError(
                f"{strange[0]} of {group.name} can't reach a receiver; compare discoveries as "
                "they were made."
            )
        shown = max((ranked.index(head) + 1 for head in group.heads), default=0)
        size = shown if given is None else given.get(group.name, 0)
        expected = {head for head in ranked[:size] if head not in others}
        if expected != set(group.heads):
            raise InputError(
                f"The heads of {group.name} are not the {size} most important ones of its scores; "
                "compare discoveries as they were made."
            )
        sizes[group.name] = size
        others.update(ranked[:size])
    return sizes


def _group_overlap(group: Group, base: _Side, tuned: _Side) -> Overlap:
    name = group.name
    maps = (base.maps[name], tuned.maps[name])
    width = min(scores.width for scores in maps)
    return _overlap(
        name,
        (base.places([name]), tuned.places([name])),
        (base.drawn[name], tuned.drawn[name]),
        _chance([name], base, tuned),
        width,
        correlation=float(spearman(*(scores.mean[:width] for scores in maps))),
        correlations=spearman(*(scores.drawn[:, :width] for scores in maps)),
    )


def _whole_overlap(base: _Side, tuned: _Side) -> Overlap:
    positions = list(base.found.circuit.heads_at())
    groups = {position: base.at(position) for position in positions}
    every = [name for names in groups.values() for name in names]
    drawn = [
        np.concatenate(
            [
                reduce(np.logical_or, [side.drawn[name] for name in names])
                for names in groups.values()
            ],
            -1,
        )
        for side in (base, tuned)
    ]
    return _overlap(
        WHOLE_CIRCUIT,
        (base.places(every), tuned.places(every)),
        (drawn[0], drawn[1]),
        reduce(Chance.and_also, [_chance(names, base, tuned) for names in groups.values()]),
        sum(min(base.width(names), tuned.width(names)) for names in groups.values()),
        correlation=float("nan"),
        correlations=np.full(len(drawn[0]), np.nan),
    )


def _chance(names: Sequence[str], base: _Side, tuned: _Side) -> Chance:
    """How many heads of these groups, all at one position, are shared by chance.

    Bands of layers within which all these groups can choose alike, in both models, are taken one by
    one.
    """
    n_heads = base.maps[names[0]].n_heads
    edges = {side.maps[name].width for side in (base, tuned) for name in names}
    total = overlap_by_chance(0, 0, 0)
    for start, stop in pairwise(sorted({0, *edges})):
        counts = [
            sum(start <= head.layer * n_heads + head.head < stop for _, head in side.places(names))
            for side in (base, tuned)
        ]
        total = total.and_also(overlap_by_chance(stop - start, *counts))
    return total


def _overlap(
    name: str,
    chosen: tuple[set[Place], set[Place]],
    drawn: tuple[Bool[np.ndarray, "draws place"], Bool[np.ndarray, "draws place"]],
    chance: Chance,
    population: int,
    *,
    correlation: float,
    correlations: Float[np.ndarray, " draws"],
) -> Overlap:
    base, tuned = chosen
    shared = (drawn[0] & drawn[1]).sum(-1)
    n_base, n_tuned = (some.sum(-1) for some in drawn)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall, jaccard = (
            percentile_interval(shared / total)
            for total in (n_tuned, n_base, n_base + n_tuned - shared)
        )
    return Overlap(
        name=name,
        shared=tuple(sorted(base & tuned)),
        new=tuple(sorted(tuned - base)),
        lost=tuple(sorted(base - tuned)),
        precision_interval=precision,
        recall_interval=recall,
        jaccard_interval=jaccard,
        population=population,
        chance=chance,
        correlation=correlation,
        correlation_interval=percentile_interval(correlations),
    )


def _compared(group: Group, found_base: Discovery, found_tuned: Discovery) -> list[ComparedHead]:
    name = group.name
    base, tuned = found_base.circuit[name], found_tuned.circuit[name]
    places = [
        {head: rank for rank, head in enumerate(found.scores[name].ranked(), start=1)}
        for found in (found_base, found_tuned)
    ]
    scores = [found.scores[name].scores.tolist() for found in (found_base, found_tuned)]

    def score(which: int, head: Head) -> float:
        return scores[which][head.layer][head.head] if head in places[which] else float("nan")

    return [
        ComparedHead(
            group=name,
            position=group.position,
            head=head,
            base_score=score(0, head),
            tuned_score=score(1, head),
            base_rank=places[0].get(head),
            tuned_rank=places[1].get(head),
            in_base=head in base,
            in_tuned=head in tuned,
        )
        for head in dict.fromkeys((*base, *tuned))
    ]


def _check_alike(found_base: Discovery, found_tuned: Discovery) -> None:
    base, tuned = (
        [(group.name, group.position) for group in found.circuit]
        for found in (found_base, found_tuned)
    )
    if base != tuned or not base:
        raise InputError(f"The circuits must have the same groups, not {base} and {tuned}.")
    for name, _ in base:
        ours, theirs = (
            tuple(found.scores[name].per_example.shape[:2]) for found in (found_base, found_tuned)
        )
        if ours != theirs:
            raise InputError(
                f"The score maps of {name} are of {ours} and {theirs} layers and heads."
            )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _with_interval(name: str, value: float, interval: Interval) -> dict[str, float]:
    return {name: value, f"{name}_low": interval.low, f"{name}_high": interval.high}
