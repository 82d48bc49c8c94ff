"""Attention knockout against a forward written from scratch, and where the answer is known."""

import numpy as np
import pytest
import torch

from tests.independent import Forward
from tests.methods.planted import planted_model, planted_pairs
from tests.random_models import random_model, random_prompts
from tl_entity import InputError, PromptBatch, box_prompts, evaluate, load_model
from tl_entity.methods.knockout import (
    knock_out_attention,
    knockout_curve,
    random_earlier_tokens,
)

MODEL = random_model(n_layers=3, n_heads=4, n_kv_heads=2)
PLANTED = planted_model()
PAIRS = planted_pairs(30)


def without_edge(
    forward: Forward, tokens: torch.Tensor, seer: int, seen: int, first_layer: int
) -> torch.Tensor:
    """Log probabilities at the last token, the edge deleted from `first_layer` up."""
    vectors = {}

    def keep(layer: int, head: int, which: str, x: torch.Tensor) -> torch.Tensor:
        vectors[which] = x
        return x

    def delete(layer: int, head: int, z: torch.Tensor) -> torch.Tensor:
        if layer < first_layer:
            return z
        others = [token for token in range(seer + 1) if token != seen]
        q, k = forward.rotate(vectors["q"]), forward.rotate(vectors["k"])
        weights = (k[others] @ q[seer] / forward.cfg.d_head**0.5).softmax(0)
        z = z.clone()
        z[seer] = weights @ vectors["v"][others]
        return z

    return forward.run(tokens, edit_input=keep, edit_z=delete)[0][-1]


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("edge", [("last", "place"), ("last", "early"), ("place", "early")])
def test_the_edge_is_deleted_from_each_layer_up(
    engine: str, left: bool, edge: tuple[str, str]
) -> None:
    prompts = random_prompts(6, 8, left=left, seed=2)
    if edge == ("place", "early"):
        apart = prompts.position("place") > prompts.position("early")
        prompts = prompts[apart]
    assert len(prompts) >= 3
    curve = knockout_curve(
        MODEL, prompts, from_position=edge[0], to_position=edge[1], engine=engine, batch_size=4
    )
    forward = Forward(MODEL)
    seer, seen = (prompts.position(name) for name in edge)
    for first_layer, found in enumerate(curve.evaluations):
        for row in range(len(prompts)):
            start = int(prompts.position("early")[row])
            expected = without_edge(
                forward,
                prompts.tokens[row][prompts.mask[row]],
                int(seer[row]) - start,
                int(seen[row]) - start,
                first_layer,
            )
            answer = int(prompts.answers[row])
            assert found.answer_log_probability[row].item() == pytest.approx(
                expected[answer].item(), abs=1e-6
            )
            assert int(found.predicted[row]) == int(expected.argmax())
    whole = evaluate(MODEL, prompts, engine=engine)
    torch.testing.assert_close(
        curve.whole.answer_log_probability, whole.answer_log_probability, atol=1e-10, rtol=0
    )
    assert not torch.allclose(
        curve.evaluations[0].answer_log_probability, whole.answer_log_probability
    )


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_the_planted_edges_break_where_they_are_planted(engine: str) -> None:
    def accuracy(from_position: str, to_position: str) -> list[float]:
        found = knock_out_attention(
            PLANTED,
            PAIRS.clean,
            from_position=from_position,
            to_position=to_position,
            engine=engine,
        )
        assert found.shape == (2,)
        return found.tolist()

    # The copier in layer 1 reads the value; the note-taker in layer 0 reads the label from there.
    assert max(accuracy("last", "value")) < 0.5
    note = accuracy("value", "label")
    assert note[0] < 0.5
    assert note[1] == 1.0
    assert accuracy("last", "label") == [1.0, 1.0]


def test_the_default_pair_breaks_where_it_was_planted() -> None:
    model = load_model("default-base")
    prompts = box_prompts(model.tokenizer, 60, seed=0)
    found = knock_out_attention(
        model, prompts, from_position="query_label", to_position="previous_query_label"
    )
    # Its position detectors are in layer 1.
    assert found[:2].max() < 0.4
    whole = evaluate(model, prompts).accuracy
    assert found[2:].tolist() == pytest.approx([whole, whole])


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_the_control_hides_a_random_earlier_token(engine: str) -> None:
    edge = {"from_position": "last", "to_position": "value"}
    curve = knockout_curve(
        PLANTED, PAIRS.clean, **edge, random_draws=3, seed=1, engine=engine, batch_size=7
    )
    assert curve.control_accuracy.shape == (3, 2)
    assert curve.control_accuracy.min() > 0.9
    drawn = random_earlier_tokens(PAIRS.clean, **edge, draws=3, seed=1)
    named = PromptBatch(
        PAIRS.clean.tokens,
        PAIRS.clean.answers,
        {**PAIRS.clean.positions, "drawn": drawn[2]},
    )
    alone = knockout_curve(PLANTED, named, from_position="last", to_position="drawn")
    for one, same in zip(curve.controls[2], alone.evaluations, strict=True):
        torch.testing.assert_close(
            one.answer_log_probability, same.answer_log_probability, atol=1e-5, rtol=1e-5
        )


def test_random_tokens_are_any_but_those_named() -> None:
    prompts = random_prompts(40, 9, left=True, seed=4)
    # Three tokens leave one: neither the first nor the last, nor the one that is named.
    roomy = prompts[prompts.mask.sum(1) > 3]
    drawn = random_earlier_tokens(
        roomy, from_position="last", to_position="place", draws=200, seed=0
    )
    assert drawn.shape == (200, len(roomy))
    for row in range(len(roomy)):
        first, last, place = (int(roomy.position(n)[row]) for n in ("early", "last", "place"))
        assert set(drawn[:, row].tolist()) == set(range(first + 1, last)) - {place}
    again = random_earlier_tokens(
        roomy, from_position="last", to_position="place", draws=200, seed=0
    )
    other = random_earlier_tokens(
        roomy, from_position="last", to_position="place", draws=200, seed=1
    )
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_a_curve_says_what_it_found() -> None:
    done: list[int] = []
    curve = knockout_curve(
        PLANTED,
        PAIRS.clean,
        from_position="last",
        to_position="value",
        random_draws=2,
        seed=0,
        progress=done.append,
    )
    assert sum(done) == (2 * 3 + 1) * 30
    table = curve.to_dataframe()
    assert table["first_layer"].tolist()[:2] == [0, 1]
    assert table["first_layer"].isna().tolist() == [False, False, True]
    assert table["n_prompts"].tolist() == [30] * 3
    np.testing.assert_allclose(table["accuracy"][:2], curve.accuracy)
    np.testing.assert_allclose(table["correct"] / 30, table["accuracy"])
    np.testing.assert_allclose(table[["low", "high"]][:2], curve.intervals)
    np.testing.assert_allclose(table["control_accuracy"][:2], curve.control_accuracy.mean(0))
    assert table["accuracy"][2] == curve.whole.accuracy == 1.0
    assert "last no longer sees value" in str(curve)
    assert "random tokens" in str(curve)
    plain = knockout_curve(PLANTED, PAIRS.clean, from_position="last", to_position="value")
    assert "random" not in str(plain)
    assert "control_accuracy" not in plain.to_dataframe()


def test_what_cannot_be_knocked_out_is_refused() -> None:
    prompts = random_prompts(4, 6)
    for edge, message in (
        (("early", "last"), "comes after"),
        (("early", "early"), "nothing to see"),
        (("last", "nowhere"), "no position 'nowhere'"),
    ):
        with pytest.raises(InputError, match=message):
            knockout_curve(MODEL, prompts, from_position=edge[0], to_position=edge[1])
    edge = {"from_position": "last", "to_position": "place"}
    with pytest.raises(InputError, match="seed"):
        knockout_curve(MODEL, prompts, **edge, random_draws=1)
    with pytest.raises(InputError, match="no other token"):
        random_earlier_tokens(prompts, from_position="early", to_position="early", draws=1, seed=0)
    unanswered = PromptBatch(
        prompts.tokens, prompts.answers - 30, prompts.positions, prompts.attention_mask
    )
    with pytest.raises(InputError, match="no answer"):
        knockout_curve(MODEL, unanswered, **edge)


def test_a_token_can_be_kept_from_seeing_itself() -> None:
    prompts = random_prompts(4, 6)
    both = [
        knockout_curve(MODEL, prompts, from_position="last", to_position="last", engine=engine)
        for engine in ("exact", "hooks")
    ]
    for one, other in zip(both[0].evaluations, both[1].evaluations, strict=True):
        assert one.answer_log_probability.isfinite().all()
        torch.testing.assert_close(
            one.answer_log_probability, other.answer_log_probability, atol=1e-10, rtol=0
        )
