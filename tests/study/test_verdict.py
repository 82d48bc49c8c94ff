"""The verdict says what the numbers say, and that they don't when they don't."""

import copy

import pytest

from tl_entity.study.settings import GROUPS
from tl_entity.study.verdict import (
    BETTER,
    CIRCUIT_WORKS,
    GAIN,
    MECHANISM,
    SAME_FUNCTION,
    SAME_HEADS,
    headline,
    verdict,
)


def share(accuracy, low, high):
    return {"accuracy": accuracy, "interval": [low, high], "correct": 0, "prompts": 100}


def entry(group, kind, accuracy):
    found = share(accuracy, max(0.0, accuracy - 0.1), min(1.0, accuracy + 0.1))
    return {"group": group, "desideratum": kind, "heads": [], "draws": [accuracy], **found}


def carries(kind_of):
    kinds = ("object_value", "box_label_value", "position")
    return [
        entry(group, kind, 0.8 if kind_of.get(group) == kind else 0.05)
        for kind in kinds
        for group in ("unpatched", *GROUPS)
    ]


def removal(kind, removed, difference, low, high):
    return {
        "kind": kind, "removed": removed, "draw": 0, "heads": 2,
        "circuit": share(0.7 - difference, 0.6, 0.8), "model": share(0.8, 0.7, 0.9),
        "circuit_loss": 0.1 + difference, "model_loss": 0.1,
        "difference": difference, "difference_interval": [low, high],
    }  # fmt: skip


def model():
    kinds = {"value_fetcher": "object_value", **dict.fromkeys(GROUPS[1:], "position")}
    return {
        "faithfulness": {
            "faithfulness": 0.95,
            "interval": [0.9, 0.98],
            "model": share(0.9, 0.8, 1.0),
            "random": {"accuracies": [0.0, 0.09], "highest": 0.09},
            "other_circuits": {"base": {"faithfulness": 0.93, "interval": [0.9, 0.97]}},
        },
        "completeness": {
            "entries": [
                removal("whole", "nothing", 0.0, -0.03, 0.03),
                removal("group", "value_fetcher", -0.05, -0.11, 0.01),
                removal("random", "random heads", 0.02, -0.05, 0.09),
            ]
        },
        "information": {"own": {"entries": carries(kinds)}},
    }


def patched(group, gain, low, high):
    return {
        "group": group, "patch": "output", "gain": gain, "gain_interval": [low, high],
        "recovered": gain / 0.3, "recovered_interval": [low / 0.3, high / 0.3],
        **share(0.6 + gain, 0.6 + low, 0.6 + high),
    }  # fmt: skip


@pytest.fixture
def results():
    """A fine-tune that is better by the same mechanism, all of the gain in A."""
    whole = {
        "first": 10, "second": 10, "shared": [[0, 0]] * 9, "shared_by_chance": 2.0,
        "p_value": 1e-6, "jaccard": 0.82, "precision": 0.9, "recall": 0.85,
    }  # fmt: skip
    return {
        "models": {"base": model(), "tuned": model()},
        "same_circuit": {"whole": whole},
        "cmap": {
            "tuned_into_base": {
                "into": share(0.6, 0.5, 0.7), "from": share(0.9, 0.8, 1.0),
                "gain": 0.3, "gain_interval": [0.2, 0.4],
                "entries": [
                    patched("value_fetcher", 0.29, 0.2, 0.4),
                    patched("pos_transmitter", 0.02, -0.05, 0.1),
                    patched("pos_detector", 0.0, -0.1, 0.1),
                    patched("struct_reader", 0.0, -0.1, 0.1),
                    patched("whole circuit", 0.3, 0.2, 0.4),
                ],
            },
            "base_into_tuned": {
                "gain": -0.3, "gain_interval": [-0.4, -0.2],
                "entries": [
                    {**patched("value_fetcher", -0.28, -0.35, -0.2),
                     "recovered": 0.93, "recovered_interval": [0.7, 1.1]},
                    {**patched("pos_transmitter", -0.05, -0.1, 0.0),
                     "recovered": 0.17, "recovered_interval": [0.0, 0.3]},
                ],
            },
        },
    }  # fmt: skip


def answers(results):
    return {finding["question"]: finding["answer"] for finding in verdict(results)}


def finding(results, question):
    return next(found for found in verdict(results) if found["question"] == question)


def alone(results, role, value, low, high):
    results["models"][role]["faithfulness"] |= {"faithfulness": value, "interval": [low, high]}


def test_better_by_the_same_mechanism(results):
    assert set(answers(results).values()) == {"yes"}
    assert headline(verdict(results)) == "The fine-tuned model is better, by the same mechanism."
    texts = {finding["question"]: finding["text"] for finding in verdict(results)}
    assert "0.600 [0.500, 0.700]" in texts[BETTER] and "+0.300 [0.200, 0.400]" in texts[BETTER]
    assert "a Jaccard index of 0.82. Drawn at random within their layers" in texts[SAME_HEADS]
    assert finding(results, SAME_HEADS)["figure"] == "comparison"
    assert "0.90 of the base model's heads are in the fine-tuned" in texts[SAME_HEADS]
    assert "make up 0.85 of it" in texts[SAME_HEADS]
    assert texts[MECHANISM].count("keeps 0.95 [0.900, 0.980] of its accuracy") == 2
    assert "By 0 of 2 removals" in texts[MECHANISM]
    assert texts[GAIN].startswith("A value_fetcher brings the most, and costs the most")


def test_no_gain_is_said_and_not_shared_out(results):
    results["cmap"]["tuned_into_base"]["gain_interval"] = [-0.05, 0.4]
    assert answers(results)[BETTER] == "can't tell"
    assert answers(results)[GAIN] == "can't tell"
    assert headline(verdict(results)).startswith("No gain")


@pytest.mark.parametrize(
    ("p_value", "jaccard", "twice", "answer"),
    [
        # No more than chance, though the base's circuit is found twice alike.
        (0.2, 0.1, 0.7, "no"),
        # The base's circuit is not found twice alike, or was not looked for twice.
        (0.2, 0.1, 0.2, "can't tell"),
        (0.2, 0.1, None, "can't tell"),
        (0.2, 0.7, 0.9, "can't tell"),
        (1e-6, 0.3, 0.7, "partly"),
        (1e-6, 0.3, None, "partly"),
        (1e-6, 0.3, 0.25, "can't tell"),
        (1e-6, 0.6, 0.9, "yes"),
        (1.0, None, None, "can't tell"),
    ],
)
def test_heads_that_are_not_the_same(results, p_value, jaccard, twice, answer):
    same = results["same_circuit"]
    same["whole"] |= {"p_value": p_value, "jaccard": jaccard}
    if twice is not None:
        same["ceiling"] = {"whole": {"jaccard": twice, "shared": [[0, 0]] * 7}}
    assert answers(results)[SAME_HEADS] == answer
    told = "shares 7 of its heads" in finding(results, SAME_HEADS)["text"]
    assert told == (twice is not None)


def test_no_answer_rests_on_an_interval_of_the_overlap(results):
    """Such intervals leave out what they are of; kept results of before still hold them."""
    before = answers(results)
    results["same_circuit"]["whole"]["jaccard_interval"] = [0.1, 0.3]
    assert answers(results) == before


@pytest.mark.parametrize(
    ("value", "interval", "answer"),
    [
        (0.05, [0.0, 0.09], "no"),
        (0.2, [0.05, 0.4], "can't tell"),
        (0.4, [0.3, 0.5], "partly"),
        # As good by the value, but the interval leaves room for half.
        (0.94, [0.5, 1.0], "can't tell"),
        (None, [None, None], "can't tell"),
    ],
)
def test_a_circuit_that_does_not_do_as_well(results, value, interval, answer):
    other = results["models"]["tuned"]["faithfulness"]["other_circuits"]["base"]
    other |= {"faithfulness": value, "interval": interval}
    assert answers(results)[CIRCUIT_WORKS] == answer


def test_two_useless_circuits_are_not_called_as_good_as_each_other(results):
    alone(results, "tuned", 0.1, 0.05, 0.16)
    other = results["models"]["tuned"]["faithfulness"]["other_circuits"]["base"]
    other |= {"faithfulness": 0.1, "interval": [0.05, 0.16]}
    assert answers(results)[CIRCUIT_WORKS] == "can't tell"
    assert answers(results)[MECHANISM] == "no"


def test_without_a_random_circuit_nothing_is_said_to_be_beyond_one(results):
    for role in ("base", "tuned"):
        results["models"][role]["faithfulness"]["random"] = {"accuracies": [], "highest": None}
    assert answers(results)[CIRCUIT_WORKS] == "can't tell"
    assert answers(results)[MECHANISM] == "can't tell"
    assert "no random circuit" in finding(results, MECHANISM)["text"]


def test_circuits_of_the_same_heads_are_one_measurement(results):
    whole = results["same_circuit"]["whole"]
    whole |= {"shared": [[0, 0]] * whole["first"]}
    assert "is no measurement" in finding(results, CIRCUIT_WORKS)["text"]


@pytest.mark.parametrize(
    ("value", "interval", "answer", "said"),
    [
        (0.18, [0.11, 0.25], "no", "so most of the mechanism of the base model lies outside them"),
        (0.5, [0.3, 0.7], "can't tell", "can't be told"),
        (0.7, [0.6, 0.78], "partly", "so part of the mechanism of the base model lies outside"),
    ],
)
def test_heads_that_do_little_alone_are_not_called_the_mechanism(
    results, value, interval, answer, said
):
    alone(results, "base", value, *interval)
    assert answers(results)[MECHANISM] == answer
    text = headline(verdict(results))
    assert said in text and "by the same mechanism" not in text
    assert f"{value:.2f} [{interval[0]:.3f}, {interval[1]:.3f}] of the accuracy of the base" in text


def test_a_circuit_that_differs_once_heads_are_removed_is_a_part(results):
    entries = results["models"]["tuned"]["completeness"]["entries"]
    entries[1] = removal("group", "value_fetcher", 0.3, 0.2, 0.4)
    found = finding(results, MECHANISM)
    assert found["answer"] == "partly"
    assert "without A value_fetcher the circuit loses 0.400 and the model 0.100" in found["text"]
    assert "lose different amounts by the same heads" in headline(verdict(results))


def test_other_information_is_another_function(results):
    tuned = results["models"]["tuned"]["information"]["own"]
    tuned["entries"] = carries(
        {"value_fetcher": "position", **dict.fromkeys(GROUPS[1:], "position")}
    )
    found = finding(results, SAME_FUNCTION)
    assert found["answer"] == "partly"
    # The numbers stand where the groups differ, too.
    assert "A value_fetcher: another kind (object value 0.800 [0.700, 0.900]" in found["text"]
    tuned["entries"] = carries(
        {"value_fetcher": "position", **dict.fromkeys(GROUPS[1:], "object_value")}
    )
    assert answers(results)[SAME_FUNCTION] == "no"
    tuned["entries"] = carries({})
    assert answers(results)[SAME_FUNCTION] == "can't tell"


def test_two_kinds_that_overlap_leave_a_group_undecided(results):
    entries = results["models"]["base"]["information"]["own"]["entries"]
    rival = next(
        e for e in entries if (e["group"], e["desideratum"]) == ("value_fetcher", "position")
    )
    rival |= share(0.65, 0.55, 0.75)
    assert answers(results)[SAME_FUNCTION] == "partly"
    assert "A value_fetcher: can't tell" in finding(results, SAME_FUNCTION)["text"]


def test_a_kind_that_comes_without_patching_is_not_carried(results):
    entries = results["models"]["base"]["information"]["own"]["entries"]
    for found in entries:
        if (found["group"], found["desideratum"]) == ("unpatched", "position"):
            found |= share(0.8, 0.7, 0.9)
    assert answers(results)[SAME_FUNCTION] == "partly"


def test_a_small_share_of_the_gain_is_not_all_of_it(results):
    record = results["cmap"]["tuned_into_base"]
    record["entries"][0] = patched("value_fetcher", 0.1, 0.06, 0.14)
    record["entries"][1:4] = [patched(group, -0.1, -0.2, -0.02) for group in GROUPS[1:]]
    found = finding(results, GAIN)
    assert found["answer"] == "partly" and "not beyond doubt 0.5 of the gain" in found["text"]
    names = "B pos_transmitter, C pos_detector, D struct_reader"
    assert f"outputs of {names} put into the base model lower its accuracy" in found["text"]
    # Heads that can't be exchanged are not the same mechanism without a word.
    assert names in headline(verdict(results))


def test_the_other_direction_has_to_bear_a_group_out(results):
    record = results["cmap"]["base_into_tuned"]
    record["entries"][1] |= {"gain_interval": [-0.5, -0.4], "recovered_interval": [1.3, 1.7]}
    found = finding(results, GAIN)
    assert found["answer"] == "partly" and "does not bear it out" in found["text"]
    results["cmap"]["base_into_tuned"] = None
    assert "was not measured" in finding(results, GAIN)["text"]


def test_a_group_has_to_bring_more_than_the_control_models(results):
    control = {
        "gain": 0.0, "gain_interval": [-0.1, 0.1],
        "entries": [patched("value_fetcher", 0.02, -0.05, 0.1)],
    }  # fmt: skip
    results["cmap"]["control_into_base"] = control
    found = finding(results, GAIN)
    assert found["answer"] == "yes"
    assert "control model's heads: A value_fetcher 0.620 [0.550, 0.700]." in found["text"]
    control["entries"] = [patched("value_fetcher", 0.15, 0.05, 0.25)]
    found = finding(results, GAIN)
    assert found["answer"] == "partly"
    assert "not beyond doubt more than the control model's heads" in found["text"]


def test_overlapping_gains_are_not_given_to_one_group(results):
    entries = results["cmap"]["tuned_into_base"]["entries"]
    entries[1] = patched("pos_transmitter", 0.25, 0.15, 0.35)
    found = finding(results, GAIN)
    assert found["answer"] == "partly"
    assert "A value_fetcher, B pos_transmitter" in found["text"]


def test_without_all_its_experiments_there_is_no_verdict(results):
    less = copy.deepcopy(results)
    del less["models"]["base"]["information"]
    assert verdict(less) == []
    assert headline([]) == ""
