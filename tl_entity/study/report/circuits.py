"""The circuits: how they were found, what they do alone, what they share, what they look at."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tl_entity.heads import Head
from tl_entity.hooks.ablations import LEAVES
from tl_entity.methods.overlap import NO_OVERLAP_INTERVAL
from tl_entity.studies.design import Words
from tl_entity.study.report.cells import (
    NO_VALUE,
    Table,
    group_cell,
    heads_text,
    is_of_boxes,
    number_text,
    ratio_text,
    share_text,
    signed,
    size,
    table,
    words_of,
)
from tl_entity.study.report.story import Values
from tl_entity.study.tables import by_ablation, scores_by_ablation


def circuit_sections(content: dict[str, Any]) -> list[Values]:
    """Sections on the models in which a circuit was looked for, of which there is at least one."""
    models = content["models"]

    def all_have(experiment: str) -> bool:
        return all(experiment in model for model in models.values())

    found = [("circuits", "Circuits", _circuits(content))]
    if all_have("faithfulness"):
        found.append(("faithfulness", "Faithfulness", _faithfulness(content)))
    if content["same_circuit"] is not None:
        found.append(("same", "The same heads?", _same(content)))
    if all_have("attention"):
        found.append(("attention", "Attention", _attention(content)))
    if any(model["planted"] for model in models.values()):
        found.append(("planted", "Planted heads", {"tables": _planted(content)}))
    return found


def _circuits(content: dict[str, Any]) -> dict[str, Any]:
    models, words, groups = content["models"], words_of(content), content["task"]["groups"]
    first = next(iter(models))
    return {
        "planted": any(model["planted"] for model in models.values()),
        "metric": content["task"]["metric"],
        "of_boxes": is_of_boxes(content),
        "models": [
            {
                "label": model["label"],
                "pairs": model["pairs"],
                "maps": [
                    {
                        "title": words.stage(model["discovery"][group], group),
                        "figure": f"{role}-{group}",
                    }
                    for group in groups
                ],
                "table": _stages(model, groups, words),
                # The first one's is at the top of the page.
                "figure": f"{role}_circuit",
                "is_above": role == first,
            }
            for role, model in models.items()
        ],
    }


def _stages(model: dict[str, Any], groups: Sequence[str], words: Words) -> Table:
    rows: list[list[str]] = []
    for group in groups:
        stage, heads = model["discovery"][group], model["circuit"][group]
        into = "logits"
        if "edges" in stage:
            into = words.into(stage)
        elif stage["receivers"] is not None:
            into = Markup("{} of {}").format(
                stage["receiver_input"], heads_text(stage["receivers"])
            )
        at = words.position(stage["position"])
        rows.append([group_cell(group, words), at, into, heads_text(heads), _span(stage, heads)])
    header = ["group", "at", "patched into", "heads chosen, the most important first", "scores"]
    return table(header, rows)


def _span(stage: dict[str, Any], heads: Sequence[Sequence[int]]) -> str:
    scores = [stage["scores"][layer][head] for layer, head in heads]
    if not scores:
        return ""
    text = f"{min(scores):+.3f}" + (f" to {max(scores):+.3f}" if len(scores) > 1 else "")
    return signed(text.replace(" ", "\u00a0"))


def _faithfulness(content: dict[str, Any]) -> dict[str, Any]:
    rows: list[list[str]] = []
    found: dict[str, Any] = {}
    for model in content["models"].values():
        found, name = model["faithfulness"], model["label"]
        rows.append([name, "none", "whole model", share_text(found["model"]), ""])
        for ablation, kept, score in scores_by_ablation(found):
            what = f"{kept} ({size(model)} heads)" if kept == "its circuit" else kept
            rows.append([name, ablation, what, share_text(score["circuit"]), ratio_text(score)])
        for ablation, part in by_ablation(found).items():
            if part["random"]["accuracies"]:
                rows.append([name, ablation, *_random_cells(part)])
    ablation = content["settings"]["ablation"]
    return {
        "prompts": content["settings"]["prompts"],
        "ablation": ablation,
        "of_boxes": is_of_boxes(content),
        "leaves": {kind: left for kind, left in LEAVES.items() if kind in by_ablation(found)},
        "table": table(["model", "ablation", "what is left", "accuracy", "faithfulness"], rows),
    }


def _random_cells(found: Mapping[str, Any]) -> list[str]:
    control, whole = found["random"], found["model"]["accuracy"]
    return [
        f"{len(control['accuracies'])} random circuits of these sizes",
        f"{control['mean']:.3f} (from {control['lowest']:.3f} to {control['highest']:.3f})",
        f"{control['mean'] / whole:.3f}" if whole else NO_VALUE,
    ]


def _same(content: dict[str, Any]) -> dict[str, Any]:
    same, names = content["same_circuit"], [m["label"] for m in content["models"].values()]
    groups, words = content["task"]["groups"], words_of(content)
    parts = {**{group: same["groups"][group] for group in groups}, "whole circuit": same["whole"]}
    ceiling = same.get("ceiling")
    again = {} if ceiling is None else {**ceiling["groups"], "whole circuit": ceiling["whole"]}
    measures = ("precision", "recall", "jaccard", "rank_correlation")
    rows = [
        [
            group_cell(name, words),
            heads_text(found["shared"]),
            heads_text(found["only_first"]),
            heads_text(found["only_second"]),
            f"{found['shared_by_chance']:.2f}",
            f"{found['p_value']:.2g}",
            *(number_text(found[measure]) for measure in measures),
            *([number_text(again[name]["jaccard"])] if again else []),
        ]
        for name, found in parts.items()
    ]
    header = ["group", "in both", f"only {names[0]}", f"only {names[1]}", "by chance", "p"]
    header += ["precision", "recall", "Jaccard index", "rank correlation"]
    header += ["Jaccard index, base found twice"] if again else []
    over_all = same["whole"].get("shared_by_chance_over_all_layers")
    return {
        "no_interval": NO_OVERLAP_INTERVAL,
        "found_again": bool(again),
        "over_all_layers": None if over_all is None else f"{over_all:.2f}",
        "table": table(header, rows),
    }


def _attention(content: dict[str, Any]) -> dict[str, Any]:
    header = ["group", "head", "looks from", "mostly to", "weight", "tokens back", "in prompts"]
    return {
        "models": [
            {"figure": f"{role}_attention", "table": table(header, _looks(model, content))}
            for role, model in content["models"].items()
        ]
    }


def _looks(model: dict[str, Any], content: dict[str, Any]) -> list[list[str]]:
    words = words_of(content)
    rows: list[list[str]] = []
    for group in content["task"]["groups"]:
        seen = model["attention"][group]
        for index, head in enumerate(seen["heads"]):
            weights = seen["weights"][index]
            best = max(range(len(weights)), key=weights.__getitem__)
            rows.append(
                [
                    group_cell(group, words),
                    str(Head(*head)),
                    words.position(seen["from"]),
                    words.position(seen["to"][best]),
                    f"{weights[best]:.2f}",
                    f"{seen['common_offset'][index]}",
                    f"{seen['offset_share'][index]:.0%}",
                ]
            )
    return rows


def _planted(content: dict[str, Any]) -> list[Table]:
    header = ["group", "planted", "found", "missed", "chosen, not planted"]
    words, tables = words_of(content), list[Table]()
    for model in content["models"].values():
        known = model["planted"]
        if not known:
            continue
        rows = [
            [
                group_cell(group, words),
                *(heads_text(known["groups"][group][kind]) for kind in _KINDS),
            ]
            for group in content["task"]["groups"]
        ]
        caption = (
            f"{model['label']}: {known['found']} of {known['planted']} planted heads found, among "
            f"{known['chosen']} chosen."
        )
        tables.append(table(header, rows, caption))
    return tables


_KINDS = ("planted", "found", "missed", "not_planted")
