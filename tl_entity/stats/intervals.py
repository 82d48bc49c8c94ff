"""Intervals: every accuracy and mean score carries its uncertainty."""

import math
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
        if math.isnan(self.low) or math.isnan(self.high):
            return "[no interval]"
        return f"[{self.low:.3f}, {self.high:.3f}]"


NO_INTERVAL = Interval(math.nan, math.nan)
"""Where none can be given that would hold the truth as often as it says."""


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
def paired_loss_interval(
    one: tuple[Bool[np.ndarray, " batch"], Bool[np.ndarray, " batch"]],
    other: tuple[Bool[np.ndarray, " batch"], Bool[np.ndarray, " batch"]],
) -> Interval:
    """95 % interval of how much more one loses than another: of (before - after) of `one`'s
    proportions less that of `other`'s, all four on the same prompts.

    As in `paired_difference_interval`, one prompt is added on which the difference of losses is 1
    and one on which it is -1, so that it has a width where nothing was seen to vary.

    Args:
        one: whether it succeeds on each prompt before and after.
        other: the same.

    Raises:
        ValueError: if there are no prompts.
    """
    n = len(one[0])
    if n == 0:
        raise ValueError("There are no prompts to compare.")
    lost = [before.astype(np.float64) - after for before, after in (one, other)]
    difference = np.append(lost[0] - lost[1], [1.0, -1.0])
    centre = float(difference.mean())
    spread = Z_95 * math.sqrt(float((difference**2).mean() - centre**2) / (n + 2))
    return Interval(max(-2.0, centre - spread), min(2.0, centre + spread))
