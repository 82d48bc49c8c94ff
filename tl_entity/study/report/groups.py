"""What the groups carry, what the circuit loses, where information passes, what is brought from the
other model."""

from collections.abc import Mapping
from typing import Any

from tl_entity.studies.entity_tracking import (
    GROUPS,
    NAME,
    PUBLISHED_CMAP,
    PUBLISHED_CMAP_SIZES,
    PUBLISHED_KNOCKOUT,
    WORDS,
)
from tl_entity.study.report.cells import Table, frame_table, sizes_text, table
from tl_entity.study.report.story import Values
from tl_entity.study.tables import AS_PUBLISHED, CONTROL
from tl_entity.tasks.desiderata import DESIDERATA

_MASK_COLUMNS = {
    "model": "model",
    "group": "group",
    "desideratum": "pairs",
    "candidates": "candidates",
    "selected": "selected",
    "accuracy": "test accuracy",
    "with_all_candidates": "all candidates patched",
    "with_none": "none patched",
}
_SEVERAL_MASKS = {"sparsity": "price of a head", "seed": "seed", "chosen": "patched"}

_COMPLETENESS_COLUMNS = {
    "model": "model",
    "removed": "K",
    "circuit_without": "circuit without K",
    "circuit_loses": "circuit loses",
    "model_without": "model without K",
    "model_loses": "model loses",
    "difference": "difference",
    "low": "low",
    "high": "high",
}

_MINIMALITY_COLUMNS = {
    "model": "model",
    "ablation": "ablation",
    "group": "group",
    "head": "head",
    "removed_first": "removed first",
    "accuracy_then": "accuracy then",
    "and_without_the_head": "and without the head",
    "minimality": "minimality",
    "low": "low",
    "high": "high",
    "kept": "kept",
}

_KNOCKOUT_COLUMNS = {
    "model": "model",
    "from": "from",
    "to": "to",
    "first_layer": "first layer",
    "accuracy": "accuracy",
    "low": "low",
    "high": "high",
    "control": "random tokens",
}

_CMAP_COLUMNS = {
    "into": "model",
    "from": "heads of",
    "group": "group",
    "patch": "patched",
    "accuracy": "accuracy",
    "low": "low",
    "high": "high",
    "recovered": "share of the difference",
    "recovered_low": "low",
    "recovered_high": "high",
}


def group_sections(content: dict[str, Any], tables: Mapping[str, Any]) -> list[Values]:
    """Sections on those of these experiments that were done."""
    roles, models = list(content["models"]), content["models"].values()
    made, cmaps = next(iter(models)), content["cmap"]
    sections: list[Values] = []

    def add(name: str, heading: str, **values: Any) -> None:
        sections.append((name, heading, {"roles": roles, **values}))

    if "information" in made:
        add("information", "What the groups carry", **_information(content, tables))
    if "completeness" in made:
        shown = frame_table(tables["completeness"], _COMPLETENESS_COLUMNS)
        add("completeness", "Completeness", table=shown)
    if "minimality" in made:
        add("minimality", "Minimality", **_minimality(content, tables))
    if "knockout" in made:
        shown = frame_table(tables["knockout"], _KNOCKOUT_COLUMNS)
        known = PUBLISHED_KNOCKOUT if content["task"]["name"] == NAME else {}
        published = {f"{accuracy:.2f}": layer for layer, accuracy in known.items()}
        add("knockout", "Where information passes", table=shown, published=published)
    if cmaps:
        shown = frame_table(tables["cmap"], _CMAP_COLUMNS)
        both = [name for name in cmaps if name not in (CONTROL, AS_PUBLISHED)]
        add("cmap", "Heads of the other model", names=both, table=shown)
    if AS_PUBLISHED in cmaps:
        values = _as_published(content, tables)
        add("published_cmap", "Heads of the fine-tune's own circuit", **values)
    if CONTROL in cmaps:
        about = (*content["models"].values(), content["control"])
        base, tuned, control = (each["label"] for each in about)
        shown = frame_table(tables[f"cmap_{CONTROL}"], _CMAP_COLUMNS)
        values = {"base": base, "tuned": tuned, "control": control, "table": shown}
        add("control", "Heads of a control model", figure=f"cmap_{CONTROL}", **values)
    return sections


def _information(content: dict[str, Any], tables: Any) -> dict[str, Any]:
    models = content["models"]
    columns = [[WORDS.kind(kind.name), kind.says] for kind in DESIDERATA.values()]
    left_out = {
        WORDS.kind(name): reason
        for model in models.values()
        for name, reason in model["dcm"]["left_out"].items()
    }
    masks: Table | None = None
    several = False
    if "masks" in tables:
        frame, names = tables["masks"], _MASK_COLUMNS
        several = not frame["chosen"].all()
        if several:
            # A price has few places, but not always three.
            frame = frame.assign(sparsity=frame["sparsity"].map("{:g}".format))
            first = list(names)[:3]
            names = {n: names[n] for n in first} | _SEVERAL_MASKS | names
        masks = frame_table(frame, names)
    return {
        "figures": [
            f"{role}_carries_{heads}_heads"
            for role, model in models.items()
            for heads in model["information"]
        ],
        "columns": table(["pairs", "what they are"], columns),
        "masks": masks,
        "several": several,
        "left_out": left_out,
    }


def _minimality(content: dict[str, Any], tables: Any) -> dict[str, Any]:
    kept: dict[str, tuple[int, int]] = {}
    for model in content["models"].values():
        entries = model["minimality"]["entries"]
        kept[model["label"]] = (sum(entry["kept"] for entry in entries), len(entries))
    there = "minimality" in tables
    shown = frame_table(tables["minimality"], _MINIMALITY_COLUMNS) if there else None
    by_index = any("by_index" in model["minimality"] for model in content["models"].values())
    return {"kept": kept, "table": shown, "by_index": by_index}


def _as_published(content: dict[str, Any], tables: Any) -> dict[str, Any]:
    base, tuned = (model["label"] for model in content["models"].values())
    published = [
        [name, *(f"{found[group]:.2f}" for group in (*GROUPS, "whole circuit"))]
        for name, found in PUBLISHED_CMAP.items()
    ]
    header = ["published: Llama-7B with head outputs of", *map(WORDS.group, GROUPS)]
    return {
        "base": base,
        "tuned": tuned,
        "heads": sizes_text(content["cmap"][AS_PUBLISHED]["heads"], GROUPS),
        "published_heads": {
            name: "/".join(map(str, found)) for name, found in PUBLISHED_CMAP_SIZES.items()
        },
        "figure": f"cmap_{AS_PUBLISHED}",
        "published": table([*header, "whole circuit"], published),
        "table": frame_table(tables[f"cmap_{AS_PUBLISHED}"], _CMAP_COLUMNS),
    }
