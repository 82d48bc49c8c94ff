import math

import numpy as np
import pytest

from tl_entity.stats import (
    Bootstrap,
    Interval,
    average_ranks,
    mean_intervals,
    overlap_by_chance,
    paired_difference_interval,
    paired_ratio_interval,
    percentile_interval,
    spearman,
    wilson_interval,
)


def ratio(top: np.ndarray, bottom: np.ndarray, *, seed: int, draws: int = 10_000) -> Interval:
    """Of prompts drawn for it alone."""
    return Bootstrap.draw(len(top), seed=seed, draws=draws).ratio(top, bottom)


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
    assert ratio(correct / 2, correct, seed=0) == pytest.approx((0.5, 0.5))


def test_bootstrap_finds_the_spread_of_a_proportion() -> None:
    half = np.array([1.0, 0.0] * 200)
    low, high = ratio(half, np.ones(400), seed=1)
    # The standard error of 0.5 in 400 is 0.025.
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_the_seed_decides_the_bootstrap() -> None:
    generator = np.random.default_rng(0)
    top, bottom = generator.random(30), generator.random(30)
    first = ratio(top, bottom, seed=3, draws=200)
    assert ratio(top, bottom, seed=3, draws=200) == first
    assert ratio(top, bottom, seed=4, draws=200) != first


def test_draws_without_a_denominator_do_not_count() -> None:
    zero, one_of_two = np.zeros(2), np.array([1.0, 0.0])
    assert ratio(one_of_two, one_of_two, seed=0) == (1.0, 1.0)
    assert all(math.isnan(bound) for bound in ratio(zero, zero, seed=0))


def of_200(n: int) -> np.ndarray:
    """Success on the first `n` of 200 prompts."""
    return np.arange(200) < n


@pytest.mark.parametrize(
    ("one", "other", "low"),
    [
        # Of 200 prompts 35 before and 1 after: the one is missing from (199/200)^200 = 37 % of the
        # draws, in which the ratio is infinite.
        (35, 1, 10.33),
        (35, 2, 6.67),
        (24, 3, 3.67),
    ],
)
def test_proportions_over_nothing_are_infinite(one: int, other: int, low: float) -> None:
    found = Bootstrap.draw(200, seed=0).ratio_of_proportions(of_200(one), of_200(other))
    assert found.low == pytest.approx(low, abs=0.5)
    assert found.high == math.inf


def test_proportions_by_hand() -> None:
    bootstrap = Bootstrap.draw(200, seed=0, draws=400)
    one, other = of_200(60), of_200(90)
    found = bootstrap.ratio_of_proportions(one, other)
    assert found == bootstrap.ratio(one.astype(np.float64), other.astype(np.float64))
    assert found.low < 60 / 90 < found.high
    ratios = bootstrap.means(one.astype(float)) / bootstrap.means(other.astype(float))
    assert found == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])))


def test_what_neither_proportion_has_counts_as_it_is_told() -> None:
    two = Bootstrap(np.array([[2.0, 0.0]] * 30 + [[0.0, 2.0]] * 70))
    one, other = np.array([True, False]), np.array([True, False])
    # In 70 of 100 draws neither has a success.
    assert two.ratio_of_proportions(one, other, neither=0.5) == (0.5, 1.0)
    # Left out, there are 30 draws, all of the same ratio.
    assert two.ratio_of_proportions(one, other) == paired_ratio_interval(1, 0, 0)
    never = np.array([False, False])
    assert all(math.isnan(end) for end in two.ratio_of_proportions(never, never))
    assert two.ratio_of_proportions(never, never, neither=1.0) == (0, math.inf)


@pytest.mark.parametrize("n", [1, 24, 200])
def test_a_ratio_that_no_draw_varies_has_a_width_all_the_same(n: int) -> None:
    bootstrap = Bootstrap.draw(200, seed=0)
    z = 1.959963984540054
    # None against n: Wilson's upper limit of 0 in n, z² / (n + z²), over his lower one of n in n,
    # n / (n + z²).
    none = bootstrap.ratio_of_proportions(of_200(0), of_200(n))
    assert none == pytest.approx((0, z**2 / n))
    # All against none, the other way round.
    assert bootstrap.ratio_of_proportions(of_200(n), of_200(0)) == pytest.approx(
        (n / z**2, math.inf)
    )
    # The same n in both: the quantile squared is z² (n + 2) / (2 (n + 1)).
    narrow = z**2 * (n + 2) / (2 * (n + 1))
    same = bootstrap.ratio_of_proportions(of_200(n), of_200(n))
    assert same == pytest.approx((n / (n + narrow), (n + narrow) / n))


def test_ratios_of_pairs_by_hand() -> None:
    """Airway hyper-responsiveness before and after a transplant (Bentur 2009): both 1, only before
    1, only after 7; a ratio of 2 to 8 among 9."""
    spread = math.sqrt(10 / (3 * 9))
    z = 1.959963984540054 * spread / (math.sqrt((1 - 3 / 11) / 3) + math.sqrt((1 - 9 / 11) / 9))
    limits = [
        (2 * x + z**2 + sign * z * math.sqrt(z**2 + 4 * x * (1 - x / 9))) / (2 * (9 + z**2))
        for x in (2, 8)
        for sign in (-1, 1)
    ]
    found = paired_ratio_interval(1, 1, 7)
    assert found == pytest.approx((limits[0] / limits[3], limits[1] / limits[2]))
    assert found == pytest.approx((0.068, 0.923), abs=5e-4)
    # Which of the two is the numerator does not matter.
    assert paired_ratio_interval(1, 7, 1) == pytest.approx((1 / found.high, 1 / found.low))
    with pytest.raises(ValueError, match="no counts"):
        paired_ratio_interval(1, -1, 0)


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


def test_means_are_those_of_the_prompts_drawn() -> None:
    generator = np.random.default_rng(0)
    one, other = (generator.random(40) < p for p in (0.7, 0.4))
    one, other = one.astype(np.float64), other.astype(np.float64)
    bootstrap = Bootstrap.draw(40, seed=3, draws=500)
    assert bootstrap.counts.shape == (500, 40)
    assert (bootstrap.counts.sum(1) == 40).all()
    rows = [np.repeat(np.arange(40), counts.astype(int)) for counts in bootstrap.counts]
    np.testing.assert_allclose(
        bootstrap.means(np.stack([one, other])),
        [[one[chosen].mean() for chosen in rows], [other[chosen].mean() for chosen in rows]],
    )


def test_percentiles_pass_over_what_is_undefined() -> None:
    samples = np.append(np.linspace(0, 1, 1001), np.nan)
    assert percentile_interval(samples) == pytest.approx((0.025, 0.975))
    assert all(math.isnan(bound) for bound in percentile_interval(np.full(3, np.nan)))


def test_percentiles_of_what_is_infinite_are_infinite() -> None:
    # 97 finite draws of 100: the 97.5 % quantile lies among those that are not.
    samples = np.append(np.arange(97.0), [np.inf] * 3)
    assert percentile_interval(samples) == (2.0, math.inf)
    # Of 99 it lies among the finite ones.
    assert percentile_interval(np.append(np.arange(99.0), np.inf)) == (2.0, 97.0)
    assert percentile_interval(np.full(5, np.inf)) == (math.inf, math.inf)


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    values = np.array([[3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    expected = [[3.5, 1.0, 3.5, 2.0], [2.5] * 4, [1.0, 2.0, 3.0, 4.0]]
    assert average_ranks(values).tolist() == expected
    assert average_ranks(np.zeros((2, 0))).shape == (2, 0)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # 1 - 6 sum(d²) / (n (n² - 1)) with d = 0, 1, 1, 1, 1.
        ([1, 2, 3, 4, 5], [1, 3, 2, 5, 4], 1 - 6 * 4 / (5 * 24)),
        ([1, 2, 3], [30, 20, 10], -1),
        # The order is all that counts.
        ([1, 2, 3, 4], [1, 10, 100, 1000], 1),
        # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: correlation of these numbers.
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
    ],
)
def test_spearman_by_hand(one: list, other: list, expected: float) -> None:
    one, other = (np.array(values, dtype=np.float64) for values in (one, other))
    assert spearman(one, other) == pytest.approx(expected)
    both = spearman(np.stack([one, one]), np.stack([other, one]))
    assert both.tolist() == pytest.approx([expected, 1.0])


def test_spearman_of_what_does_not_vary_is_undefined() -> None:
    constant, other = np.ones(3), np.arange(3.0)
    assert math.isnan(spearman(constant, other))
    assert math.isnan(spearman(other[:1], other[:1]))
    assert np.isnan(spearman(np.zeros((2, 0)), np.zeros((2, 0)))).all()


def test_overlaps_by_chance_are_hypergeometric() -> None:
    # Two of four and two of four: of the six second choices one shares both, one none.
    chance = overlap_by_chance(4, 2, 2)
    assert chance.probabilities == pytest.approx((1 / 6, 4 / 6, 1 / 6))
    assert chance.expected == pytest.approx(1)
    assert (chance.low, chance.high) == (0, 2)
    assert chance.at_least(0) == chance.at_least(-1) == 1.0
    assert chance.at_least(1) == pytest.approx(5 / 6)
    assert chance.at_least(2) == pytest.approx(1 / 6)
    assert chance.at_least(3) == 0
    # As large as a population of heads gets: 58 of 1024 twice.
    large = overlap_by_chance(1024, 58, 58)
    assert math.fsum(large.probabilities) == pytest.approx(1)
    assert large.expected == pytest.approx(58 * 58 / 1024)
    assert (large.low, large.high) == (0, 7)
    assert overlap_by_chance(3, 3, 2).probabilities == pytest.approx((0, 0, 1))
    assert overlap_by_chance(0, 0, 0).probabilities == (1.0,)
    for population, one, other in ((3, 4, 1), (3, 1, 4), (3, -1, 1)):
        with pytest.raises(ValueError, match="can't be chosen"):
            overlap_by_chance(population, one, other)


def test_overlaps_by_chance_are_what_drawing_gives() -> None:
    generator = np.random.default_rng(0)
    shared = [
        len({*generator.permutation(12)[:5]} & {*generator.permutation(12)[:7]})
        + len({*generator.permutation(6)[:2]} & {*generator.permutation(6)[:3]})
        for _ in range(4000)
    ]
    chance = overlap_by_chance(12, 5, 7).and_also(overlap_by_chance(6, 2, 3))
    drawn = np.bincount(shared, minlength=len(chance.probabilities)) / 4000
    np.testing.assert_allclose(drawn, chance.probabilities, atol=0.025)
    assert chance.expected == pytest.approx(35 / 12 + 1)
    low, high = np.quantile(shared, [0.025, 0.975])
    assert (chance.low, chance.high) == (low, high)
