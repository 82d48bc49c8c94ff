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

HERE = Path(__file__).parent
KEPT = HERE / "qwen"
FIGURES = (
    "base_heatmaps",
    "tuned_heatmaps",
    "cmap_tuned_into_base",
    "base_knockout",
    "tuned_knockout",
)
GROUPS = {
    "value_fetcher": "A value fetchers",
    "pos_transmitter": "B position transmitters",
    "pos_detector": "C position detectors",
    "struct_reader": "D structure readers",
}
FINETUNES = {
    "mixed_0": "all three",
    "mixed_1": "all three",
    "lookup_0": "variable look-up",
    "arithmetic_0": "arithmetic",
    "stories_0": "plain stories",
}
"""Folders of fine-tunes, and the kinds of text each was trained on."""

LABELS = {"base": "the base", "tuned": "the fine-tune"}
KINDS = {"object_value": "object", "box_label_value": "box label", "position": "position"}


def keep(study: Path) -> None:
    """Bring what the page is made of beside it."""
    from PIL import Image

    from tl_entity.results import plain
    from tl_entity.study.folder import STUDY
    from tl_entity.study.results import Study
    from tl_entity.study.store import to_json
    from tl_entity.study.verdict import verdict

    KEPT.mkdir(exist_ok=True)
    results = study / "results"
    content = _read(results / "results.json")
    # By the rules of today, which read nothing but these results.
    content["verdict"] = plain(verdict(Study.load(results / STUDY)))
    for place in (content["settings"], *content["models"].values()):
        for key in ("base", "tuned", "name"):
            if isinstance(place.get(key), str):
                place[key] = Path(place[key]).name
    (KEPT / "results.json").write_text(to_json(content), encoding="utf-8")
    shutil.copy(results / "timings.json", KEPT / "timings.json")
    for role in LABELS:
        shutil.copy(study / f"ablation_{role}.json", KEPT / f"ablation_{role}.json")
    shutil.copy(study / "more" / "more.json", KEPT / "more.json")
    runs = {name: _read(study / name / "finetune.json") for name in FINETUNES}
    kept = {
        name: {key: run[key] for key in ("settings", "versions", "evaluations")}
        for name, run in runs.items()
    }
    (KEPT / "finetunes.json").write_text(to_json(kept), encoding="utf-8")
    control = _read(study / "smollm2" / "results.json")["models"]["base"]
    kept = {key: control[key] for key in ("accuracy", "no_circuit")}
    (KEPT / "smollm2.json").write_text(to_json(kept), encoding="utf-8")
    for name in FIGURES:
        # A few dozen colours are all a figure has; with 256 the file is a third of the size.
        with Image.open(results / "figures" / f"{name}.png") as figure:
            colours = figure.convert("RGB").quantize(256)
            colours.save(KEPT / f"{name}.png", optimize=True)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load(name: str) -> Any:
    """One of the kept files."""
    return _read(KEPT / f"{name}.json")


def share(value: float | None) -> str:
    """`.55`, `1.00`, `-.20`."""
    if value is None:
        return "none"
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text


def with_interval(found: dict[str, Any], name: str = "accuracy", interval: str = "") -> str:
    """`.55 [.40, .69]`."""
    low, high = found[interval or ("interval" if name == "accuracy" else f"{name}_interval")]
    return f"{share(found[name])} [{share(low)}, {share(high)}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy(models: Any) -> str:
    """Accuracy by number of boxes."""
    counts = list(models["base"]["accuracy"])
    rows = [
        [LABELS[role], *(with_interval(model["accuracy"][n]) for n in counts)]
        for role, model in models.items()
    ]
    return table(["boxes", *counts], rows)


def circuits(models: Any, same: Any) -> str:
    """Sizes, overlap with chance, and layers."""
    rows = []
    for group, words in GROUPS.items():
        found = same["groups"][group]
        layers = [sorted(layer for layer, _ in m["circuit"][group]) for m in models.values()]
        spans = [f"{some[0]}-{some[-1]}" for some in layers]
        rows.append(
            [
                words,
                str(found["first"]),
                *spans,
                str(len(found["shared"])),
                f"{found['shared_by_chance']:.2f}",
                f"{found['p_value']:.1g}",
                share(found["rank_correlation"]),
            ]
        )
    whole = same["whole"]
    rows.append(
        [
            "all",
            str(whole["first"]),
            "",
            "",
            str(len(whole["shared"])),
            f"{whole['shared_by_chance']:.2f}",
            f"{whole['p_value']:.1g}",
            "",
        ]
    )
    header = ["group", "heads", "layers, base", "layers, fine-tune", "shared", "by chance", "p"]
    return table([*header, "rank correlation of all heads' scores"], rows)


def finetunes() -> str:
    """Accuracy along the fine-tunes."""
    runs = load("finetunes")
    steps = [entry["step"] for entry in runs["mixed_0"]["evaluations"]]
    rows = [
        [words, str(runs[name]["settings"]["seed"])]
        + [with_interval(entry) for entry in runs[name]["evaluations"]]
        for name, words in FINETUNES.items()
        if name in runs
    ]
    return table(["texts", "seed", *(f"step {step}" for step in steps)], rows)


def ablations() -> str:
    """Accuracy without the circuit and without random heads."""
    rows = []
    for role, label in LABELS.items():
        found = load(f"ablation_{role}")
        rows.append(
            [
                label,
                str(found["heads"]),
                with_interval(found["whole"]),
                with_interval(found["without_circuit"]),
                mean_and_range(found["without_random_of_the_same_layers"]),
                mean_and_range(found["without_random"]),
            ]
        )
    header = ["model", "heads", "whole", "without the circuit", "without others of its layers"]
    return table([*header, "without any others"], rows)


def mean_and_range(entries: list[Any]) -> str:
    """`.50 (.37 to .60)`."""
    found = [entry["accuracy"] for entry in entries]
    return f"{share(sum(found) / len(found))} ({share(min(found))} to {share(max(found))})"


def random_heads(record: Any) -> str:
    """CMAP of the heads found, of others of the same layers, and of every head."""
    rows = [
        [
            GROUPS.get(entry["group"], entry["group"]),
            with_interval(entry["found"]),
            mean_and_range(entry["random"]),
            with_interval(entry["every_head"]),
        ]
        for entry in record["entries"]
    ]
    return table(["outputs of", "found", "others of these layers", "every head at the token"], rows)


def faithfulness(models: Any) -> str:
    """What circuits have alone."""
    rows = []
    for role, model in models.items():
        found = model["faithfulness"]
        kept = {"its own circuit": found}
        kept |= {f"{LABELS[o]}'s circuit": x for o, x in found["other_circuits"].items()}
        kept["every head at these four tokens"] = found["every_head"]
        for words, entry in kept.items():
            rows.append(
                [
                    LABELS[role],
                    words,
                    with_interval(entry["circuit"]),
                    with_interval(entry, "faithfulness", "interval"),
                ]
            )
        random = found["random"]
        rows.append([LABELS[role], "random heads", f"at most {share(random['highest'])}", ""])
    return table(["model", "kept", "accuracy", "faithfulness"], rows)


def alone(found: Any) -> str:
    """The same on more prompts."""
    rows = []
    for role, record in found.items():
        rows.append([LABELS[role], "everything", with_interval(record["whole"]), ""])
        other = next(name for name in LABELS if name != role)
        for kept, words in (
            (role, "its own circuit"),
            (other, f"{LABELS[other]}'s circuit"),
            ("every_head", "every head at these four tokens"),
        ):
            share_of = with_interval(record[kept], "faithfulness")
            rows.append([LABELS[role], words, with_interval(record[kept]), share_of])
    return table(["model", "kept", "accuracy", "faithfulness"], rows)


def sizes(found: Any) -> str:
    """What larger circuits have alone."""
    rows = []
    for role, record in found.items():
        cells = [f"{with_interval(e)} ({e['heads']})" for e in record["entries"]]
        rows.append([LABELS[role], *cells, with_interval(record["whole"])])
    times = [entry["times"] for entry in next(iter(found.values()))["entries"]]
    return table(["model", *(f"{n} times" for n in times), "everything"], rows)


def brought(record: Any) -> dict[str, str]:
    """Accuracies and shares of the gain for the text, such as `output_value_fetcher`."""
    found = {}
    for entry in record["entries"]:
        name = f"{entry['patch']}_{entry['group'].replace(' ', '_')}"
        found[name] = with_interval(entry)
        found[f"share_{name}"] = with_interval(entry, "recovered")
    return found


def along(found: Any) -> str:
    """CMAP from the checkpoints of the fine-tune."""
    rows = []
    for step, record in found.items():
        outputs = {e["group"]: e for e in record["entries"] if e["patch"] == "output"}
        cells = [with_interval(entry) for entry in outputs.values()]
        rows.append([step, with_interval(record["into"]), with_interval(record["from"]), *cells])
    groups = [GROUPS.get(group, group) for group in outputs]
    return table(["step", "the base", "the checkpoint", *groups], rows)


def carried_by_more(found: Any) -> str:
    """Activation patching on more pairs."""
    rows = []
    for role, record in found.items():
        entries = {(e["group"], e["desideratum"]): e for e in record["entries"]}
        for group, words in {"unpatched": "nothing patched", **GROUPS}.items():
            cells = [with_interval(entries[group, kind]) for kind in KINDS]
            rows.append([LABELS[role], words, *cells])
    return table(["model", "group", *KINDS.values()], rows)


def carried(record: Any) -> str:
    """Activation patching of the base's heads in the fine-tune."""
    entries = {(e["group"], e["desideratum"]): e for e in record["entries"]}
    rows = [
        [words, *(with_interval(entries[group, kind]) for kind in KINDS)]
        for group, words in {"unpatched": "nothing patched", **GROUPS}.items()
    ]
    return table(["group", *KINDS.values()], rows)


def transfer(record: Any) -> str:
    """CMAP: accuracy by group and by what is patched."""
    entries = {(e["group"], e["patch"]): e for e in record["entries"]}
    patches = list(dict.fromkeys(patch for _, patch in entries))
    rows = [
        [
            GROUPS.get(group, group),
            *(with_interval(entries[group, p]) if (group, p) in entries else "" for p in patches),
        ]
        for group in dict.fromkeys(group for group, _ in entries)
    ]
    return table(["heads of the other model", *patches], rows)


def flow(models: Any) -> str:
    """From which layer up attention between two tokens is no longer needed."""
    rows = []
    for role, model in models.items():
        for curve in model["knockout"]["curves"]:
            layers = curve["layers"]
            cells = [share(layers[n]["accuracy"]) for n in (0, 8, 12, 14, 16, 20, 23)]
            words = f"{curve['from']} to {curve['to']}".replace("_", " ")
            rows.append([LABELS[role], words, *cells, share(curve["whole"]["accuracy"])])
    at = [f"from {n}" for n in (0, 8, 12, 14, 16, 20, 23)]
    return table(["model", "attention cut", *at, "none cut"], rows)


def cost() -> str:
    """Wall time by kind of step, in minutes."""
    kinds: dict[str, float] = {}
    for step, seconds in load("timings").items():
        name = step.split("_", 1)[1] if step.startswith(("base_", "tuned_")) else step
        kind = "discovery" if name.startswith("scores") else name.split("_from")[0]
        kind = "activation patching" if kind.startswith("activation") else kind
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    rows = [[kind.replace("_", " "), f"{seconds / 60:.0f}"] for kind, seconds in kinds.items()]
    rows.append(["all", f"{sum(kinds.values()) / 60:.0f}"])
    return table(["step, both models", "minutes, one core"], rows)


def page() -> str:
    """The page, every number of it from the kept files."""
    content = load("results")
    models, same, settings = content["models"], content["same_circuit"], content["settings"]
    boxes = str(settings["boxes"])
    more, control = load("more"), load("smollm2")
    findings = [[f["question"], f["answer"]] for f in content["verdict"]]
    return TEMPLATE.format(
        prompts=settings["prompts"],
        mask_pairs=settings["mask_pairs"],
        boxes=boxes,
        base=with_interval(models["base"]["accuracy"][boxes]),
        tuned=with_interval(models["tuned"]["accuracy"][boxes]),
        verdict=table(["question", "answer"], findings),
        accuracy=accuracy(models),
        circuits=circuits(models, same),
        ablations=ablations(),
        ablation_prompts=load("ablation_base")["prompts"],
        faithfulness=faithfulness(models),
        carried=carried(models["tuned"]["information"]["base"]),
        few_pairs=models["tuned"]["information"]["base"]["entries"][0]["prompts"],
        into_base=transfer(content["cmap"]["tuned_into_base"]),
        into_tuned=transfer(content["cmap"]["base_into_tuned"]),
        flow=flow(models),
        control_prompts=more["control_prompts"],
        into_tuned_more=transfer(more["cmap_base_into_tuned"]),
        random_heads=random_heads(more["cmap_random"]),
        cost=cost(),
        finetunes=finetunes(),
        more_prompts=more["prompts"],
        more_pairs=more["pairs"],
        few_prompts=more["checkpoint_prompts"],
        alone=alone(more["alone"]),
        sizes=sizes(more["sizes"]),
        into_base_more=transfer(more["cmap"]),
        along=along(more["checkpoints"]),
        carried_by_more=carried_by_more(more["carries"]),
        smollm2=control["no_circuit"],
        memory=load("machine")["peak_gib"],
        finetune_prompts=load("finetunes")["mixed_0"]["settings"]["prompts"],
        random_base=share(models["base"]["faithfulness"]["random"]["highest"]),
        random_tuned=share(models["tuned"]["faithfulness"]["random"]["highest"]),
        more_base=with_interval(more["alone"]["base"]["whole"]),
        more_tuned=with_interval(more["alone"]["tuned"]["whole"]),
        base_alone=with_interval(more["alone"]["base"]["base"], "faithfulness"),
        tuned_alone=with_interval(more["alone"]["tuned"]["tuned"], "faithfulness"),
        base_every=with_interval(more["alone"]["base"]["every_head"], "faithfulness"),
        tuned_every=with_interval(more["alone"]["tuned"]["every_head"], "faithfulness"),
        **brought(more["cmap"]),
        **{
            f"share_back_{e['group'].replace(' ', '_')}": with_interval(e, "recovered")
            for e in more["cmap_base_into_tuned"]["entries"]
            if e["patch"] == "output"
        },
    )


TEMPLATE = (HERE / "qwen.template").read_text(encoding="utf-8")

if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    (HERE / "qwen.md").write_text(page(), encoding="utf-8")
