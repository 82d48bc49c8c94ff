"""Answers follow from the numbers by the rules, and wrong rules give wrong answers."""

import math
from dataclasses import replace

import pytest

from tl_entity import InputError
from tl_entity.heads import Node
from tl_entity.methods.judgement import (
    ABILITY,
    BETTER,
    EDGES,
    GAIN,
    INFORMATION,
    MECHANISM,
    NODES,
    QUESTIONS,
    ROBUST,
    Judgement,
    Rules,
    judge,
)
from tl_entity.methods.pair_evidence import (
    Alone,
    GainParts,
    NodeChange,
    NodesCompared,
    PairEvidence,
    Share,
)
from tl_entity.stats import Changes, GroupChange, Interval

FETCHER = Node(3, 6, "last")


def changes(lost, new, *, width=0.05, groups=()):
    def around(value):
        return Interval(max(0.0, value - width), min(1.0, value + width))

    return Changes(100, lost, new, around(lost), around(new), 0.0, Interval(-0.1, 0.1), groups)


def group(name, weight, lost, new, width):
    ends = [Interval(max(0.0, x - width), min(1.0, x + width)) for x in (lost, new)]
    return GroupChange(name, weight, lost, new, *ends)


def share(difference, width):
    return Share(
        0.5, 0.5 + difference, difference, Interval(difference - width, difference + width)
    )


def alone(faithfulness):
    ends = Interval(faithfulness - 0.1, faithfulness + 0.1)
    return Alone(60, 416, faithfulness, ends, faithfulness, ends, (FETCHER,))


def nodes(lost, new, p_value=0.001, width=0.05):
    found = (NodeChange(FETCHER, 0.3, 0.0, 1e-6), NodeChange(Node(0, 1, "label"), 0.2, 0.2, 0.9))
    return NodesCompared(changes(lost, new, width=width), 0.5, 0.3, p_value, found)


SAME = PairEvidence(
    n=200,
    better=share(0, 0.014),
    ability=share(0, 0.014),
    errors={},
    base_alone=alone(0.95),
    tuned_alone=alone(0.9),
    base_in_tuned=None,
    tuned_in_base=None,
    nodes=nodes(0.02, 0.03),
    edges=changes(0.01, 0.02),
    information=changes(0.0, 0.02),
    gain=GainParts(0.0, Interval(-0.1, 0.1), {}, math.nan),
    missing={},
)


def answer(question, rules=None, **changed):
    return judge(replace(SAME, **changed), rules or Rules())[question]


def test_every_question_is_answered_in_a_sentence_of_at_most_two_numbers() -> None:
    found = judge(SAME, Rules())
    assert tuple(a.question for a in found.answers) == QUESTIONS
    assert {a.answer for a in found.answers if a.question != GAIN} == {"no", "yes"}
    for each in found.answers:
        words = each.sentence.replace(",", " ").split()
        assert sum(word.strip(".;").replace(".", "").isdigit() for word in words) <= 3
        assert each.sentence.count(".") - each.sentence.count("0.") <= 3


@pytest.mark.parametrize(
    ("difference", "width", "said"),
    [
        (0.1, 0.05, "yes"),
        (-0.1, 0.05, "no"),
        (0.0, 0.02, "no"),
        (0.02, 0.04, "can't tell"),
        (0.0, 0.08, "can't tell"),
    ],
)
def test_a_gain_is_claimed_excluded_or_left_open(difference, width, said) -> None:
    assert answer(BETTER, better=share(difference, width)).answer == said
    assert answer(ABILITY, ability=share(difference, width)).answer == said


def test_nodes_are_the_same_partly_or_not_by_what_is_beyond_chance() -> None:
    assert answer(NODES).answer == "yes"
    partly = answer(NODES, nodes=nodes(0.0, 0.5))
    assert partly.answer == "partly"
    assert "L3H6@last" in partly.sentence and "L0H1" not in partly.sentence
    assert answer(NODES, nodes=nodes(0.7, 0.8, p_value=0.4)).answer == "no"
    open_question = answer(NODES, nodes=nodes(0.1, 0.1, width=0.45))
    assert open_question.answer == "can't tell"
    assert open_question.reason in open_question.sentence


def test_one_input_that_changed_makes_edges_partly_the_same() -> None:
    """A small part of the whole, beyond doubt within its group."""
    small = group("q of L3H6@last", 0.08, 0.7, 0.6, 0.2)
    rest = group("v of L2H7@last", 0.9, 0.0, 0.0, 0.05)
    found = answer(EDGES, edges=changes(0.05, 0.05, groups=(small, rest)))
    assert found.answer == "partly" and "q of L3H6@last" in found.sentence
    light = replace(small, weight=0.01)
    assert answer(EDGES, edges=changes(0.01, 0.01, groups=(light, rest))).answer == "yes"
    unsure = group("q of L3H6@last", 0.08, 0.5, 0.5, 0.5)
    open_question = answer(EDGES, edges=changes(0.05, 0.05, groups=(unsure, rest)))
    assert open_question.answer == "can't tell" and "q of L3H6@last" in open_question.reason
    assert answer(EDGES, edges=changes(0.9, 0.9)).answer == "no"


def test_information_of_another_kind() -> None:
    assert answer(INFORMATION).answer == "yes"
    assert answer(INFORMATION, information=changes(0.9, 0.8)).answer == "no"
    part = (group("query_label", 0.4, 0.9, 0.0, 0.1),)
    found = answer(INFORMATION, information=changes(0.5, 0.1, groups=part))
    assert found.answer == "partly" and "query_label" in found.sentence
    wide = changes(0.1, 0.1, width=0.45)
    assert answer(INFORMATION, information=wide).answer == "can't tell"


def test_the_weaker_mechanism_counts() -> None:
    assert answer(MECHANISM).answer == "yes"
    assert answer(MECHANISM, tuned_alone=alone(0.75)).answer == "can't tell"
    assert answer(MECHANISM, base_alone=alone(0.3)).answer == "no"
    none = answer(MECHANISM, base_alone=None, missing={"base mechanism": "Too few prompts."})
    assert (none.answer, none.reason) == ("can't tell", "Too few prompts.")


def test_where_the_gain_lies() -> None:
    def gain(heads):
        parts = {
            "attention heads": (heads, Interval(heads - 0.1, heads + 0.1)),
            "MLPs": (1 - heads, Interval(0.9 - heads, 1.1 - heads)),
        }
        return GainParts(0.5, Interval(0.4, 0.6), parts, 0.01)

    assert answer(GAIN).answer == "can't tell"
    assert answer(GAIN, gain=gain(0.9)).answer == "yes"
    other = answer(GAIN, gain=gain(0.1))
    assert other.answer == "no" and "MLPs" in other.sentence
    assert answer(GAIN, gain=gain(0.5)).answer == "can't tell"


def test_halves_that_differ_are_told() -> None:
    apart = replace(changes(0.1, 0.1), difference=0.4, difference_interval=Interval(0.3, 0.5))
    found = replace(nodes(0.1, 0.1), changes=apart)
    assert answer(ROBUST, nodes=found).answer == "no"


def test_what_was_not_measured_is_told_with_its_reason() -> None:
    reasons = {"nodes": "Roles differ.", "edges": "No pairs.", "information": "None given."}
    evidence = replace(SAME, nodes=None, edges=None, information=None, missing=reasons)
    for question, key in ((NODES, "nodes"), (EDGES, "edges"), (INFORMATION, "information")):
        found = judge(evidence, Rules())[question]
        assert (found.answer, found.reason) == ("can't tell", reasons[key])


def test_a_judgement_is_kept_and_read_back(tmp_path) -> None:
    found = judge(replace(SAME, nodes=nodes(0.0, 0.5)), Rules(same=0.3))
    found.save(tmp_path / "judgement")
    again = Judgement.load(tmp_path / "judgement")
    assert str(again) == str(found) and again.rules == found.rules
    assert len(found.to_dataframe()) == len(QUESTIONS)


def test_rules_outside_their_range_are_refused() -> None:
    with pytest.raises(InputError, match="above 0 and below 1"):
        Rules(same=1.5)
