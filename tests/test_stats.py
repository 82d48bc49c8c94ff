import math

import numpy as np
import pytest

from tl_entity.stats import bootstrap_ratio_interval, mean_intervals, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # The examples of Newcombe (1998), table I, method 3, to four digits.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    # What is counted as a success does not matter.
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_bounds_hold_the_proportion_at_the_ends() -> None:
    assert wilson_interval(0, 7).low == 0.0
    assert wilson_interval(7, 7).high == 1.0
    for successes, trials in ((1, 0), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson_interval(successes, trials)


def test_mean_intervals_by_hand() -> None:
    samples = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]], dtype=np.float32)
    # Mean 2.5, standard deviation sqrt(5/3), standard error sqrt(5/12), times 1.96.
    half = 1.959964 * math.sqrt(5 / 12)
    expected = [[2.5 - half, 2.5 + half], [5.0, 5.0]]
    np.testing.assert_allclose(mean_intervals(samples), expected, atol=1e-6)
    assert mean_intervals(samples[None]).shape == (1, 2, 2)
    assert np.isnan(mean_intervals(samples[:, :1])).all()


def test_bootstrap_resamples_numerator_and_denominator_together() -> None:
    generator = np.random.default_rng(0)
    correct = (generator.random(50) < 0.5).astype(np.float64)
    # Whatever prompts are drawn, half of the same prompts is half; apart, the ratio would vary.
    assert bootstrap_ratio_interval(correct / 2, correct, seed=0) == pytest.approx((0.5, 0.5))


def test_bootstrap_finds_the_spread_of_a_proportion() -> None:
    half = np.array([1.0, 0.0] * 200)
    low, high = bootstrap_ratio_interval(half, np.ones(400), seed=1)
    # The standard error of 0.5 in 400 is 0.025.
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_the_seed_decides_the_bootstrap() -> None:
    generator = np.random.default_rng(0)
    top, bottom = generator.random(30), generator.random(30)
    first = bootstrap_ratio_interval(top, bottom, seed=3, draws=200)
    assert bootstrap_ratio_interval(top, bottom, seed=3, draws=200) == first
    assert bootstrap_ratio_interval(top, bottom, seed=4, draws=200) != first


def test_draws_without_a_denominator_do_not_count() -> None:
    zero, one_of_two = np.zeros(2), np.array([1.0, 0.0])
    assert bootstrap_ratio_interval(one_of_two, one_of_two, seed=0) == (1.0, 1.0)
    assert all(math.isnan(bound) for bound in bootstrap_ratio_interval(zero, zero, seed=0))
