"""What counts as lost and new, its intervals, and what is kept by chance."""

import numpy as np
import pytest

from tl_entity.stats import adjusted_p_values, compare_effects, kept_by_chance, share_changes


def compared(base, tuned, groups=None, names=("all",), n=40):
    """Of effects that are the same on every prompt."""
    effects = [np.tile(np.array(x, dtype=float), (n, 1)) for x in (base, tuned)]
    groups = np.zeros(len(base), dtype=int) if groups is None else np.array(groups)
    return compare_effects(effects[0], effects[1], groups, names)


def test_lost_and_new_worked_out_by_hand():
    """Shares .5 .3 .2 and .5 0 .5: of the second part .3 is lost; the third has no more than three
    times as much. Signs and scale don't count."""
    found = compared([5, -3, 2], [-50, 0, 50])
    assert (found.lost, found.new) == pytest.approx((0.3, 0.0))
    assert found.lost_interval == pytest.approx((0.3, 0.3))
    # .9 is three times .2 and .3 more.
    found = compared([8, 2], [1, 9])
    assert found.lost == pytest.approx(0.8 - 3 * 0.1)
    assert found.new == pytest.approx(0.9 - 3 * 0.2)


def test_shares_are_within_their_group():
    """The first group is half of all effects and its parts change places; the second only shrinks
    from a half to a third."""
    base, tuned = [3, 0, 2, 1], [0, 4, 4 / 3, 2 / 3]
    found = compared(base, tuned, [0, 0, 1, 1], ("swapped", "smaller"))
    swapped, smaller = found.groups
    assert (swapped.lost, swapped.new) == pytest.approx((1, 1))
    assert (smaller.lost, smaller.new) == pytest.approx((0, 0))
    assert swapped.weight == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (found.lost, found.new) == pytest.approx((1 / 2, 2 / 3))


def test_a_group_that_one_model_does_not_use_is_new_as_a_whole():
    found = compared([1, 0, 0], [1, 0.5, 0.5], [0, 1, 1], ("old", "added"))
    assert found.groups[1].new == pytest.approx(1)
    assert (found.lost, found.new) == pytest.approx((0, 0.5))


def held(new, noise, n_draws=200):
    """How often the interval holds what is new, and the mean of the estimates. So much of what
    twelve parts did goes to twelve that were idle; parts vary from prompt to prompt in proportion
    to what they do, and besides by some noise."""
    generator = np.random.default_rng(0)
    strong = 1 / (1 + np.arange(12) / 4)
    base = np.concatenate([strong, np.zeros(12)])
    tuned = np.concatenate([strong * (1 - new), strong * new])
    truth, inside, estimates = truth_of(base, tuned), 0, []
    for seed in range(n_draws):
        spread = 0.6 * np.stack([base, tuned])[:, None] + noise
        drawn = generator.normal(0, 1, (2, 100, 24)) * spread
        seen = [x + each for x, each in zip((base, tuned), drawn, strict=True)]
        found = compare_effects(*seen, np.zeros(24, dtype=int), ["all"], alike=False, seed=seed)
        inside += found.new_interval.low <= truth <= found.new_interval.high
        estimates.append(found.new)
    return inside / n_draws, np.mean(estimates)


@pytest.mark.parametrize("new", [0.0, 0.48])
def test_intervals_hold_the_truth_where_parts_stand_out_of_the_noise(new):
    assert held(new, 0.003)[0] >= 0.92


def test_noise_in_idle_parts_makes_less_seem_new_never_more():
    assert held(0.48, 0.15)[1] < 0.45
    assert held(0.0, 0.15)[1] < 0.02


def truth_of(base, tuned):
    return np.maximum(0, tuned / tuned.sum() - 3 * base / base.sum()).sum()


def moved(within: bool, generator, n_layers=5, n_roles=4, n_heads=8):
    """Effects of one model, and of another with heads elsewhere. Work lies in the upper layers."""
    depth = np.arange(1, n_layers + 1)[:, None, None] ** 2
    one = generator.exponential(1, (n_layers, n_roles, n_heads)) ** 3 * depth
    other = np.stack([layer[:, generator.permutation(n_heads)] for layer in one])
    return (one, other) if within else (one, one)


def test_p_values_are_uniform_if_heads_only_stand_elsewhere_in_their_layer():
    generator = np.random.default_rng(1)
    found = [kept_by_chance(*moved(True, generator), draws=99, seed=seed)[2] for seed in range(400)]
    for level in (0.05, 0.25, 0.5, 0.75):
        # Within three standard errors.
        spread = 3 * np.sqrt(level * (1 - level) / 400)
        assert abs(np.mean(np.array(found) <= level) - level) <= spread


def test_without_layers_chance_is_found_too_often():
    generator = np.random.default_rng(2)
    found = [
        kept_by_chance(*moved(True, generator), draws=99, seed=seed, within_layers=False)[2]
        for seed in range(100)
    ]
    assert np.mean(np.array(found) <= 0.05) > 0.3


def test_the_same_heads_have_all_in_common():
    common, by_chance, p_value = kept_by_chance(*moved(False, np.random.default_rng(3)))
    assert common == pytest.approx(1)
    assert by_chance < 0.8
    assert p_value == pytest.approx(1 / 1001)


def test_adjusted_p_values_by_hand():
    """Of .01 .02 .03 .5: times 4/1, 4/2, 4/3, 4/4, and none above a later one."""
    found = adjusted_p_values(np.array([0.5, 0.01, 0.03, 0.02]))
    assert found == pytest.approx([0.5, 0.04, 0.04, 0.04])


def test_parts_that_are_the_same_are_seldom_found_changed():
    """A share just three times the other is the bound of the null: one in twenty at most."""
    generator = np.random.default_rng(4)
    base, tuned = np.array([3.0, 5.0, 2.0]), np.array([1.0, 5.0, 4.0])
    p_values = []
    for _ in range(400):
        noise = generator.normal(0, 1, (2, 100, 3))
        seen = [
            x + each - each.mean(1, keepdims=True)
            for x, each in zip((base, tuned), noise, strict=True)
        ]
        p_values.append(share_changes(*seen)[2][0])
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
