"""Write the page on Qwen2.5-Coder-0.5B-Instruct from the files that the study left.

python docs/studies/qwen.py STUDY        # with what the commands on the page left in a folder
python docs/studies/qwen.py              # the page alone, from what is kept here

With a folder, what the page is made of is kept beside it first.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import qwen_tables
from qwen_tables import (
    FINETUNES,
    GROUPS,
    LABELS,
    kinds_in,
    mean_and_range,
    numbered,
    table,
    with_interval,
)

from tl_entity.study.store import to_json
from tl_entity.study.verdict_rules import INCOMPLETE

NOTHING_TO_LOSE = "nothing to lose"
"""Stands for a removal from a circuit that answers nothing right."""

LARGEST = 16
"""Times as large as it is, the largest circuit measured."""

HERE = Path(__file__).parent
KEPT = HERE / "qwen"
FIGURES = (
    "base_heatmaps",
    "tuned_heatmaps",
    "cmap_tuned_into_base",
    "base_knockout",
    "tuned_knockout",
)
MEASURED_AGAIN = ("faithfulness", "completeness", "minimality")
"""Of the whole study what `circuits.py` measures on more prompts; the page has it from there."""

SHARES = ("gain", "gain_interval", "recovered", "recovered_interval")
"""The same of CMAP, which `more.py` measures on more prompts."""


def keep(study: Path) -> None:
    """Bring what the page is made of beside it."""
    from PIL import Image

    KEPT.mkdir(exist_ok=True)
    results = study / "results"
    _write("results", cut_down(_read(results / "results.json")))
    shutil.copy(results / "timings.json", KEPT / "timings.json")
    for name in ("circuits", "more"):
        shutil.copy(study / name / f"{name}.json", KEPT / f"{name}.json")
    runs = {name: _read(study / name / "finetune.json") for name in FINETUNES}
    kept = {
        name: {key: run[key] for key in ("settings", "versions", "evaluations")}
        for name, run in runs.items()
    }
    _write("finetunes", kept)
    control = _read(study / "smollm2" / "results.json")["models"]["base"]
    _write("smollm2", {key: control[key] for key in ("accuracy", "no_circuit")})
    for name in FIGURES:
        # A few dozen colours are all a figure has; with 256 the file is a third of the size.
        with Image.open(results / "figures" / f"{name}.png") as figure:
            colours = figure.convert("RGB").quantize(256)
            colours.save(KEPT / f"{name}.png", optimize=True)


def cut_down(content: Any) -> Any:
    """Results without what is measured again on more prompts, without folders' names, and with no
    more digits than float32 has."""
    content.pop("verdict", None)
    for model in content["models"].values():
        for found in model["discovery"].values():
            for key in ("scores", "intervals"):
                found[key] = _rounded(found[key])
    for record in content["cmap"].values():
        for entry in (record, *record["entries"]):
            for key in SHARES:
                entry.pop(key, None)
    for place in (content["settings"], *content["models"].values()):
        for key in MEASURED_AGAIN:
            place.pop(key, None)
        for key in ("base", "tuned", "name"):
            if isinstance(place.get(key), str):
                place[key] = Path(place[key]).name
    return content


def _rounded(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_rounded(number) for number in numbers]
    return numbers and float(f"{numbers:.7g}")


def _write(name: str, content: Any) -> None:
    (KEPT / f"{name}.json").write_text(to_json(content), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load(name: str) -> Any:
    """One of the kept files."""
    return _read(KEPT / f"{name}.json")


def apart(entries: list[Any]) -> str:
    """By how many removals circuit and model are apart, as the verdict counts them."""
    removed = [entry for entry in entries if entry["kind"] != "whole"]
    ends = [entry["difference_interval"] for entry in removed]
    n = sum(low > INCOMPLETE or high < -INCOMPLETE for low, high in ends)
    return f"{n} of {len(removed)}"


def changed_by_ablation(found: Any) -> str:
    """What was here under the paper's ablation, and what is under each."""
    before = load("before")
    rows: list[list[str]] = []
    kinds = kinds_in(found["alone"])
    for role, label in LABELS.items():
        old, new = before["alone"][role], found["alone"][role]
        for name, words in ((role, "its circuit alone"), ("every_head", "every head there alone")):
            entries = [old[name], *(new[kind][name] for kind in kinds)]
            cells = [with_interval(entry, "faithfulness") for entry in entries]
            rows.append([f"{label}, {words}: faithfulness", *cells])
        largest = [before["sizes"][role]["entries"][-1], new["pooled"][f"times_{LARGEST}"]]
        cells = [with_interval(entry, "faithfulness") for entry in largest]
        cells += [""] * (len(kinds) - 1)
        rows.append([f"{label}, {LARGEST} times its circuit alone: faithfulness", *cells])
    for role, label in LABELS.items():
        under = [before["removals"][role], *map(found["removals"][role].get, kinds)]
        cells = [with_interval(some["circuit"]) if some else "" for some in under]
        rows.append([f"{label} without its circuit: accuracy", *cells])
        drawn = [some and (some.get("random") or numbered(some, "random")) for some in under]
        cells = [mean_and_range(entries) if entries else "" for entries in drawn]
        rows.append([f"{label} without random heads: accuracy", *cells])
    return table(["", "before", *kinds], rows)


def changed(found: Any, more: Any, same: Any) -> str:
    """What was here by other definitions, and what is in its place."""
    before, by_rule = load("before"), found["by_rule"]["same_circuit"]["whole"]
    rows = []
    for way, words in (
        ("tuned_into_base", "brings the base"),
        ("base_into_tuned", "costs the fine-tune"),
    ):
        old, new = (
            {e["group"]: e for e in some["cmap"][way]["entries"] if e["patch"] == "output"}
            for some in (before, more)
        )
        for group in old:
            cells = [with_interval(some[group], "recovered") for some in (old, new)]
            rows.append([f"share of the gain that {GROUPS.get(group, group)} {words}", *cells])
    for role, label in LABELS.items():
        entries = found["completeness"][role]["entries"]
        now = apart(entries) if entries else NOTHING_TO_LOSE
        words = f"{label}: removals by which circuit and model are apart"
        rows.append([words, apart(before["completeness"][role]), now])
        old, now = before["minimality"][role], needed_now(found, role)
        words = f"{label}: heads that its circuit needs"
        rows.append([words, f"{old['kept']} of {old['of']}", now])
    cells = [
        f"{of['first']}, {of['second']}, {len(of['shared'])} ({of['shared_by_chance']:.1f})"
        for of in (same["whole"], by_rule)
    ]
    rows.append(["heads of the base, of the fine-tune, shared (by chance)", *cells])
    return table(["", "before", "now"], rows)


def needed_now(found: Any, role: str) -> str:
    """How many heads a circuit needs, or why that is not known."""
    if role not in found.get("minimality", {}):
        return "not measured again"
    entries = found["minimality"][role]["entries"]
    kept = sum(entry["kept"] for entry in entries)
    return f"{kept} of {len(entries)}" if entries else NOTHING_TO_LOSE


def answers(old: list[Any], new: list[Any]) -> str:
    """The verdict, with what it was before."""
    was = {finding["question"]: finding["answer"] for finding in old}
    rows = [[f["question"], was[f["question"]], f["answer"], f["text"]] for f in new]
    return table(["question", "before", "now", "numbers"], rows)


def in_words(found: Any, into_base: Any, into_tuned: Any) -> dict[str, str]:
    """Numbers for the text, such as `into_share_output_value_fetcher`, `base_own_pooled` and
    `tuned_without_circuit_index`."""
    texts: dict[str, str] = {}
    for way, record in (("into", into_base), ("back", into_tuned)):
        for entry in record["entries"]:
            name = f"{entry['patch']}_{entry['group']}".replace(" ", "_")
            texts[f"{way}_accuracy_{name}"] = with_interval(entry)
            texts[f"{way}_share_{name}"] = with_interval(entry, "recovered")
    for role in LABELS:
        for kind, entries in found["alone"][role].items():
            for name, entry in entries.items():
                texts[f"{role}_{name}_{kind}"] = with_interval(entry, "faithfulness")
            texts[f"{role}_own_{kind}"] = texts[f"{role}_{role}_{kind}"]
        for kind, entries in found["removals"][role].items():
            for name, entry in entries.items():
                texts[f"{role}_without_{name}_{kind}"] = with_interval(entry)
    return texts


def page() -> str:
    """The page, every number of it from the kept files."""
    content = load("results")
    models, same, settings = content["models"], content["same_circuit"], content["settings"]
    boxes = str(settings["boxes"])
    found, more, before = load("circuits"), load("more"), load("before")
    into_base, into_tuned = (
        more["cmap"][f"{way}"] for way in ("tuned_into_base", "base_into_tuned")
    )
    findings = load("verdict")
    return TEMPLATE.format(
        prompts=settings["prompts"],
        mask_pairs=settings["mask_pairs"],
        boxes=boxes,
        verdict=answers(before["verdict"], findings),
        accuracy=qwen_tables.accuracy(models),
        circuits=qwen_tables.circuits(models, same),
        by_rule=qwen_tables.circuits(
            {role: {"circuit": some} for role, some in found["by_rule"]["circuits"].items()},
            found["by_rule"]["same_circuit"],
        ),
        removals=qwen_tables.removals(found),
        few=found["settings"]["few"],
        many=found["settings"]["prompts"],
        others=found["settings"]["others"],
        losses=qwen_tables.losses(found),
        needed=qwen_tables.needed(found),
        changed_by_ablation=changed_by_ablation(found),
        changed=changed(found, more, same),
        carried=qwen_tables.carried(models["tuned"]["information"]["base"]),
        few_pairs=models["tuned"]["information"]["base"]["entries"][0]["prompts"],
        into_base=qwen_tables.transfer(content["cmap"]["tuned_into_base"]),
        into_tuned=qwen_tables.transfer(content["cmap"]["base_into_tuned"]),
        flow=qwen_tables.flow(models),
        control_prompts=more["random"]["prompts"],
        into_base_more=qwen_tables.transfer(into_base, shares=True),
        into_tuned_more=qwen_tables.transfer(into_tuned, shares=True),
        as_published=qwen_tables.as_published(into_base),
        into_prompts=len(into_base["into"]["right"]),
        back_prompts=len(into_tuned["into"]["right"]),
        random_heads=qwen_tables.random_heads(more["random"]),
        cost=qwen_tables.cost(load("timings")),
        finetunes=qwen_tables.finetunes(load("finetunes")),
        more_pairs=more["carries"]["base"]["pairs"],
        checkpoint_prompts=next(iter(more["checkpoints"].values()))["prompts"],
        alone=qwen_tables.alone(found),
        sizes=qwen_tables.sizes(found),
        along=qwen_tables.along(more["checkpoints"]),
        carried_by_more=qwen_tables.carried_by_more(more["carries"]),
        smollm2=load("smollm2")["no_circuit"],
        memory=load("machine")["peak_gib"],
        finetune_prompts=load("finetunes")["mixed_0"]["settings"]["prompts"],
        before_prompts=before["prompts"]["alone"],
        more_base=with_interval(before["alone"]["base"]["whole"]),
        more_tuned=with_interval(before["alone"]["tuned"]["whole"]),
        **in_words(found, into_base, into_tuned),
    )


TEMPLATE = (HERE / "qwen.template").read_text(encoding="utf-8")

if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    (HERE / "qwen.md").write_text(page(), encoding="utf-8")
