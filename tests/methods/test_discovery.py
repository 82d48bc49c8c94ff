from typing import Any

import pytest
import torch

from tests.random_models import random_model, random_prompts
from tl_entity import Head, InputError, PairBatch, PromptBatch, Stage, discover_circuit, path_patch
from tl_entity.methods.discovery import Discovery, choose_heads
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
    def below_zero(scores: HeadScores, n: int) -> list[Head]:
        return [h for h in scores.ranked()[:n] if scores.intervals[h.layer, h.head, 1] < 0]

    a = path_patch(MODEL, PAIRS, position="last")
    into_a = below_zero(a, patched_into["value_fetcher"])
    b = path_patch(MODEL, PAIRS, position="last", receivers=into_a, receiver_input="q")
    into_b = below_zero(b, patched_into["pos_transmitter"])
    c = path_patch(MODEL, PAIRS, position="query_label", receivers=into_b, receiver_input="v")
    into_c = below_zero(c, patched_into["pos_detector"])
    d = path_patch(
        MODEL, PAIRS, position="previous_query_label", receivers=into_c, receiver_input="v"
    )
    stages = dict(zip(SIZES, (a, b, c, d), strict=True))
    for group, expected in stages.items():
        assert torch.equal(found.scores[group].per_example, expected.per_example)
    best = {group: set(below_zero(scores, SIZES[group])) for group, scores in stages.items()}
    assert best == {group: set(heads) for group, heads in found.candidates.items()}
    for group in ("pos_detector", "struct_reader"):
        assert set(found.circuit[group]) == best[group]
    first, second = found.circuit.value_fetcher, found.circuit.pos_transmitter
    assert {*first, *second} == best["value_fetcher"] | best["pos_transmitter"]
    assert not {*first} & {*second}
    later = discover_circuit(
        MODEL, PAIRS, sizes=SIZES, receiver_sizes=receiver_sizes, overlaps="later"
    )
    assert set(later.circuit.pos_transmitter) == best["pos_transmitter"]
    assert set(later.circuit.value_fetcher) == best["value_fetcher"] - best["pos_transmitter"]
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


STAGES = (
    Stage("a", "last"),
    Stage("b", "last", into="a", receiver_input="q"),
    Stage("c", "early", into="b", receiver_input="v"),
)


def test_a_head_chosen_twice_at_one_position_belongs_where_the_evidence_is_stronger() -> None:
    first = scores_of([[-0.9, -0.1], [-0.8, 0.3]])
    later = scores_of([[-0.5, -0.4], [0.0, 0.0]], receivers=(Head(1, 0),))
    scores, sizes = {"a": first, "b": later, "c": later}, {"a": 2, "b": 2, "c": 1}
    circuit = choose_heads(scores, sizes, STAGES)
    assert circuit["a"] == (Head(0, 0), Head(1, 0))
    assert circuit["b"] == (Head(0, 1),)
    assert circuit["c"] == (Head(0, 0),)  # another position, so another part of the circuit
    papers = choose_heads(scores, sizes, STAGES, overlaps="later")
    assert papers["a"] == (Head(1, 0),)
    assert papers["b"] == (Head(0, 0), Head(0, 1))
    assert papers["c"] == (Head(0, 0),)


def spread_scores(means: list[float], spreads: list[float], **how: Any) -> HeadScores:
    """Scores of one layer's heads over four pairs, with this mean and spread."""
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    per_example = torch.tensor(means)[:, None] + torch.tensor(spreads)[:, None] * signs
    return HeadScores(per_example[None], torch.zeros(4), "last", **how)


def test_a_head_joins_no_group_for_a_score_that_could_be_zero() -> None:
    """L0H0 is first in one group, far beyond doubt; in the other it has a score that might be
    zero. It stays where it is, and nothing joins a group by chance."""
    first = spread_scores(
        [-4.8, -0.5, -0.2],
        [0.1, 0.1, 5.0],
        receivers=None,
        receiver_input=None,
        engine="exact",
    )
    second = HeadScores(
        torch.cat(
            [
                spread_scores(
                    [-0.028, -0.01, 0.0],
                    [0.04, 0.001, 0.0],
                    receivers=None,
                    receiver_input=None,
                    engine="exact",
                ).per_example,
                torch.zeros(1, 3, 4),
            ]
        ),
        torch.zeros(4),
        "last",
        receivers=(Head(1, 0),),
        receiver_input="q",
        engine="exact",
    )
    assert second.intervals[0, 0, 1] > 0
    scores = {"a": first, "b": second, "c": second}
    for overlaps in ("stronger", "later"):
        circuit = choose_heads(scores, {"a": 3, "b": 2, "c": 2}, STAGES, overlaps=overlaps)
        # L0H2's mean is below zero in the first group too, but might not be.
        assert circuit["a"] == (Head(0, 0),)
        assert circuit["b"] == (Head(0, 1),)


def test_the_map_shows_where_a_head_went() -> None:
    how: dict[str, Any] = {"receivers": None, "receiver_input": None, "engine": "exact"}
    scores = {
        "a": spread_scores([-0.9, -0.3], [0.1, 0.1], **how),
        "b": spread_scores([-0.5, -0.4], [0.1, 0.1], **how),
    }
    stages = STAGES[:2]
    chosen = {name: some.found(2) for name, some in scores.items()}
    circuit = choose_heads(scores, {"a": 2, "b": 2}, stages)
    assert (circuit["a"], circuit["b"]) == ((Head(0, 0),), (Head(0, 1),))
    found = Discovery(circuit, scores, {}, stages, chosen)
    outlines = [t for t in found.plot().data if t.name == "chosen, in another group"]
    # The left edges of the squares: L0H1 on the first map, L0H0 on the second.
    assert [t.x[0] + 0.5 for t in outlines] == [1, 0]
    assert "belongs to another group" in str(found.plot().data[0].customdata)


def test_empty_groups_name_the_parent_that_they_were_patched_into() -> None:
    nothing = spread_scores([0.0], [0.0], receivers=(), receiver_input="v", engine="exact")
    first = spread_scores([0.1], [0.0], receivers=None, receiver_input=None, engine="exact")
    stages = (
        Stage("a", "last"),
        Stage("b", "last", into="a", receiver_input="v"),
        Stage("c", "last", into="b", receiver_input="v"),
    )
    scores = {"a": first, "b": nothing, "c": nothing}
    sizes = dict.fromkeys(scores, 1)
    circuit = choose_heads(scores, sizes, stages)
    found = Discovery(circuit, scores, dict.fromkeys(scores, ()), stages)
    titles = [a.text for a in found.plot().layout.annotations]
    assert [any(f"v of {into}" in text for text in titles) for into in "ab"] == [True, True]


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
