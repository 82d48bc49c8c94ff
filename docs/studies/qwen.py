"""Write the page on Qwen2.5-Coder-0.5B-Instruct from the files that the study left.

tl-entity reproduce ... --out results            # the command is on the page
python docs/studies/ablate.py ...                # once for each model
python docs/studies/qwen.py results ablation_base.json ablation_tuned.json
python docs/studies/qwen.py                      # the page alone, from what is kept here

With a folder, its results, timings and figures are kept beside the page first.
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
    "faithfulness",
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
LABELS = {"base": "the base", "tuned": "the fine-tune"}
KINDS = {"object_value": "object", "box_label_value": "box label", "position": "position"}


def keep(results: Path, ablations: list[Path]) -> None:
    """Bring what the page is made of beside it."""
    from PIL import Image

    from tl_entity.study.store import to_json
    from tl_entity.study.verdict import verdict

    KEPT.mkdir(exist_ok=True)
    content = json.loads((results / "results.json").read_text(encoding="utf-8"))
    # By the rules of today, which read nothing but these numbers.
    content["verdict"] = verdict(content)
    for place in (content["settings"], *content["models"].values()):
        for key in ("base", "tuned", "name"):
            if isinstance(place.get(key), str):
                place[key] = Path(place[key]).name
    (KEPT / "results.json").write_text(to_json(content), encoding="utf-8")
    shutil.copy(results / "timings.json", KEPT / "timings.json")
    for role, path in zip(LABELS, ablations, strict=True):
        shutil.copy(path, KEPT / f"ablation_{role}.json")
    for name in FIGURES:
        # A few dozen colours are all a figure has; with 256 the file is a third of the size.
        with Image.open(results / "figures" / f"{name}.png") as figure:
            colours = figure.convert("RGB").quantize(256)
            colours.save(KEPT / f"{name}.png", optimize=True)


def load(name: str) -> Any:
    """One of the kept files."""
    return json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))


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
                with_interval(found, "rank_correlation"),
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


def ablations() -> str:
    """Accuracy without the circuit and without random heads."""
    rows = []
    for role, label in LABELS.items():
        found = load(f"ablation_{role}")
        others = [entry["accuracy"] for entry in found["without_random"]]
        rows.append(
            [
                label,
                str(found["heads"]),
                with_interval(found["whole"]),
                with_interval(found["without_circuit"]),
                share(sum(others) / len(others)),
                f"{share(min(others))} to {share(max(others))}",
            ]
        )
    header = ["model", "heads", "whole", "without the circuit", "without random heads", "range"]
    return table(header, rows)


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


def carried(models: Any) -> str:
    """Activation patching of the heads that DCM chose."""
    rows = []
    for role, model in models.items():
        if "information" not in model:
            continue
        for whose, record in model["information"].items():
            entries = {(e["group"], e["desideratum"]): e for e in record["entries"]}
            heads = "own" if whose == "own" else f"{LABELS[whose]}'s"
            for group, words in {"unpatched": "nothing patched", **GROUPS}.items():
                cells = [with_interval(entries[group, kind]) for kind in KINDS]
                rows.append([LABELS[role], heads, words, *cells])
    return table(["model", "heads", "group", *KINDS.values()], rows)


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
        carried=carried(models),
        into_base=transfer(content["cmap"]["tuned_into_base"]),
        into_tuned=transfer(content["cmap"]["base_into_tuned"]),
        flow=flow(models),
        cost=cost(),
    )


TEMPLATE = (HERE / "qwen.template").read_text(encoding="utf-8")

if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    (HERE / "qwen.md").write_text(page(), encoding="utf-8")
