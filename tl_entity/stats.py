"""Intervals and resampling: every accuracy and mean score carries its uncertainty."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

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
    share = successes / trials
    spread = Z_95 * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2))
    centre = share + Z_95**2 / (2 * trials)
    scale = 1 + Z_95**2 / trials
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
def bootstrap_ratio_interval(
    numerator: Float[np.ndarray, " batch"],
    denominator: Float[np.ndarray, " batch"],
    *,
    seed: int,
    draws: int = 10_000,
) -> Interval:
    """Percentile 95 % interval of mean(numerator) / mean(denominator), the prompts resampled in
    pairs (the same prompts in both). Draws with a zero denominator are left out; NaN if all are.
    """
    generator = np.random.default_rng(seed)
    n = len(numerator)
    # Multinomial counts are the same resampling as drawing n indices, at a fraction of the memory.
    counts = generator.multinomial(n, np.full(n, 1 / n), size=draws)
    top, bottom = counts @ numerator.astype(float), counts @ denominator.astype(float)
    ratios = top[bottom != 0] / bottom[bottom != 0]
    if len(ratios) == 0:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(low), float(high))
