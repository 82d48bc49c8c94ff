"""The mechanisms: the fewest nodes that alone answer as a model does, and what two models share."""

from collections.abc import Mapping
from typing import Any

from tl_entity.results import read_number
from tl_entity.study.mechanism_results import CIRCUIT
from tl_entity.study.report.cells import (
    NO_VALUE,
    Table,
    agreement_text,
    frame_table,
    is_of_boxes,
    mechanism_sentence,
    ratio_text,
    share_text,
    table,
    unbroken,
)
from tl_entity.study.report.story import Values

_NODE_COLUMNS = {
    "model": "model",
    "node": "node",
    "layer": "layer",
    "role": "role",
    "strength": "strength",
    "score": "score",
}

_EDGE_COLUMNS = {
    "model": "model",
    "sender": "sender",
    "receiver": "receiver",
    "input": "input",
    "score": "score",
    "low": "low",
    "high": "high",
    "exact": "exact",
}

EDGES_SHOWN = 20
"""Edges of each model in the page's table; all are in the file."""


ROLES_SIDE_BY_SIDE = 8
"""Maps of more roles stand one below the other."""


def mechanism_sections(content: dict[str, Any], tables: Mapping[str, Any]) -> list[Values]:
    """The section on the mechanisms, if one was looked for."""
    models = {role: m for role, m in content["models"].items() if "mechanism" in m}
    if not models:
        return []
    found = {role: m for role, m in models.items() if "nodes" in m["mechanism"]}
    values: dict[str, Any] = {
        "sentences": [unbroken(mechanism_sentence(model)) for model in models.values()],
        "found": [{"role": role, "label": model["label"]} for role, model in found.items()],
        "side_by_side": all(_n_roles(m["mechanism"]) <= ROLES_SIDE_BY_SIDE for m in found.values()),
        "table": _alone(content, found) if found else None,
        "of": next((m["mechanism"]["prompts"] for m in found.values()), None),
        "ablation": next((m["mechanism"]["ablation"] for m in found.values()), None),
        "knowing": sorted({r for m in found.values() for r in m["mechanism"]["knowing"]}),
        "same": _same(content),
        "of_circuit": _of_circuit(content, found),
        "nodes": frame_table(tables["mechanism_nodes"], _NODE_COLUMNS) if found else None,
        "edges": _edges(tables),
        "with_edges": [role for role, m in found.items() if m["mechanism"]["edges"]],
        "no_edges": [
            (m["label"], m["mechanism"]["no_edges"])
            for m in found.values()
            if m["mechanism"]["no_edges"]
        ],
    }
    return [("mechanism", "The mechanism", values)]


def _of_circuit(content: dict[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    """What the figure's caption says of the circuit, if it is there."""
    if not any(CIRCUIT in model["mechanism"]["beside"] for model in models.values()):
        return ""
    said = " Beside them the circuit of groups"
    # Of the paper's positions two depend on what is asked.
    return f"{said}, which is told where to look." if is_of_boxes(content) else f"{said}."


def _n_roles(found: Mapping[str, Any]) -> int:
    return len({role for _, _, role in found["nodes"]})


def _alone(content: dict[str, Any], models: Mapping[str, Mapping[str, Any]]) -> Table:
    labels = {role: model["label"] for role, model in content["models"].items()}
    rows: list[list[str]] = []
    for model in models.values():
        found, name = model["mechanism"], model["label"]
        whole = [name, "everything", str(found["n_all"]), share_text(found["alone"]["model"])]
        rows.append([*whole, "", "", ""])
        rows.append([name, "its mechanism", *_cells(found["alone"])])
        for role, point in found["beside"].items():
            what = "its circuit of groups" if role == CIRCUIT else f"mechanism of {labels[role]}"
            rows.append([name, what, *_cells(point)])
        if found["random"]:
            rows.append([name, *_random(found)])
    header = ["model", "what is left", "nodes", "accuracy", "faithfulness", "agreement"]
    return table([*header, "KL"], rows)


def _cells(point: Mapping[str, Any]) -> list[str]:
    low, high = (read_number(end) for end in point["kl_interval"])
    return [
        str(point["n_nodes"]),
        share_text(point["accuracy"]),
        ratio_text(point),
        agreement_text(point),
        f"{point['kl']:.3f} [{low:.3f}, {high:.3f}]",
    ]


def _random(found: Mapping[str, Any]) -> list[str]:
    def span(values: list[float]) -> str:
        return f"{min(values):.3f} to {max(values):.3f}"

    drawn = found["random"]
    shares = [read_number(point["faithfulness"]) for point in drawn]
    return [
        f"{len(drawn)} draws of random nodes, of the same layers and roles",
        str(drawn[0]["n_nodes"]),
        span([point["accuracy"]["accuracy"] for point in drawn]),
        span(shares),
        span([point["agreement"] for point in drawn]),
        span([point["kl"] for point in drawn]),
    ]


def _same(content: dict[str, Any]) -> dict[str, Any] | None:
    same = content["same_mechanism"]
    if same is None:
        return None
    nodes, edges = same["nodes"], same["edges"]
    base, tuned = (model["label"] for model in content["models"].values())
    rows = [_overlap("nodes", nodes, nodes), _overlap("nodes", nodes, nodes["within_roles"], True)]
    for role, again in same["ceiling"].items():
        rows.append(_overlap(f"nodes, {role} found twice", again, again))
    rows += [] if edges is None else [_overlap("strongest edges", edges, edges)]
    header = ["what", f"only {base}", "in both", f"only {tuned}", "in both by chance", "p"]
    return {
        "base": base,
        "tuned": tuned,
        "shared": len(nodes["shared"]),
        "lost": len(nodes["lost"]),
        "gained": len(nodes["gained"]),
        "chance": f"{nodes['within_roles']['shared_by_chance']:.1f}",
        "p": f"{nodes['within_roles']['p_value']:.2g}",
        "found_again": bool(same["ceiling"]),
        "table": table([*header, "Jaccard index"], rows),
    }


def _overlap(
    what: str, found: Mapping[str, Any], chance: Mapping[str, Any], within: bool = False
) -> list[str]:
    low, high = chance["chance_range"]
    jaccard = found["jaccard"]
    return [
        f"{what}, chance within layers and roles" if within else f"{what}, chance within layers",
        str(len(found["lost"])),
        str(len(found["shared"])),
        str(len(found["gained"])),
        f"{chance['shared_by_chance']:.1f} [{low}, {high}]",
        f"{chance['p_value']:.2g}",
        NO_VALUE if jaccard is None else f"{jaccard:.2f}",
    ]


def _edges(tables: Mapping[str, Any]) -> Table | None:
    if "mechanism_edges" not in tables:
        return None
    frame = tables["mechanism_edges"]
    return frame_table(frame.groupby("model", sort=False).head(EDGES_SHOWN), _EDGE_COLUMNS)
