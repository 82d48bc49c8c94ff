"""The mechanism of the pair that ships, whose planted heads are known, is found by itself."""

import pytest
import torch

from tl_entity import (
    Circuit,
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
from tl_entity.models.registry import planted_circuit

MODEL = load_model("default-base")
ROLE_OF = {
    "value_fetcher": "last",
    "pos_transmitter": "last",
    "pos_detector": "query_label",
    "struct_reader": "label",
}
OTHERS = discovery_pairs(MODEL.tokenizer, 200, n_boxes=7, seed=22).corrupt


@pytest.fixture(scope="module")
def ablation():
    return pooled_ablation(MODEL, OTHERS)


@pytest.fixture(scope="module")
def found(ablation) -> Mechanism:
    prompts = box_prompts(MODEL.tokenizer, 600, n_boxes=7, seed=21)
    return find_mechanism(MODEL, prompts, ablation=ablation)


def test_a_small_part_of_the_nodes_answers_as_the_whole_model_does(found) -> None:
    answers = found.found
    assert answers.n_nodes == len(found.nodes) <= 0.25 * 32 * 13
    assert answers.faithfulness.interval.low >= 0.9
    assert answers.agreement_interval.low >= 0.85
    # As many random nodes of the same layers and roles, some of them the same, keep far less.
    random = max(each.faithfulness.interval.high for each in found.random)
    assert random < answers.faithfulness.interval.low
    assert found.knowing == ()


def test_the_planted_heads_are_in_it(found) -> None:
    planted = Circuit.load(planted_circuit("default-base"))
    nodes = {Node(h.layer, h.head, ROLE_OF[group.name]) for group in planted for h in group.heads}
    assert nodes <= set(found.nodes)


def test_what_is_reported_is_what_the_nodes_do_alone(found, ablation) -> None:
    """On fresh prompts, by plain runs with every other head ablated at every token."""
    fresh = box_prompts(MODEL.tokenizer, 60, n_boxes=7, seed=99)
    keep: dict[str, list] = {}
    for node in found.nodes:
        keep.setdefault(node.role, []).append(Head(node.layer, node.head))
    by_hooks = evaluate(MODEL, fresh, keep=keep, ablation=ablation, engine="hooks")
    alone = found.evaluate(MODEL, fresh, ablation=ablation).alone
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
