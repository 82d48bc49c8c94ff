"""Known pairs are judged as they are, from few prompts and without a search."""

import pytest

from tl_entity import InputError, PromptBatch, box_prompts, desideratum_pairs, load_model
from tl_entity.methods.gate_training import GateTraining
from tl_entity.methods.judge_pair import judge_pair
from tl_entity.methods.judgement import ABILITY, BETTER, EDGES, GAIN, INFORMATION, MECHANISM, NODES
from tl_entity.tasks.desiderata import MAIN_DESIDERATA
from tl_entity.training.known_pairs import known_pair

TOKENIZER = load_model("default-base").tokenizer
OTHERS = box_prompts(TOKENIZER, 60, n_boxes=7, seed=12)


def judged(kind, n_prompts, **how):
    pair = known_pair(kind, 2)
    prompts = box_prompts(TOKENIZER, n_prompts, n_boxes=7, seed=11)
    return judge_pair(pair.base, pair.tuned, prompts, others=OTHERS, **{"training": None, **how})


def test_the_same_function_in_other_weights_is_the_same() -> None:
    found = judged("rewritten", 80)
    assert found[NODES].answer == "yes" and found[EDGES].answer == "yes"
    assert found[BETTER].answer == "no" and found[ABILITY].answer == "no"
    changes = found.evidence.nodes.changes
    assert changes.lost == pytest.approx(0, abs=1e-3) and changes.new == pytest.approx(0, abs=1e-3)
    # Nothing was gained that could lie anywhere, no pairs tell what is carried, none was searched.
    for question in (GAIN, INFORMATION, MECHANISM):
        assert found[question].answer == "can't tell" and found[question].reason


def test_heads_that_changed_places_are_not_the_same_nodes() -> None:
    information = {
        name: desideratum_pairs(TOKENIZER, name, 40, n_boxes=7, seed=13) for name in MAIN_DESIDERATA
    }
    found = judged("moved", 80, information=information)
    assert found[BETTER].answer == "yes"
    assert found[NODES].answer == "no"
    assert found[INFORMATION].answer != "no"
    assert found[GAIN].answer == "yes"


def test_a_mechanism_is_searched_for_and_tried_in_the_other_model() -> None:
    training = GateTraining(first_steps=2, steps=2, prompts_per_step=8, most_prices=2, prunings=0)
    evidence = judged("noise", 120, training=training).evidence
    assert set(evidence.mechanisms) == {
        "base in base",
        "fine-tune in fine-tune",
        "base in fine-tune",
        "fine-tune in base",
    }
    # Of two models that answer alike.
    own, other = evidence.tuned_in_base, evidence.base_in_tuned
    assert other.faithfulness == pytest.approx(own.faithfulness, abs=0.05)


def test_prompts_without_roles_are_refused() -> None:
    pair = known_pair("noise", 0)
    prompts = box_prompts(TOKENIZER, 20, n_boxes=7, seed=1)
    bare = PromptBatch(prompts.tokens, prompts.answers, prompts.positions)
    with pytest.raises(InputError, match="the prompts have none"):
        judge_pair(pair.base, pair.tuned, bare, others=OTHERS)
