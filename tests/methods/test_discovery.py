from typing import Any

import pytest
import torch

from tests.random_models import random_model, random_prompts
from tl_entity import Head, InputError, PairBatch, PromptBatch, Stage, discover_circuit, path_patch
from tl_entity.methods.discovery import choose_heads
from tl_entity.methods.path_patching import HeadScores

MODEL = random_model(n_layers=4, n_heads=4, n_kv_heads=2)
SIZES = {"value_fetcher": 5, "pos_transmitter": 6, "pos_detector": 3, "struct_reader": 2}


def box_like_pairs() -> PairBatch:
    def prompts(n_tokens: int, seed: int) -> PromptBatch:
        batch = random_prompts(4, n_tokens, seed=seed)
        last, early = batch.position("last"), batch.position("early")
        names = {"last": last, "query_label": last - 1, "previous_query_label": early}
        return PromptBatch(batch.tokens, batch.answers, names, batch.attention_mask)

    clean = prompts(9, 0)
    return PairBatch(clean, prompts(7, 1), clean.answers)


PAIRS = box_like_pairs()


def scores_of(means: list[list[float]], receivers: tuple[Head, ...] | None = None) -> HeadScores:
    return HeadScores(
        per_example=torch.tensor(means)[..., None],
        clean_values=torch.zeros(1),
        position="last",
        receivers=receivers,
        receiver_input=None if receivers is None else "q",
        engine="exact",
    )


@pytest.mark.parametrize("receiver_sizes", [None, {"value_fetcher": 2, "pos_detector": 1}])
def test_each_stage_patches_into_the_best_heads_of_the_one_before(
    receiver_sizes: dict[str, int] | None,
) -> None:
    found = discover_circuit(MODEL, PAIRS, sizes=SIZES, receiver_sizes=receiver_sizes)
    patched_into = {**SIZES, **(receiver_sizes or {})}
    # The four stages one after the other, as the paper describes them.
    a = path_patch(MODEL, PAIRS, position="last")
    into_a = a.ranked()[: patched_into["value_fetcher"]]
    b = path_patch(MODEL, PAIRS, position="last", receivers=into_a, receiver_input="q")
    into_b = b.ranked()[: patched_into["pos_transmitter"]]
    c = path_patch(MODEL, PAIRS, position="query_label", receivers=into_b, receiver_input="v")
    into_c = c.ranked()[: patched_into["pos_detector"]]
    d = path_patch(
        MODEL, PAIRS, position="previous_query_label", receivers=into_c, receiver_input="v"
    )
    stages = dict(zip(SIZES, (a, b, c, d), strict=True))
    for group, expected in stages.items():
        assert torch.equal(found.scores[group].per_example, expected.per_example)
    best = {group: set(scores.ranked()[: SIZES[group]]) for group, scores in stages.items()}
    assert best["value_fetcher"] & best["pos_transmitter"]  # else the next line shows nothing
    assert set(found.circuit.value_fetcher) == best["value_fetcher"] - best["pos_transmitter"]
    for group in ("pos_transmitter", "pos_detector", "struct_reader"):
        assert set(found.circuit[group]) == best[group]
    assert found.receivers["value_fetcher"] == tuple(into_a)
    assert found.receivers["pos_detector"] == tuple(into_c)


def test_both_engines_find_the_same_circuit() -> None:
    exact = discover_circuit(MODEL, PAIRS, sizes=SIZES, engine="exact")
    hooks = discover_circuit(MODEL, PAIRS, sizes=SIZES, engine="hooks", batch_size=3)
    assert exact.circuit == hooks.circuit
    assert exact.scores["pos_detector"].engine == "exact"
    assert hooks.scores["pos_detector"].engine == "hooks"


def test_progress_counts_the_runs_of_all_stages() -> None:
    done: list[int] = []
    discover_circuit(MODEL, PAIRS, sizes=SIZES, progress=done.append)
    assert sum(done) == 4 * 16 * len(PAIRS)


def test_a_head_chosen_twice_at_one_position_counts_for_the_later_stage() -> None:
    stages = (
        Stage("a", "last"),
        Stage("b", "last", into="a", receiver_input="q"),
        Stage("c", "early", into="b", receiver_input="v"),
    )
    first = scores_of([[-0.9, -0.1], [-0.8, 0.3]])
    later = scores_of([[-0.5, -0.4], [0.0, 0.0]], receivers=(Head(1, 0),))
    circuit = choose_heads({"a": first, "b": later, "c": later}, {"a": 2, "b": 2, "c": 1}, stages)
    assert circuit["a"] == (Head(1, 0),)
    assert circuit["b"] == (Head(0, 0), Head(0, 1))
    assert circuit["c"] == (Head(0, 0),)  # another position, so another part of the circuit


def test_ranking_is_by_the_mean_and_leaves_out_what_cannot_reach() -> None:
    scores = scores_of([[-0.1, -0.3, 0.2], [-0.3, -0.9, 0.0]])
    assert scores.ranked() == [(1, 1), (0, 1), (1, 0), (0, 0), (1, 2), (0, 2)]
    assert scores.top(2) == (Head(1, 1), Head(0, 1))
    assert scores.top(2, exclude=[Head(0, 1)]) == (Head(1, 1), Head(1, 0))
    below = scores_of([[-0.1, -0.3, 0.2], [0.0, 0.0, 0.0]], receivers=(Head(1, 0), Head(0, 2)))
    assert below.top_layer == 1
    assert below.top(5) == (Head(0, 1), Head(0, 0), Head(0, 2))


def test_scores_and_intervals_are_over_the_pairs() -> None:
    scores = HeadScores(
        per_example=torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]),
        clean_values=torch.zeros(4),
        position="last",
        receivers=None,
        receiver_input=None,
        engine="exact",
    )
    assert scores.scores.tolist() == [[2.5]]
    assert scores.intervals[0, 0].tolist() == pytest.approx([1.2348, 3.7652], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {**SIZES, "pos_detector": 17}}, "pos_detector can't have 17 heads.*has 16"),
        ({"sizes": {**SIZES, "pos_detector": 0}}, "pos_detector can't have 0 heads"),
        ({"sizes": {"value_fetcher": 1}}, "how many heads the group pos_transmitter"),
        ({"sizes": {**SIZES, "movers": 1}}, "No stage finds a group movers"),
        ({"receiver_sizes": {"value_fetcher": 17}}, "value_fetcher can't have 17"),
        ({"receiver_sizes": {"movers": 1}}, "No stage finds a group movers"),
        (
            {"stages": [Stage("x", "last", into="y", receiver_input="q")], "sizes": {"x": 1}},
            "x patches into y, which no stage before",
        ),
        ({"stages": [Stage("x", "nowhere")], "sizes": {"x": 1}}, "no position 'nowhere'"),
    ],
)
def test_discoveries_that_cannot_be_made_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        discover_circuit(MODEL, PAIRS, **{"sizes": SIZES, **changes})
