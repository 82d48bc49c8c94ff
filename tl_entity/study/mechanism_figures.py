"""Figures of what the circuit's heads do: what they carry, where it passes, what they bring."""

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tl_entity.heads import Head
from tl_entity.methods.activation_patching import UNPATCHED
from tl_entity.methods.cmap import OUTPUT, WHOLE_CIRCUIT
from tl_entity.plots.bars import Bar, add_level, grouped_bars, overlap_bars
from tl_entity.plots.circuit_diagram import Edge, Node, circuit_diagram
from tl_entity.plots.curves import Curve, Point, layer_curves, loss_scatter
from tl_entity.plots.heatmaps import share_heatmap
from tl_entity.study.figures import LETTERS, accuracy_bar, position_words
from tl_entity.study.settings import GROUPS
from tl_entity.study.store import read_number, with_circuit
from tl_entity.study.tables import labels_of
from tl_entity.tasks.boxes import BoxPrompt
from tl_entity.tasks.desiderata import DESIDERATA, MAIN_DESIDERATA

EXAMPLE = BoxPrompt(("apple", "bell", "cup"), ("E", "Q", "M"), "Q")
"""The prompt that circuits are drawn over."""

_INFORMATION_WORDS = {
    "object_value": "object value",
    "box_label_value": "label value",
    "position": "position",
}


def mechanism_figures(results: dict[str, Any]) -> dict[str, go.Figure]:
    """All figures of these experiments, by file name."""
    figures: dict[str, go.Figure] = {}
    for role, model in with_circuit(results["models"]).items():
        figures[f"{role}_circuit"] = _circuit(model)
        for heads, record in model.get("information", {}).items():
            figures[f"{role}_carries_{heads}_heads"] = _carries(model, heads, record)
        for name, draw in _FIGURES.items():
            if name in model:
                figures[f"{role}_{name}"] = draw(model)
    if results["same_circuit"] is not None:
        figures["comparison"] = _comparison(results)
    for name, record in results["cmap"].items():
        figures[f"cmap_{name}"] = _cmap(results, record)
    return figures


def group_words(group: str) -> str:
    """`A value_fetcher`; other names as they are."""
    return f"{LETTERS[group]} {group}" if group in LETTERS else group


def information_words(desideratum: str) -> str:
    """A desideratum in words."""
    return _INFORMATION_WORDS.get(desideratum, desideratum.replace("_", " "))


def main_information(model: dict[str, Any], heads: str = "own") -> dict[str, str]:
    """For each group the kind of information that its heads carry, if one stands out: its interval
    lies above those of every other kind, and above that of the run with nothing patched."""
    if "information" not in model:
        return {}
    entries = {
        (entry["group"], entry["desideratum"]): entry["interval"]
        for entry in model["information"][heads]["entries"]
        if entry["desideratum"] in MAIN_DESIDERATA
    }
    found: dict[str, str] = {}
    for group in GROUPS:
        kinds = {kind: interval for (of, kind), interval in entries.items() if of == group}
        for kind, (low, _) in kinds.items():
            # Without the unpatched run nothing says that the patch brought it.
            if (UNPATCHED, kind) not in entries:
                continue
            rivals = [entries[UNPATCHED, kind]]
            rivals += [interval for other, interval in kinds.items() if other != kind]
            if all(low > high for _, high in rivals):
                found[group] = kind
    return found


def _circuit(model: dict[str, Any]) -> go.Figure:
    words = EXAMPLE.text.replace(",", " ,").replace(".", " .").split()
    carries = main_information(model)
    label = words.index("Q")
    at = {
        "last": len(words) - 1,
        "query_label": len(words) - 1 - words[::-1].index("Q"),
        "previous_query_label": label,
    }
    nodes, edges = [], []
    for group in GROUPS:
        stage = model["discovery"][group]
        heads = tuple(Head(*head) for head in model["circuit"][group])
        nodes.append(
            Node(
                group_words(group),
                at[stage["position"]],
                heads,
                information_words(carries[group]) if group in carries else "",
            )
        )
        target = None if stage["into"] is None else group_words(stage["into"])
        edges.append(Edge(group_words(group), target, stage["receiver_input"] or "logits"))
    return circuit_diagram(words, nodes, edges, title=f"{model['label']}: the circuit")


def _carries(model: dict[str, Any], heads: str, record: dict[str, Any]) -> go.Figure:
    entries = {(entry["group"], entry["desideratum"]): entry for entry in record["entries"]}
    kinds = [kind for kind in DESIDERATA if (UNPATCHED, kind) in entries]
    rows = [group for group in (UNPATCHED, *GROUPS) if (group, kinds[0]) in entries]
    whose = "its own heads" if heads == "own" else f"the {heads} model's heads"
    return share_heatmap(
        [group_words(group) for group in rows],
        [information_words(kind) for kind in kinds],
        np.array([[entries[g, k]["accuracy"] for k in kinds] for g in rows], dtype=np.float64),
        title=f"{model['label']}: answers with the target, {whose} patched",
        name="accuracy",
    )


_REMOVED = {
    "group": "a group removed",
    "random": "random heads of the circuit removed",
}


def _completeness(model: dict[str, Any]) -> go.Figure:
    points = [
        Point(
            group_words(entry["removed"]),
            Bar(entry["model_loss"], *entry["model_loss_interval"]),
            Bar(entry["circuit_loss"], *entry["circuit_loss_interval"]),
            _REMOVED[entry["kind"]],
        )
        for entry in model["completeness"]["entries"]
        if entry["kind"] != "whole"
    ]
    return loss_scatter(
        points, title=f"{model['label']}: what circuit and model lose by the same heads"
    )


def _minimality(model: dict[str, Any]) -> go.Figure:
    entries = model["minimality"]["entries"]
    numbers = [[read_number(n) for n in (e["score"], *e["interval"])] for e in entries]
    # Even the lower end of what is infinite may be so high that nothing else would be seen.
    seen = [n for some in numbers if some[0] < math.inf for n in some if n < math.inf]
    highest = max([1.0, *seen])
    series: dict[str, dict[str, Bar]] = {group_words(entry["group"]): {} for entry in entries}
    for entry, (value, low, high) in zip(entries, numbers, strict=True):
        name = str(Head(*entry["head"])) + ("" if entry["kept"] else " (dropped)")
        # What is infinite is as high as the figure, and marked: the most needed heads of all.
        name += " ∞" if value == math.inf else " ↑" if high == math.inf else ""
        series[group_words(entry["group"])][name] = Bar(
            min(value, highest),
            min(low, highest),
            min(high, highest),
            says=f"{value:.1%} [{low:.1%}, {high:.1%}]".replace("inf%", "∞"),
        )
    figure = grouped_bars(
        series, title=f"{model['label']}: what the circuit loses with each head", axis="minimality"
    )
    figure.update_yaxes(range=None, autorange=True, tickformat=".0%", dtick=None)
    figure.update_layout(barmode="overlay")
    return figure


def _knockout(model: dict[str, Any]) -> go.Figure:
    curves = []
    for curve in model["knockout"]["curves"]:
        name = f"{position_words(curve['from'])} to {position_words(curve['to'])}"
        curves.append(Curve(name, tuple(accuracy_bar(found) for found in curve["layers"])))
        control = curve["control"]
        bars = zip(control["mean"], control["lowest"], control["highest"], strict=True)
        curves.append(
            Curve(
                f"{name.split(' to ')[0]} to random tokens, not the {name.split(' to ')[1]}",
                tuple(Bar(*bar) for bar in bars),
                faint=True,
            )
        )
    return layer_curves(
        curves,
        title=f"{model['label']}: attention knocked out from a layer up",
        whole=accuracy_bar(model["knockout"]["curves"][0]["whole"]),
        axis="first knocked-out layer",
    )


def _cmap(results: dict[str, Any], record: dict[str, Any]) -> go.Figure:
    labels = labels_of(results)
    into, source = labels[record["into_role"]], labels[record["from_role"]]
    series: dict[str, dict[str, Bar]] = {}
    for entry in record["entries"]:
        what = "head outputs" if entry["patch"] == OUTPUT else f"{entry['patch']} of the heads"
        series.setdefault(what, {})[group_words(entry["group"])] = accuracy_bar(entry)
    figure = grouped_bars(series, title=f"{into} with heads of {source} (CMAP)")
    add_level(figure, into, accuracy_bar(record["into"]))
    add_level(figure, source, accuracy_bar(record["from"]))
    order = [*map(group_words, GROUPS), WHOLE_CIRCUIT]
    figure.update_xaxes(categoryorder="array", categoryarray=order)
    return figure


def _comparison(results: dict[str, Any]) -> go.Figure:
    same = results["same_circuit"]
    base, tuned = (model["label"] for model in results["models"].values())
    parts = {group_words(name): same["groups"][name] for name in GROUPS}
    parts[WHOLE_CIRCUIT] = same["whole"]

    whole = same["whole"]
    chance = {
        name: map(read_number, (part["jaccard_by_chance"], *part["jaccard_by_chance_interval"]))
        for name, part in parts.items()
    }
    ceiling: dict[str, float] = {}
    if same.get("ceiling") is not None:
        again = same["ceiling"]
        ceiling = {group_words(n): read_number(again["groups"][n]["jaccard"]) for n in GROUPS}
        ceiling[WHOLE_CIRCUIT] = read_number(again["whole"]["jaccard"])
    return overlap_bars(
        {name: read_number(part["jaccard"]) for name, part in parts.items()},
        {name: Bar(value, low, high) for name, (value, low, high) in chance.items()},
        ceiling=ceiling,
        title=f"{base} and {tuned}: {len(whole['shared'])} heads in both circuits, "
        f"{whole['shared_by_chance']:.1f} by chance",
    )


_FIGURES = {
    "completeness": _completeness,
    "minimality": _minimality,
    "knockout": _knockout,
}
