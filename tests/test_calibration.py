"""The tables of the calibration catch rules that are wrong."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.methods.test_judgement import SAME, changes, nodes
from tl_entity.methods.judgement import EDGES, INFORMATION, NODES, Rules
from tl_entity.training.known_pairs import KINDS, known_pair

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from calibration_table import PLANTED, Measured, choose_rules, outcomes, table
from calibration_truth import right_answers

QUESTIONS = (NODES, EDGES, INFORMATION)


def measured(kind, **numbers):
    truth = known_pair(kind, 0).truth
    return Measured(kind, 0, 200, replace(SAME, **numbers), right_answers(kind, truth, {}))


@pytest.fixture(scope="module")
def pairs():
    """Numbers as such pairs give them: nothing changed but by noise, all changed, half is new."""
    return [
        measured("stronger", nodes=nodes(0.08, 0.05), information=changes(0.04, 0.05)),
        measured("moved", nodes=nodes(0.7, 0.7, p_value=0.6), edges=changes(0.9, 0.9)),
        measured("redundant", nodes=nodes(0.0, 0.48), edges=changes(0.0, 0.1)),
    ]


def test_the_rules_of_the_package_are_right_on_such_numbers(pairs) -> None:
    found = outcomes(pairs, Rules())
    assert found[NODES]["right"] == found[NODES]["pairs"] == 3
    assert found[NODES]["false changed"] == found[NODES]["false same"] == 0
    # Edges of the third say that nothing changed, and are wrong.
    assert found[EDGES]["false same"] == 1 and found[EDGES]["wrong"] == 1
    assert "1 of 2" in table(found)


def test_thresholds_moved_on_purpose_are_caught(pairs) -> None:
    every, none, nothing_shared, always_shared = (
        outcomes(pairs, replace(Rules(), **changed)) for changed in PLANTED.values()
    )
    assert every[NODES]["false changed"] == 1
    assert none[NODES]["false same"] == 2
    # Half of what the third's fine-tune does is by the same nodes; of the second nothing is.
    assert nothing_shared[NODES]["wrong"] == 1
    assert always_shared[NODES]["wrong"] == 1


def test_rules_are_chosen_by_what_is_right(pairs) -> None:
    wrong = replace(Rules(), changed=0.3, same=0.15)
    tight = [measured("stronger", nodes=nodes(0.18, 0.0, width=0.12)), *pairs[:2]]
    assert outcomes(tight, wrong)[NODES]["can't tell"] == 1
    chosen = choose_rules(tight, wrong)
    assert outcomes(tight, chosen)[NODES]["right"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_right_answers_to_what_is_claimed(kind) -> None:
    narrow = {"accuracy": (0.02, 0.1), "ability": (0.02, 0.1)}
    right = right_answers(kind, known_pair(kind, 0).truth, narrow)
    assert set(QUESTIONS) <= set(right) and all(right.values())
