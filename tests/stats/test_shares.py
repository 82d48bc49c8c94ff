"""Shares of a gain: by hand, by search, and how often they hold the truth."""

import math
from itertools import product

import numpy as np
import pytest

from tl_entity.stats import (
    paired_ratio_interval,
    paired_share,
    paired_share_interval,
    share_scores,
)
from tl_entity.stats.shares import OUTCOMES

Z = 1.959963984540054


def table(**counts: int) -> np.ndarray:
    """Prompts by outcome, such as `o001=3`: wrong before, wrong in part, right after."""
    return np.array([counts.get(f"o{n:03b}", 0) for n in range(8)], dtype=np.float64)


def scores(one: np.ndarray, shares: list[float]) -> np.ndarray:
    return share_scores(np.tile(one, (len(shares), 1)), np.array(shares, dtype=np.float64))


def test_shares_are_of_the_gain() -> None:
    before = np.array([False] * 30 + [True] * 20)
    after = np.array([True] * 28 + [False] * 2 + [True] * 19 + [False])
    part = np.array([True] * 10 + [False] * 20 + [True] * 20)
    share, interval = paired_share(before, part, after)
    assert share == pytest.approx(10 / 27)
    assert interval.low < share < interval.high
    # All of it, and nothing, are shares with a width.
    share, interval = paired_share(before, after, after)
    assert share == 1 and interval.low < 1 < interval.high
    share, interval = paired_share(before, before, after)
    assert share == 0 and interval.low < 0 < interval.high
    # The same the other way round: what is lost is lost in the same shares.
    turned, around = paired_share(~before, ~part, ~after)
    share, interval = paired_share(before, part, after)
    assert (turned, *around) == pytest.approx((share, *interval))


def test_a_gain_that_may_be_nothing_has_no_shares() -> None:
    # McNemar's statistic of 5 gained and 1 lost is (5 - 1)² / 6 = 2.67; of 6 and 0 it is 6.
    assert math.isnan(paired_share_interval(table(o001=3, o011=2, o100=1, o111=40)).low)
    assert paired_share_interval(table(o001=3, o011=3, o111=40)).low < 0.5
    same = np.array([True, False] * 20)
    share, interval = paired_share(same, ~same, same)
    assert math.isnan(share) and np.isnan(interval).all()


def test_scores_by_hand() -> None:
    gained = table(o011=4, o001=6, o111=30)
    # Of 10 gained prompts 4 are gained. With a share of .6 the likeliest is that of the 10 a part
    # of .6 is gained, and nothing else: a variance of 10 * .6 * .4, as in Wilson's interval.
    assert scores(gained, [0.6])[0] == pytest.approx((4 - 6) / math.sqrt(2.4), abs=1e-9)
    # With a share of .2 it is likelier that some prompts are lost that were not seen to be: the
    # multiplier is 1, and the variance 4 * .8² / 1.8 + 6 * .2² / .8 + (4 * .8 / 1.8 - 6 * .2 / .8).
    assert scores(gained, [0.2])[0] == pytest.approx((4 - 2) / math.sqrt(2), abs=1e-9)
    assert scores(gained, [0.4])[0] == 0


def test_without_prompts_right_before_it_is_a_ratio() -> None:
    """If nothing is right before, the share is the ratio of two proportions, and the interval that
    of the ratio while it is within 0 and 1, where no outcome that was not seen is likelier."""
    for both, one, other in ((9, 3, 4), (20, 2, 15), (12, 6, 8)):
        share = paired_share_interval(table(o011=both, o010=one, o001=other, o000=30))
        ratio = paired_ratio_interval(both, one, other)
        assert share == pytest.approx(ratio, abs=1e-6)


def likeliest_score(one: np.ndarray, share: float) -> float:
    """The score, with the maximum of the likelihood found by ascent in the probabilities, the
    constraint kept by a penalty that grows."""
    had, whole = (OUTCOMES[:, n] - OUTCOMES[:, 0] for n in (1, 2))
    values = had - share * whole
    n = one.sum()
    kinds = np.unique(values.round(12))
    counts = np.array([one[np.isclose(values, kind)].sum() for kind in kinds])
    # Newton's method on the dual: the multiplier of the empirical likelihood.
    multiplier = 0.0
    for _ in range(200):
        weights = 1 + multiplier * kinds
        slope = (counts * kinds**2 / weights**2).sum()
        step = (counts * kinds / weights).sum() / slope
        while ((1 + (multiplier + step) * kinds)[counts > 0] <= 0).any():
            step /= 2
        multiplier += step
    p = counts / n / (1 + multiplier * kinds)
    assert p.sum() == pytest.approx(1) and p @ kinds == pytest.approx(0, abs=1e-9)
    return float(counts @ kinds / math.sqrt(n * (p @ kinds**2)))


def test_scores_are_those_of_the_likeliest_probabilities() -> None:
    """Where all outcomes were seen, so that none needs a probability that it has no count for."""
    one = np.array([10.0, 8, 3, 9, 2, 1, 2, 20])
    for share in (-0.4, 0.2, 0.75, 1.3):
        assert scores(one, [share])[0] == pytest.approx(likeliest_score(one, share), abs=1e-6)


def outcome_probabilities(
    before: float, gain: float, share: float, lost: float, own: float
) -> np.ndarray:
    """Of a base that is right on a proportion `before`, and a fine-tune that loses a part `lost` of
    this and gains so much. What is patched answers as the fine-tune on a part `share` of the
    prompts and as the base on the others, and on a part `own` of all by itself."""
    gained = (gain + before * lost) / (1 - before)
    patched = before + share * gain
    found = []
    for was, now, then in OUTCOMES.astype(bool):
        p = before if was else 1 - before
        p *= (1 - lost if then else lost) if was else (gained if then else 1 - gained)
        like = share * (now == then) + (1 - share) * (now == was)
        found.append(p * ((1 - own) * like + own * (patched if now else 1 - patched)))
    return np.array(found)


def held(tables: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether the share is not contradicted by each table, and whether it has an interval."""
    lost, gained = tables[:, [4, 6]].sum(1), tables[:, [1, 3]].sum(1)
    shown = (gained - lost) ** 2 > Z**2 * (gained + lost)
    return np.abs(share_scores(tables, np.full(len(tables), share))) <= Z, shown


def test_intervals_are_the_shares_not_contradicted() -> None:
    generator = np.random.default_rng(0)
    shares = np.linspace(-2, 3, 51)
    shown = 0
    for n, gain, share in product((20, 40, 100, 300), (0.05, 0.1, 0.3, 0.6), (0.0, 0.5, 1.0)):
        p = outcome_probabilities(0.3, gain, share, 0.1, 0.1)
        for one in generator.multinomial(n, p, size=2).astype(np.float64):
            interval = paired_share_interval(one)
            _, there = held(one[None], 0.0)
            assert there[0] == (not math.isnan(interval.low))
            if there[0]:
                shown += 1
                allowed = np.abs(scores(one, shares.tolist())) <= Z
                inside = (interval.low <= shares) & (shares <= interval.high)
                assert (allowed == inside).all()
                ends = np.abs(scores(one, list(interval)))
                np.testing.assert_allclose(ends, Z, atol=1e-5)
    assert shown > 50


def test_shares_hold_the_truth_as_often_as_they_say() -> None:
    """Shares of 0 to 1 of gains of .05 to .6, on 20 to 300 prompts. The share is right in 93 % or
    more among all tables, and among those alone that have an interval.

    It is more than 97 % where few prompts tell: those that base and fine-tune differ on, and for a
    share of 0 or 1, where these are no information, those on which the patched model answers by
    itself. What was not seen there could be, and the interval leaves room for it.
    """
    generator = np.random.default_rng(0)
    above, cells = [], 0
    for n, gain, share, (lost, own) in product(
        (20, 40, 100, 300), (0.05, 0.1, 0.3, 0.6), (0, 0.25, 0.5, 0.8, 1), ((0.1, 0.1), (0.2, 0.3))
    ):
        p = outcome_probabilities(0.3, gain, share, lost, own)
        drawn, times = np.unique(generator.multinomial(n, p, size=3000), axis=0, return_counts=True)
        within, shown = held(drawn.astype(np.float64), float(share))
        coverage = within @ times / times.sum()
        assert coverage > 0.93, (n, gain, share, coverage)
        if shown @ times > 0.2 * times.sum():
            coverage = within[shown] @ times[shown] / times[shown].sum()
            assert coverage > 0.93, (n, gain, share, coverage)
        cells += 1
        had, whole = (OUTCOMES[:, k] - OUTCOMES[:, 0] for k in (1, 2))
        if coverage > 0.97:
            above.append(n * (p @ (had - share * whole) ** 2))
    # So many prompts, each counted by how far it stands from what the share lets expect.
    assert max(above) < 4
    assert len(above) < cells / 3
