"""The ratio of two proportions on the same prompts, such as faithfulness: its score interval."""

import numpy as np
from jaxtyping import Bool, Float64, Integer

from tl_entity._typing import checked
from tl_entity.stats.intervals import Z_95, Interval

HALVINGS = 60
"""Each end is found to the last bits of a float."""


@checked
def paired_counts(
    one: Bool[np.ndarray, " batch"], other: Bool[np.ndarray, " batch"]
) -> tuple[int, int, int]:
    """Prompts on which both succeed, only the one, and only the other."""
    return int((one & other).sum()), int((one & ~other).sum()), int((other & ~one).sum())


@checked
def paired_ratio_interval(both: int, only_one: int, only_other: int) -> Interval:
    """95 % score interval of the ratio of two proportions on the same prompts (Nam and Blackwelder
    2002, Statistics in Medicine 21, 689-699; Tang, Tang and Chan 2003, the same 22, 1217-1233).

    It holds every ratio that the counts don't contradict. A ratio r says that one proportion is r
    times the other; the difference of the first and r times the second is set beside its standard
    error, estimated by maximum likelihood *as if r were right*. So the ratio seen is always within,
    and there is a width where nothing was seen to vary: 0 of 24 against 24 of 24 gives 0 to 0.16,
    the same 24 right in both 0.86 to 1.16. Prompts on which neither succeeds say nothing.

    In simulations over 20 to 300 prompts, denominators of .2 to .99 and ratios of .05 to 1 it holds
    the true ratio in 93 to 97 % of cases, and in more where few prompts differ between the two. The
    lowest was 92.5 %: 20 prompts of which the numerator succeeds on one in twenty, where one count
    more or less would make it 98 %.

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
    low, high = paired_ratio_intervals(np.array([both, only_one, only_other])).tolist()
    return Interval(low, high)


@checked
def paired_ratio_intervals(
    counts: Integer[np.ndarray, "*tables 3"],
) -> Float64[np.ndarray, "*tables 2"]:
    """`paired_ratio_interval` of many tables at once, each a row of the three counts."""
    both, one, other = np.moveaxis(counts.astype(np.float64), -1, 0)
    top, bottom = both + one, both + other
    # A ratio r is kept as r / (1 + r), which is from 0 to 1 where r is from 0 to infinity.
    seen = np.divide(top, top + bottom, out=np.full_like(top, 0.5), where=top + bottom > 0)

    def search(outside: np.ndarray) -> np.ndarray:
        """Where the score first is as large as it may be, between a ratio outside and the one
        seen, which is inside."""
        inside = seen
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            held = _holds(middle, both, one, other)
            inside = np.where(held, middle, inside)
            outside = np.where(held, outside, middle)
        return inside

    # With no success the ratio may be nothing, and with none in the denominator without limit.
    low = np.where(top > 0, search(np.zeros_like(seen)), 0.0)
    high = np.where(bottom > 0, search(np.ones_like(seen)), 1.0)
    with np.errstate(divide="ignore"):
        return np.stack([low / (1 - low), high / (1 - high)], -1)


def _holds(place: np.ndarray, both: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether a ratio, as r / (1 + r), is within the interval."""
    u, w = place, 1 - place
    top, bottom, trials = both + one, both + other, both + one + other
    difference = w * top - u * bottom
    # The variance of the difference with the likeliest proportions of which the one is r times the
    # other; these solve a quadratic equation.
    root = np.sqrt((w**2 * top - u**2 * bottom) ** 2 + 4 * u**2 * w**2 * one * other)
    variance = (root - w**2 * top + u**2 * (bottom + 2 * one)) / 2 + u * (w - u) * trials
    return difference**2 <= Z_95**2 * variance
