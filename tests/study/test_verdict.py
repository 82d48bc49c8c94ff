"""The verdict says what the numbers say, and that they don't when they don't."""

import math

import pytest

from tests.study.made import (
    CARRIED,
    alone,
    answered,
    carried,
    comparison,
    completeness,
    faithfulness,
    good_model,
    into_base,
    into_tuned,
    overlap,
    patched,
    removal,
    study,
)
from tl_entity.study.experiment_results import CarriedByCircuit
from tl_entity.study.settings import GROUPS
from tl_entity.study.verdict import headline, verdict
from tl_entity.study.verdict_rules import (
    BETTER,
    CIRCUIT_WORKS,
    GAIN,
    MECHANISM,
    SAME_FUNCTION,
    SAME_HEADS,
)

ENTRIES = (
    patched("value_fetcher", 0.29, 0.2, 0.4),
    patched("pos_transmitter", 0.02, -0.05, 0.1),
    patched("pos_detector", 0.0, -0.1, 0.1),
    patched("struct_reader", 0.0, -0.1, 0.1),
    patched("whole circuit", 0.3, 0.2, 0.4),
)
BACK = (
    patched("value_fetcher", -0.28, -0.35, -0.2, (0.93, 0.7, 1.1)),
    patched("pos_transmitter", -0.05, -0.1, 0.0, (0.17, 0.0, 0.3)),
)


def made(base=None, tuned=None, same=None, **cmap):
    """A fine-tune that is better by the same mechanism, all of the gain in A; but for what is
    given."""
    transfers = {"tuned_into_base": into_base(*ENTRIES), "base_into_tuned": into_tuned(*BACK)}
    return study(
        base or good_model(),
        tuned or good_model("tuned"),
        same=same or comparison(overlap(9, 1, 1)),
        **{**transfers, **cmap},
    )


def answers(found):
    return {finding.question: finding.answer for finding in verdict(found)}


def finding(found, question):
    return next(each for each in verdict(found) if each.question == question)


def test_better_by_the_same_mechanism():
    found = made()
    assert set(answers(found).values()) == {"yes"}
    assert headline(verdict(found)) == "The fine-tuned model is better, by the same mechanism."
    texts = {each.question: each.text for each in verdict(found)}
    # Wilson's interval of 60 of 100, worked by hand.
    assert "0.600 [0.502, 0.691]" in texts[BETTER]
    assert "a difference of +0.300 [0.2" in texts[BETTER]
    assert "10 heads in the base and 10 in the fine-tuned model, share 9" in texts[SAME_HEADS]
    assert "a Jaccard index of 0.82. Drawn at random within their layers" in texts[SAME_HEADS]
    assert finding(found, SAME_HEADS).figure == "comparison"
    assert "0.90 of the base model's heads are in the fine-tuned" in texts[SAME_HEADS]
    assert "make up 0.90 of it" in texts[SAME_HEADS]
    assert texts[MECHANISM].count("keeps 0.95 [0.900, 0.980] of its accuracy") == 2
    assert texts[MECHANISM].count("All heads at the circuit's tokens keep 0.97 [0.930, 0.990]") == 2
    assert "By 0 of 2 removals" in texts[MECHANISM]
    assert texts[GAIN].startswith("A value_fetcher brings the most, and costs the most")


def test_no_gain_is_said_and_not_shared_out():
    # As many are lost as won.
    found = made(tuned_into_base=into_base(*ENTRIES, tuned=answered(20, 80)))
    assert answers(found)[BETTER] == "can't tell"
    assert answers(found)[GAIN] == "can't tell"
    assert headline(verdict(found)).startswith("No gain")
    assert answers(made(tuned_into_base=into_base(*ENTRIES, tuned=answered(30))))[BETTER] == "no"


@pytest.mark.parametrize(
    ("p_value", "heads", "twice", "answer"),
    [
        # No more than chance, though the base's circuit is found twice alike.
        (0.2, (1, 4, 5), (7, 3), "no"),
        # The base's circuit is not found twice alike, or was not looked for twice.
        (0.2, (1, 4, 5), (7, 28), "can't tell"),
        (0.2, (1, 4, 5), None, "can't tell"),
        (0.2, (7, 1, 2), (9, 1), "can't tell"),
        (1e-6, (3, 3, 4), (7, 3), "partly"),
        (1e-6, (3, 3, 4), None, "partly"),
        (1e-6, (3, 3, 4), (7, 21), "can't tell"),
        (1e-6, (6, 2, 2), (9, 1), "yes"),
        (1.0, (0, 0, 0), None, "can't tell"),
    ],
)
def test_heads_that_are_not_the_same(p_value, heads, twice, answer):
    ceiling = () if twice is None else (overlap(*twice),)
    found = made(same=comparison(overlap(*heads, p_value=p_value), ceiling=ceiling))
    assert answers(found)[SAME_HEADS] == answer
    told = f"shares {twice[0] if twice else 0} of its heads" in finding(found, SAME_HEADS).text
    assert told == (twice is not None)


@pytest.mark.parametrize(
    ("value", "interval", "answer"),
    [
        (0.05, (0.0, 0.08), "no"),
        (0.2, (0.05, 0.4), "can't tell"),
        (0.4, (0.3, 0.5), "partly"),
        # As good by the value, but the interval leaves room for half.
        (0.94, (0.5, 1.0), "can't tell"),
        (math.nan, (math.nan, math.nan), "can't tell"),
    ],
)
def test_a_circuit_that_does_not_do_as_well(value, interval, answer):
    own = faithfulness(0.95, 0.9, 0.98)
    tuned = good_model(faithfulness=alone(own, base=faithfulness(value, *interval)))
    assert answers(made(tuned=tuned))[CIRCUIT_WORKS] == answer


def test_two_useless_circuits_are_not_called_as_good_as_each_other():
    useless = faithfulness(0.1, 0.05, 0.16)
    found = made(tuned=good_model(faithfulness=alone(useless, base=useless)))
    assert answers(found)[CIRCUIT_WORKS] == "can't tell"
    assert answers(found)[MECHANISM] == "no"


def test_without_a_random_circuit_nothing_is_said_to_be_beyond_one():
    own, other = faithfulness(0.95, 0.9, 0.98), faithfulness(0.93, 0.9, 0.97)
    none = good_model(faithfulness=alone(own, random=(), base=other))
    found = made(none, none)
    assert answers(found)[CIRCUIT_WORKS] == "can't tell"
    assert answers(found)[MECHANISM] == "can't tell"
    assert "no random circuit" in finding(found, MECHANISM).text


def test_circuits_of_the_same_heads_are_one_measurement():
    found = made(same=comparison(overlap(10)))
    assert "is no measurement" in finding(found, CIRCUIT_WORKS).text
    assert "is no measurement" not in finding(made(), CIRCUIT_WORKS).text


@pytest.mark.parametrize(
    ("value", "interval", "answer", "said"),
    [
        (0.18, (0.11, 0.25), "no", "so most of the mechanism of the base model lies outside them"),
        (0.5, (0.3, 0.7), "can't tell", "can't be told"),
        (0.7, (0.6, 0.78), "partly", "so part of the mechanism of the base model lies outside"),
    ],
)
def test_heads_that_do_little_alone_are_not_called_the_mechanism(value, interval, answer, said):
    found = made(good_model(faithfulness=alone(faithfulness(value, *interval))))
    assert answers(found)[MECHANISM] == answer
    text = headline(verdict(found))
    assert said in text and "by the same mechanism" not in text
    assert f"{value:.2f} [{interval[0]:.3f}, {interval[1]:.3f}] of the accuracy of the base" in text


def test_a_circuit_that_differs_once_heads_are_removed_is_a_part():
    lossy = completeness(removal("value_fetcher", 0.3, 0.2, 0.4))
    found = made(tuned=good_model(completeness=lossy))
    said = finding(found, MECHANISM)
    assert said.answer == "partly"
    assert "without A value_fetcher the circuit loses 0.400 and the model 0.100" in said.text
    assert "lose different amounts by the same heads" in headline(verdict(found))
    # Not measured, it says nothing for or against.
    assert answers(made(tuned=good_model(completeness=None)))[MECHANISM] == "yes"


def with_carried(kinds, **entries):
    return good_model("tuned", information=CarriedByCircuit({"own": carried(kinds, **entries)}))


def test_other_information_is_another_function():
    tuned = with_carried({"value_fetcher": "position", **dict.fromkeys(GROUPS[1:], "position")})
    said = finding(made(tuned=tuned), SAME_FUNCTION)
    assert said.answer == "partly"
    # The numbers stand where the groups differ, too; Wilson's interval of 80 of 100, by hand.
    assert "A value_fetcher: another kind (object value 0.800 [0.711, 0.867]" in said.text
    other = {"value_fetcher": "position", **dict.fromkeys(GROUPS[1:], "object_value")}
    assert answers(made(tuned=with_carried(other)))[SAME_FUNCTION] == "no"
    assert answers(made(tuned=with_carried({})))[SAME_FUNCTION] == "can't tell"


def test_two_kinds_that_overlap_leave_a_group_undecided():
    found = made(with_carried(CARRIED, value_fetcher={"position": 70}))
    assert answers(found)[SAME_FUNCTION] == "partly"
    assert "A value_fetcher: can't tell" in finding(found, SAME_FUNCTION).text


def test_a_kind_that_comes_without_patching_is_not_carried():
    found = made(with_carried(CARRIED, unpatched={"position": 80}))
    assert answers(found)[SAME_FUNCTION] == "partly"


def test_a_small_share_of_the_gain_is_not_all_of_it():
    small = (
        patched("value_fetcher", 0.1, 0.06, 0.14),
        *(patched(group, -0.1, -0.2, -0.02) for group in GROUPS[1:]),
    )
    found = made(tuned_into_base=into_base(*small))
    said = finding(found, GAIN)
    assert said.answer == "partly" and "not beyond doubt 0.5 of the gain" in said.text
    names = "B pos_transmitter, C pos_detector, D struct_reader"
    assert f"outputs of {names} put into the base model lower its accuracy" in said.text
    # Heads that can't be exchanged are not the same mechanism without a word.
    assert names in headline(verdict(found))


def test_groups_that_bring_nothing_are_not_given_the_gain():
    nothing = (patched(group, 0.0, -0.1, 0.1) for group in GROUPS)
    said = finding(made(tuned_into_base=into_base(*nothing)), GAIN)
    assert said.answer == "no" and said.text.startswith("No group brings a gain by itself.")


def test_the_other_direction_has_to_bear_a_group_out():
    second = patched("pos_transmitter", -0.45, -0.5, -0.4, (1.5, 1.3, 1.7))
    said = finding(made(base_into_tuned=into_tuned(BACK[0], second)), GAIN)
    assert said.answer == "partly" and "does not bear it out" in said.text
    assert "was not measured" in finding(made(base_into_tuned=None), GAIN).text


def test_a_group_has_to_bring_more_than_the_control_models():
    little = into_base(patched("value_fetcher", 0.02, -0.05, 0.1))
    said = finding(made(control_into_base=little), GAIN)
    assert said.answer == "yes"
    # Wilson's interval of 62 of 100, by hand.
    assert "control model's heads: A value_fetcher 0.620 [0.522, 0.709]." in said.text
    much = into_base(patched("value_fetcher", 0.15, 0.05, 0.25))
    said = finding(made(control_into_base=much), GAIN)
    assert said.answer == "partly"
    assert "not beyond doubt more than the control model's heads" in said.text


def test_overlapping_gains_are_not_given_to_one_group():
    second = patched("pos_transmitter", 0.25, 0.15, 0.35)
    found = made(tuned_into_base=into_base(ENTRIES[0], second, *ENTRIES[2:]))
    said = finding(found, GAIN)
    assert said.answer == "partly"
    assert "A value_fetcher, B pos_transmitter" in said.text


def test_without_all_its_experiments_there_is_no_verdict():
    assert verdict(made(good_model(information=None))) == ()
    assert verdict(made(tuned=good_model(faithfulness=None))) == ()
    assert verdict(study(good_model(), good_model(), same=comparison(overlap(9, 1, 1)))) == ()
    assert verdict(study(good_model())) == ()
    assert headline(()) == ""
