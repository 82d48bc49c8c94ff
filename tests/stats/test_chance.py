"""What two choices share by chance, counted by hand and drawn."""

import math

import numpy as np
import pytest

from tl_entity.stats import layered_overlap_by_chance, overlap_by_chance


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


def test_layers_are_drawn_one_by_one() -> None:
    # Of two layers of two, one in the first each, both in the second of one choice and one of the
    # other: by chance half, and for certain one.
    chance = layered_overlap_by_chance([(2, 1, 1), (2, 2, 1)])
    assert chance.probabilities == pytest.approx((0, 0.5, 0.5))
    assert chance.expected == pytest.approx(1.5)
    assert layered_overlap_by_chance([]).probabilities == (1.0,)
    # With all in one layer it is the plain draw; where the choices have no layer in common, nothing
    # can be shared, which the plain draw does not know.
    assert layered_overlap_by_chance([(4, 2, 2)]) == overlap_by_chance(4, 2, 2)
    apart = layered_overlap_by_chance([(4, 2, 0), (4, 0, 3)])
    assert apart.expected == 0 and apart.at_least(1) == 0
    with pytest.raises(ValueError, match="can't be chosen"):
        layered_overlap_by_chance([(4, 2, 2), (2, 3, 0)])
