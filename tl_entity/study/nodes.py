"""The mechanism of each model: found, left alone in the other model, compared; and its edges."""

from collections.abc import Mapping
from typing import Any

import torch

from tl_entity.errors import InputError
from tl_entity.heads import Circuit
from tl_entity.methods.compare_mechanisms import compare_mechanisms
from tl_entity.methods.edges import mechanism_edges
from tl_entity.methods.gate_training import SCORED_AT, GateTraining
from tl_entity.methods.gated_forward import GatedForward, NodesEvaluation
from tl_entity.methods.mechanism import MechanismStep, find_mechanism, reporting_prompts
from tl_entity.methods.mechanism_result import Mechanism
from tl_entity.study.bench import Bench
from tl_entity.study.mechanism_results import (
    FoundEdges,
    FoundMechanism,
    MechanismOfModel,
    SameMechanism,
)
from tl_entity.study.settings import Settings
from tl_entity.study.store import Step
from tl_entity.tasks.batches import PairBatch, PromptBatch

MECHANISM, ALONE, EDGES = Step(FoundMechanism), Step(NodesEvaluation), Step(FoundEdges)

EDGE_PAIRS = 40
"""Pairs that edges are scored on, at most."""

AGAIN = "mechanism_again"
"""The purpose of the prompts that the base's mechanism is found from a second time."""


def gate_training(settings: Settings) -> GateTraining:
    """How gates are trained.

    Raises:
        InputError: if the settings name what `GateTraining` does not have, or it refuses them.
    """
    given: dict[str, Any] = dict(settings.gate_training or {})
    unknown = set(given) - set(GateTraining.__dataclass_fields__)
    if unknown:
        raise InputError(
            f"There is no {min(unknown)} in how gates are trained; there are "
            f"{', '.join(GateTraining.__dataclass_fields__)}."
        )
    return GateTraining(**given)


def find_nodes(bench: Bench, *, which: str = "mechanism") -> FoundMechanism:
    """The fewest nodes that alone answer as the whole model does; or why none could be looked for,
    as where there are too few prompts to see it.

    Args:
        bench: the model.
        which: the purpose of the prompts; those of another purpose are others.
    """
    s, seed = bench.settings, bench.seed(which)
    training = gate_training(s)
    prompts = search_prompts(bench, which)

    def compute() -> FoundMechanism:
        most = len(SCORED_AT) + training.first_steps + (training.most_prices - 1) * training.steps
        shown = 0
        with bench.progress(f"{bench.role}: {which.replace('_', ' ')}", most) as done:

            def count(step: MechanismStep) -> None:
                nonlocal shown
                nodes = "" if step.n_nodes is None else f"{step.n_nodes} nodes"
                steps = int(step.doing in ("scoring", "training"))
                shown += steps
                done(steps, nodes or step.doing)

            try:
                found = FoundMechanism(
                    find_mechanism(
                        bench.model,
                        prompts,
                        ablation=bench.ablation(s.ablation),
                        target=s.target,
                        agreement=s.agreement,
                        training=training,
                        seed=seed,
                        progress=count,
                        **bench.how,
                    )
                )
            except InputError as reason:
                found = FoundMechanism(None, str(reason))
            # How many prices are tried is found on the way.
            done(most - shown)
        return found

    asked = {**_asked(bench, which), "training": training}
    return bench.step(which, MECHANISM, asked, compute)


def search_prompts(bench: Bench, which: str = "mechanism") -> PromptBatch:
    """The prompts that a mechanism is found and tested on, each once: the half that reports had no
    part in the search."""
    n, seed = bench.settings.prompts_of_mechanism, bench.seed(which)
    return distinct(bench.prompts(n, seed, "finding"))


def distinct(drawn: PromptBatch) -> PromptBatch:
    """The prompts in their order, each once."""
    texts = [tuple(row) for row in (drawn.tokens.masked_fill(~drawn.mask, -1)).tolist()]
    first = {text: row for row, text in reversed(list(enumerate(texts)))}
    return drawn[torch.tensor(sorted(first.values()))]


def leave_alone(bench: Bench, mechanism: Mechanism, of: str) -> NodesEvaluation:
    """How the model answers with the nodes of another model's mechanism, on the prompts that its
    own is tested on.

    Args:
        bench: the model.
        mechanism: the other model's.
        of: the other model's role.
    """

    def compute() -> NodesEvaluation:
        reporting = reporting_prompts(search_prompts(bench), seed=bench.seed("mechanism"))
        with bench.progress(f"{bench.role}: mechanism of {of}", len(reporting)) as done:
            found = mechanism.evaluate(
                bench.model, reporting, ablation=bench.ablation(mechanism.ablation), **bench.how
            )
            done(len(reporting))
        return found

    asked = {**_asked(bench), "nodes": mechanism.nodes, "by": mechanism.seed}
    return bench.step(f"mechanism_of_{of}", ALONE, asked, compute)


def leave_circuit_alone(bench: Bench, circuit: Circuit) -> NodesEvaluation:
    """The same with the model's circuit of groups, at its tokens."""
    s, seed = bench.settings, bench.seed("mechanism")

    def compute() -> NodesEvaluation:
        reporting = reporting_prompts(search_prompts(bench), seed=seed)
        with bench.progress(f"{bench.role}: circuit", len(reporting)) as done:
            forward = GatedForward.of(bench.model, bench.ablation(s.ablation), **bench.how)
            found = forward.evaluate_circuit(forward.record(reporting), circuit, seed)
            done(len(reporting))
        return found

    asked = {**_asked(bench), "circuit": circuit}
    return bench.step("circuit_beside_mechanism", ALONE, asked, compute)


def score_edges(bench: Bench, mechanism: Mechanism, pairs: PairBatch) -> FoundEdges:
    """The edges between a mechanism's nodes; or why they could not be scored, as where the two
    prompts of a pair have unequally many tokens of a role.

    Args:
        bench: the model.
        mechanism: its mechanism.
        pairs: that the model answers right.
    """
    some, s = pairs[:EDGE_PAIRS], bench.settings
    seed = bench.seed("edges")

    def compute() -> FoundEdges:
        with bench.progress(f"{bench.role}: edges", len(some)) as done:
            try:
                found = FoundEdges(
                    mechanism_edges(
                        bench.model,
                        some,
                        mechanism,
                        seed=seed,
                        engine=s.engine,
                        memory=s.memory_bytes,
                    )
                )
            except InputError as reason:
                found = FoundEdges(None, str(reason))
            done(len(some))
        return found

    asked = {"nodes": mechanism.nodes, "pairs": len(some), "seed": seed, **_asked(bench)}
    return bench.step("mechanism_edges", EDGES, asked, compute)


def compare_nodes(models: Mapping[str, MechanismOfModel]) -> SameMechanism | None:
    """Which nodes and edges both models' mechanisms have; None if one has none."""
    base, tuned = (models[role].found.mechanism for role in ("base", "tuned"))
    if base is None or tuned is None:
        return None
    of_base, of_tuned = (models[role].edges for role in ("base", "tuned"))
    edges = None
    if of_base is not None and of_tuned is not None and of_base.edges and of_tuned.edges:
        edges = (of_base.edges, of_tuned.edges)
    again = models["base"].again
    second = None if again is None else again.mechanism
    return SameMechanism(
        compare_mechanisms(
            base, tuned, edges=edges, again=None if second is None else {"base": second}
        )
    )


def _asked(bench: Bench, which: str = "mechanism") -> dict[str, Any]:
    """What decides the prompts and the search, for the inputs of a step."""
    s = bench.settings
    return {
        "prompts": s.prompts_of_mechanism,
        "others": s.prompts,
        **bench.design.task.inputs,
        "seeds": [bench.seed(which), bench.seed("ablation")],
        "ablation": s.ablation,
        "target": s.target,
        "agreement": s.agreement,
    }
