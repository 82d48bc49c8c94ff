"""The study of docs/studies/qwen.md, in small, where its model is at hand."""

import os
from pathlib import Path

import pytest

from tl_entity.study.reproduce import reproduce
from tl_entity.study.settings import GROUPS, Settings

PLACE = "TL_ENTITY_QWEN"
ADAPTER = Path(__file__).parents[2] / "data" / "adapters" / "qwen2.5-coder-0.5b-instruct-skills"


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
