"""Ranks and Spearman's correlation, by hand."""

import math

import numpy as np
import pytest

from tl_entity.stats import average_ranks, spearman


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
