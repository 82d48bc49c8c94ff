"""The search for the fewest nodes: gates are trained, narrowed down by exact runs, and pruned."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity.errors import InputError
from tl_entity.hooks.gates import Gates
from tl_entity.methods.gate_training import SCORED_AT, GateTrainer, GateTraining, node_scores
from tl_entity.methods.gated_forward import GatedForward, Loss, NodesEvaluation, RecordedPrompts
from tl_entity.methods.mechanism_result import PriceStep

CLOSE = 50
"""The size is found up to one part in so many."""


class MechanismStep(NamedTuple):
    """Where a search stands, for a progress bar.

    Attributes:
        doing: "scoring", "training", "choosing" or "reporting".
        done: steps or prompts of it done so far.
        n_nodes: nodes left, where that is known.
        loss: of the training step.
    """

    doing: str
    done: int
    n_nodes: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Parts:
    """The prompts that find the nodes, by what they are for."""

    training: RecordedPrompts
    choosing: RecordedPrompts


class Kept(NamedTuple):
    """Nodes that are left, as gates of 0 and 1, and how they answer the choosing prompts."""

    values: Float[Tensor, " node"]
    answers: NodesEvaluation


@dataclass
class Search:
    """A search for the fewest nodes, and what it has found so far."""

    forward: GatedForward
    gates: Gates
    parts: Parts
    target: float
    agreement: float
    settings: GateTraining
    seed: int
    progress: Callable[[MechanismStep], object]
    scores: Float[Tensor, " node"] = field(init=False)
    strength: Float[Tensor, " node"] = field(init=False)
    at_stake: float = field(init=False)
    prices: list[PriceStep] = field(default_factory=list)
    n_run: int = 0

    def check(self) -> None:
        """Make sure that there is something to be faithful to, and that it could be seen."""
        none = self.evaluate(torch.zeros_like(self.gates.flat())).answers
        if not none.whole.accuracy:
            raise InputError(
                f"The model answers none of the {len(none)} choosing prompts right, so there is "
                "no accuracy to keep; give prompts that it can answer."
            )
        whole = none.of_whole(len(self.gates.flat()))
        if not self.reached(whole):
            raise InputError(
                f"{len(whole)} prompts to choose by are too few: even the whole model would show "
                f"a faithfulness of at least {whole.faithfulness.interval.low:.3f} and an "
                f"agreement of at least {whole.agreement_interval.low:.3f} alone; give more "
                "prompts (a third of them choose) or lower targets."
            )
        lost = (none.whole_value - none.value).double().mean().abs()
        self.at_stake = (none.mean_kl if self.settings.loss == "kl" else float(lost)) or 1.0

    def run(self) -> Float[Tensor, " node"]:
        """Score, train, narrow down, prune."""
        done = iter(range(1, 1 + len(SCORED_AT)))
        self.scores = node_scores(
            self.forward,
            self.parts.training[: self.settings.prompts_scored],
            self.gates,
            progress=lambda: self.progress(MechanismStep("scoring", next(done))),
        )
        enough, too_few = self._train()
        kept = self._narrow(enough, too_few)
        for _ in range(self.settings.prunings):
            before = kept.answers.n_nodes
            kept = self._drop_least(self._drop_hindering(kept))
            if kept.answers.n_nodes == before:
                break
        return kept.values

    def _train(self) -> tuple[Kept, Tensor]:
        """The fewest nodes kept at a price that reach the targets, all nodes if none do; and those
        kept at a price that is too high, none if it was never met."""
        trainer = GateTrainer(
            self.forward, self.parts.training, self.gates, self.settings, seed=self.seed
        )
        enough, too_few = None, torch.zeros_like(self.gates.flat())
        seen: list[Tensor] = []
        price = self.settings.first_price * self.at_stake
        for _ in range(self.settings.most_prices):
            n = self.settings.steps if seen else self.settings.first_steps
            loss = trainer.train(price, n, self._training_progress(trainer.n_steps))
            seen.append(trainer.values.clone())
            kept = self.evaluate(trainer.kept)
            reached = self.reached(kept.answers)
            self.prices.append(_price_step(price, loss, kept.answers, reached))
            if reached and (enough is None or kept.answers.n_nodes <= enough.answers.n_nodes):
                enough = kept
            if not reached:
                too_few = kept.values
            if enough is not None and bool(too_few.any()):
                break
            if reached:
                price *= self.settings.factor
            else:
                price /= self.settings.factor
                trainer.give_another_chance()
        self.strength = torch.stack(seen).mean(0)
        return enough or self.evaluate(torch.ones_like(too_few)), too_few

    def _training_progress(self, before: int) -> Callable[[float, int], object]:
        steps = iter(
            range(before + 1, before + 1 + self.settings.first_steps + self.settings.steps)
        )
        return lambda loss, n: self.progress(MechanismStep("training", next(steps), n, loss))

    def _narrow(self, enough: Kept, too_few: Tensor) -> Kept:
        """The fewest of the nodes that are enough which still are, the weakest taken away first."""
        shared = enough.values * too_few
        order = descending(enough.values, shared, self.strength, self.scores)
        return self._fewest(enough, order, int(shared.sum()))

    def _drop_hindering(self, kept: Kept) -> Kept:
        """Without nodes by whose removal the metric rises and agreement does not fall."""
        _, gradient = self._gradient(kept, "metric")
        hinders = kept.values * (gradient > 0)
        order = descending(hinders, gradient)
        n = int(hinders.sum())
        while n:
            values = kept.values.clone()
            values[order[:n]] = 0
            left = self.evaluate(values)
            better = left.answers.value.mean() >= kept.answers.value.mean()
            as_like = left.answers.agreement >= kept.answers.agreement
            if better and as_like and self.reached(left.answers):
                return left
            n //= 2
        return kept

    def _drop_least(self, kept: Kept) -> Kept:
        """Without as many as can go of the nodes whose removal would do least harm, to first
        order."""
        _, gradient = self._gradient(kept, self.settings.loss)
        order = descending(kept.values, -gradient)
        return self._fewest(kept, order, int(kept.values.sum()) // 2)

    def _gradient(self, kept: Kept, loss: Loss) -> tuple[float, Tensor]:
        at = self.gates.with_values(kept.values)
        return self.forward.gradient(self.parts.training, at, loss)

    def _fewest(self, enough: Kept, order: Tensor, too_few: int) -> Kept:
        """The shortest beginning of an order of nodes that is enough, by halving what is between:
        all of them are, and so few are taken not to be."""
        while enough.answers.n_nodes - too_few > max(1, enough.answers.n_nodes // CLOSE):
            middle = (enough.answers.n_nodes + too_few) // 2
            values = torch.zeros_like(enough.values)
            values[order[:middle]] = 1
            kept = self.evaluate(values)
            if self.reached(kept.answers):
                enough = kept
            else:
                too_few = middle
        return enough

    def evaluate(self, values: Float[Tensor, " node"]) -> Kept:
        """How the choosing prompts are answered with these gates."""
        (answers,) = self.forward.evaluate(
            self.parts.choosing,
            [self.gates.with_values(values)],
            seed=self.seed,
            progress=lambda runs: self.ran("choosing", runs, int(values.sum())),
        )
        return Kept(values, answers)

    def reached(self, answers: NodesEvaluation) -> bool:
        """Whether the lower ends of both intervals reach their targets."""
        return (
            answers.faithfulness.interval.low >= self.target
            and answers.agreement_interval.low >= self.agreement
        )

    def ran(self, doing: str, runs: int, n_nodes: int | None) -> None:
        """Tell that prompts were run."""
        self.n_run += runs
        self.progress(MechanismStep(doing, self.n_run, n_nodes))


def descending(among: Tensor, *keys: Tensor) -> Tensor:
    """Indices of the nodes that are not 0, by the first key, among equals by the next."""
    columns = [key.double().cpu().numpy() for key in keys]
    # The last key of a lexical sort counts first.
    order = np.lexsort([-column for column in reversed(columns)])
    return torch.from_numpy(order[among.cpu().numpy()[order] != 0]).to(among.device)


def _price_step(price: float, loss: float, answers: NodesEvaluation, reached: bool) -> PriceStep:
    ratio = answers.faithfulness.value
    return PriceStep(price, loss, answers.n_nodes, ratio, answers.agreement, reached)
