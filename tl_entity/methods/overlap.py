"""Heads that two circuits share, beside how many they would share by chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

from tl_entity.heads import Head
from tl_entity.methods.discovery import Discovery
from tl_entity.results import plain
from tl_entity.stats import (
    NO_INTERVAL,
    Chance,
    Interval,
    layered_overlap_by_chance,
    spearman,
)

WHOLE_CIRCUIT = "whole circuit"
"""Names the comparison of all groups together."""

NO_OVERLAP_INTERVAL = (
    "What two circuits share has no interval. Heads are chosen by a rank: resampled score maps "
    "differ by more than the maps themselves, so that circuits chosen from them share less, and "
    "bootstrap intervals of precision, recall, Jaccard index and rank correlation leave out the "
    "value they are of (a map beside itself: a Jaccard index of 1.00, and an interval of .46 to "
    ".74). How much finding a circuit twice differs is what the ceiling shows: the same model's "
    "circuit found again from other prompts."
)
"""Why none is shown."""

Place = tuple[str, Head]
"""A head at a named position."""


@dataclass(frozen=True)
class Overlap:
    """Heads of one group, or of all, in two circuits.

    Precision is the share of the base's heads that the tuned model's circuit has too, recall the
    share of the tuned model's heads that the base's has too: as in the paper's notebooks, where of
    Llama-7B's 40 heads of group A and FLoat-7B's 68 both have 27, a precision of .68 and a recall
    of .40.

    Attributes:
        name: the group, or `WHOLE_CIRCUIT`.
        shared: heads in both.
        new: heads only in the tuned model's circuit.
        lost: heads only in the base's.
        population: heads that both could have chosen.
        chance: how many heads would be shared if both circuits had as many heads in each layer as
            they have, and else were drawn at random.
        chance_over_all_layers: the same with heads drawn from all that both could have chosen,
            whatever their layer. It takes for a finding what comes of where in depth important
            heads lie.
        correlation: Spearman's rank correlation of the two score maps over the heads that both
            could have chosen; NaN for the whole circuit. Where most heads do next to nothing, their
            order is chance, and it says little about the heads chosen.
    """

    name: str
    shared: tuple[Place, ...]
    new: tuple[Place, ...]
    lost: tuple[Place, ...]
    population: int
    chance: Chance
    chance_over_all_layers: Chance
    correlation: float

    def __str__(self) -> str:
        text = (
            f"{self.name}: {len(self.shared)} heads shared ({self.chance.expected:.1f} by chance), "
            f"{len(self.new)} new, {len(self.lost)} lost, "
            f"Jaccard {self.jaccard:.2f} ({self.chance_jaccard:.2f} by chance, "
            f"p = {self.p_value:.2g})"
        )
        if math.isnan(self.correlation):
            return text
        return f"{text}, rank correlation {self.correlation:.2f}"

    @property
    def precision(self) -> float:
        """Share of the base's heads that are in the tuned model's circuit; NaN if it has none."""
        return _share(len(self.shared), len(self.shared) + len(self.lost))

    @property
    def recall(self) -> float:
        """Share of the tuned model's heads that are in the base's circuit; NaN if it has none."""
        return _share(len(self.shared), len(self.shared) + len(self.new))

    @property
    def jaccard(self) -> float:
        """Shared heads as a share of those in either; NaN if there are none."""
        return self._jaccard_of(len(self.shared))

    @property
    def precision_interval(self) -> Interval:
        """None: see `NO_OVERLAP_INTERVAL`. So too for recall, Jaccard index and correlation."""
        return NO_INTERVAL

    recall_interval = jaccard_interval = correlation_interval = precision_interval

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

    def to_json(self) -> dict[str, Any]:
        """The heads shared and not, and every measure, beside what chance would give."""
        return {
            "first": len(self.shared) + len(self.lost),
            "second": len(self.shared) + len(self.new),
            "shared": [plain(head) for _, head in self.shared],
            "only_first": [plain(head) for _, head in self.lost],
            "only_second": [plain(head) for _, head in self.new],
            "population": self.population,
            "shared_by_chance": self.chance.expected,
            "chance_range": [self.chance.low, self.chance.high],
            "p_value": self.p_value,
            "shared_by_chance_over_all_layers": self.chance_over_all_layers.expected,
            "precision": plain(self.precision),
            "recall": plain(self.recall),
            "jaccard": plain(self.jaccard),
            "jaccard_by_chance": plain(self.chance_jaccard),
            "jaccard_by_chance_interval": plain(self.chance_interval),
            "rank_correlation": plain(self.correlation),
        }

    def _jaccard_of(self, shared: int) -> float:
        """The Jaccard index of circuits of these sizes that share so many heads."""
        return _share(shared, 2 * len(self.shared) + len(self.new) + len(self.lost) - shared)


def group_overlap(name: str, base: Discovery, tuned: Discovery) -> Overlap:
    """What one group of two discoveries has in common."""
    layers = min(found.scores[name].top_layer for found in (base, tuned))
    maps = [found.scores[name].scores.double().cpu().numpy() for found in (base, tuned)]
    chances = _chances([name], base, tuned)
    return _overlap(
        name,
        _places([name], base),
        _places([name], tuned),
        layers * maps[0].shape[1],
        chances,
        correlation=float(spearman(*(scores[:layers].flatten() for scores in maps))),
    )


def whole_overlap(base: Discovery, tuned: Discovery) -> Overlap:
    """What two discoveries have in common, heads told apart by position, not by group."""
    positions = dict.fromkeys(group.position for group in base.circuit)
    groups = [
        [group.name for group in base.circuit if group.position == position]
        for position in positions
    ]
    every = [name for names in groups for name in names]
    n_heads = base.scores[every[0]].per_example.shape[1]
    by_position = [_chances(names, base, tuned) for names in groups]
    layered, over_all = (reduce(Chance.and_also, some) for some in zip(*by_position, strict=True))
    return _overlap(
        WHOLE_CIRCUIT,
        _places(every, base),
        _places(every, tuned),
        sum(min(_top(names, base), _top(names, tuned)) for names in groups) * n_heads,
        (layered, over_all),
        correlation=float("nan"),
    )


def _places(names: Sequence[str], found: Discovery) -> set[Place]:
    """The heads found in these groups."""
    return {
        (group.position, head)
        for group in found.circuit
        if group.name in names
        for head in group.heads
    }


def _top(names: Sequence[str], found: Discovery) -> int:
    """Layers in which heads can be chosen in one of these groups."""
    return max(found.scores[name].top_layer for name in names)


def _chances(names: Sequence[str], base: Discovery, tuned: Discovery) -> tuple[Chance, Chance]:
    """How many heads of these groups, all at one position, are shared by chance: drawn within each
    layer, and drawn over all layers.

    Where the groups reach up to different layers, heads are even in the second case drawn between
    these alone.
    """
    n_heads = base.scores[names[0]].per_example.shape[1]
    both = [[head.layer for _, head in _places(names, found)] for found in (base, tuned)]

    def between(start: int, stop: int) -> tuple[int, int, int]:
        one, other = (sum(start <= layer < stop for layer in layers) for layers in both)
        return (stop - start) * n_heads, one, other

    tops = {found.scores[name].top_layer for found in (base, tuned) for name in names}
    return (
        layered_overlap_by_chance(between(layer, layer + 1) for layer in range(max(tops))),
        layered_overlap_by_chance(between(*band) for band in pairwise(sorted({0, *tops}))),
    )


def _overlap(
    name: str,
    base: set[Place],
    tuned: set[Place],
    population: int,
    chances: tuple[Chance, Chance],
    *,
    correlation: float,
) -> Overlap:
    return Overlap(
        name=name,
        shared=tuple(sorted(base & tuned)),
        new=tuple(sorted(tuned - base)),
        lost=tuple(sorted(base - tuned)),
        population=population,
        chance=chances[0],
        chance_over_all_layers=chances[1],
        correlation=correlation,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
