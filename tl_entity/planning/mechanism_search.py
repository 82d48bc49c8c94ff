"""What a search for the mechanism takes, before it is made."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.gates import Gates
from tl_entity.hooks.run import answer_logits
from tl_entity.methods.ablations import zero_ablation
from tl_entity.methods.gate_training import SCORED_AT, GateTraining
from tl_entity.methods.gated_forward import GatedForward
from tl_entity.methods.mechanism import CURVE_SHARES, RANDOM_DRAWS, roles_there, split_prompts
from tl_entity.planning.jobs import Count, Job
from tl_entity.planning.meta import Stand
from tl_entity.planning.operations import Operation, Tally
from tl_entity.runs.runner import BATCH_SIZE
from tl_entity.tasks.batches import PairBatch

HALF = 0.5
"""Gates at which all that a gate can need is computed."""


@dataclass(frozen=True)
class MechanismSearch(Job):
    """A search by `find_mechanism` for heads, at most: if the last price is tried and nodes are
    pruned as often as asked for, in runs that leave nothing out, in the model's own precision. The
    clean prompts are searched.

    Attributes:
        training: how gates are trained.
        n_sizes: sets of nodes that are reported.
        batch_size: prompts run together.
    """

    training: GateTraining = field(default_factory=GateTraining)
    n_sizes: int = len(CURVE_SHARES) + 2 + RANDOM_DRAWS
    batch_size: int = BATCH_SIZE

    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        """One gradient of all gates and one evaluation: what a search repeats."""
        parts = _Parts.of(self, model, pairs, memory)
        return parts.gradient(parts.training), parts.evaluation(parts.reporting, self.n_sizes)

    def count(
        self,
        like: Stand | HookedTransformer | HookedTransformerConfig,
        pairs: PairBatch,
        memory: int,
    ) -> Count:
        """As `Job.count`; each kind of run is made once and counted as often as it comes."""
        pairs = pairs.to("cpu")
        longest = max(prompts.tokens.shape[1] for prompts in (pairs.clean, pairs.corrupt))
        stand = like if isinstance(like, Stand) else Stand.of(like, longest)
        parts = _Parts.of(self, stand.model, pairs, memory)
        total: Counter[tuple[str, Operation]] = Counter()
        cache = chunk = 0
        for prompts in (parts.training, parts.choosing, parts.reporting):
            recorded = _counted(stand, lambda some=prompts: parts.forward.record(some))
            total.update(recorded.tally.counts)
        for piece in self._pieces(parts):
            recorded = _counted(stand, lambda some=piece.prompts: parts.forward.record(some))
            whole = _counted(stand, lambda once=piece: once.run(parts))
            for operation, n in (whole.tally - recorded.tally).counts.items():
                total[operation] += n * piece.times
            cache = max(cache, whole.cache_peak)
            chunk = max(chunk, whole.peak - whole.cache_peak)
        return Count(Tally(total), cache, chunk, *self.plain(stand, pairs))

    def _pieces(self, parts: "_Parts") -> "list[_Piece]":
        settings, n_nodes = self.training, len(parts.gates.flat())
        steps = settings.first_steps + (settings.most_prices - 1) * settings.steps
        scored = parts.training[: settings.prompts_scored]
        batch = parts.training[: settings.prompts_per_step]
        found = [
            _Piece(len(SCORED_AT), scored, None),
            _Piece(steps, batch, None),
            _Piece(2 * settings.prunings, parts.training, None),
            _Piece(self._n_chosen(n_nodes), parts.choosing, 1),
            _Piece(1, parts.reporting, self.n_sizes),
        ]
        return [piece for piece in found if piece.times]

    def _n_chosen(self, n_nodes: int) -> int:
        """Evaluations of the choosing prompts: one to begin with, one a price, and by halving."""
        halvings = math.ceil(math.log2(max(2, n_nodes)))
        return 1 + self.training.most_prices + halvings * (1 + 2 * self.training.prunings)

    def plain(self, stand: Stand, pairs: PairBatch) -> tuple[int, int]:
        parts = _Parts.of(self, stand.model, pairs, None)
        # All prompts are recorded once. A gradient takes a run more.
        runs = len(pairs) + sum(
            piece.times * len(piece.prompts) * (piece.n_sets or 2) for piece in self._pieces(parts)
        )
        passes = math.ceil(runs / len(pairs))
        once = _counted(stand, lambda: answer_logits(stand.model, pairs.clean))
        return passes, passes * once.tally.total_operations


class _Piece(NamedTuple):
    """What a search runs again and again.

    Attributes:
        times: how often.
        prompts: on which prompts.
        n_sets: sets of nodes that are evaluated together; None for a gradient.
    """

    times: int
    prompts: PairBatch
    n_sets: int | None

    def run(self, parts: "_Parts") -> object:
        if self.n_sets is None:
            return parts.gradient(self.prompts)
        return parts.evaluation(self.prompts, self.n_sets)


@dataclass(frozen=True)
class _Parts:
    """A search's prompts, and how they are run on a model without weights."""

    forward: GatedForward
    gates: Gates
    training: PairBatch
    choosing: PairBatch
    reporting: PairBatch

    @classmethod
    def of(
        cls, job: MechanismSearch, model: HookedTransformer, pairs: PairBatch, memory: int | None
    ) -> "_Parts":
        how: dict[str, Any] = {"batch_size": job.batch_size, "memory": memory}
        ablation: Ablation = zero_ablation()
        forward = GatedForward.of(model, ablation, **how)
        gates = Gates.filled(model.cfg, roles_there(pairs.clean), HALF)
        parts = split_prompts(pairs, 0)
        training, choosing, reporting = (p for p in parts if isinstance(p, PairBatch))
        return cls(forward, gates, training, choosing, reporting)

    def gradient(self, prompts: PairBatch) -> object:
        return self.forward.gradient(self.forward.record(prompts), self.gates, "kl")

    def evaluation(self, prompts: PairBatch, n: int) -> object:
        # Gates with numbers: those that are 0 are left out of runs without a gradient.
        gates = Gates(self.gates.roles, torch.full(self.gates.heads.shape, HALF))
        return self.forward.evaluate(self.forward.record(prompts), [gates] * n)


def _counted(stand: Stand, piece: Callable[[], object]) -> Any:
    with stand.run() as run:
        piece()
    return run
