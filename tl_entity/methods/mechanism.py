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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.gates import Gates, check_gates_fit
from tl_entity.methods.ablations import BATCH_SIZE
from tl_entity.methods.gate_training import GateTraining
from tl_entity.methods.gated_forward import GatedForward, NodesEvaluation, RecordedPrompts
from tl_entity.methods.mechanism_result import Mechanism
from tl_entity.methods.mechanism_search import MechanismStep as MechanismStep
from tl_entity.methods.mechanism_search import Parts, Search, descending
from tl_entity.methods.path_patching import Engine
from tl_entity.methods.random_circuits import random_nodes as random_nodes
from tl_entity.methods.search_journal import kept_forward
from tl_entity.metrics import LOG_PROBABILITY, Metric
from tl_entity.tasks.batches import PairBatch, PromptBatch
from tl_entity.tasks.fingerprint import fingerprint

RANDOM_DRAWS = 3
"""Draws of random nodes that the mechanism is compared with."""

CURVE_SHARES = (0.25, 0.5, 0.75, 1.5, 2.5)
"""Sizes that are reported beside the mechanism, as shares of its own."""


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
    curve: Sequence[float] = CURVE_SHARES,
    n_random: int = RANDOM_DRAWS,
    seed: int = 0,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
    folder: str | Path | None = None,
    progress: Callable[[MechanismStep], object] = lambda step: None,
) -> Mechanism:
    """Find the fewest nodes that alone, all others ablated, answer as the whole model does.

    The prompts are split by the seed: one half finds the nodes (a third of it trains gates, the
    rest chooses how many are kept), the other half reports. Roles should be blind to what is asked;
    if some of the prompts' roles are among those that know, the mechanism is marked as told where
    to look. Under `torchrun` prompts are shared out over the processes.

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
        curve: other sizes that are reported, as shares of the mechanism's; none and all come with
            them.
        n_random: how many draws of random nodes are reported.
        seed: of the split, the order of prompts and the random nodes.
        engine: "exact", or "hooks" for plain runs of any hooked model.
        batch_size: prompts run together, at most.
        memory: bytes that intermediate results may take; found from the device if left out.
        folder: where every step is kept, so that a search that was cut off and is called again with
            the same goes on from there and ends with the same result; a few kilobytes a step.
        progress: called after each step.

    Raises:
        InputError: if the prompts have no roles, lack an answer or are too few for the targets to
            be seen reached, the model answers none of them right, MLPs are to be ablated by an
            ablation without their outputs, the ablation or circuit does not fit, the folder has
            steps of another search, or the exact engine does not fit the model.
    """
    forward = GatedForward.of(
        model, ablation, metric=metric, engine=engine, batch_size=batch_size, memory=memory
    )
    clean = prompts.clean if isinstance(prompts, PairBatch) else prompts
    gates = Gates.filled(model.cfg, roles_there(clean), 1, mlps=mlps)
    check_gates_fit(gates, forward.ablation)
    settings = training or GateTraining()
    if folder is not None:
        told = (target, agreement, metric.name, mlps, settings, tuple(curve), n_random, seed)
        forward = kept_forward(forward, folder, prompts, *told)
    found_in = forward.in_bfloat16() if settings.precision == "bfloat16" else forward
    *finding, reporting = split_prompts(prompts, seed)
    parts = Parts(*(found_in.record(some) for some in finding))
    search = Search(found_in, gates, parts, target, agreement, settings, seed, progress)
    search.check()
    kept = search.run()
    report = _Report(search, forward, forward.record(reporting), fingerprint(prompts))
    return report.of(kept, curve, n_random, circuit)


@dataclass(frozen=True)
class _Report:
    """What is said of a mechanism.

    Attributes:
        search: it found the nodes.
        forward: how the model itself is run.
        prompts: those that had no part in the search.
        fingerprint: of all prompts.
    """

    search: Search
    forward: GatedForward
    prompts: RecordedPrompts
    fingerprint: str

    def of(
        self, kept: Tensor, shares: Sequence[float], n_random: int, circuit: Circuit | None
    ) -> Mechanism:
        """Run the nodes found alone, beside what they are compared with."""
        search, forward = self.search, self.forward
        gates, settings = search.gates, search.settings
        order = descending(torch.ones_like(kept), kept, search.strength, search.scores)
        n, n_all = int(kept.sum()), len(kept)
        sizes = sorted({0, n, *(round(share * n) for share in shares)})
        sizes = [size for size in sizes if size < n_all]
        each = []
        for size in sizes:
            values = torch.zeros_like(kept)
            values[order[:size]] = 1
            each.append(gates.with_values(values))
        nodes = gates.with_values(kept).nodes
        drawn = random_nodes(gates, nodes, n_random, seed=search.seed)
        each += [gates.with_values(values) for values in drawn]
        found = self._run(each)
        curve, random = found[: len(sizes)], found[len(sizes) :]
        # All nodes kept is the whole model itself.
        curve.append(curve[0].of_whole(n_all))
        sizes.append(n_all)
        given = None
        if circuit is not None:
            given = forward.evaluate_circuit(self.prompts, circuit, search.seed)
        knowing = self.prompts.pairs.clean.knowing
        return Mechanism(
            nodes=nodes,
            found=curve[sizes.index(n)],
            curve=tuple(curve),
            random=tuple(random),
            circuit=given,
            target=search.target,
            agreement_target=search.agreement,
            roles=gates.roles,
            knowing=tuple(role for role in gates.roles if role in knowing),
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
            prompts=self.fingerprint,
            engine=forward.engine,
        )

    def _run(self, each: Sequence[Gates]) -> list[NodesEvaluation]:
        return self.forward.evaluate(
            self.prompts,
            each,
            seed=self.search.seed,
            progress=lambda runs: self.search.ran("reporting", runs, None),
        )


@checked
def reporting_prompts(prompts: PromptBatch, *, seed: int) -> PromptBatch:
    """Those of the prompts that had no part in finding a mechanism: what `find_mechanism` with the
    same prompts and seed reports of.

    Raises:
        InputError: if there are too few prompts to be split.
    """
    reported = split_prompts(prompts, seed)[-1]
    assert isinstance(reported, PromptBatch)
    return reported


def split_prompts(prompts: PromptBatch | PairBatch, seed: int) -> list[PromptBatch | PairBatch]:
    """A sixth to train on, a third to choose by, half to report, as `find_mechanism` takes them.

    Raises:
        InputError: if there are fewer than six.
    """
    n = len(prompts)
    if n < 6:
        raise InputError(f"{n} prompts can't be split in six to find and test a mechanism.")
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(n))
    parts = order.split([n // 6, n // 2 - n // 6, n - n // 2])
    return [prompts[rows.to(_device(prompts))] for rows in parts]


def _device(prompts: PromptBatch | PairBatch) -> torch.device:
    return (prompts.clean if isinstance(prompts, PairBatch) else prompts).tokens.device


def roles_there(prompts: PromptBatch) -> tuple[str, ...]:
    """The roles that the prompts have tokens of.

    Raises:
        InputError: if they have no roles.
    """
    if prompts.roles is None:
        raise InputError(
            "Nodes are heads at the tokens of a role, and the prompts have no roles; give "
            "PromptBatch its roles."
        )
    there = set(prompts.roles.unique().tolist())
    return tuple(name for index, name in enumerate(prompts.role_names) if index in there)
