"""Intervals and resampling: every accuracy and mean score carries its uncertainty."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from tl_entity._typing import checked

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


class Interval(NamedTuple):
    """Lower and upper bound of a 95 % interval."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:.3f}, {self.high:.3f}]"


@checked
def wilson_interval(successes: int, trials: int) -> Interval:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), right also near 0 and 1.

    Raises:
        ValueError: if `trials` is not positive or `successes` is outside 0..trials.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion.")
    return _wilson(successes, trials, Z_95)


def _wilson(successes: int, trials: int, z: float) -> Interval:
    share = successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    centre = share + z**2 / (2 * trials)
    scale = 1 + z**2 / trials
    # Rounding must not push a bound past the proportion itself at 0 and 1.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return Interval(low, high)


@checked
def mean_intervals(samples: Float[np.ndarray, "*cells batch"]) -> Float64[np.ndarray, "*cells 2"]:
    """Normal 95 % interval of the mean over the last axis, for every cell at once.

    With a batch of one there is no spread to estimate, and both bounds are NaN.
    """
    samples = samples.astype(np.float64)
    n = samples.shape[-1]
    mean = samples.mean(-1)
    if n < 2:
        half = np.full_like(mean, np.nan)
    else:
        half = Z_95 * samples.std(-1, ddof=1) / math.sqrt(n)
    return np.stack([mean - half, mean + half], -1)


@checked
def paired_difference_interval(
    one: Bool[np.ndarray, " batch"], other: Bool[np.ndarray, " batch"]
) -> Interval:
    """Bonett and Price's 95 % interval of the difference of two proportions on the same prompts
    (2012, Journal of Educational and Behavioral Statistics 37, 479-488: the adjusted Wald
    interval).

    One prompt is added to those on which only `one` succeeds, and one to those on which only
    `other` does. So it has a width where nothing was seen to vary: the same 40 prompts right in
    both give -0.066 to 0.066.

    Raises:
        ValueError: if there are no prompts.
    """
    n = len(one)
    if n == 0:
        raise ValueError("There are no prompts to compare.")
    up, down = (int((x & ~y).sum()) + 1 for x, y in ((one, other), (other, one)))
    centre = (up - down) / (n + 2)
    spread = Z_95 * math.sqrt(((up + down) / (n + 2) - centre**2) / (n + 2))
    return Interval(max(-1.0, centre - spread), min(1.0, centre + spread))


@checked
def paired_ratio_interval(both: int, only_one: int, only_other: int) -> Interval:
    """Bonett and Price's 95 % interval of the ratio of two proportions on the same prompts (2006,
    Statistics in Medicine 25, 3039-3050: the hybrid Wilson score interval).

    Of the prompts on which at least one succeeds, each proportion gets Wilson's limits, with a
    quantile so much smaller that the ratio of the limits has the coverage wanted, given how often
    the two succeed together. So it has a width where nothing was seen to vary: 0 of 24 against 24
    of 24 gives 0 to 0.16, the same 24 right in both 0.92 to 1.08.

    Args:
        both: prompts on which both succeed.
        only_one: on which only the one in the numerator does.
        only_other: on which only the one in the denominator does.

    Returns:
        The interval; its upper end is infinite if the denominator never succeeds, and it is all
        there is, from 0 to infinity, if neither does.

    Raises:
        ValueError: if a count is negative.
    """
    if min(both, only_one, only_other) < 0:
        raise ValueError(f"{both}, {only_one} and {only_other} are no counts.")
    trials = both + only_one + only_other
    if trials == 0:
        return Interval(0.0, math.inf)
    one, other = both + only_one, both + only_other
    spread = math.sqrt((only_one + only_other + 2) / ((one + 1) * (other + 1)))
    each = sum(math.sqrt((1 - (x + 1) / (trials + 2)) / (x + 1)) for x in (one, other))
    z = Z_95 * spread / each
    (low, high), (other_low, other_high) = (_wilson(x, trials, z) for x in (one, other))
    return Interval(low / other_high, high / other_low if other_low else math.inf)


@checked
@dataclass(frozen=True)
class Bootstrap:
    """Prompts resampled many times, for the intervals of any statistics of these prompts.

    Attributes:
        counts: how often each draw has each prompt.
    """

    counts: Float64[np.ndarray, "draws batch"]

    @classmethod
    def draw(cls, n: int, *, seed: int, draws: int = 10_000) -> "Bootstrap":
        """As many of `n` prompts, drawn with replacement; the same seed gives the same draws."""
        generator = np.random.default_rng(seed)
        # Multinomial counts are the same resampling as drawing n indices, at a fraction of the
        # memory.
        return cls(generator.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64))

    @checked
    def means(
        self, values: Float[np.ndarray, "*cells batch"]
    ) -> Float64[np.ndarray, "*cells draws"]:
        """The mean of the prompts' values in each draw."""
        return values.astype(np.float64) @ self.counts.T / self.counts.shape[1]

    @checked
    def ratio(
        self, numerator: Float[np.ndarray, " batch"], denominator: Float[np.ndarray, " batch"]
    ) -> Interval:
        """Percentile 95 % interval of mean(numerator) / mean(denominator), the prompts resampled in
        pairs (the same prompts in both).

        The denominator may be of either sign, so a draw in which it is zero has no ratio; such
        draws are left out, and the interval is NaN if all are. For two proportions use
        `ratio_of_proportions`.
        """
        top, bottom = (
            self.counts @ values.astype(np.float64) for values in (numerator, denominator)
        )
        return percentile_interval(top[bottom != 0] / bottom[bottom != 0])

    @checked
    def ratio_of_proportions(
        self,
        one: Bool[np.ndarray, " batch"],
        other: Bool[np.ndarray, " batch"],
        *,
        neither: float = math.nan,
    ) -> Interval:
        """95 % interval of the share of prompts on which `one` succeeds over that on which `other`
        does, the prompts resampled in pairs.

        The percentiles of the draws, where these differ. Draws in which `one` succeeds and `other`
        never does are infinite, and so may be the upper end. Where the percentiles are one number,
        as with no success in `one` or the same successes in both, the draws know nothing of prompts
        that were not asked; there it is `paired_ratio_interval`.

        Args:
            one: whether the numerator succeeds on each prompt.
            other: the same of the denominator.
            neither: the ratio in draws in which neither succeeds; NaN leaves these out, and the
                interval is NaN if all are.
        """
        top, bottom = (self.counts @ values.astype(np.float64) for values in (one, other))
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = top / bottom
        drawn[(top == 0) & (bottom == 0)] = neither
        low, high = percentile_interval(drawn)
        if low != high:
            return Interval(low, high)
        counts = (one & other, one & ~other, other & ~one)
        return paired_ratio_interval(*(int(some.sum()) for some in counts))


@checked
def percentile_interval(samples: Float[np.ndarray, " draws"]) -> Interval:
    """From the 2.5 % to the 97.5 % quantile of bootstrap draws. Draws that are NaN are left out;
    NaN if all are. Infinite draws count as what they are, and so may be the ends."""
    there = samples[~np.isnan(samples)]
    if len(there) == 0:
        return Interval(math.nan, math.nan)
    if np.isinf(there).any():
        # There is nothing between a number and infinity: the draw further out.
        low = np.quantile(there, 0.025, method="lower")
        high = np.quantile(there, 0.975, method="higher")
    else:
        low, high = np.quantile(there, [0.025, 0.975])
    return Interval(float(low), float(high))


@checked
def average_ranks(values: Float[np.ndarray, "*cells n"]) -> Float64[np.ndarray, "*cells n"]:
    """Ranks from 1 along the last axis; equal values share the mean of their ranks."""
    order = values.argsort(-1, kind="stable")
    ascending = np.take_along_axis(values, order, -1)
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    begins = np.ones(values.shape, dtype=bool)
    begins[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    ends = np.ones(values.shape, dtype=bool)
    ends[..., :-1] = begins[..., 1:]
    first = np.maximum.accumulate(np.where(begins, place, 0), -1)
    last = np.where(ends, place, values.shape[-1])
    last = np.flip(np.minimum.accumulate(np.flip(last, -1), -1), -1)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, -1)
    return ranks


@checked
def spearman(
    one: Float[np.ndarray, "*cells n"], other: Float[np.ndarray, "*cells n"]
) -> Float64[np.ndarray, "*cells"]:
    """Spearman's rank correlation along the last axis, for every cell at once: the correlation of
    average ranks. NaN where one of the two is constant or has a single value."""
    if one.shape[-1] == 0:
        return np.full(one.shape[:-1], np.nan)
    ranks = [average_ranks(values) for values in (one, other)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    spread = [np.sqrt((values**2).sum(-1)) for values in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((centred[0] * centred[1]).sum(-1) / (spread[0] * spread[1]))


class Chance(NamedTuple):
    """How many things two random choices would share.

    Attributes:
        probabilities: of sharing 0, 1, 2, ...
        expected: the mean number shared.
        low: lower bound of the central 95 % of numbers shared.
        high: upper bound.
    """

    probabilities: tuple[float, ...]
    expected: float
    low: int
    high: int

    def at_least(self, shared: int) -> float:
        """The one-sided p-value: how probable it is to share this many or more."""
        return min(1.0, math.fsum(self.probabilities[max(0, shared) :]))

    def and_also(self, other: "Chance") -> "Chance":
        """The number shared in two independent pairs of choices together."""
        return _chance(np.convolve(self.probabilities, other.probabilities))


@checked
def overlap_by_chance(population: int, one: int, other: int) -> Chance:
    """The hypergeometric distribution of how many of `population` things are in both of two
    choices, `one` and `other` of them drawn at random without replacement.

    Raises:
        ValueError: if a choice is larger than the population or negative.
    """
    if not 0 <= min(one, other) <= max(one, other) <= population:
        raise ValueError(f"{one} and {other} can't be chosen of {population}.")
    # Whole numbers as long as possible: factorials of a thousand heads are too large for floats.
    ways = [
        math.comb(one, shared) * math.comb(population - one, other - shared)
        for shared in range(min(one, other) + 1)
    ]
    total = math.comb(population, other)
    return _chance(np.array([way / total for way in ways]))


@checked
def overlap_of_choices(
    ours: int, our_choice: int, theirs: int, their_choice: int, common: int
) -> Chance:
    """How many things are in both of two random choices from populations that differ: `our_choice`
    of `ours` things and `their_choice` of `theirs`, of which `common` are in both populations.

    Raises:
        ValueError: if a choice or what is common is larger than a population, or negative.
    """
    if not 0 <= common <= min(ours, theirs):
        raise ValueError(f"{common} of {ours} and {theirs} can't be common.")
    total = np.zeros(common + 1)
    # Their choice has so many of the common things; ours meets some of these.
    for met, weight in enumerate(overlap_by_chance(theirs, common, their_choice).probabilities):
        shared = np.array(overlap_by_chance(ours, our_choice, met).probabilities)
        total[: len(shared)] += weight * shared
    return _chance(total)


def _chance(probabilities: np.ndarray) -> Chance:
    below = probabilities.cumsum()
    # Rounding of the sum must not push a bound past the last number.
    low, high = (min(int(np.searchsorted(below, q)), len(below) - 1) for q in (0.025, 0.975))
    expected = float(probabilities @ np.arange(len(probabilities)))
    return Chance(tuple(probabilities.tolist()), expected, low, high)
