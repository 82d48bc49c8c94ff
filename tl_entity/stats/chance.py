"""How much two choices share by chance."""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from tl_entity._typing import checked


class Chance(NamedTuple):
    """How many things two random choices would share.

    Attributes:
        probabilities: of sharing 0, 1, 2, ...
        expected: the mean number shared.
        low: lower bound of the central 95 % of numbers shared.
        high: upper bound.
    """

    probabilities: tuple[float, ...]
    expected: float
    low: int
    high: int

    def at_least(self, shared: int) -> float:
        """The one-sided p-value: how probable it is to share this many or more."""
        return min(1.0, math.fsum(self.probabilities[max(0, shared) :]))

    def and_also(self, other: "Chance") -> "Chance":
        """The number shared in two independent pairs of choices together."""
        return _chance(np.convolve(self.probabilities, other.probabilities))


@checked
def overlap_by_chance(population: int, one: int, other: int) -> Chance:
    """The hypergeometric distribution of how many of `population` things are in both of two
    choices, `one` and `other` of them drawn at random without replacement.

    Raises:
        ValueError: if a choice is larger than the population or negative.
    """
    return _chance(_hypergeometric(population, one, other))


def _hypergeometric(population: int, one: int, other: int) -> np.ndarray:
    if not 0 <= min(one, other) <= max(one, other) <= population:
        raise ValueError(f"{one} and {other} can't be chosen of {population}.")
    # Whole numbers as long as possible: factorials of a thousand heads are too large for floats.
    ways = [
        math.comb(one, shared) * math.comb(population - one, other - shared)
        for shared in range(min(one, other) + 1)
    ]
    total = math.comb(population, other)
    return np.array([way / total for way in ways])


@checked
def layered_overlap_by_chance(layers: Iterable[tuple[int, int, int]]) -> Chance:
    """How many things are in both of two choices if each is drawn anew within its own layers.

    Where in depth important heads lie is alike in many circuits that have nothing else in common,
    so what they share by that is no sign of a common mechanism. Each layer is hypergeometric
    (`overlap_by_chance`), and the layers are independent.

    Args:
        layers: for each layer how many things it has, and how many of them are in either choice.

    Raises:
        ValueError: if a choice is larger than its layer or negative.
    """
    return _chance(reduce(np.convolve, (_hypergeometric(*layer) for layer in layers), np.ones(1)))


@checked
def overlap_of_choices(
    ours: int, our_choice: int, theirs: int, their_choice: int, common: int
) -> Chance:
    """How many things are in both of two random choices from populations that differ: `our_choice`
    of `ours` things and `their_choice` of `theirs`, of which `common` are in both populations.

    Raises:
        ValueError: if a choice or what is common is larger than a population, or negative.
    """
    if not 0 <= common <= min(ours, theirs):
        raise ValueError(f"{common} of {ours} and {theirs} can't be common.")
    total = np.zeros(common + 1)
    # Their choice has so many of the common things; ours meets some of these.
    for met, weight in enumerate(overlap_by_chance(theirs, common, their_choice).probabilities):
        shared = np.array(overlap_by_chance(ours, our_choice, met).probabilities)
        total[: len(shared)] += weight * shared
    return _chance(total)


@checked
def shared_by_all(population: int, choices: Sequence[int]) -> Chance:
    """How many of `population` things are in every one of several random choices, each of so many
    things drawn without replacement.

    Raises:
        ValueError: if a choice is larger than the population or negative, or there is none.
    """
    if not choices:
        raise ValueError("Without a choice nothing is shared.")
    shared = np.zeros(choices[0] + 1)
    shared[-1] = 1
    for size in choices[1:]:
        after = np.zeros_like(shared)
        for n, probability in enumerate(shared):
            met = _hypergeometric(population, n, size)
            after[: len(met)] += probability * met
        shared = after
    return _chance(shared)


def _chance(probabilities: np.ndarray) -> Chance:
    below = probabilities.cumsum()
    # Rounding of the sum must not push a bound past the last number.
    low, high = (min(int(np.searchsorted(below, q)), len(below) - 1) for q in (0.025, 0.975))
    expected = float(probabilities @ np.arange(len(probabilities)))
    return Chance(tuple(probabilities.tolist()), expected, low, high)
