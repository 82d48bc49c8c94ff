"""Ablation and accuracy against a forward written from scratch, prompt by prompt."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.independent import Forward
from tests.random_models import random_model, random_prompts
from tl_entity import (
    Circuit,
    Evaluation,
    Faithfulness,
    Group,
    Head,
    InputError,
    PromptBatch,
    evaluate,
    mean_head_outputs,
    random_circuits,
)
from tl_entity.methods.circuits import evaluate_circuits, evaluate_removals, recall_by_group

MODEL = random_model(n_layers=2, n_heads=4, n_kv_heads=2)
PROMPTS = random_prompts(5, 7)
KEPT = {"place": [Head(0, 1), Head(1, 3)], "last": [Head(1, 0)]}
REMOVED = {"last": [Head(1, 0), Head(0, 2)], "early": [Head(0, 0)]}

Ablated = Callable[[int, int, int, int], bool]
"""Whether a head's output is replaced: prompt, layer, head, token."""


def some_values() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 9, 4, 8, generator=generator, dtype=torch.float64)


def is_at(heads: dict[str, list[Head]], row: int, layer: int, head: int, token: int) -> bool:
    return any(
        Head(layer, head) in at and int(PROMPTS.position(name)[row]) == token
        for name, at in heads.items()
    )


def by_hand(ablated: Ablated, values: Tensor) -> Tensor:
    """Log probabilities at the last token of each prompt."""
    forward, rows = Forward(MODEL), []
    for row, (tokens, mask) in enumerate(zip(PROMPTS.tokens, PROMPTS.mask, strict=True)):

        def edit(layer: int, head: int, z: Tensor, row: int = row) -> Tensor:
            z = z.clone()
            for token in range(len(z)):
                if ablated(row, layer, head, token):
                    z[token] = values[layer, token, head]
            return z

        rows.append(forward.run(tokens[mask], edit_z=edit)[0][-1])
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize(
    ("how", "ablated"),
    [
        ({}, lambda *where: False),
        ({"keep": {}}, lambda *where: True),
        ({"keep": KEPT}, lambda *where: not is_at(KEPT, *where)),
        ({"remove": REMOVED}, lambda *where: is_at(REMOVED, *where)),
        ({"remove": {}}, lambda *where: False),
        (
            {"keep": KEPT, "remove": REMOVED},
            lambda *where: is_at(REMOVED, *where) or not is_at(KEPT, *where),
        ),
    ],
    ids=["whole", "keep-none", "keep", "remove", "remove-none", "both"],
)
@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_answers_are_those_of_the_definition(
    how: dict, ablated: Ablated, batch_size: int, engine: str
) -> None:
    values = some_values()
    expected = by_hand(ablated, values)
    found = evaluate(
        MODEL,
        PROMPTS,
        **how,
        mean_outputs=values if how else None,
        engine=engine,
        batch_size=batch_size,
    )
    answers = expected.gather(1, PROMPTS.answers[:, None]).squeeze(1)
    torch.testing.assert_close(found.answer_log_probability, answers, atol=1e-6, rtol=0)
    assert torch.equal(found.predicted, expected.argmax(-1))
    assert torch.equal(found.correct, expected.argmax(-1) == PROMPTS.answers)


def test_right_answers_are_counted() -> None:
    whole = evaluate(MODEL, PROMPTS)
    answers = whole.predicted.clone()
    answers[3] = (answers[3] + 1) % 20
    told = PromptBatch(PROMPTS.tokens, answers, PROMPTS.positions, PROMPTS.attention_mask)
    found = evaluate(MODEL, told)
    assert found.correct.tolist() == [True, True, True, False, True]
    assert found.accuracy == 0.8
    # Wilson for 4 of 5.
    assert found.interval == pytest.approx((0.3755, 0.9638), abs=1e-4)
    assert "accuracy 0.800" in str(found)
    assert "5 prompts" in str(found)


@pytest.mark.parametrize(("engine", "rounding"), [("hooks", 0), ("exact", 1e-12)])
def test_keeping_every_head_at_every_token_changes_nothing(engine: str, rounding: float) -> None:
    tokens = random_prompts(3, 4).tokens
    every = {f"token {i}": torch.full((3,), i) for i in range(4)}
    prompts = PromptBatch(
        tokens, torch.zeros(3, dtype=torch.long), {**every, "last": every["token 3"]}
    )
    heads = [Head(layer, head) for layer in range(2) for head in range(4)]
    kept, fewer = (
        evaluate(
            MODEL,
            prompts,
            keep=dict.fromkeys(names, heads),
            mean_outputs=some_values(),
            engine=engine,
        )
        for names in (list(every), list(every)[:3])
    )
    whole = evaluate(MODEL, prompts)
    torch.testing.assert_close(
        kept.answer_log_probability, whole.answer_log_probability, atol=rounding, rtol=0
    )
    assert not torch.allclose(fewer.answer_log_probability, whole.answer_log_probability)


def test_a_circuit_is_kept_like_its_heads_by_position() -> None:
    circuit = Circuit((Group("a", "place", (Head(0, 1),)), Group("b", "last", (Head(1, 0),))))
    values = some_values()
    found = evaluate(MODEL, PROMPTS, keep=circuit, mean_outputs=values)
    same = evaluate(MODEL, PROMPTS, keep=circuit.heads_at(), mean_outputs=values)
    other = evaluate(MODEL, PROMPTS, keep={}, mean_outputs=values)
    assert torch.equal(found.answer_log_probability, same.answer_log_probability)
    assert not torch.equal(found.answer_log_probability, other.answer_log_probability)


@pytest.mark.parametrize("several", [evaluate_circuits, evaluate_removals])
@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_many_at_once_are_each_one_alone(several: Callable, engine: str) -> None:
    values = some_values()
    circuits = [KEPT, {}, REMOVED, {"last": [Head(1, 3)]}]
    done = []
    found = several(
        MODEL,
        PROMPTS,
        circuits,
        mean_outputs=values,
        engine=engine,
        batch_size=2,
        progress=done.append,
    )
    what = "keep" if several is evaluate_circuits else "remove"
    for evaluation, circuit in zip(found, circuits, strict=True):
        alone = evaluate(
            MODEL, PROMPTS, **{what: circuit}, mean_outputs=values, engine="hooks", batch_size=5
        )
        torch.testing.assert_close(
            evaluation.answer_log_probability, alone.answer_log_probability, atol=1e-10, rtol=0
        )
        assert torch.equal(evaluation.predicted, alone.predicted)
    assert sum(done) == len(circuits) * len(PROMPTS)
    assert several(MODEL, PROMPTS, [], mean_outputs=values, engine=engine) == []


def test_mean_outputs_count_only_the_prompts_that_reach_a_position() -> None:
    forward = Forward(MODEL)
    total = torch.zeros(2, 7, 4, 8, dtype=torch.float64)
    count = torch.zeros(7)
    for tokens, mask in zip(PROMPTS.tokens, PROMPTS.mask, strict=True):
        _, zs, _ = forward.run(tokens[mask])
        count[: int(mask.sum())] += 1
        for (layer, head), z in zs.items():
            total[layer, : len(z), head] += z
    assert count.tolist() != [5.0] * 7  # lengths differ
    expected = total / count[:, None, None]
    for batch_size in (2, 32):
        found = mean_head_outputs(MODEL, PROMPTS, batch_size=batch_size)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_mean_outputs_take_plain_tokens_too() -> None:
    tokens = random_prompts(3, 4).tokens
    last = torch.full((3,), 3)
    prompts = PromptBatch(tokens, last, {"last": last})
    assert torch.equal(mean_head_outputs(MODEL, tokens), mean_head_outputs(MODEL, prompts))


def test_questions_that_have_no_answer_are_refused() -> None:
    values = some_values()
    with pytest.raises(InputError, match="give mean_outputs"):
        evaluate(MODEL, PROMPTS, keep={})
    with pytest.raises(InputError, match="no head L2H0"):
        evaluate(MODEL, PROMPTS, keep={"last": [Head(2, 0)]}, mean_outputs=values)
    with pytest.raises(InputError, match="no head L0H4"):
        evaluate(MODEL, PROMPTS, remove={"last": [Head(0, 4)]}, mean_outputs=values)
    with pytest.raises(InputError, match="no position 'nowhere'"):
        evaluate(MODEL, PROMPTS, remove={"nowhere": [Head(0, 0)]}, mean_outputs=values)
    with pytest.raises(InputError, match=r"7 tokens.*only 6"):
        evaluate(MODEL, PROMPTS, keep={}, mean_outputs=values[:, :6])
    unanswered = PromptBatch(
        PROMPTS.tokens, PROMPTS.answers - 30, PROMPTS.positions, PROMPTS.attention_mask
    )
    with pytest.raises(InputError, match="no answer"):
        evaluate(MODEL, unanswered)
    with pytest.raises(InputError, match="padded on the right"):
        mean_head_outputs(MODEL, random_prompts(5, 7, left=True))


def test_left_padded_prompts_are_ablated_at_their_own_tokens_or_refused() -> None:
    whole = random_prompts(5, 7)
    shift = whole.tokens.shape[1] - whole.mask.sum(1)
    index = torch.arange(7) - shift[:, None]
    left = PromptBatch(
        whole.tokens.gather(1, index.clamp(min=0)),
        whole.answers,
        {name: at + shift for name, at in whole.positions.items()},
        (index >= 0).long(),
    )
    expected = evaluate(MODEL, whole, keep=KEPT, mean_outputs=some_values())
    try:
        found = evaluate(MODEL, left, keep=KEPT, mean_outputs=some_values())
    except InputError:
        return
    torch.testing.assert_close(found.answer_log_probability, expected.answer_log_probability)


def test_mean_outputs_of_a_shallower_model_are_refused() -> None:
    with pytest.raises(InputError):
        evaluate(MODEL, PROMPTS, keep={}, mean_outputs=some_values()[:1])


def test_random_circuits_have_the_same_form_and_other_heads() -> None:
    circuit = Circuit.entity_tracking(
        value_fetcher=[(1, 0), (1, 1), (1, 2)],
        pos_transmitter=[(0, 0), (0, 1), (0, 2), (0, 3), (1, 3)],
        pos_detector=[(0, 0), (0, 1)],
    )
    drawn = random_circuits(MODEL, circuit, 30, seed=0)
    assert len(drawn) == 30
    for one in drawn:
        assert one.sizes == circuit.sizes
        assert [(g.name, g.position) for g in one] == [(g.name, g.position) for g in circuit]
        # All eight heads of the model are needed at the last token: none twice, none left out.
        assert sorted(one.value_fetcher + one.pos_transmitter) == [
            Head(layer, head) for layer in range(2) for head in range(4)
        ]
        assert len(set(one.pos_detector)) == 2
    assert len({one.pos_detector for one in drawn}) > 10
    # Over many draws every head comes up about equally often: 60 draws of 8 heads.
    often = [sum(Head(1, h) in one.pos_detector for one in drawn) for h in range(4)]
    assert all(1 <= times <= 18 for times in often)
    assert drawn == random_circuits(MODEL, circuit, 30, seed=0)
    assert drawn != random_circuits(MODEL, circuit, 30, seed=1)


def test_a_circuit_larger_than_the_model_cannot_be_drawn() -> None:
    circuit = Circuit.entity_tracking(value_fetcher=[(layer, 0) for layer in range(9)])
    with pytest.raises(InputError, match=r"9 different heads at 'last'.*has 8"):
        random_circuits(MODEL, circuit, 1, seed=0)


def test_controls_of_the_same_layers_are_other_heads_of_these_layers() -> None:
    circuit = Circuit.entity_tracking(
        value_fetcher=[(1, 0), (0, 2)], pos_transmitter=[(1, 3)], pos_detector=[(0, 0)]
    )
    drawn = random_circuits(MODEL, circuit, 20, seed=0, match="layer")
    for one in drawn:
        for found, control in zip(circuit, one, strict=True):
            layers = [sorted(head.layer for head in group.heads) for group in (found, control)]
            assert layers[0] == layers[1]
        assert not set(one.heads_at()["last"]) & set(circuit.heads_at()["last"])
        assert len(set(one.heads_at()["last"])) == 3
    assert len({str(one) for one in drawn}) > 5
    many = Circuit.entity_tracking(value_fetcher=[(1, 0), (1, 1), (1, 2)])
    with pytest.raises(InputError, match="too many heads of layer 1 at 'last'"):
        random_circuits(MODEL, many, 1, seed=0, match="layer")


def evaluation(correct: list[int]) -> Evaluation:
    right = torch.tensor(correct, dtype=torch.bool)
    return Evaluation(right.long(), right, torch.zeros(len(correct)))


def test_faithfulness_by_hand() -> None:
    model = evaluation([1, 1, 1, 1, 0])
    circuit = evaluation([1, 1, 0, 0, 0])
    found = Faithfulness.of(circuit, model, seed=0)
    assert found.value == 0.5
    # Right on 2 of the model's 4: below, Wilson's limit of 2 of 4; above, (2 + z²) / 4.
    assert found.interval == pytest.approx((0.150, 1.460), abs=1e-3)
    assert found == Faithfulness.of(circuit, model, seed=1) == Faithfulness.of(circuit, model)
    same = Faithfulness.of(model, model)
    # Four prompts right in both: what was not asked may differ. The ratio goes from n / (n + z²) to
    # its inverse.
    assert same.value == 1.0
    assert same.interval == pytest.approx((4 / 7.841, 7.841 / 4), abs=1e-3)
    many = evaluation([1] * 190 + [0] * 10)
    assert Faithfulness.of(many, many).interval == pytest.approx((0.98, 1.02), abs=1e-3)
    # Nothing of 24 is not nothing at all: up to 1.96² / 24.
    nothing = Faithfulness.of(evaluation([0] * 24), evaluation([1] * 24), seed=0)
    assert nothing.value == 0.0
    assert nothing.interval == pytest.approx((0, 0.16), abs=1e-3)
    hopeless = Faithfulness.of(circuit, evaluation([0] * 5), seed=0)
    assert math.isnan(hopeless.value)
    assert np.isnan(hopeless.interval).all()


def test_found_and_missed_heads_are_told_apart_by_group() -> None:
    known = Circuit.entity_tracking(value_fetcher=[(0, 0), (1, 1)], pos_detector=[(0, 2)])
    found = Circuit.entity_tracking(value_fetcher=[(1, 1), (0, 2)], pos_transmitter=[(0, 0)])
    recall = recall_by_group(found, known)
    assert recall["value_fetcher"] == ([Head(1, 1)], [Head(0, 0)])
    assert recall["pos_detector"] == ([], [Head(0, 2)])
    assert recall["struct_reader"] == ([], [])


def test_an_empty_circuit_sees_no_prompt_but_its_last_token() -> None:
    model = random_model()
    prompts = random_prompts(6, 5, seed=3)
    same_end = prompts.tokens.clone()
    for row, last in enumerate(prompts.position("last").tolist()):
        same_end[row, :last] = (same_end[row, :last] + 7) % 20
    other = PromptBatch(same_end, prompts.answers, prompts.positions, prompts.attention_mask)
    means = torch.randn(3, 5, 4, 8, dtype=torch.float64)
    first, second = (
        evaluate(model, batch, keep=Circuit(()), mean_outputs=means) for batch in (prompts, other)
    )
    torch.testing.assert_close(first.answer_log_probability, second.answer_log_probability)
