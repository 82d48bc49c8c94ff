"""Minimality where the answer is known, and head by head from its definition."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from transformer_lens import HookedTransformer

from tests.methods.planted import COPY, NOTE, planted_model, planted_pairs
from tests.random_models import random_model, random_prompts
from tl_entity import Circuit, Group, Head, InputError, PromptBatch, evaluate, mean_head_outputs
from tl_entity.heads import without
from tl_entity.methods.circuits import evaluate_circuits
from tl_entity.methods.minimality import minimality, relative_loss

PROMPTS = planted_pairs(60).clean
BACKUP, IDLE, IDLE_NOTE = Head(1, 0), Head(1, 3), Head(0, 2)
CIRCUIT = Circuit(
    (
        Group("copier", "last", (IDLE, COPY, BACKUP)),
        Group("note_taker", "value", (NOTE, IDLE_NOTE)),
    )
)


def model_with_a_backup() -> HookedTransformer:
    """The planted model, in which a second head copies as the first does, and two do nothing."""
    model = planted_model()
    attn = model.blocks[COPY.layer].attn
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
        weights = getattr(attn, name).data
        weights[BACKUP.head] = weights[COPY.head]
    for idle in (IDLE, IDLE_NOTE):
        model.blocks[idle.layer].attn.W_O.data[idle.head] = 0
    return model


MODEL = model_with_a_backup()
MEANS = mean_head_outputs(MODEL, planted_pairs(200, seed=1).clean)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_a_redundant_head_is_kept_and_an_idle_one_dropped(engine: str) -> None:
    done: list[int] = []
    found = minimality(
        MODEL,
        PROMPTS,
        CIRCUIT,
        mean_outputs=MEANS,
        seed=0,
        engine=engine,
        progress=done.append,
    )
    judged = {head.head: head for head in found.heads}
    # By itself either copier is useless; with the other gone it is all.
    assert judged[COPY].removed == (BACKUP,)
    assert judged[BACKUP].removed == (COPY,)
    for head in (COPY, BACKUP, NOTE):
        assert judged[head].kept
        assert judged[head].score > 1
        assert judged[head].without_removed.accuracy == 1.0
    for head in (IDLE, IDLE_NOTE):
        assert not judged[head].kept
        assert judged[head].score == 0
        assert judged[head].removed == ()
        # The same 60 prompts with and without it, which is not all prompts: the ratio goes from
        # n / (n + z²) to its inverse.
        assert judged[head].interval == pytest.approx((60 / 63.841 - 1, 63.841 / 60 - 1), abs=1e-4)
    assert found.minimal == Circuit(
        (Group("copier", "last", (COPY, BACKUP)), Group("note_taker", "value", (NOTE,)))
    )
    assert found.of_circuit.accuracy == found.of_minimal.accuracy == 1.0
    # The whole circuit, the minimal one, and of each group every head and pair, once. No K is
    # larger than one head here, so no part has three.
    assert sum(done) == (1 + 1 + (3 + 3) + (2 + 1)) * 60
    assert "3 of 5 heads kept" in str(found)
    assert "L1H2 of copier" in str(judged[COPY])


def some_case(n_prompts: int = 60) -> tuple[HookedTransformer, PromptBatch, Circuit, torch.Tensor]:
    """A random model whose circuit answers about half of the prompts right."""
    model = random_model(n_layers=3, n_kv_heads=2)
    prompts = random_prompts(n_prompts, 6)
    circuit = Circuit(
        (
            # Equal head indices in different layers are pairs like any other.
            Group("a", "last", (Head(0, 1), Head(1, 1), Head(2, 1), Head(2, 2), Head(1, 3))),
            Group("b", "place", (Head(0, 0), Head(1, 0))),
            Group("c", "early", ()),
        )
    )
    means = mean_head_outputs(model, random_prompts(60, 6, seed=1))
    (told,) = evaluate_circuits(model, prompts, [circuit], mean_outputs=means)
    answers = torch.where(torch.arange(n_prompts) % 4 > 0, told.predicted, prompts.answers)
    answered = PromptBatch(prompts.tokens, answers, prompts.positions, prompts.attention_mask)
    return model, answered, circuit, means


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_score_follows_from_its_definition(share: float) -> None:
    model, prompts, circuit, means = some_case()
    found = minimality(
        model, prompts, circuit, mean_outputs=means, seed=0, largest_share=share, batch_size=32
    )

    @cache
    def right(group: Group, *removed: Head) -> int:
        left = without(circuit, {group.position: removed})
        alone = evaluate(model, prompts, keep=left, mean_outputs=means, engine="hooks")
        return int(alone.correct.sum())

    groups = {group.name: group for group in circuit}
    several = set()
    for judged in found.heads:
        group, v = groups[judged.group], judged.head
        harm = {u: right(group, u) - right(group, u, v) for u in group.heads if u != v}
        order = sorted((u for u in harm if harm[u] > 0), key=lambda u: (-harm[u], u))
        order = order[: math.ceil(share * len(group.heads))]
        scores = []
        for n in range(len(order) + 1):
            before, after = right(group, *order[:n]), right(group, *order[:n], v)
            scores.append((before - after) / after if after else math.inf if before else 0.0)
        best = max(scores)
        assert judged.score == pytest.approx(best)
        assert judged.removed == tuple(order[: scores.index(best)])
        assert judged.kept == (best >= 0.01)
        before, after = right(group, *judged.removed), right(group, *judged.removed, v)
        assert int(judged.without_removed.correct.sum()) == before
        assert int(judged.without_head.correct.sum()) == after
        several.add(len(judged.removed))
    if share == 1.0:
        assert max(several) > 1
    if share == 0.0:
        assert several == {0}
    assert ("a", frozenset({Head(0, 1), Head(1, 1)})) in found.parts
    kept = {(h.group, h.head) for h in found.heads if h.kept}
    assert {(g.name, head) for g in found.minimal for head in g.heads} == kept
    alone = evaluate(model, prompts, keep=found.minimal, mean_outputs=means, engine="hooks")
    assert torch.equal(found.of_minimal.correct, alone.correct)


def test_engines_agree_and_nothing_is_drawn() -> None:
    model, prompts, circuit, means = some_case(24)
    how = {"mean_outputs": means, "batch_size": 10}
    exact, hooks, other = (
        minimality(model, prompts, circuit, **how, engine=engine, seed=seed)
        for engine, seed in (("exact", 0), ("hooks", 0), ("exact", 1))
    )
    for one, same, differs in zip(exact.heads, hooks.heads, other.heads, strict=True):
        assert (one.head, one.removed, one.score) == (same.head, same.removed, same.score)
        assert one.interval == pytest.approx(same.interval, nan_ok=True)
        assert (differs.score, differs.interval) == (one.score, one.interval)
        assert one.interval.low <= one.score <= one.interval.high
    table = exact.to_dataframe()
    np.testing.assert_allclose(table["without_head_correct"] / 24, table["without_head"])
    assert table["head"].tolist()[:2] == ["L0H1", "L1H1"]
    assert table["kept"].dtype == bool


def test_the_threshold_is_met_exactly_or_not() -> None:
    model, prompts, circuit, means = some_case(24)
    scores = [
        h.score for h in minimality(model, prompts, circuit, mean_outputs=means, seed=0).heads
    ]
    finite = sorted(score for score in scores if 0 < score < math.inf)
    for threshold, kept in ((finite[0], True), (math.nextafter(finite[0], 1), False)):
        found = minimality(model, prompts, circuit, mean_outputs=means, seed=0, threshold=threshold)
        assert next(h.kept for h in found.heads if h.score == finite[0]) is kept


def test_losses_are_of_counts_and_never_rounded() -> None:
    # Accuracies .5 and .496 round to the same two digits; the loss is 0.8 %.
    assert relative_loss(125, 124) == pytest.approx(1 / 124)
    assert relative_loss(101, 100) == 0.01
    assert relative_loss(3, 4) == -0.25
    assert relative_loss(3, 0) == math.inf
    assert relative_loss(0, 0) == 0.0


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="share"):
        minimality(MODEL, PROMPTS, CIRCUIT, mean_outputs=MEANS, seed=0, largest_share=1.5)
