"""The tables of the page on Qwen2.5-Coder-0.5B-Instruct, from what the study's files hold."""

import math
from typing import Any

from tl_entity.results import read_number
from tl_entity.stats import wilson_interval
from tl_entity.study.published import PUBLISHED_CMAP

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

PUBLISHED = "as published"
"""Names what `more.py` patches as the paper did."""

LABELS = {"base": "the base", "tuned": "the fine-tune"}
KINDS = {"object_value": "object", "box_label_value": "box label", "position": "position"}


ABLATIONS = ("pooled", "index", "resample")


def share(value: float | str | None) -> str:
    """`.55`, `1.00`, `-.20`."""
    number = read_number(value)
    if not math.isfinite(number):
        return "none" if math.isnan(number) else "infinite"
    # Not `-.00`.
    text = f"{round(number, 2) or 0.0:.2f}"
    return text.replace("0.", ".", 1) if abs(number) < 0.995 else text


def with_interval(found: dict[str, Any], name: str = "accuracy") -> str:
    """`.55 [.40, .69]`; of what is not defined nothing."""
    if found[name] is None:
        return "none"
    low, high = found["interval" if name == "accuracy" else f"{name}_interval"]
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
                sizes_of(found),
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
            sizes_of(whole),
            "",
            "",
            str(len(whole["shared"])),
            f"{whole['shared_by_chance']:.2f}",
            f"{whole['p_value']:.1g}",
            "",
        ]
    )
    header = [
        "group",
        "heads, base and fine-tune",
        "layers, base",
        "layers, fine-tune",
        "shared",
        "by chance",
        "p",
    ]
    return table([*header, "rank correlation of all heads' scores"], rows)


def sizes_of(found: Any) -> str:
    """How many heads the base and the fine-tune have."""
    return f"{found['first']}, {found['second']}"


def finetunes(runs: Any) -> str:
    """Accuracy along the fine-tunes."""
    steps = [entry["step"] for entry in runs["mixed_0"]["evaluations"]]
    rows = [
        [words, str(runs[name]["settings"]["seed"])]
        + [with_interval(entry) for entry in runs[name]["evaluations"]]
        for name, words in FINETUNES.items()
        if name in runs
    ]
    return table(["texts", "seed", *(f"step {step}" for step in steps)], rows)


def removals(found: Any) -> str:
    """Accuracy without the circuit, its groups and random heads, under each ablation."""
    kinds = [k for k in ABLATIONS if any(k in of_model for of_model in found["removals"].values())]
    rows = []
    for role, label in LABELS.items():
        under = found["removals"][role]
        whole = prefix(found["whole"][role], len(under["pooled"]["circuit"]["right"]))
        cells = [with_interval(whole) if kind in under else "" for kind in kinds]
        rows.append([label, "nothing", *cells])
        names = {"circuit": "the circuit", **GROUPS}
        rows += [
            [label, words]
            + [with_interval(under[kind][name]) if kind in under else "" for kind in kinds]
            for name, words in names.items()
        ]
        drawn = [numbered(under.get(kind, {}), "random") for kind in kinds]
        cells = [mean_and_range(entries) if entries else "" for entries in drawn]
        rows.append([label, "random heads of its layers", *cells])
    return table(["model", "without", *kinds], rows)


def kinds_in(found: Any) -> list[str]:
    """The ablations under which both models were measured."""
    return [kind for kind in ABLATIONS if all(kind in of_model for of_model in found.values())]


def numbered(entries: Any, name: str) -> list[Any]:
    """The entries `name_0`, `name_1` and so on."""
    return [entry for key, entry in entries.items() if key.startswith(f"{name}_")]


def prefix(found: Any, n: int) -> Any:
    """An accuracy on the first `n` of its prompts."""
    right = found["right"][:n]
    count = right.count("1")
    return {"accuracy": count / n, "interval": list(wilson_interval(count, n)), "right": right}


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


def alone(found: Any) -> str:
    """What circuits have alone, under each ablation."""
    kinds = kinds_in(found["alone"])
    rows = []
    for role, label in LABELS.items():
        under = found["alone"][role]
        rows.append([label, "everything", with_interval(found["whole"][role]), *[""] * len(kinds)])
        other = next(name for name in LABELS if name != role)
        names = {role: "its own circuit", other: f"{LABELS[other]}'s circuit"}
        if role == "tuned":
            names["by_rule"] = "its own, by today's rule"
        names["every_head"] = "every head at these four tokens"
        rows += [
            [label, words, with_interval(under["pooled"][name])]
            + [with_interval(under[kind][name], "faithfulness") for kind in kinds]
            for name, words in names.items()
        ]
        best = [
            max(numbered(under[kind], "random"), key=lambda entry: entry["accuracy"])
            for kind in kinds
        ]
        cells = [with_interval(entry, "faithfulness") for entry in best]
        rows.append([label, "the best of five random circuits", with_interval(best[0]), *cells])
    header = ["model", "kept", "accuracy, pooled", *(f"faithfulness, {kind}" for kind in kinds)]
    return table(header, rows)


def sizes(found: Any) -> str:
    """What larger circuits have alone."""
    rows = []
    for role, label in LABELS.items():
        entries = found["alone"][role]["pooled"]
        kept = {"1": entries[role]}
        kept |= {n.removeprefix("times_"): e for n, e in entries.items() if "times_" in n}
        rows += [
            [label, times, str(entry["heads"])]
            + [with_interval(entry, name) for name in ("accuracy", "faithfulness")]
            for times, entry in sorted(kept.items(), key=lambda item: int(item[0]))
        ]
    return table(["model", "times as large", "heads", "accuracy", "faithfulness"], rows)


def losses(found: Any) -> str:
    """What circuit and model lose by the same heads."""
    rows = []
    for role, label in LABELS.items():
        entries = found["completeness"][role]["entries"]
        some = [entry for entry in entries if entry["kind"] == "group"]
        rows += [
            [label, GROUPS[entry["removed"]]]
            + [with_interval(entry, f"{of}_loss") for of in ("circuit", "model")]
            + [with_interval(entry, "difference")]
            for entry in some
        ]
    return table(["model", "without", "the circuit loses", "the model loses", "difference"], rows)


def needed(found: Any) -> str:
    """Heads that the circuit needs, by group, if that was measured."""
    rows = []
    for role, minimal in found.get("minimality", {}).items():
        if minimal["entries"]:
            every = [entry["group"] for entry in minimal["entries"]]
            kept = [entry["group"] for entry in minimal["entries"] if entry["kept"]]
            cells = [f"{kept.count(group)} of {every.count(group)}" for group in GROUPS]
            ends = [with_interval(minimal[of]) for of in ("circuit", "minimal")]
            rows.append([LABELS[role], *cells, *ends])
    if not rows:
        return "Minimality was not measured again."
    header = [*(words[0] for words in GROUPS.values()), "accuracy with all", "with those needed"]
    return table(["model", *header], rows)


def along(found: Any) -> str:
    """CMAP from the checkpoints of the fine-tune."""
    rows = []
    groups: list[str] = []
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


def transfer(record: Any, *, shares: bool = False) -> str:
    """CMAP: accuracy by group and by what is patched, and if wanted the share of the gain."""
    entries = {(e["group"], e["patch"]): e for e in record["entries"]}
    patches = [p for p in dict.fromkeys(patch for _, patch in entries) if p != PUBLISHED]
    rows = []
    for group in dict.fromkeys(group for group, _ in entries):
        cells = []
        for patch in patches:
            cells.append(with_interval(entries[group, patch]))
            if shares:
                cells.append(with_interval(entries[group, patch], "recovered"))
        rows.append([GROUPS.get(group, group), *cells])
    columns = ["heads of the other model"]
    for patch in patches:
        columns += [patch, f"share of the gain by {patch}"] if shares else [patch]
    return table(columns, rows)


def as_published(record: Any) -> str:
    """CMAP of the fine-tune's heads that DCM selected, beside what was published."""
    published = PUBLISHED_CMAP["Goat-7B"]
    rows = [
        [
            GROUPS.get(entry["group"], entry["group"]),
            str(entry["heads"]),
            with_interval(entry),
            with_interval(entry, "recovered"),
            share(published[entry["group"]]),
        ]
        for entry in record["entries"]
        if entry["patch"] == PUBLISHED
    ]
    header = ["heads of the fine-tune", "how many", "accuracy", "share of the gain"]
    return table([*header, "published, Goat-7B into Llama-7B"], rows)


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


def cost(timings: Any) -> str:
    """Wall time by kind of step, in minutes."""
    kinds: dict[str, float] = {}
    for step, seconds in timings.items():
        name = step.split("_", 1)[1] if step.startswith(("base_", "tuned_")) else step
        kind = "discovery" if name.startswith("scores") else name.split("_from")[0]
        kind = "activation patching" if kind.startswith("activation") else kind
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    rows = [[kind.replace("_", " "), f"{seconds / 60:.0f}"] for kind, seconds in kinds.items()]
    rows.append(["all", f"{sum(kinds.values()) / 60:.0f}"])
    return table(["step, both models", "minutes, one core"], rows)
