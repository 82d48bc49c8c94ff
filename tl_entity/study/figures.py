"""From the content of results.json to figures; nothing is computed here."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tl_entity.heads import Head
from tl_entity.plots.bars import Bar, accuracy_bars, grouped_bars
from tl_entity.plots.heatmaps import (
    HeadMap,
    attention_heatmap,
    head_heatmap,
    shared_limits,
    stage_heatmaps,
)
from tl_entity.study.settings import GROUPS
from tl_entity.study.store import with_circuit

LETTERS = dict(zip(GROUPS, "ABCD", strict=True))
"""The paper's letters for the groups."""

POSITION_WORDS = {
    "last": "last token",
    "query_label": "query label",
    "previous_query_label": "previous query label",
    "correct_object": "correct object",
    "first_token": "first token",
    "elsewhere": "elsewhere",
}


def position_words(name: str) -> str:
    """A named position in words."""
    return POSITION_WORDS.get(name, name.replace("_", " "))


_INPUT_WORDS = {"q": "queries", "k": "keys", "v": "values"}


def figures_of(results: dict[str, Any]) -> dict[str, go.Figure]:
    """All figures by name, in the order in which they are shown."""
    models = results["models"]
    boxes = results["settings"]["boxes"]
    figures = {
        "accuracy": accuracy_bars(
            {
                model["label"]: {int(n): accuracy_bar(at) for n, at in sorted_counts(model)}
                for model in models.values()
            },
            title="Accuracy by number of boxes",
        )
    }
    models = with_circuit(models)
    limits = stage_limits(results) if models else {}
    for role, model in models.items():
        figures[f"{role}_heatmaps"] = stage_heatmaps(
            [head_map(model, group) for group in GROUPS],
            title=f"{model['label']}: how much the answer needs each head (path patching)",
            limits=[limits[group] for group in GROUPS],
        )
    if models and all("faithfulness" in model for model in models.values()):
        figures["faithfulness"] = _faithfulness(models, boxes)
    for role, model in models.items():
        if "attention" in model:
            figures[f"{role}_attention"] = _attention(model)
    return figures


def single_heatmaps(results: dict[str, Any], role: str) -> dict[str, go.Figure]:
    """One figure a stage, without title, for a page that says what each shows."""
    limits = stage_limits(results)
    model = results["models"][role]
    return {
        group: head_heatmap(replace(head_map(model, group), title=""), limit=limits[group])
        for group in GROUPS
    }


def stage_limits(results: dict[str, Any]) -> dict[str, float]:
    """Colour limits by stage, the same for all models."""
    models = with_circuit(results["models"]).values()
    stages = [[head_map(model, group) for model in models] for group in GROUPS]
    return dict(zip(GROUPS, shared_limits(stages), strict=True))


def head_map(model: dict[str, Any], group: str) -> HeadMap:
    """The heatmap of one stage."""
    stage = model["discovery"][group]
    known = (model["planted"] or {"groups": {}})["groups"].get(group, {"planted": []})["planted"]
    return HeadMap(
        title=stage_title(stage, group),
        scores=np.array(stage["scores"], dtype=np.float64),
        intervals=np.array(stage["intervals"], dtype=np.float64),
        chosen=tuple(Head(*head) for head in model["circuit"][group]),
        known=tuple(Head(*head) for head in known),
        top_layer=stage["top_layer"],
    )


def stage_title(stage: dict[str, Any], group: str) -> str:
    """`B pos_transmitter: into the queries of A, last token`."""
    if stage["into"] is None:
        into = "the logits"
    else:
        into = f"the {_INPUT_WORDS[stage['receiver_input']]} of {LETTERS[stage['into']]}"
    return f"{LETTERS[group]} {group}: into {into}, {position_words(stage['position'])}"


def sorted_counts(model: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Accuracies by number of boxes, the fewest first."""
    return sorted(model["accuracy"].items(), key=lambda item: int(item[0]))


def accuracy_bar(found: dict[str, Any]) -> Bar:
    """An accuracy with its interval."""
    low, high = found["interval"]
    return Bar(found["accuracy"], low, high)


def _faithfulness(models: dict[str, Any], boxes: int) -> go.Figure:
    series: dict[str, dict[str, Bar]] = {}
    for role, model in models.items():
        found = model["faithfulness"]
        bars = {
            "whole model": accuracy_bar(found["model"]),
            "its circuit alone": accuracy_bar(found["circuit"]),
            "every head at its positions": accuracy_bar(found["every_head"]["circuit"]),
        }
        for other, score in found["other_circuits"].items():
            bars[f"{other} model's circuit"] = accuracy_bar(score["circuit"])
        control = found["random"]
        if control["accuracies"]:
            bars["random circuits, mean and range"] = Bar(
                control["mean"],
                control["lowest"],
                control["highest"],
                tuple(control["accuracies"]),
            )
        name = model["label"]
        series[name if name == role or len(models) == 1 else f"{name} ({role})"] = bars
    # Every series in the same order of categories, though not every one has all.
    order = list(dict.fromkeys(category for bars in series.values() for category in bars))
    order.sort(key=lambda category: category.startswith("random"))
    figure = grouped_bars(series, title=f"What the circuit alone can do, {boxes} boxes")
    figure.update_xaxes(categoryorder="array", categoryarray=order)
    return figure


def _attention(model: dict[str, Any]) -> go.Figure:
    columns: list[str] = list(
        dict.fromkeys(name for group in model["attention"].values() for name in group["to"])
    )
    # The rest comes last, whichever group it was first seen in.
    columns.sort(key=lambda name: list(POSITION_WORDS).index(name) if name in POSITION_WORDS else 0)
    rows, weights = [], []
    for group in GROUPS:
        seen = model["attention"][group]
        for (layer, head), row in zip(seen["heads"], seen["weights"], strict=True):
            rows.append(f"{LETTERS[group]} {Head(layer, head)}")
            by_name = dict(zip(seen["to"], row, strict=True))
            weights.append([by_name.get(name, math.nan) for name in columns])
    return attention_heatmap(
        rows,
        [position_words(name) for name in columns],
        np.array(weights, dtype=np.float64).reshape(len(rows), len(columns)),
        title=f"{model['label']}: what the circuit's heads attend to, each from its own position",
    )
