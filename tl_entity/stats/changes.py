"""How much of what one model does is done by other parts in another."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Float64, Int

from tl_entity._typing import checked
from tl_entity.stats.intervals import Z_95, Interval

RATIO = 3.0
"""A part counts as changed as far as its share is more than so many times the other model's."""

FLOOR = 0.1
"""A group that does less than this of what it does in the other model is taken to be unused, and
shares within it are of this much."""

HEAVY = 0.04
"""Groups with less than this share of all effects are not looked at by themselves."""

DRAWS = 1000
"""Bootstrap samples."""


@dataclass(frozen=True)
class GroupChange:
    """What changed within one group of parts.

    Attributes:
        name: of the group.
        weight: its share of all effects, the mean over the two models.
        lost: how much of it the first model's parts do that do far less of it in the second.
        new: the same of the second model's parts.
        lost_interval: of it; those of all heavy groups hold together in 95 % (Bonferroni).
        new_interval: the same.
    """

    name: str
    weight: float
    lost: float
    new: float
    lost_interval: Interval
    new_interval: Interval


@dataclass(frozen=True)
class Changes:
    """What changed over all groups of parts.

    Attributes:
        n: prompts that the intervals are from.
        lost: share of the first model's effects by parts that do far less in the second.
        new: share of the second model's effects by parts that do far less in the first.
        lost_interval: 95 % interval.
        new_interval: 95 % interval.
        difference: `lost` and `new`, whichever is larger, on one half of the prompts less on the
            other.
        difference_interval: 95 % interval.
        groups: the same within each group.
    """

    n: int
    lost: float
    new: float
    lost_interval: Interval
    new_interval: Interval
    difference: float
    difference_interval: Interval
    groups: tuple[GroupChange, ...]


@checked
def compare_effects(
    base: Float[np.ndarray, "batch part"],
    tuned: Float[np.ndarray, "batch part"],
    groups: Int[np.ndarray, " part"],
    names: Sequence[str],
    *,
    alike: bool = True,
    seed: int = 0,
) -> Changes:
    """How much of two models' effects lies in parts that do far more in one than in the other.

    Every prompt counts alike, if nothing else is said: its effects are taken as shares of the sum
    of their sizes. Otherwise the few prompts that a model is least sure of would decide a mean.

    Within its group each part has a share of all effects, whatever their sign; a part counts as
    lost as far as its share in the first model is more than `RATIO` times that in the second, and
    as new the other way round. So a model that does the same by the same parts, only more or less
    of it, has lost nothing.

    Intervals are normal, with the spread of bootstrap samples of the prompts, which the models
    share. Give only parts whose effects stand out of the noise: the larger of zero and a noisy
    difference is too large, and with hundreds of such parts that adds up.

    Args:
        base: effects of each part on each prompt in the first model.
        tuned: in the second, on the same prompts.
        groups: which group each part is of, counted from 0.
        names: of the groups.
        alike: whether every prompt counts alike; False for effects that are bounded by themselves.
        seed: of the bootstrap.
    """
    if alike:
        base, tuned = (each_alike(effects) for effects in (base, tuned))
    n, n_groups = len(base), len(names)
    fold = np.arange(n) % 2
    generator = np.random.default_rng([seed, 11])
    weights = np.concatenate([_fold_counts(fold), _resampled(fold, generator)], 1)
    of_group = np.zeros((len(groups), n_groups))
    of_group[np.arange(len(groups)), groups] = 1

    def measured(prompts: np.ndarray) -> np.ndarray:
        return _lost_and_new([np.abs(prompts @ effects) for effects in (base, tuned)], of_group)

    both = measured(weights.mean(0))
    seen, again = both[0], both[1:]
    spread = again.std(0, ddof=1)
    apart = [measured(weights[k])[:, -2:].max(1) for k in (0, 1)]
    difference = apart[0] - apart[1]
    heavy = max(1, int((seen[:-2:3] >= HEAVY).sum()))
    z = NormalDist().inv_cdf(1 - 0.025 / (2 * heavy))
    found = tuple(
        GroupChange(
            name=name,
            weight=float(seen[3 * i]),
            lost=float(seen[3 * i + 1]),
            new=float(seen[3 * i + 2]),
            lost_interval=_within(seen[3 * i + 1], z * spread[3 * i + 1]),
            new_interval=_within(seen[3 * i + 2], z * spread[3 * i + 2]),
        )
        for i, name in enumerate(names)
    )
    return Changes(
        n=n,
        lost=max(0.0, float(seen[-2])),
        new=max(0.0, float(seen[-1])),
        lost_interval=_within(seen[-2], Z_95 * spread[-2]),
        new_interval=_within(seen[-1], Z_95 * spread[-1]),
        difference=float(difference[0]),
        difference_interval=_within(difference[0], Z_95 * difference[1:].std(ddof=1), -1.0),
        groups=found,
    )


@checked
def each_alike(effects: Float[np.ndarray, "batch part"]) -> Float64[np.ndarray, "batch part"]:
    """Each prompt's effects as shares of the sum of their sizes."""
    total = np.abs(effects).sum(1, keepdims=True)
    return effects / np.where(total > 0, total, 1)


def _fold_counts(fold: np.ndarray) -> Float64[np.ndarray, "2 1 batch"]:
    """Weights by which each fold's mean is taken."""
    return np.stack([(fold == k) / max(1, (fold == k).sum()) for k in (0, 1)])[:, None]


def _resampled(
    fold: np.ndarray, generator: np.random.Generator
) -> Float64[np.ndarray, "2 draw batch"]:
    """Weights of bootstrap samples, drawn within each fold."""
    weights = np.zeros((2, DRAWS, len(fold)))
    for k in (0, 1):
        rows = (fold == k).nonzero()[0]
        if len(rows):
            counts = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), DRAWS)
            weights[k][:, rows] = counts / len(rows)
    return weights


def _lost_and_new(
    sizes: Sequence[Float64[np.ndarray, "draw part"]], of_group: Float64[np.ndarray, "part group"]
) -> Float64[np.ndarray, "draw column"]:
    """For each group its weight in either model, in the mean, what is lost and what is new; then
    both of all groups."""
    totals = [size.sum(1, keepdims=True) for size in sizes]
    sizes = [
        size / np.where(total > 0, total, np.inf) for size, total in zip(sizes, totals, strict=True)
    ]
    weights = [size @ of_group for size in sizes]
    floors = [np.maximum(weights[i], FLOOR * weights[1 - i]) @ of_group.T for i in (0, 1)]
    shares = [
        size / np.where(floor > 0, floor, np.inf) for size, floor in zip(sizes, floors, strict=True)
    ]
    columns = np.zeros((len(sizes[0]), 3 * of_group.shape[1] + 2))
    columns[:, 0:-2:3] = (weights[0] + weights[1]) / 2
    for i in (0, 1):
        # What a group is short of its floor is not done by any part.
        changed = np.maximum(0, shares[i] - RATIO * shares[1 - i]) @ of_group
        columns[:, 1 + i : -2 : 3] = changed
        columns[:, i - 2] = (changed * weights[i]).sum(1)
    return columns


def _within(seen: float, half: float, least: float = 0.0) -> Interval:
    return Interval(max(least, float(seen - half)), min(1.0, float(seen + half)))


@checked
def kept_by_chance(
    base: Float[np.ndarray, "layer role head"],
    tuned: Float[np.ndarray, "layer role head"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    within_layers: bool = True,
) -> tuple[float, float, float]:
    """What two models' effects have in common, beside what they would if the heads of one stood
    elsewhere.

    In common is the sum over nodes of the smaller of both shares. By chance, the heads of each
    layer change places, each with all that it does at any role: where in depth and at which roles
    the work is done is no sign of a common mechanism.

    Args:
        base: mean effects of each node in the first model.
        tuned: in the second.
        draws: how often heads change places.
        seed: of the draws.
        within_layers: False lets heads change places with those of other layers too, which takes
            what all mechanisms of a task have in common for a sign of the same one.

    Returns:
        What is in common, what is by chance in the mean, and the p-value: how probable it is by
        chance to have this much or more in common.
    """
    generator = np.random.default_rng([seed, 12])
    ours, theirs = (np.abs(x) / max(np.abs(x).sum(), 1e-300) for x in (base, tuned))
    seen = float(np.minimum(ours, theirs).sum())
    n_layers, _, n_heads = base.shape
    drawn = np.empty(draws)
    for i in range(draws):
        if within_layers:
            order = generator.permuted(np.tile(np.arange(n_heads), (n_layers, 1)), axis=1)
            moved = np.take_along_axis(theirs, order[:, None, :], 2)
        else:
            flat = theirs.transpose(0, 2, 1).reshape(n_layers * n_heads, -1)
            moved = flat[generator.permutation(len(flat))]
            moved = moved.reshape(n_layers, n_heads, -1).transpose(0, 2, 1)
        drawn[i] = np.minimum(ours, moved).sum()
    # The pair itself is one of the ways that heads can stand.
    reached = int((drawn >= seen - 1e-12).sum())
    return seen, float(drawn.mean()), (reached + 1) / (draws + 1)


@checked
def share_changes(
    base: Float[np.ndarray, "batch part"], tuned: Float[np.ndarray, "batch part"]
) -> tuple[
    Float64[np.ndarray, " part"], Float64[np.ndarray, " part"], Float64[np.ndarray, " part"]
]:
    """Each part's share of all effects in either model, and the p-value that it is no more than
    `RATIO` times as much in one as in the other: two-sided, by the normal distribution of its
    excess over prompts."""
    base, tuned = (each_alike(effects) for effects in (base, tuned))
    means = [effects.mean(0) for effects in (base, tuned)]
    totals = [max(float(np.abs(mean).sum()), 1e-300) for mean in means]
    signed = [
        effects * np.sign(mean) / total
        for effects, mean, total in zip((base, tuned), means, totals, strict=True)
    ]
    shares = [part.mean(0) for part in signed]
    lowest = np.ones(base.shape[1])
    for i in (0, 1):
        excess = signed[i] - RATIO * signed[1 - i]
        error = excess.std(0, ddof=1) / np.sqrt(len(excess))
        z = np.divide(excess.mean(0), error, out=np.zeros_like(lowest), where=error > 0)
        p = np.array([2 * NormalDist().cdf(-max(0.0, float(each))) for each in z])
        lowest = np.minimum(lowest, p)
    return shares[0], shares[1], np.minimum(1.0, lowest)


@checked
def adjusted_p_values(p_values: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Benjamini and Hochberg's adjusted p-values (1995, Journal of the Royal Statistical Society B
    57, 289-300): those at or below .05 are at most one in twenty false, in the mean."""
    n = len(p_values)
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * n / np.arange(1, n + 1)
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return adjusted
