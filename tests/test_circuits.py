import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.random_models import random_model, random_pairs, random_prompts
from tl_entity import (
    Circuit,
    Group,
    Head,
    InputError,
    PairBatch,
    PromptBatch,
    Stage,
    discover_circuit,
    evaluate,
    mean_head_outputs,
    path_patch,
    random_circuits,
    summarize_attention,
)
from tl_entity.hooks import answer_logits, hook_point, record
from tl_entity.methods.circuits import Faithfulness, recall_by_group
from tl_entity.methods.discovery import choose_heads
from tl_entity.methods.path_patching import HeadScores
from tl_entity.stats import bootstrap_ratio_interval, mean_intervals, wilson_interval

EVERY_HEAD = [Head(layer, head) for layer in range(3) for head in range(4)]


def scores(values: list[list[float]], position: str = "last") -> HeadScores:
    per_example = torch.tensor(values)[..., None].expand(-1, -1, 2).clone()
    return HeadScores(per_example, torch.zeros(2), position, None, None, "exact")


def test_keeping_everything_everywhere_ablates_nothing() -> None:
    model = random_model()
    # One token: a circuit of all heads there is the whole model.
    prompts = PromptBatch(
        torch.arange(5)[:, None], torch.arange(5), {"last": torch.zeros(5, dtype=torch.long)}
    )
    means = torch.zeros(3, 1, 4, 8, dtype=torch.float64)
    whole = evaluate(model, prompts)
    kept = evaluate(model, prompts, keep={"last": EVERY_HEAD}, mean_outputs=means)
    assert torch.equal(kept.answer_log_probability, whole.answer_log_probability)
    none = evaluate(model, prompts, keep={}, mean_outputs=means)
    assert not torch.allclose(none.answer_log_probability, whole.answer_log_probability)
    removed = evaluate(model, prompts, remove={"last": EVERY_HEAD}, mean_outputs=means)
    assert torch.equal(removed.answer_log_probability, none.answer_log_probability)


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


def test_evaluation_is_the_models_own_answers() -> None:
    model, prompts = random_model(), random_prompts(7, 6)
    logits = answer_logits(model, prompts)
    prompts = PromptBatch(
        prompts.tokens,
        torch.where(torch.arange(7) < 3, logits.argmax(-1), logits.argmin(-1)),
        prompts.positions,
        prompts.attention_mask,
    )
    found = evaluate(model, prompts, batch_size=2)
    assert found.correct.tolist() == [True] * 3 + [False] * 4
    assert found.accuracy == 3 / 7
    assert found.interval == wilson_interval(3, 7)
    expected = logits.log_softmax(-1)[torch.arange(7), prompts.answers]
    torch.testing.assert_close(found.answer_log_probability, expected)


def test_evaluation_refuses_what_it_cannot_do() -> None:
    model, prompts = random_model(), random_prompts(2, 5)
    with pytest.raises(InputError, match="mean_outputs"):
        evaluate(model, prompts, keep={"last": [Head(0, 0)]})
    with pytest.raises(InputError, match="no head L3H0"):
        evaluate(
            model, prompts, remove={"last": [Head(3, 0)]}, mean_outputs=torch.zeros(3, 5, 4, 8)
        )
    unanswered = PromptBatch(
        prompts.tokens, torch.full((2,), -1), prompts.positions, prompts.attention_mask
    )
    with pytest.raises(InputError, match="no answer"):
        evaluate(model, unanswered)


def test_mean_outputs_count_only_tokens_that_are_there() -> None:
    model, prompts = random_model(), random_prompts(5, 7)
    means = mean_head_outputs(model, prompts, batch_size=2)
    for layer in range(3):
        name = hook_point("z", layer)
        z = record(model, prompts, {name: None})[name]
        for token in range(7):
            there = prompts.mask[:, token]
            torch.testing.assert_close(means[layer, token], z[there, token].mean(0))
    unpadded = prompts.tokens[prompts.mask.all(1)]
    assert mean_head_outputs(model, unpadded).shape == (3, 7, 4, 8)
    with pytest.raises(InputError, match="padded on the right"):
        mean_head_outputs(model, random_prompts(3, 6, left=True))


def test_discovery_follows_the_stages_and_both_engines_agree() -> None:
    model, pairs = random_model(4, n_kv_heads=2), random_pairs()
    stages = [
        Stage("reader", "last"),
        Stage("mover", "last", into="reader", receiver_input="q"),
        Stage("finder", "place", into="mover", receiver_input="v"),
    ]
    sizes = {"reader": 4, "mover": 3, "finder": 2}
    found = discover_circuit(model, pairs, sizes=sizes, receiver_sizes={"reader": 2}, stages=stages)
    first = path_patch(model, pairs)
    assert found.receivers["reader"] == first.top(2)
    second = path_patch(model, pairs, receivers=first.top(2), receiver_input="q")
    assert torch.equal(found.scores["mover"].per_example, second.per_example)
    assert found.scores["finder"].receivers == second.top(3)
    assert found.scores["finder"].position == "place"
    assert found.circuit["mover"] == second.top(3)
    assert set(found.circuit["reader"]) == set(first.top(4)) - set(second.top(3))
    hooks = discover_circuit(
        model, pairs, sizes=sizes, receiver_sizes={"reader": 2}, stages=stages, engine="hooks"
    )
    assert hooks.circuit == found.circuit


def test_a_head_chosen_twice_at_one_position_counts_for_the_later_group() -> None:
    stages = [Stage("a", "last"), Stage("b", "last", "a", "q"), Stage("c", "place", "b", "v")]
    chosen = choose_heads(
        {
            "a": scores([[-0.9, -0.1], [-0.8, -0.3]]),
            "b": scores([[-0.7, -0.2], [-0.1, 0.0]]),
            "c": scores([[-0.5, 0.1], [0.2, 0.3]], "place"),
        },
        {"a": 3, "b": 1, "c": 1},
        stages,
    )
    assert chosen["a"] == (Head(1, 0), Head(1, 1))
    assert chosen["b"] == (Head(0, 0),)
    assert chosen["c"] == (Head(0, 0),)


def test_ranking_is_lowest_first_and_ties_go_by_layer() -> None:
    ranked = scores([[0.2, -0.5], [-0.5, 0.0]]).ranked()
    assert [str(head) for head in ranked] == ["L0H1", "L1H0", "L1H1", "L0H0"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"value_fetcher": 13}, "value_fetcher can't have 13 heads: the model has 12"),
        ({"value_fetcher": 0}, "can't have 0"),
        ({"pos_detector": None}, "how many heads the group pos_detector keeps"),
        ({"readers": 1}, "No stage finds a group readers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict, message: str) -> None:
    groups = ("value_fetcher", "pos_transmitter", "pos_detector", "struct_reader")
    sizes = {**dict.fromkeys(groups, 1), **sizes}
    sizes = {group: size for group, size in sizes.items() if size is not None}
    with pytest.raises(InputError, match=message):
        discover_circuit(random_model(), random_pairs(), sizes=sizes)


def test_random_circuits_have_the_shape_and_no_head_twice_at_a_position() -> None:
    model = random_model()
    circuit = Circuit.entity_tracking(
        value_fetcher=[(0, i) for i in range(4)],
        pos_transmitter=[(1, i) for i in range(4)] + [(2, 0), (2, 1), (2, 2)],
        pos_detector=[(0, 0)],
    )
    drawn = random_circuits(model, circuit, 30, seed=0)
    assert drawn == random_circuits(model, circuit, 30, seed=0)
    assert len(set(drawn)) > 25
    assert all(control.sizes == circuit.sizes for control in drawn)  # Circuit refuses doubles
    at_last = {head for control in drawn for head in control.heads_at()["last"]}
    assert at_last == set(EVERY_HEAD)


def test_wilson_and_mean_intervals_by_hand() -> None:
    # Newcombe (1998), table I, method 3: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20).high == 1.0
    low, high = mean_intervals(np.array([1.0, 2.0, 3.0, 4.0]))
    # Mean 2.5, sample standard deviation 1.29099, standard error 0.645497.
    assert (low, high) == pytest.approx((1.23485, 3.76515), abs=1e-4)
    assert np.isnan(mean_intervals(np.array([[1.0], [2.0]]))).all()


def test_faithfulness_is_the_ratio_with_a_paired_interval() -> None:
    model, prompts = random_model(), random_prompts(8, 5)
    evaluation = evaluate(model, prompts)

    def answered(right: list[int]):
        correct = torch.tensor(right).bool()
        return type(evaluation)(evaluation.predicted, correct, evaluation.answer_log_probability)

    half = Faithfulness.of(answered([1, 1, 0, 0] * 2), answered([1] * 8), seed=0)
    assert half.value == 0.5
    assert half.interval.low < 0.5 < half.interval.high
    # Resampled in pairs, equal answers are equally faithful in every draw.
    same = Faithfulness.of(answered([1, 0] * 4), answered([1, 0] * 4), seed=0)
    assert (same.value, *same.interval) == (1.0, 1.0, 1.0)
    assert np.isnan(Faithfulness.of(answered([0] * 8), answered([0] * 8), seed=0).value)
    n = 400
    top, bottom = np.arange(n) % 4 == 0, np.arange(n) % 2 == 0
    low, high = bootstrap_ratio_interval(top.astype(float), bottom.astype(float), seed=1)
    # A quarter of n in half of n: given the denominator the ratio is binomial, p 1/2, about 200.
    assert (low, high) == pytest.approx((0.43, 0.57), abs=0.01)


def test_attention_summary_is_the_mean_pattern() -> None:
    model, prompts = random_model(), random_prompts(5, 6)
    heads = [Head(2, 1), Head(0, 3)]
    found = summarize_attention(model, prompts, heads, from_position="last", batch_size=2)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2))
    name = hook_point("pattern", 2)
    pattern = record(model, prompts, {name: None})[name]
    rows = torch.arange(5)
    looked = pattern[rows, 1, prompts.position("last"), prompts.position("last")].mean()
    assert found.weights[0, found.names.index("last")].item() == pytest.approx(looked.item())
    farthest = [
        int(prompts.position("last")[row])
        - int(pattern[row, 1, prompts.position("last")[row]].argmax())
        for row in range(5)
    ]
    assert int(found.common_offset[0]) == max(
        sorted(set(farthest)), key=lambda offset: (farthest.count(offset), -offset)
    )


def copy_model():
    """Two layers of two heads by hand; only L1H0 reads another token, and it copies it.

    Residual: 6 dimensions for what a token is, 6 for what is to be said. Queries and keys are zero,
    so every head attends evenly to all tokens. L1H0's value is the token's identity, written to
    what is to be said; L0H0 and L1H1 write nothing, L0H1 writes a little of the same.
    """
    model = random_model(2, 2, d_head=6, d_model=12, d_vocab=6, d_mlp=4)
    for parameter in model.parameters():
        parameter.data.zero_()
    one = torch.eye(6, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("ln1.w") or name == "ln_final.w":
            parameter.data.fill_(1)
    model.embed.W_E.data[:, :6] = one
    model.unembed.W_U.data[6:] = 10 * one
    for layer, head, strength in ((1, 0, 1.0), (0, 1, 0.1)):
        model.blocks[layer].attn.W_V.data[head, :6] = one
        model.blocks[layer].attn.W_O.data[head, :, 6:] = strength * one
    return model


def test_score_worked_out_by_hand() -> None:
    """Clean prompt (1, 1), corrupt (2, 2), target 1, the copying model.

    A token is a unit vector of 12 dimensions, so its RMS is 1/sqrt(12) and layer 0's norm makes it
    r = sqrt(12) long. L0H1 puts out 0.1 r on dimension 6+1. At layer 1 the residual has squares
    1 + 0.01 * 12 = 1.12, and the identity comes out of the norm as sqrt(12 / 1.12) = 3.2733; L1H0
    writes that. So before the final norm: identity 1, and to be said 0.34641 + 3.2733 = 3.61971 on
    token 1. With L1H0 patched, 0.34641 on token 1 and 3.2733 on token 2.
    """
    model = copy_model()
    last = {"last": torch.tensor([1])}
    clean = PromptBatch(torch.tensor([[1, 1]]), torch.tensor([1]), last)
    corrupt = PromptBatch(torch.tensor([[2, 2]]), torch.tensor([2]), last)
    pairs = PairBatch(clean, corrupt, torch.tensor([1]))

    def probability(said: list[float]) -> float:
        vector = np.array([0, *said, 0, 0, 0]) * 10
        vector /= np.sqrt((1 + np.sum(np.square(said))) / 12)
        return float(np.exp(vector[1]) / np.exp(vector).sum())

    before = probability([3.61971, 0.0])
    expected = {
        Head(0, 0): 0.0,
        Head(1, 1): 0.0,
        Head(1, 0): (probability([0.34641, 3.2733]) - before) / before,
        Head(0, 1): (probability([3.2733, 0.34641]) - before) / before,
    }
    for engine in ("exact", "hooks"):
        found = path_patch(model, pairs, engine=engine)
        for head, score in expected.items():
            assert found.scores[head].item() == pytest.approx(score, abs=1e-4), (engine, head)
        assert found.top(1) == (Head(1, 0),)


def test_the_copying_head_is_a_faithful_circuit_and_others_are_not() -> None:
    model = copy_model()
    tokens = torch.tensor([[i, i, i] for i in range(6)])
    prompts = PromptBatch(tokens, torch.arange(6), {"last": torch.full((6,), 2)})
    means = mean_head_outputs(model, prompts)
    assert evaluate(model, prompts).accuracy == 1
    kept = evaluate(model, prompts, keep={"last": [Head(1, 0)]}, mean_outputs=means)
    assert kept.accuracy == 1
    other = evaluate(model, prompts, keep={"last": [Head(1, 1)]}, mean_outputs=means)
    assert other.accuracy < 0.5


def test_circuit_files_round_trip_and_the_papers_form_is_read(tmp_path: Path) -> None:
    circuit = Circuit.entity_tracking(
        value_fetcher=[(3, 1), (2, 0)], pos_detector=[(1, 1)], struct_reader=[]
    )
    circuit.save(tmp_path / "circuit.json")
    content = json.loads((tmp_path / "circuit.json").read_text())
    assert content["value_fetcher"] == [[3, 1], [2, 0]]
    assert list(content) == ["value_fetcher", "pos_transmitter", "pos_detector", "struct_reader"]
    assert Circuit.load(tmp_path / "circuit.json") == circuit
    assert circuit.value_fetcher == circuit["value_fetcher"] == (Head(3, 1), Head(2, 0))
    assert circuit.heads_at()["last"] == (Head(3, 1), Head(2, 0))
    own = Circuit((Group("mover", "end", (Head(0, 1),)),))
    own.save(tmp_path / "own.json")
    assert Circuit.load(tmp_path / "own.json") == own
    known = recall_by_group(circuit, Circuit.entity_tracking(value_fetcher=[(3, 1), (3, 2)]))
    assert known["value_fetcher"] == ([Head(3, 1)], [Head(3, 2)])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"value_fetcher": 3}', '{"value_fetcher": [[1]]}', '{"mine": [[0, 1]]}',
     '{"value_fetcher": [[0, -1]]}', '{"value_fetcher": [[0, 1], [0, 1]]}'],
)  # fmt: skip
def test_bad_circuit_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError):
        Circuit.load(tmp_path / "bad.json")
    with pytest.raises(InputError, match="no such circuit file"):
        Circuit.load(tmp_path / "none.json")


def test_heads_are_written_and_read() -> None:
    for layer, head in itertools.product((0, 10), (0, 31)):
        assert Head.parse(str(Head(layer, head))) == (layer, head)
    with pytest.raises(InputError, match="like L10H3"):
        Head.parse("10.3")
    with pytest.raises(InputError, match="twice at position 'last'"):
        Circuit.entity_tracking(value_fetcher=[(0, 0)], pos_transmitter=[(0, 0)])
    with pytest.raises(InputError, match="no such group"):
        Circuit.entity_tracking(fetcher=[(0, 0)])
