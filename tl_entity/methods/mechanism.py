"""The mechanism, found by itself: the fewest nodes that alone answer as the whole model does.

A node is a head, or a layer's MLP, at all tokens of a role. Half of the prompts find the nodes, the
other half tell how faithful they are:

1. All nodes are scored at once, by gradients of their gates.
2. Gates are trained to change the answers little at a price for each node, which rises.
3. Between the last price at which the nodes left reach the target and the next, the fewest that
   still do are found by exact runs; so too what is left of them without those that hinder and
   those that do least.
4. The nodes are run alone on prompts that had no part in this, beside other sizes and random nodes.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Node
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.gates import Gates
from tl_entity.methods.ablations import BATCH_SIZE
from tl_entity.methods.gate_training import GateTrainer, GateTraining, node_scores
from tl_entity.methods.gated_forward import GatedForward, Loss, NodesEvaluation, RecordedPrompts
from tl_entity.methods.mechanism_result import Mechanism, PriceStep
from tl_entity.methods.path_patching import Engine
from tl_entity.metrics import LOG_PROBABILITY, Metric
from tl_entity.tasks.batches import PairBatch, PromptBatch

RANDOM_DRAWS = 3
"""Draws of random nodes that the mechanism is compared with."""

CURVE_SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5)
"""Sizes of the curve, as shares of the mechanism's; none and all come with them."""

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


@checked
def find_mechanism(
    model: Model,
    prompts: PromptBatch | PairBatch,
    *,
    ablation: Ablation,
    target: float = 0.9,
    agreement: float = 0.85,
    metric: Metric = LOG_PROBABILITY,
    mlps: bool = False,
    circuit: Circuit | None = None,
    training: GateTraining | None = None,
    seed: int = 0,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
    progress: Callable[[MechanismStep], object] = lambda step: None,
) -> Mechanism:
    """Find the fewest nodes that alone, all others ablated, answer as the whole model does.

    The prompts are split by the seed: one half finds the nodes (half of it trains gates, half
    chooses how many are kept), the other half reports. Roles should be blind to what is asked; if
    some of the prompts' roles are among those that know, the mechanism is marked as told where to
    look. Under `torchrun` prompts are shared out over the processes.

    Args:
        model: the model.
        prompts: prompts with roles and answers; or pairs, whose clean prompts, targets and foils
            are taken, for metrics that compare with a foil.
        ablation: what ablated nodes put out, from `pooled_ablation` or its kin, made of other
            prompts of the same form.
        target: what the lower end of the 95 % interval of faithfulness must reach on the choosing
            prompts.
        agreement: the same of the share of prompts answered as the whole model does.
        metric: by which nodes are scored, and what hinders is told from what helps.
        mlps: whether layers' MLPs are nodes too; else they are always themselves.
        circuit: heads by role or named position, evaluated beside the mechanism.
        training: how gates are trained; `GateTraining()` if left out.
        seed: of the split, the order of prompts and the random nodes.
        engine: "exact", or "hooks" for plain runs of any hooked model.
        batch_size: prompts run together, at most.
        memory: bytes that intermediate results may take; found from the device if left out.
        progress: called after each step.

    Raises:
        InputError: if the prompts have no roles, lack an answer or are too few for the targets to
            be seen reached, the model answers none of them right, MLPs are to be ablated by an
            ablation without their outputs, the ablation or circuit does not fit, or the exact
            engine does not fit the model.
    """
    forward = GatedForward.of(
        model, ablation, metric=metric, engine=engine, batch_size=batch_size, memory=memory
    )
    clean = prompts.clean if isinstance(prompts, PairBatch) else prompts
    recorded = forward.record(prompts)
    gates = Gates.filled(model.cfg, _roles_there(clean), 1, mlps=mlps)
    parts = _split(recorded, seed)
    search = _Search(
        forward, gates, parts, target, agreement, training or GateTraining(), seed, progress
    )
    search.check()
    kept = search.run()
    return _report(search, kept, circuit, _fingerprint(clean))


@dataclass(frozen=True)
class _Parts:
    """Prompts by what they are for."""

    training: RecordedPrompts
    choosing: RecordedPrompts
    reporting: RecordedPrompts


class _Kept(NamedTuple):
    """Nodes that are left, as gates of 0 and 1, and how they answer the choosing prompts."""

    values: Float[Tensor, " node"]
    answers: NodesEvaluation


@dataclass
class _Search:
    """A search for the fewest nodes, and what it has found so far."""

    forward: GatedForward
    gates: Gates
    parts: _Parts
    target: float
    agreement: float
    settings: GateTraining
    seed: int
    progress: Callable[[MechanismStep], object]
    scores: Float[Tensor, " node"] = field(init=False)
    strength: Float[Tensor, " node"] = field(init=False)
    prices: list[PriceStep] = field(default_factory=list)
    n_run: int = 0

    def check(self) -> None:
        """Make sure that there is something to be faithful to, and that it could be seen."""
        whole = self.evaluate(torch.ones_like(self.gates.flat())).answers
        if not whole.whole.accuracy:
            raise InputError(
                f"The model answers none of the {len(whole)} choosing prompts right, so there is "
                "no accuracy to keep; give prompts that it can answer."
            )
        if not self.reached(whole):
            raise InputError(
                f"{len(whole)} prompts to choose by are too few: even the whole model would show "
                f"a faithfulness of at least {whole.faithfulness.interval.low:.3f} and an "
                f"agreement of at least {whole.agreement_interval.low:.3f} alone; give more "
                "prompts (a quarter of them choose) or lower targets."
            )

    def run(self) -> Float[Tensor, " node"]:
        """Score, train, narrow down, prune."""
        done = iter(range(1, 1 + 4))
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

    def _train(self) -> tuple[_Kept, Tensor]:
        """The fewest nodes kept at a price that reach the targets, all nodes if none do; and those
        kept at a price that is too high, none if it was never met."""
        trainer = GateTrainer(
            self.forward, self.parts.training, self.gates, self.settings, seed=self.seed
        )
        enough, too_few = None, torch.zeros_like(self.gates.flat())
        seen: list[Tensor] = []
        price, factor, n_steps = self.settings.first_price, self.settings.factor, 0
        for _ in range(self.settings.most_prices):
            n = self.settings.steps if seen else self.settings.first_steps
            loss = trainer.train(price, n, self._training_progress(n_steps))
            n_steps += n
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
            # A first price that is too high is brought down until enough is kept.
            price = price * factor if reached else price / factor**2
        self.strength = torch.stack(seen).mean(0)
        return enough or self.evaluate(torch.ones_like(too_few)), too_few

    def _training_progress(self, before: int) -> Callable[[float, int], object]:
        steps = iter(
            range(before + 1, before + 1 + self.settings.first_steps + self.settings.steps)
        )
        return lambda loss, n: self.progress(MechanismStep("training", next(steps), n, loss))

    def _narrow(self, enough: _Kept, too_few: Tensor) -> _Kept:
        """The fewest of the nodes that are enough which still are, the weakest taken away first."""
        shared = enough.values * too_few
        order = _descending(enough.values, shared, self.strength, self.scores)
        return self._fewest(enough, order, int(shared.sum()))

    def _drop_hindering(self, kept: _Kept) -> _Kept:
        """Without nodes by whose removal the metric rises and agreement does not fall."""
        _, gradient = self._gradient(kept, "metric")
        hinders = kept.values * (gradient > 0)
        order = _descending(hinders, gradient)
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

    def _drop_least(self, kept: _Kept) -> _Kept:
        """Without as many as can go of the nodes whose removal would do least harm, to first
        order."""
        _, gradient = self._gradient(kept, self.settings.loss)
        order = _descending(kept.values, -gradient)
        return self._fewest(kept, order, int(kept.values.sum()) // 2)

    def _gradient(self, kept: _Kept, loss: Loss) -> tuple[float, Tensor]:
        at = self.gates.with_values(kept.values)
        return self.forward.gradient(self.parts.training, at, loss)

    def _fewest(self, enough: _Kept, order: Tensor, too_few: int) -> _Kept:
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

    def evaluate(self, values: Float[Tensor, " node"]) -> _Kept:
        """How the choosing prompts are answered with these gates."""
        (answers,) = self.forward.evaluate(
            self.parts.choosing,
            [self.gates.with_values(values)],
            seed=self.seed,
            progress=lambda runs: self._ran("choosing", runs, int(values.sum())),
        )
        return _Kept(values, answers)

    def reached(self, answers: NodesEvaluation) -> bool:
        """Whether the lower ends of both intervals reach their targets."""
        return (
            answers.faithfulness.interval.low >= self.target
            and answers.agreement_interval.low >= self.agreement
        )

    def report(self, each: Sequence[Gates]) -> list[NodesEvaluation]:
        """How the prompts that had no part in the search are answered with these gates."""
        return self.forward.evaluate(
            self.parts.reporting,
            each,
            seed=self.seed,
            progress=lambda runs: self._ran("reporting", runs, None),
        )

    def _ran(self, doing: str, runs: int, n_nodes: int | None) -> None:
        self.n_run += runs
        self.progress(MechanismStep(doing, self.n_run, n_nodes))


def _report(search: _Search, kept: Tensor, circuit: Circuit | None, prompts: str) -> Mechanism:
    """Run the nodes found alone on the reporting prompts, beside what they are compared with."""
    forward, gates, settings = search.forward, search.gates, search.settings
    order = _descending(torch.ones_like(kept), kept, search.strength, search.scores)
    n, n_all = int(kept.sum()), len(kept)
    sizes = sorted({0, n, *(round(share * n) for share in CURVE_SHARES)})
    sizes = [size for size in sizes if size < n_all]
    each = []
    for size in sizes:
        values = torch.zeros_like(kept)
        values[order[:size]] = 1
        each.append(gates.with_values(values))
    nodes = gates.with_values(kept).nodes
    drawn = random_nodes(gates, nodes, RANDOM_DRAWS, seed=search.seed)
    each += [gates.with_values(values) for values in drawn]
    found = search.report(each)
    curve, random = found[: len(sizes)], found[len(sizes) :]
    # All nodes kept is the whole model itself.
    curve.append(curve[0].of_whole(n_all))
    sizes.append(n_all)
    reporting = search.parts.reporting
    given = None if circuit is None else forward.evaluate_circuit(reporting, circuit, search.seed)
    clean = reporting.pairs.clean
    return Mechanism(
        nodes=nodes,
        found=curve[sizes.index(n)],
        curve=tuple(curve),
        random=tuple(random),
        circuit=given,
        target=search.target,
        agreement_target=search.agreement,
        roles=gates.roles,
        knowing=tuple(role for role in gates.roles if role in clean.knowing),
        n_layers=gates.heads.shape[0],
        n_heads=gates.heads.shape[2],
        with_mlps=gates.mlps is not None,
        scores=search.scores.cpu(),
        strength=search.strength.cpu(),
        prices=tuple(search.prices),
        metric=forward.metric.name,
        loss=settings.loss,
        ablation=forward.ablation.kind,
        seed=search.seed,
        n_training=len(search.parts.training),
        n_choosing=len(search.parts.choosing),
        prompts=prompts,
        engine=forward.engine,
    )


@checked
def random_nodes(
    gates: Gates, nodes: Sequence[Node], n_draws: int, *, seed: int
) -> list[Float[Tensor, " node"]]:
    """As many nodes drawn at random as are given, each draw as gates of 0 and 1: for every layer
    and role as many heads of that layer at that role, and as many of a layer's MLPs, at any roles.

    Args:
        gates: they say which nodes there are.
        nodes: the nodes to be compared with.
        n_draws: how many draws.
        seed: of the draws.
    """
    generator = np.random.default_rng([seed, 2])
    heads_at = Counter((n.layer, gates.roles.index(n.role)) for n in nodes if n.head is not None)
    mlps_in = Counter(node.layer for node in nodes if node.head is None)
    draws = []
    for _ in range(n_draws):
        drawn = gates.with_values(torch.zeros_like(gates.flat()))
        for (layer, role), n in sorted(heads_at.items()):
            some = generator.choice(gates.heads.shape[2], n, replace=False)
            drawn.heads[layer, role, some] = 1
        for layer, n in sorted(mlps_in.items()):
            assert drawn.mlps is not None
            drawn.mlps[layer, generator.choice(len(gates.roles), n, replace=False)] = 1
        draws.append(drawn.flat())
    return draws


def _descending(among: Tensor, *keys: Tensor) -> Tensor:
    """Indices of the nodes that are not 0, by the first key, among equals by the next."""
    columns = [key.double().cpu().numpy() for key in keys]
    # The last key of a lexical sort counts first.
    order = np.lexsort([-column for column in reversed(columns)])
    return torch.from_numpy(order[among.cpu().numpy()[order] != 0]).to(among.device)


def _price_step(price: float, loss: float, answers: NodesEvaluation, reached: bool) -> PriceStep:
    ratio = answers.faithfulness.value
    return PriceStep(price, loss, answers.n_nodes, ratio, answers.agreement, reached)


def _split(recorded: RecordedPrompts, seed: int) -> _Parts:
    """A quarter to train on, a quarter to choose by, half to report."""
    n = len(recorded)
    if n < 4:
        raise InputError(f"{n} prompts can't be split in four to find and test a mechanism.")
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(n))
    order = order.to(recorded.whole.device)
    training, choosing, reporting = order.split([n // 4, n // 2 - n // 4, n - n // 2])
    return _Parts(recorded[training], recorded[choosing], recorded[reporting])


def _roles_there(prompts: PromptBatch) -> tuple[str, ...]:
    assert prompts.roles is not None
    there = set(prompts.roles.unique().tolist())
    return tuple(name for index, name in enumerate(prompts.role_names) if index in there)


def _fingerprint(prompts: PromptBatch) -> str:
    """A hash of the prompts' tokens, whatever they are padded with."""
    tokens = prompts.tokens.masked_fill(~prompts.mask, -1).cpu().tolist()
    plain = [[token for token in row if token >= 0] for row in tokens]
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:16]
