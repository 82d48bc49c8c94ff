"""The right answers of a known pair: what follows from how it is made, and what is measured on
many fresh prompts."""

from typing import Any

from tl_entity import box_prompts, evaluate, pooled_ablation
from tl_entity.hooks.gates import Gates
from tl_entity.methods.gated_forward import GatedForward
from tl_entity.methods.judgement import (
    ABILITY,
    BETTER,
    EDGES,
    GAIN,
    INFORMATION,
    MECHANISM,
    NODES,
    ROBUST,
    Rules,
)
from tl_entity.methods.node_effects import AHEAD
from tl_entity.methods.pair_evidence import PairEvidence
from tl_entity.stats import paired_difference_interval
from tl_entity.training.known_pairs import KnownPair, Truth

N_FRESH = 1000
SEED_FRESH = 77

ABLE = {"yes": ("stronger", "moved", "mlps", "information"), "measured": ("rewired",)}
"""Kinds that put the right object ahead more often, and one that may; the others don't."""

HEADS_CHANGED = ("queries", "heads", "edges")


def right_answers(kind: str, truth: Truth, measured: dict[str, Any]) -> dict[str, set[str]]:
    """For each question the answers that are right.

    Args:
        kind: of the pair.
        truth: as it is made.
        measured: from `fresh_gain` and `faithful_in_truth`.
    """
    changes = kind not in ("rewritten", "noise", "lower", "redundant")
    lies_in_heads = truth.changed in HEADS_CHANGED
    able = {"measured": "measured"}.get(
        "measured" if kind in ABLE["measured"] else "", "yes" if kind in ABLE["yes"] else "no"
    )
    right = {
        BETTER: {truth.better} if truth.better else _by(measured["accuracy"]),
        ABILITY: _by(measured["ability"]) if able == "measured" else {able},
        NODES: {truth.same_nodes},
        # Of the edges of a rewired pair those between other nodes are as before.
        EDGES: {"partly", "no"} if kind == "rewired" else {truth.same_edges},
        # The object itself is still carried to the end.
        INFORMATION: {"yes"} if truth.same_information == "yes" else {"no", "partly"},
        GAIN: {"yes" if lies_in_heads else "no"} if changes else {"can't tell"},
        ROBUST: {"yes"},
    }
    if kind == "rewired":
        right[GAIN] |= {"can't tell"}
    if "faithful" in measured:
        right[MECHANISM] = {"yes" if measured["faithful"] else "no"}
    return right


def _by(found: tuple[float, float]) -> set[str]:
    """Right answers to whether there is a gain, by a narrow interval of it."""
    low, high = found
    return {*({"yes"} if high > 0 else set()), *({"no"} if low <= 0 or high < 0.05 else set())}


def fresh_gain(pair: KnownPair) -> dict[str, Any]:
    """Intervals of the gain in accuracy and in ability on many fresh prompts, where the way the
    pair is made does not say it."""
    if pair.truth.better is not None:
        return {}
    prompts = box_prompts(pair.base.tokenizer, N_FRESH, n_boxes=7, seed=SEED_FRESH)
    base, tuned = (evaluate(m, prompts, metric=AHEAD) for m in (pair.base, pair.tuned))
    assert base.values is not None and tuned.values is not None
    ahead = [(found.values > 0).numpy() for found in (tuned, base) if found.values is not None]
    return {
        "accuracy": tuple(paired_difference_interval(tuned.correct.numpy(), base.correct.numpy())),
        "ability": tuple(paired_difference_interval(*ahead)),
    }


def faithful_in_truth(pair: KnownPair, evidence: PairEvidence) -> dict[str, Any]:
    """Whether the mechanisms found are as faithful as the rules ask, on many fresh prompts."""
    found = (evidence.base_alone, evidence.tuned_alone)
    if any(alone is None for alone in found):
        return {}
    prompts = box_prompts(pair.base.tokenizer, N_FRESH // 2, n_boxes=7, seed=SEED_FRESH)
    others = box_prompts(pair.base.tokenizer, 200, n_boxes=7, seed=SEED_FRESH + 1)
    faithful = True
    for model, alone in zip((pair.base, pair.tuned), found, strict=True):
        assert alone is not None
        forward = GatedForward.of(model, pooled_ablation(model, others))
        gates = Gates.keeping(alone.nodes, model.cfg, prompts.role_names)
        (answers,) = forward.evaluate(forward.record(prompts), [gates])
        least = min(answers.faithfulness.value, answers.agreement)
        faithful = faithful and least >= Rules().faithful
    return {"faithful": faithful}
