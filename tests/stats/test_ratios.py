"""Ratios of proportions on the same prompts: by hand, by search, and as often right as they say."""

import math
from itertools import product

import numpy as np
import pytest

from tl_entity.stats import paired_counts, paired_ratio_interval, paired_ratio_intervals

Z2 = 1.959963984540054**2


def test_counts_of_pairs() -> None:
    one = np.array([True, True, True, False, False, False])
    other = np.array([True, True, False, True, False, False])
    assert paired_counts(one, other) == (2, 1, 1)
    assert paired_counts(one, ~other) == (1, 2, 2)


def test_ratios_of_pairs_are_the_published_ones() -> None:
    """Airway hyper-responsiveness before and after a transplant (Bentur 2009): both 1, only before
    1, only after 7. Fagerland, Lydersen and Laake (2014), table VII: Tang's score interval."""
    found = paired_ratio_interval(1, 1, 7)
    assert found == pytest.approx((0.065, 0.907), abs=5e-4)
    # Which of the two is the numerator does not matter.
    assert paired_ratio_interval(1, 7, 1) == pytest.approx((1 / found.high, 1 / found.low))
    with pytest.raises(ValueError, match="no counts"):
        paired_ratio_interval(1, -1, 0)


@pytest.mark.parametrize("n", [1, 24, 200])
def test_a_ratio_that_nothing_varies_has_a_width_all_the_same(n: int) -> None:
    # None against n: at most z² successes, of a proportion r times as large, are not seen.
    assert paired_ratio_interval(0, 0, n) == pytest.approx((0, Z2 / n))
    assert paired_ratio_interval(0, n, 0) == pytest.approx((n / Z2, math.inf))
    # The same n in both: (r - 1)² n² = z² (r - 1) n.
    assert paired_ratio_interval(n, 0, 0) == pytest.approx((n / (n + Z2), (n + Z2) / n))


def test_a_part_of_the_successes_is_a_proportion_of_them() -> None:
    # 3 of the 8 and nothing else: below, Wilson's limit of 3 of 8.
    low, _ = paired_ratio_interval(3, 0, 5)
    assert low == pytest.approx(0.13684, abs=1e-5)


def test_nothing_against_nothing_is_anything() -> None:
    assert paired_ratio_interval(0, 0, 0) == (0, math.inf)
    assert paired_ratio_interval(0, 3, 0).high == math.inf
    assert paired_ratio_interval(0, 0, 3).low == 0


def test_an_interval_holds_its_own_ratio() -> None:
    counts = np.array(list(product(range(9), repeat=3)))
    low, high = paired_ratio_intervals(counts).T
    top, bottom = counts[:, 0] + counts[:, 1], counts[:, 0] + counts[:, 2]
    some = bottom > 0
    seen = top[some] / bottom[some]
    assert (low[some] <= seen).all() and (seen <= high[some]).all()
    assert (high[(top > 0) & ~some] == np.inf).all()
    assert (low < high).all()


def likeliest_variance(counts: tuple[int, int, int], ratio: float) -> float:
    """Of the difference top - ratio * bottom, at the maximum of the multinomial likelihood among
    probabilities that have this ratio, found by trying all."""
    both, one, other = counts
    total = sum(counts)
    # Of the prompts on which either succeeds: p11 + p10 = ratio (p11 + p01), p11 + p10 + p01 = 1.
    p10 = np.linspace(1e-9, 1, 400_001)
    p01 = 1 - ratio + ratio * p10
    p11 = 1 - p10 - p01
    inside = (p01 > 0) & (p11 > 0)
    p11, p10, p01 = p11[inside], p10[inside], p01[inside]
    likelihood = both * np.log(p11) + one * np.log(p10) + other * np.log(p01)
    best = int(np.argmax(likelihood))
    values = np.array([1 - ratio, 1, -ratio])
    return total * float(values**2 @ np.array([p11[best], p10[best], p01[best]]))


@pytest.mark.parametrize("counts", [(5, 2, 4), (12, 1, 3), (3, 6, 2), (30, 4, 9)])
def test_the_ends_are_ratios_that_likelihood_just_allows(counts: tuple[int, int, int]) -> None:
    both, one, other = counts
    for ratio in paired_ratio_interval(*counts):
        deviation = (both + one) - ratio * (both + other)
        assert deviation**2 / likeliest_variance(counts, ratio) == pytest.approx(Z2, rel=1e-3)


def outcome_probabilities(whole: float, ratio: float, together: float) -> np.ndarray:
    """Both, only the circuit, only the model, neither; `together` is how far they go together, from
    independence to as far as possible."""
    part = whole * ratio
    both = part * whole + together * (min(part, whole) - part * whole)
    return np.array([both, part - both, whole - both, 1 - part - whole + both]).clip(0)


def test_ratios_hold_the_truth_as_often_as_they_say() -> None:
    """Faithfulness of .05 to 1 of models with an accuracy of .2 to .99, on 20 to 300 prompts.

    Where the two differ on few prompts, or the circuit has hardly any right, the count that decides
    takes few values, and no interval can hold the truth in just 95 %: rather more, then, with one
    exception. Of 20 prompts with one success in twenty it is 92.5 or 98 % for an interval of any
    kind, as one count more is taken to contradict it or not.
    """
    generator = np.random.default_rng(0)
    below, above, cells = [], [], 0
    for n, whole, ratio, together in product(
        (20, 40, 100, 300), (0.2, 0.5, 0.9, 0.99), (0.05, 0.2, 0.5, 0.9, 1.0), (0.3, 0.7)
    ):
        p = outcome_probabilities(whole, ratio, together)
        drawn, times = np.unique(
            generator.multinomial(n, p / p.sum(), size=6_000)[:, :3], axis=0, return_counts=True
        )
        defined = drawn[:, 0] + drawn[:, 2] > 0
        drawn, times = drawn[defined], times[defined]
        low, high = paired_ratio_intervals(drawn).T
        held = ((low <= ratio) & (ratio <= high)) @ times / times.sum()
        cells += 1
        # Prompts on which the two are expected to differ, and those that the circuit has right.
        differ, right = n * (p[1] + p[2]), n * (p[0] + p[1])
        if held < 0.93:
            below.append((n, whole, ratio, held))
        if held > 0.97:
            above.append((n, whole, ratio, together, min(differ, right)))
    assert cells == 160
    assert {cell[:3] for cell in below} <= {(20, 0.99, 0.05)}
    assert all(held > 0.92 for *_, held in below)
    # Conservative where fewer than six prompts tell the two apart, and there alone.
    assert all(few < 6 for *_, few in above), above
    assert len(above) < 0.2 * cells
