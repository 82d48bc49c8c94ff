"""The verdict says what the numbers say, and that they don't when they don't."""

import copy

import pytest

from tl_entity.study.settings import GROUPS
from tl_entity.study.verdict import (
    BETTER,
    CIRCUIT_WORKS,
    GAIN,
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


def model(faithfulness, interval):
    kinds = {"value_fetcher": "object_value", **dict.fromkeys(GROUPS[1:], "position")}
    return {
        "faithfulness": {
            "faithfulness": faithfulness,
            "interval": interval,
            "model": share(0.9, 0.8, 1.0),
            "random": {"accuracies": [0.0, 0.09], "highest": 0.09},
            "other_circuits": {"base": {"faithfulness": 0.75, "interval": [0.65, 0.85]}},
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
        "p_value": 1e-6, "jaccard": 0.82, "jaccard_interval": [0.7, 0.9],
        "precision": 0.9, "recall": 0.9,
    }  # fmt: skip
    return {
        "models": {"base": model(0.7, [0.6, 0.8]), "tuned": model(0.8, [0.7, 0.9])},
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
            }
        },
    }  # fmt: skip


def answers(results):
    return {finding["question"]: finding["answer"] for finding in verdict(results)}


def test_better_by_the_same_mechanism(results):
    assert set(answers(results).values()) == {"yes"}
    assert headline(verdict(results)) == "The fine-tuned model is better, by the same mechanism."
    texts = {finding["question"]: finding["text"] for finding in verdict(results)}
    assert "0.600 [0.500, 0.700]" in texts[BETTER] and "+0.300 [0.200, 0.400]" in texts[BETTER]
    assert "0.82 [0.700, 0.900]" in texts[SAME_HEADS]
    assert texts[GAIN].startswith("A value_fetcher brings the most.")


def test_no_gain_is_said_and_not_shared_out(results):
    results["cmap"]["tuned_into_base"]["gain_interval"] = [-0.05, 0.4]
    assert answers(results)[BETTER] == "can't tell"
    assert answers(results)[GAIN] == "can't tell"
    assert headline(verdict(results)).startswith("No gain")


@pytest.mark.parametrize(
    ("p_value", "interval", "answer"),
    [(0.2, [0.0, 0.3], "no"), (0.2, [0.1, 0.8], "can't tell"), (1e-6, [0.3, 0.9], "partly")],
)
def test_heads_that_are_not_the_same(results, p_value, interval, answer):
    results["same_circuit"]["whole"] |= {"p_value": p_value, "jaccard_interval": interval}
    assert answers(results)[SAME_HEADS] == answer


@pytest.mark.parametrize(
    ("value", "interval", "answer"),
    [
        (0.05, [0.0, 0.09], "no"),
        (0.2, [0.05, 0.4], "can't tell"),
        (0.4, [0.3, 0.5], "partly"),
        (0.6, [0.4, 0.8], "can't tell"),
    ],
)
def test_a_circuit_that_does_not_do_as_well(results, value, interval, answer):
    other = results["models"]["tuned"]["faithfulness"]["other_circuits"]["base"]
    other |= {"faithfulness": value, "interval": interval}
    assert answers(results)[CIRCUIT_WORKS] == answer


def test_other_information_is_another_function(results):
    tuned = results["models"]["tuned"]["information"]["own"]
    kinds = {"value_fetcher": "position", **dict.fromkeys(GROUPS[1:], "position")}
    tuned["entries"] = carries(kinds)
    assert answers(results)[SAME_FUNCTION] == "no"
    tuned["entries"] = carries({})
    assert answers(results)[SAME_FUNCTION] == "can't tell"


def test_overlapping_gains_are_not_given_to_one_group(results):
    entries = results["cmap"]["tuned_into_base"]["entries"]
    entries[1] = patched("pos_transmitter", 0.25, 0.15, 0.35)
    finding = next(f for f in verdict(results) if f["question"] == GAIN)
    assert finding["answer"] == "partly"
    assert "A value_fetcher, B pos_transmitter" in finding["text"]


def test_without_all_its_experiments_there_is_no_verdict(results):
    less = copy.deepcopy(results)
    del less["models"]["base"]["information"]
    assert verdict(less) == []
    assert headline([]) == ""
