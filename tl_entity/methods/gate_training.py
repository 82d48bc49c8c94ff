"""Scores of all nodes at once by gradients of their gates, and the training of gates."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.gates import KEPT_ABOVE, Gates
from tl_entity.methods.gated_forward import GatedForward, Loss, RecordedPrompts

SCORED_AT = (0.25, 0.5, 0.75, 1.0)
"""Values of all gates at which the gradient is taken for the scores."""

STEEPNESS = 3.0
"""How much the price of a gate bends in the end. The first part of a gate costs most, so that gates
end at 0 or 1 and rounding changes little."""

Precision = Literal["model", "bfloat16"]
"""What a search runs in: the model as it is, or a copy of it in bfloat16."""


@checked
@dataclass(frozen=True)
class GateTraining:
    """How gates are trained.

    They begin at 1 and are trained by Adam, clamped to [0, 1] after each step, on the loss plus
    a price for each gate. At first a gate costs in proportion, in the end
    (1 - exp(-3 m)) / (1 - exp(-3)) times the price of a node. After some steps at a price the gates
    are rounded. While the nodes left reach the target the price rises by a factor, while they
    fall short of it it is lowered, until both were seen; the gates go on from where they are.

    Attributes:
        loss: "kl": divergence of the answers from the whole model's; "metric": minus the metric.
        first_steps: at the first price.
        steps: at each further price.
        prompts_per_step: drawn without repetition until all had their turn.
        lr: Adam's learning rate.
        first_price: of all nodes together, as a share of what it costs the loss to ablate them
            all; so it means the same for any model.
        factor: by which the price rises or is lowered.
        most_prices: how many prices are tried at most.
        prompts_scored: for the scores, at most.
        prunings: how often, in the end, nodes are ranked by what their removal would do, and as
            many as can go are removed.
        precision: "bfloat16" searches in a copy of the model in bfloat16, which is faster where the
            processor has units for it. What is reported is always run in the model itself.

    Raises:
        InputError: if a number of steps, prompts or prices is below one, or a price, factor or
            learning rate leads nowhere.
    """

    loss: Loss = "kl"
    first_steps: int = 40
    steps: int = 20
    prompts_per_step: int = 32
    lr: float = 0.1
    first_price: float = 0.5
    factor: float = 1.5
    most_prices: int = 12
    prompts_scored: int = 64
    prunings: int = 2
    precision: Precision = "model"

    def __post_init__(self) -> None:
        counts = (
            self.first_steps,
            self.steps,
            self.prompts_per_step,
            self.most_prices,
            self.prompts_scored,
        )
        if min(counts) < 1 or self.prunings < 0:
            raise InputError("Training gates needs at least one step, prompt and price.")
        if not (self.lr > 0 and self.first_price > 0 and self.factor > 1):
            raise InputError(
                "Training gates needs a learning rate and a price above 0 and a factor above 1."
            )


@checked
def node_scores(
    forward: GatedForward,
    recorded: RecordedPrompts,
    gates: Gates,
    *,
    progress: Callable[[], object] = lambda: None,
) -> Float[Tensor, " node"]:
    """For every node the gradient of the mean metric with respect to its gate, averaged over runs
    with all gates at .25, .5, .75 and 1: about what the metric gains by the node.

    It is a start, no answer: what a node does depends on which others are left.

    Args:
        forward: how the model is run.
        recorded: the prompts.
        gates: of any values; they say which nodes there are.
        progress: called after each of the four runs.
    """
    total = torch.zeros_like(gates.flat())
    for value in SCORED_AT:
        at = gates.with_values(torch.full_like(total, value))
        total -= forward.gradient(recorded, at, "metric")[1]
        progress()
    return total / len(SCORED_AT)


class GateTrainer:
    """Trains gates at one price after another.

    Args:
        forward: how the model is run.
        recorded: the prompts to train on.
        gates: of any values; they say which nodes there are.
        settings: how gates are trained.
        seed: of the order of the prompts.
    """

    def __init__(
        self,
        forward: GatedForward,
        recorded: RecordedPrompts,
        gates: Gates,
        settings: GateTraining,
        *,
        seed: int,
    ) -> None:
        self._forward, self._recorded, self._settings = forward, recorded, settings
        self._batches = _batches(len(recorded), settings.prompts_per_step, seed)
        self._gates = gates
        self.values = torch.ones_like(gates.flat())
        self.n_steps = 0
        self._optimizer = torch.optim.Adam([self.values], lr=settings.lr)

    def give_another_chance(self) -> None:
        """Put all gates half-way back to 1. From 0 alone they would not come back: the price bends
        most there, and a node may only matter where others are left."""
        self.values.add_(1).div_(2)

    @property
    def gates(self) -> Gates:
        """The gates as they stand."""
        return self._gates.with_values(self.values.clone())

    @property
    def kept(self) -> Float[Tensor, " node"]:
        """The gates rounded to 0 and 1."""
        return (self.values > KEPT_ABOVE).to(self.values)

    def train(self, price: float, n_steps: int, progress: Callable[[float, int], object]) -> float:
        """Train some steps further.

        Args:
            price: of all nodes together, in units of the loss.
            n_steps: how many steps.
            progress: called after each with its loss and the number of gates above one half.

        Returns:
            The mean loss of the steps, without the price.
        """
        losses: list[float] = []
        each, settings = price / len(self.values), self._settings
        for _, rows in zip(range(n_steps), self._batches, strict=False):
            some = self._recorded[rows.to(self._recorded.whole.device)]
            loss, gradient = self._forward.gradient(some, self.gates, settings.loss)
            # In proportion at first: a bent price hardly pulls at gates near 1, where all begin.
            bent = STEEPNESS * min(1.0, self.n_steps / settings.first_steps)
            self.values.grad = gradient + each * slope(self.values, bent)
            self._optimizer.step()
            self.values.clamp_(0, 1)
            self.n_steps += 1
            losses.append(loss)
            progress(loss, int(self.kept.sum()))
        return math.fsum(losses) / len(losses)


def slope(values: Float[Tensor, " node"], steepness: float) -> Float[Tensor, " node"]:
    """The derivative of a gate's price (1 - exp(-s m)) / (1 - exp(-s)), of a node whose price is 1;
    of m where the steepness s is 0."""
    if steepness == 0:
        return torch.ones_like(values)
    return steepness * torch.exp(-steepness * values) / -math.expm1(-steepness)


def _batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows for one step after another; all have had their turn before one comes again."""
    generator = np.random.default_rng([seed, 1])
    while True:
        order = torch.from_numpy(generator.permutation(n))
        for start in range(0, n, size):
            yield order[start : start + size]
