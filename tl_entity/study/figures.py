"""The figures of a study: the results' own, with its names for groups and positions."""

import math
from dataclasses import asdict

import numpy as np
import plotly.graph_objects as go

from tl_entity.methods.circuits import Evaluation
from tl_entity.plots.bars import Bar, accuracy_bars, grouped_bars
from tl_entity.plots.heatmaps import attention_heatmap, head_heatmap, shared_limits
from tl_entity.studies.design import Words
from tl_entity.studies.entity_tracking import LETTERS as LETTERS
from tl_entity.studies.entity_tracking import NAME
from tl_entity.studies.entity_tracking import POSITION_WORDS as POSITION_WORDS
from tl_entity.study.experiment_results import AccuracyByBoxes, CircuitAttention
from tl_entity.study.results import ModelFindings, Study

REST = ("first_token", "elsewhere")
"""Columns of attention that stand last."""


def figures_of(study: Study) -> dict[str, go.Figure]:
    """All figures by name, in the order in which they are shown."""
    words = study.task.words
    figures = {"accuracy": _accuracy(study)}
    models = study.with_circuit
    limits = stage_limits(study)
    for role, model in models.items():
        if model.discovery is not None:
            figures[f"{role}_heatmaps"] = model.discovery.plot(
                known=model.planted,
                title=f"{model.label}: how much the answer needs each head (path patching)",
                panel_titles={
                    s.group: words.stage(asdict(s), s.group) for s in model.discovery.stages
                },
                limits=limits,
            )
    if models and all(model.faithfulness is not None for model in models.values()):
        is_paper = study.task.name == NAME
        what = f"{study.settings.boxes} boxes" if is_paper else study.task.name
        figures["faithfulness"] = _faithfulness(models, what)
    for role, model in models.items():
        if model.attention is not None:
            figures[f"{role}_attention"] = _attention(model.label, model.attention, words)
    return figures


def single_heatmaps(study: Study, role: str) -> dict[str, go.Figure]:
    """One figure a stage, without title, for a page that says what each shows."""
    model, limits = study.models[role], stage_limits(study)
    if model.discovery is None:
        return {}
    return {
        group: head_heatmap(
            model.discovery.panel(group, known=model.planted, title=""), limit=limits[group]
        )
        for group in model.discovery.scores
    }


def stage_limits(study: Study) -> dict[str, float]:
    """Colour limits by stage, the same for all models."""
    found = [model.discovery for model in study.models.values() if model.discovery is not None]
    if not found:
        return {}
    groups = tuple(found[0].scores)
    stages = [[discovery.panel(group) for discovery in found] for group in groups]
    return dict(zip(groups, shared_limits(stages), strict=True))


def accuracy_bar(found: Evaluation) -> Bar:
    """An accuracy with its interval."""
    return Bar(found.accuracy, *found.interval)


def _accuracy(study: Study) -> go.Figure:
    by_size: dict[str, dict[int, Bar]] = {}
    on_task: dict[str, dict[str, Bar]] = {}
    for model in study.models.values():
        if isinstance(model.accuracy, AccuracyByBoxes):
            sizes = model.accuracy.evaluations
            by_size[model.label] = {n: accuracy_bar(found) for n, found in sizes.items()}
        else:
            rights = model.accuracy.evaluations
            on_task[model.label] = {what: accuracy_bar(found) for what, found in rights.items()}
    if by_size:
        return accuracy_bars(by_size, title="Accuracy by number of boxes")
    return grouped_bars(on_task, title=f"Accuracy: {study.task.name}")


def _faithfulness(models: dict[str, ModelFindings], what: str) -> go.Figure:
    series: dict[str, dict[str, Bar]] = {}
    for role, model in models.items():
        if model.faithfulness is None:
            continue
        alone = model.faithfulness.asked
        bars = {
            "whole model": accuracy_bar(alone.circuit.of_model),
            "its circuit alone": accuracy_bar(alone.circuit.of_circuit),
            "every head at its positions": accuracy_bar(alone.every_head.of_circuit),
        }
        for other, found in alone.others.items():
            bars[f"{other} model's circuit"] = accuracy_bar(found.of_circuit)
        drawn = alone.accuracies
        if drawn:
            mean = sum(drawn) / len(drawn)
            bars["random circuits, mean and range"] = Bar(mean, min(drawn), max(drawn), drawn)
        name = model.label
        series[name if name == role or len(models) == 1 else f"{name} ({role})"] = bars
    # Every series in the same order of categories, though not every one has all.
    order = list(dict.fromkeys(category for bars in series.values() for category in bars))
    order.sort(key=lambda category: category.startswith("random"))
    figure = grouped_bars(series, title=f"What the circuit alone can do, {what}")
    figure.update_xaxes(categoryorder="array", categoryarray=order)
    return figure


def _attention(label: str, attention: CircuitAttention, words: Words) -> go.Figure:
    seen = attention.groups
    columns = list(dict.fromkeys(name for group in seen.values() for name in group.names))
    # The rest comes last, whichever group it was first seen in.
    order = [*words.positions, *REST]
    columns.sort(key=lambda name: order.index(name) if name in order else 0)
    rows, weights = [], []
    for group in seen:
        for head, row in zip(seen[group].heads, seen[group].weights.tolist(), strict=True):
            rows.append(f"{words.letters.get(group, group)} {head}")
            by_name = dict(zip(seen[group].names, row, strict=True))
            weights.append([by_name.get(name, math.nan) for name in columns])
    return attention_heatmap(
        rows,
        [words.position(name) for name in columns],
        np.array(weights, dtype=np.float64).reshape(len(rows), len(columns)),
        title=f"{label}: what the circuit's heads attend to, each from its own position",
    )
