"""The integral of each unit's rate over the way between two models, by as many points as needed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.memory import halving
from tl_entity.finite import NotFiniteError
from tl_entity.hooks.run import answer_logits
from tl_entity.methods.weight_path import WeightPath
from tl_entity.metrics import Metric
from tl_entity.ranks import shared_out
from tl_entity.tasks.batches import PairBatch

TOLERANCE = 0.02
"""How far, relative to the gain, the shares may sum to something else before points are added."""

PROMPT_TOLERANCE = 0.05
"""The same prompt by prompt: the mean size of the errors relative to that of the gains. It keeps
errors of prompts that happen to cancel from passing for none."""

FIRST_POINTS = 5
"""Points at which the sum of the shares is first compared with the gain."""

MAX_POINTS = 65
"""Points at which the integration stops whatever its error."""

ROUNDING = 1e-5
"""An error below this part of the sum of the shares' sizes is rounding: more points don't help."""


@checked
def clenshaw_curtis(n: int) -> Float64[np.ndarray, " n"]:
    """Weights of the n points (1 - cos(pi j / (n - 1))) / 2 in the integral from 0 to 1; n is odd
    and at least 3 (Clenshaw and Curtis 1960). Exact for polynomials of degree n - 1."""
    half = n - 1
    points = np.arange(n)
    weights = np.ones(n)
    for k in range(1, half // 2 + 1):
        factor = (1 if 2 * k == half else 2) / (4 * k**2 - 1)
        weights -= factor * np.cos(2 * np.pi * k * points / half)
    weights[1:-1] *= 2
    return weights / (2 * half)


class Integration:
    """Rates at the points that were needed so far."""

    def __init__(
        self,
        path: WeightPath,
        pairs: PairBatch,
        metric: Metric,
        batch_size: int,
        max_points: int,
        progress: Callable[[int], object],
    ) -> None:
        if max_points < FIRST_POINTS:
            raise InputError(
                f"The integration takes at least {FIRST_POINTS} points, not {max_points}."
            )
        self.path, self.pairs, self.metric = path, pairs, metric
        self.batch_size, self.max_points, self.progress = batch_size, max_points, progress
        # By the place among the points, 0 to 1, which angles would only give rounded.
        self.rates: dict[Fraction, Tensor] = {}
        self.start, rates = self._at(Fraction(0), None)
        self.rates[Fraction(0)] = rates
        end, self.rates[Fraction(1)] = self._at(Fraction(1), self.start)
        self.gain = metric.change(end, self.start)

    def integral(self, n_points: int) -> Float[Tensor, "unit batch"]:
        """The shares by so many points."""
        total: Tensor | None = None
        for index, weight in enumerate(clenshaw_curtis(n_points).tolist()):
            place = Fraction(index, n_points - 1)
            if place not in self.rates:
                _, self.rates[place] = self._at(place, self.start)
            part = weight * self.rates[place].double()
            total = part if total is None else total + part
        assert total is not None
        return total

    def until_exact(self) -> tuple[Float[Tensor, "unit batch"], dict[int, float]]:
        """The shares by so many points that they sum to the gain, or by as many as may be.

        Returns:
            The shares; and what their means sum to by each number of points tried.
        """
        n_points, sums = FIRST_POINTS, {}
        while True:
            shares = self.integral(n_points)
            sums[n_points] = float(shares.mean(-1).sum())
            if _is_exact_enough(shares, self.gain) or 2 * n_points - 1 > self.max_points:
                return shares, sums
            n_points = 2 * n_points - 1

    def _at(self, place: Fraction, start: Tensor | None) -> tuple[Tensor, Tensor]:
        at = (1 - math.cos(math.pi * float(place))) / 2

        def compute(rows: _Rows) -> tuple[Tensor, Tensor]:
            found = self.path.rates(rows.pairs, at, self.metric, rows.start)
            self.progress(len(rows))
            return found

        def compute_mine(mine: _Rows) -> tuple[Tensor, Tensor]:
            parts = [some for _, some in halving(mine, self.batch_size, compute)]
            return torch.cat([v for v, _ in parts]), torch.cat([r for _, r in parts], -1)

        values, rates = shared_out(_Rows(self.pairs, start), compute_mine)
        if not bool(values.isfinite().all() and rates.isfinite().all()):
            for end, model in ((0, self.path.base), (1, self.path.tuned)):
                if place == end:  # a run of the model itself says where
                    answer_logits(model, self.pairs.clean.to(model.cfg.device or "cpu"))
            raise NotFiniteError(
                f"{self.metric.name} or its gradient is not finite at the point {at:.3f} of the "
                "way from the base to the tuned model."
            )
        return values, rates


@dataclass(frozen=True)
class _Rows:
    """Pairs with the metric's values in the base model, where these are known."""

    pairs: PairBatch
    start: Tensor | None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: slice, /) -> "_Rows":
        return _Rows(self.pairs[rows], None if self.start is None else self.start[rows])


def _is_exact_enough(shares: Tensor, gain: Tensor) -> bool:
    errors = shares.sum(0) - gain
    rounding = ROUNDING * float(shares.abs().sum(0).mean())
    of_mean = max(TOLERANCE * abs(float(gain.mean())), rounding)
    of_prompts = max(PROMPT_TOLERANCE * float(gain.abs().mean()), rounding)
    return abs(float(errors.mean())) <= of_mean and float(errors.abs().mean()) <= of_prompts
