"""The study of docs/studies/qwen.md: what is kept of it, and a small one where its model is."""

import json
import os
from pathlib import Path

import pytest

from tl_entity.stats import paired_ratio_interval
from tl_entity.study.reproduce import reproduce
from tl_entity.study.settings import GROUPS, Settings

PLACE = "TL_ENTITY_QWEN"
ADAPTER = Path(__file__).parents[2] / "data" / "adapters" / "qwen2.5-coder-0.5b-instruct-skills"


KEPT = Path(__file__).parents[2] / "docs" / "studies" / "qwen"


def kept(name: str) -> dict:
    return json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))


def test_kept_accuracies_are_those_of_the_kept_answers():
    answered = []

    def look(record):
        if isinstance(record, dict) and "right" in record:
            answered.append(record)
        for value in record.values() if isinstance(record, dict) else record:
            if isinstance(value, dict | list):
                look(value)

    look(kept("circuits"))
    look(kept("more"))
    assert len(answered) > 90
    for record in answered:
        assert set(record["right"]) <= set("01")
        assert record["accuracy"] == record["right"].count("1") / len(record["right"])
        assert record["interval"][0] <= record["accuracy"] <= record["interval"][1]


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_kept_faithfulness_is_of_the_same_prompts(role):
    found = kept("circuits")
    whole = found["whole"][role]["right"]
    for entries in found["alone"][role].values():
        for entry in entries.values():
            pairs = list(zip(entry["right"], whole, strict=False))
            counts = [pairs.count(outcome) for outcome in (("1", "1"), ("1", "0"), ("0", "1"))]
            both, only_circuit, only_model = counts
            ratio = (both + only_circuit) / (both + only_model)
            assert entry["faithfulness"] == pytest.approx(ratio)
            interval = list(paired_ratio_interval(*counts))
            assert entry["faithfulness_interval"] == pytest.approx(interval)
            assert interval[0] <= ratio <= interval[1]


def test_kept_shares_of_the_gain_are_of_the_same_prompts():
    for record in kept("more")["cmap"].values():
        before, after = (record[of]["right"].count("1") for of in ("into", "from"))
        for entry in record["entries"]:
            had = entry["right"].count("1")
            assert entry["recovered"] == pytest.approx((had - before) / (after - before))
            low, high = entry["recovered_interval"]
            assert low <= entry["recovered"] <= high


@pytest.mark.skipif(
    PLACE not in os.environ,
    reason=f"{PLACE} does not name a folder with Qwen2.5-Coder-0.5B-Instruct",
)
@pytest.mark.timeout(1200)
def test_a_short_study_runs_to_its_end(tmp_path):
    settings = Settings(
        base=os.environ[PLACE],
        tuned=os.environ[PLACE],
        tuned_adapter=str(ADAPTER),
        prompts=8,
        boxes=3,
        sizes=dict.fromkeys(GROUPS, 3),
        random_circuits=1,
        only=("faithfulness", "cmap", "comparison"),
        png=False,
    )
    results = reproduce(settings, tmp_path)
    models = results["models"]
    assert all(len(model["circuit"][group]) == 3 for model in models.values() for group in GROUPS)
    # Heads late in the model, at its last token, fetch the answer.
    assert all(layer >= 10 for layer, _ in models["base"]["circuit"]["value_fetcher"])
    entries = results["cmap"]["tuned_into_base"]["entries"]
    assert {entry["group"] for entry in entries} == {*GROUPS, "whole circuit"}
    assert (tmp_path / "report.html").is_file()
