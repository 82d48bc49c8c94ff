"""The mechanism of the pair that ships, whose planted heads are known, is found by itself."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tl_entity import (
    Circuit,
    GateTraining,
    Head,
    InputError,
    Mechanism,
    Node,
    PromptBatch,
    box_prompts,
    discovery_pairs,
    evaluate,
    find_mechanism,
    load_model,
    pooled_ablation,
)
from tl_entity.methods.gate_training import slope
from tl_entity.models.registry import planted_circuit

MODELS = {name: load_model(name) for name in ("default-base", "default-tuned")}
MODEL = MODELS["default-base"]
ROLE_OF = {
    "value_fetcher": "last",
    "pos_transmitter": "last",
    "pos_detector": "query_label",
    "struct_reader": "label",
}
OTHERS = discovery_pairs(MODEL.tokenizer, 200, n_boxes=7, seed=22).corrupt


QUICK = GateTraining(
    first_steps=10, steps=5, prompts_per_step=8, prompts_scored=8, most_prices=6, prunings=0
)


@pytest.fixture(scope="module")
def ablation():
    return pooled_ablation(MODEL, OTHERS)


@pytest.fixture(scope="module")
def few_prompts():
    return box_prompts(MODEL.tokenizer, 120, n_boxes=3, seed=5)


@pytest.fixture(scope="module", params=MODELS)
def found_in(request) -> tuple[str, Mechanism]:
    model = MODELS[request.param]
    prompts = box_prompts(model.tokenizer, 600, n_boxes=7, seed=21)
    return request.param, find_mechanism(model, prompts, ablation=pooled_ablation(model, OTHERS))


@pytest.fixture
def found(found_in) -> Mechanism:
    return found_in[1]


def test_a_small_part_of_the_nodes_answers_as_the_whole_model_does(found) -> None:
    answers = found.found
    assert answers.n_nodes == len(found.nodes) <= 0.2 * 32 * 13
    assert answers.faithfulness.interval.low >= 0.9
    assert answers.measured["agreement"][1].low >= 0.85
    # As many random nodes of the same layers and roles, some of them the same, keep far less.
    random = max(each.faithfulness.interval.high for each in found.random)
    assert random < answers.faithfulness.interval.low
    assert found.knowing == ()


def test_the_planted_heads_are_in_it(found_in) -> None:
    name, found = found_in
    planted = Circuit.load(planted_circuit(name))
    nodes = {Node(h.layer, h.head, ROLE_OF[group.name]) for group in planted for h in group.heads}
    assert nodes <= set(found.nodes)


def test_what_is_reported_is_what_the_nodes_do_alone(found_in) -> None:
    """On fresh prompts, by plain runs with every other head ablated at every token."""
    name, found = found_in
    model = MODELS[name]
    ablation = pooled_ablation(model, OTHERS)
    fresh = box_prompts(model.tokenizer, 60, n_boxes=7, seed=99)
    keep: dict[str, list] = {}
    for node in found.nodes:
        keep.setdefault(node.role, []).append(Head(node.layer, node.head))
    by_hooks = evaluate(model, fresh, keep=keep, ablation=ablation, engine="hooks")
    alone = found.evaluate(model, fresh, ablation=ablation).alone
    torch.testing.assert_close(
        alone.answer_log_probability, by_hooks.answer_log_probability, atol=1e-4, rtol=1e-4
    )


def test_prompts_that_no_mechanism_can_be_found_from_are_refused(ablation) -> None:
    prompts = box_prompts(MODEL.tokenizer, 30, n_boxes=7, seed=1)
    bare = PromptBatch(prompts.tokens, prompts.answers, prompts.positions)
    with pytest.raises(InputError, match="no roles"):
        find_mechanism(MODEL, bare, ablation=ablation)
    with pytest.raises(InputError, match="too few"):
        find_mechanism(MODEL, prompts, ablation=ablation)


def test_the_price_of_a_whole_gate_is_the_same_however_it_bends() -> None:
    """By Simpson's rule over the slope; bent, the first part of a gate costs most."""
    at = torch.linspace(0, 1, 201, dtype=torch.float64)
    weights = torch.tensor([1.0, *[4.0, 2.0] * 99, 4.0, 1.0], dtype=torch.float64) / 600
    for steepness in (0.0, 0.5, 3.0):
        assert float(weights @ slope(at, steepness)) == pytest.approx(1, abs=1e-8)
    assert float(slope(at, 3.0)[0] / slope(at, 3.0)[-1]) == pytest.approx(20.0855, abs=1e-3)


@pytest.mark.parametrize(("first_price", "way"), [(1e-3, 1), (30.0, -1)])
def test_the_price_is_moved_until_the_target_lies_between(
    ablation, few_prompts, first_price, way
) -> None:
    settings = replace(QUICK, first_price=first_price, factor=4.0, most_prices=12)
    how = {"target": 0.6, "agreement": 0.6, "curve": (), "n_random": 0}
    found = find_mechanism(MODEL, few_prompts, ablation=ablation, training=settings, **how)
    steps = found.prices
    assert len(steps) > 1
    for one, then in pairwise(steps):
        assert then.price == pytest.approx(one.price * 4.0**way)
    assert [step.reached for step in steps] == [way > 0] * (len(steps) - 1) + [way < 0]
    assert len(found) <= min(step.n_nodes for step in steps if step.reached)


def test_a_search_in_bfloat16_is_reported_in_the_model_itself(ablation, few_prompts) -> None:
    settings = replace(QUICK, precision="bfloat16")
    how = {"target": 0.6, "agreement": 0.6, "curve": (0.5, 2.0), "n_random": 1}
    found = find_mechanism(MODEL, few_prompts, ablation=ablation, training=settings, **how)
    assert {parameter.dtype for parameter in MODEL.parameters()} == {torch.float32}
    n = len(found)
    assert [point.n_nodes for point in found.curve] == [0, round(n / 2), n, 2 * n, found.n_all]
    assert len(found.random) == 1
    # The metric of every prompt that is reported is one of a plain run in full precision.
    run = evaluate(MODEL, few_prompts, engine="hooks").answer_log_probability
    apart = (found.found.whole_value[:, None] - run).abs().amin(1)
    assert float(apart.max()) < 1e-4
    keep: dict[str, list] = {}
    for node in found.nodes:
        keep.setdefault(node.role, []).append(Head(node.layer, node.head))
    run = evaluate(MODEL, few_prompts, keep=keep, ablation=ablation, engine="hooks")
    apart = (found.found.value[:, None] - run.answer_log_probability).abs().amin(1)
    assert float(apart.max()) < 1e-4
