"""Where the fine-tune's gain lies: in which weights, and below or above which layer."""

from collections.abc import Mapping
from typing import Any

import torch
from transformer_lens import HookedTransformer

from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head
from tl_entity.methods.corners import FourCorners, four_corners
from tl_entity.methods.grafts import GraftCurve, graft_curve
from tl_entity.methods.weight_integral import MAX_POINTS
from tl_entity.methods.weight_shares import WeightShares, weight_shares
from tl_entity.study.bench import Bench
from tl_entity.study.gain_results import FoundShares, Gain
from tl_entity.study.nodes import distinct
from tl_entity.study.results import ModelFindings
from tl_entity.study.store import Step
from tl_entity.tasks.batches import PromptBatch

SHARES, GRAFTS, CORNERS = Step(FoundShares), Step(GraftCurve), Step(FourCorners)

GRAFTED = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""How many of the changed units are grafted, as shares of all."""

GRAFT_SEEDS = (0,)
"""Of the random units that grafts are compared with."""

GRAFT_PROMPTS = 100
"""Prompts that grafts answer, at most: each graft is another model."""

FEWEST_HELD_OUT = 2
"""With fewer prompts that the shares are not from, there is nothing to test them on."""


def find_gain(
    bench: Bench,
    tuned: HookedTransformer,
    fingerprint: str,
    models: Mapping[str, ModelFindings],
) -> Gain:
    """The share of the gain that each unit's change brings, and its tests.

    Args:
        bench: the base.
        tuned: the fine-tune.
        fingerprint: of the fine-tune.
        models: what was found of both, to say how much lies in their mechanisms and circuits.
    """
    prompts = distinct(bench.prompts(bench.settings.gain_prompts, bench.seed("gain"), "finding"))
    found = _share_out(bench, tuned, fingerprint, prompts)
    if found.shares is None:
        return Gain(found)
    held_out = _without(bench.test_prompts(), prompts)[:GRAFT_PROMPTS]
    if len(held_out) < FEWEST_HELD_OUT:
        return Gain(found, _inside(bench, found.shares, models))
    return Gain(
        found,
        _inside(bench, found.shares, models),
        _graft(bench, tuned, fingerprint, held_out, found.shares),
        _put_together(bench, tuned, fingerprint, held_out),
    )


def _share_out(
    bench: Bench, tuned: HookedTransformer, fingerprint: str, prompts: PromptBatch
) -> FoundShares:
    def compute() -> FoundShares:
        most, shown = MAX_POINTS * len(prompts), 0
        with bench.progress("gain: shares of the weights", most) as done:

            def count(runs: int) -> None:
                nonlocal shown
                shown += runs
                done(runs)

            try:
                found = FoundShares(
                    weight_shares(
                        bench.model,
                        tuned,
                        prompts,
                        batch_size=bench.batch_size,
                        memory=bench.settings.memory_bytes,
                        progress=count,
                    )
                )
            except InputError as reason:
                found = FoundShares(None, str(reason))
            # How many points are needed is found on the way.
            done(most - shown)
        return found

    return bench.step("gain_shares", SHARES, _asked(bench, fingerprint), compute)


def _graft(
    bench: Bench,
    tuned: HookedTransformer,
    fingerprint: str,
    prompts: PromptBatch,
    shares: WeightShares,
) -> GraftCurve:
    n = len(shares.units)
    sizes = sorted({max(1, round(n * share)) for share in GRAFTED})

    def compute() -> GraftCurve:
        entries = (2 + len(GRAFT_SEEDS)) * len(sizes)
        with bench.progress("gain: grafts", (2 + 2 * entries) * len(prompts)) as done:
            return graft_curve(
                bench.model,
                tuned,
                prompts,
                shares,
                sizes=sizes,
                seeds=GRAFT_SEEDS,
                progress=done,
            )

    asked = {**_asked(bench, fingerprint), **bench.tested_on}
    asked |= {"sizes": sizes, "draws": GRAFT_SEEDS, "held out": len(prompts)}
    return bench.step("gain_grafts", GRAFTS, asked, compute)


def _put_together(
    bench: Bench, tuned: HookedTransformer, fingerprint: str, prompts: PromptBatch
) -> FourCorners:
    def compute() -> FourCorners:
        with bench.progress("gain: four corners", len(prompts)) as done:
            found = four_corners(
                bench.model,
                tuned,
                prompts,
                engine=bench.settings.engine,
                batch_size=bench.batch_size,
            )
            done(len(prompts))
        return found

    asked = {**_asked(bench, fingerprint), **bench.tested_on, "held out": len(prompts)}
    return bench.step("gain_corners", CORNERS, asked, compute)


def _inside(
    bench: Bench, shares: WeightShares, models: Mapping[str, ModelFindings]
) -> dict[str, Any]:
    """How much of the gain lies in the heads of each model's mechanism and circuit."""
    seed = bench.seed("gain at random")
    found: dict[str, Any] = {}
    for model in models.values():
        mechanism = None if model.mechanism is None else model.mechanism.found.mechanism
        if mechanism is not None:
            heads = {
                Head(node.layer, node.head) for node in mechanism.nodes if node.head is not None
            }
            found[f"mechanism of {model.label}"] = shares.inside(sorted(heads), seed=seed)
        if len(model.circuit):
            found[f"circuit of {model.label}"] = shares.inside(_heads(model.circuit), seed=seed)
    return found


def _heads(circuit: Circuit) -> list[Head]:
    return sorted({head for group in circuit for head in group.heads})


def _without(prompts: PromptBatch, others: PromptBatch) -> PromptBatch:
    """The prompts that are not among others, each once."""

    def texts(some: PromptBatch) -> list[tuple[int, ...]]:
        rows = some.tokens.masked_fill(~some.mask, -1).tolist()
        return [tuple(token for token in row if token >= 0) for row in rows]

    each = distinct(prompts)
    seen = set(texts(others))
    rows = [row for row, text in enumerate(texts(each)) if text not in seen]
    return each[torch.tensor(rows, dtype=torch.long)]


def _asked(bench: Bench, fingerprint: str) -> dict[str, Any]:
    """What decides the shares, for the inputs of a step."""
    return {
        "tuned": fingerprint,
        "gain prompts": bench.settings.gain_prompts,
        "gain seed": bench.seed("gain"),
        **bench.design.task.inputs,
    }
