import math

import numpy as np
import pytest

from tl_entity.stats import (
    NO_INTERVAL,
    mean_intervals,
    paired_difference_interval,
    paired_loss_interval,
    wilson_interval,
)


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


def test_differences_of_pairs_by_hand() -> None:
    # 1 both, 1 only the first, 7 only the second, 12 neither (Fagerland, Lydersen and Laake 2014,
    # Statistics in Medicine 33, 2850-2875, airway hyper-responsiveness).
    one = np.repeat([True, True, False, False], [1, 1, 7, 12])
    other = np.repeat([True, False, True, False], [1, 1, 7, 12])
    assert paired_difference_interval(one, other) == pytest.approx((-0.508, -0.013), abs=5e-4)
    found = paired_difference_interval(other, one)
    assert found == pytest.approx((0.013, 0.508), abs=5e-4)
    same = paired_difference_interval(one[:1].repeat(40), one[:1].repeat(40))
    assert same == pytest.approx((-0.066, 0.066), abs=5e-4)
    for n in (1, 2, 30):
        low, high = paired_difference_interval(np.ones(n, bool), np.zeros(n, bool))
        assert 0 < high <= 1 and low < high
    with pytest.raises(ValueError, match="no prompts"):
        paired_difference_interval(one[:0], other[:0])


def test_intervals_of_paired_differences_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    for shares in ((0.9, 0.04, 0.02, 0.04), (0.3, 0.3, 0.1, 0.3), (0.0, 0.5, 0.01, 0.49)):
        held = []
        for _ in range(2000):
            kinds = generator.choice(4, 60, p=shares)
            low, high = paired_difference_interval(kinds < 2, kinds % 2 == 0)
            held.append(low <= shares[1] - shares[2] <= high)
        assert np.mean(held) > 0.935


def test_intervals_of_paired_losses_hold_and_cover() -> None:
    """How much more one loses than the other, all four on the same prompts."""
    none = np.zeros(40, dtype=bool)
    low, high = paired_loss_interval((~none, ~none), (~none, ~none))
    assert low == -high and 0.05 < high < 0.1  # a width where nothing was seen to vary
    generator = np.random.default_rng(0)
    # Eight outcomes: right before and after in the one, right after in the other, in which all
    # were right before.
    shares = generator.dirichlet(np.full(8, 0.5))
    outcomes = np.array([[a >> bit & 1 for bit in range(3)] for a in range(8)], dtype=bool)
    truth = float(shares @ (outcomes[:, 0] * 1.0 - outcomes[:, 1] - (1.0 - outcomes[:, 2])))
    held = []
    for _ in range(600):
        before, after, other = outcomes[generator.choice(8, 60, p=shares)].T
        low, high = paired_loss_interval((before, after), (np.ones(60, dtype=bool), other))
        held.append(low <= truth <= high)
    assert 0.93 < np.mean(held) < 0.985


def test_no_interval_says_so() -> None:
    assert str(NO_INTERVAL) == "[no interval]"
    assert str(wilson_interval(1, 29)) == "[0.006, 0.172]"


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_intervals_hold_their_own_estimate(n: int) -> None:
    for successes in range(n + 1):
        low, high = wilson_interval(successes, n)
        assert low <= successes / n <= high
    prompts = np.arange(n)
    for both in range(n + 1):
        for up in range(n + 1 - both):
            for down in range(n + 1 - both - up):
                one = prompts < both + up
                other = (prompts < both) | (prompts >= n - down)
                low, high = paired_difference_interval(one, other)
                assert low <= (up - down) / n <= high
