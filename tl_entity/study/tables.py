"""Every experiment as a table: data frames made from the content of results.json."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tl_entity.heads import Head
from tl_entity.study.settings import GROUPS
from tl_entity.study.store import with_circuit

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

CONTROL = "control_into_base"
"""CMAP with the heads of the control, among the results."""

AS_PUBLISHED = "tuned_into_base_as_published"
"""CMAP with the heads that the paper patches, among the results."""


def tables_of(results: Mapping[str, Any]) -> dict[str, "pd.DataFrame"]:
    """All tables by file name; a table that would be empty is left out."""
    import pandas as pd

    models = results["models"]
    rows: dict[str, list[Row]] = {
        "accuracy": [
            {"model": model["label"], "boxes": int(boxes), **_share(found)}
            for model in models.values()
            for boxes, found in sorted(model["accuracy"].items(), key=lambda item: int(item[0]))
        ],
        "circuits": [
            row for found in with_circuit(models).values() for row in _circuit_rows(found)
        ],
        **{
            name: [row for model in models.values() if key in model for row in rows_of(model)]
            for name, (key, rows_of) in _OF_A_MODEL.items()
        },
        "cmap": [
            row
            for name, record in results["cmap"].items()
            if name not in (CONTROL, AS_PUBLISHED)
            for row in _cmap_rows(labels_of(results), record)
        ],
        **{
            f"cmap_{name}": _cmap_rows(labels_of(results), results["cmap"][name])
            for name in (CONTROL, AS_PUBLISHED)
            if name in results["cmap"]
        },
        "comparison": _comparison_rows(results["same_circuit"]),
        "verdict": [
            {key: finding[key] for key in ("question", "answer", "text")}
            for finding in results["verdict"]
        ],
    }
    return {name: pd.DataFrame(some) for name, some in rows.items() if some}


def labels_of(results: Mapping[str, Any]) -> dict[str, str]:
    """What each model is called, by its role; the control, too, if there is one."""
    labels = {role: model["label"] for role, model in results["models"].items()}
    control = results["control"]
    return labels if control is None else labels | {"control": control["label"]}


def to_markdown(table: "pd.DataFrame") -> str:
    """A Markdown table; numbers to three places."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:.3f}"
        return "" if value is None else str(value).replace("|", "\\|")

    lines = [
        "| " + " | ".join(str(column).replace("_", " ") for column in table.columns) + " |",
        "|" + "---|" * len(table.columns),
    ]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def heads_text(heads: list[list[int]]) -> str:
    """`L1H0 L2H3`."""
    return " ".join(str(Head(*head)) for head in heads)


def _share(found: Mapping[str, Any]) -> Row:
    low, high = found["interval"]
    return {
        "correct": found["correct"],
        "prompts": found["prompts"],
        "accuracy": found["accuracy"],
        "low": low,
        "high": high,
    }


def _circuit_rows(model: Mapping[str, Any]) -> list[Row]:
    return [
        {
            "model": model["label"],
            "group": group,
            "position": model["discovery"][group]["position"],
            "head": str(Head(*head)),
            "score": model["discovery"][group]["scores"][head[0]][head[1]],
        }
        for group in GROUPS
        for head in model["circuit"][group]
    ]


def _faithfulness_rows(model: Mapping[str, Any]) -> list[Row]:
    found = model["faithfulness"]
    rows = [
        {
            "model": model["label"],
            "ablation": "none",
            "kept": "everything",
            **_share(found["model"]),
        }
    ]
    for ablation, kept, score in scores_by_ablation(found):
        low, high = score["interval"]
        rows.append(
            {
                "model": model["label"],
                "ablation": ablation,
                "kept": kept,
                **_share(score["circuit"]),
                "faithfulness": score["faithfulness"],
                "faithfulness_low": low,
                "faithfulness_high": high,
            }
        )
    return rows


def scores_by_ablation(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """What is left of a model, under the ablation that was asked for and the paper's: the ablation,
    what is kept, and its faithfulness."""
    return [
        (ablation, kept, score)
        for ablation, part in {found["ablation"]: found, "index": found["by_index"]}.items()
        for kept, score in {
            "its circuit": part,
            "every head at its positions": part["every_head"],
            **{f"circuit of {role}": score for role, score in part["other_circuits"].items()},
        }.items()
    ]


def _mask_rows(model: Mapping[str, Any]) -> list[Row]:
    return [
        {
            "model": model["label"],
            "group": mask["group"],
            "desideratum": mask["desideratum"],
            "sparsity": mask["sparsity"],
            "seed": mask["seed"],
            "chosen": mask["chosen"],
            "candidates": len(mask["candidates"]),
            "selected": heads_text(mask["selected"]),
            "validation_accuracy": mask["validation_accuracy"],
            **_share(mask["test"]),
            "with_all_candidates": mask["test_of_all"]["accuracy"],
            "with_none": mask["test_of_none"]["accuracy"],
        }
        for mask in model["dcm"]["masks"]
    ]


def _carries_rows(model: Mapping[str, Any]) -> list[Row]:
    return [
        {
            "model": model["label"],
            "heads_of": heads,
            "group": entry["group"],
            "desideratum": entry["desideratum"],
            "heads": heads_text(entry["heads"]),
            **_share(entry),
            "draws": len(entry["draws"]),
        }
        for heads, record in model["information"].items()
        for entry in record["entries"]
    ]


def _completeness_rows(model: Mapping[str, Any]) -> list[Row]:
    return [
        {
            "model": model["label"],
            "removed": entry["removed"],
            "heads": "; ".join(f"{at}: {heads_text(h)}" for at, h in entry["heads"].items()),
            "circuit_without": entry["circuit"]["accuracy"],
            "circuit_loses": entry["circuit_loss"],
            "model_without": entry["model"]["accuracy"],
            "model_loses": entry["model_loss"],
            "difference": entry["difference"],
            "low": entry["difference_interval"][0],
            "high": entry["difference_interval"][1],
        }
        for entry in model["completeness"]["entries"]
    ]


def _minimality_rows(model: Mapping[str, Any]) -> list[Row]:
    found = model["minimality"]
    return [
        {
            "model": model["label"],
            "ablation": part["ablation"],
            "group": entry["group"],
            "head": str(Head(*entry["head"])),
            "removed_first": heads_text(entry["removed"]),
            "accuracy_then": entry["without_removed"]["accuracy"],
            "and_without_the_head": entry["without_head"]["accuracy"],
            "minimality": entry["score"],
            "low": entry["interval"][0],
            "high": entry["interval"][1],
            "kept": entry["kept"],
        }
        for part in {found["ablation"]: found, "index": found["by_index"]}.values()
        for entry in part["entries"]
    ]


def _knockout_rows(model: Mapping[str, Any]) -> list[Row]:
    return [
        {
            "model": model["label"],
            "from": curve["from"],
            "to": curve["to"],
            "first_layer": layer,
            **_share(found),
            "control": curve["control"]["mean"][layer],
        }
        for curve in model["knockout"]["curves"]
        for layer, found in enumerate(curve["layers"])
    ]


def _cmap_rows(labels: Mapping[str, str], record: Mapping[str, Any]) -> list[Row]:
    into, source = labels[record["into_role"]], labels[record["from_role"]]
    return [
        {
            "into": into,
            "from": source,
            "patch": entry["patch"],
            "group": entry["group"],
            **_share(entry),
            "gain": entry["gain"],
            "recovered": entry["recovered"],
            "recovered_low": entry["recovered_interval"][0],
            "recovered_high": entry["recovered_interval"][1],
        }
        for entry in record["entries"]
    ]


def _comparison_rows(same: Mapping[str, Any] | None) -> list[Row]:
    if same is None:
        return []
    parts = {**same["groups"], "whole circuit": same["whole"]}
    return [
        {
            "group": name,
            "base": found["first"],
            "tuned": found["second"],
            "shared": len(found["shared"]),
            "shared_by_chance": found["shared_by_chance"],
            "p_value": found["p_value"],
            "precision": found["precision"],
            "recall": found["recall"],
            "jaccard": found["jaccard"],
            "jaccard_by_chance": found["jaccard_by_chance"],
            "jaccard_by_chance_low": found["jaccard_by_chance_interval"][0],
            "jaccard_by_chance_high": found["jaccard_by_chance_interval"][1],
            "rank_correlation": found["rank_correlation"],
            **_ceiling_columns(same, name),
        }
        for name, found in parts.items()
    ]


def _ceiling_columns(same: Mapping[str, Any], name: str) -> Row:
    """What the base's circuit shares with itself, found again; nothing if it was not."""
    if same.get("ceiling") is None:
        return {}
    again = {**same["ceiling"]["groups"], "whole circuit": same["ceiling"]["whole"]}[name]
    return {"ceiling_shared": len(again["shared"]), "ceiling_jaccard": again["jaccard"]}


_OF_A_MODEL: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[Row]]]] = {
    "faithfulness": ("faithfulness", _faithfulness_rows),
    "masks": ("dcm", _mask_rows),
    "carries": ("information", _carries_rows),
    "completeness": ("completeness", _completeness_rows),
    "minimality": ("minimality", _minimality_rows),
    "knockout": ("knockout", _knockout_rows),
}
"""Tables of single models: the experiment that each is made from, and how."""
