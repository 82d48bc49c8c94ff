"""The answer at the end: same heads, same function, and what brings the gain.

Every sentence is made from the numbers in results.json, says their intervals, and names the figure
that shows them. Where intervals overlap what they would have to be apart from, it says that the
data can't tell.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tl_entity.methods.cmap import OUTPUT, WHOLE_CIRCUIT
from tl_entity.study.mechanism_figures import group_words, information_words, main_information
from tl_entity.study.settings import GROUPS

SIGNIFICANT = 0.01
"""Circuits are said to share more than chance below this p-value."""

MOSTLY = 0.5
"""From this Jaccard index up, circuits are said to be mostly the same."""

AS_GOOD = 0.9
"""A circuit with this share of another's faithfulness is said to do as well."""

Answer = Literal["yes", "partly", "no", "can't tell"]


@dataclass(frozen=True)
class Finding:
    """One question and what the numbers say.

    Attributes:
        question: what was asked.
        answer: in a word.
        text: in a sentence or two, with numbers and intervals.
        figure: name of the figure that shows it.
    """

    question: str
    answer: Answer
    text: str
    figure: str


def verdict(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The findings on a base model and its fine-tune; none for a single model, for models whose
    heads can't be compared, or if an experiment was left out that they rest on."""
    models = results["models"].values()
    complete = all("faithfulness" in model and "information" in model for model in models)
    if results["same_circuit"] is None or not results["cmap"] or not complete:
        return []
    findings = [
        _better(results),
        _same_heads(results),
        _same_circuit_works(results),
        _same_function(results),
        _what_brings_the_gain(results),
    ]
    return [asdict(finding) for finding in findings]


def headline(findings: list[dict[str, Any]]) -> str:
    """One sentence for the top of the page."""
    if not findings:
        return ""
    answers = {finding["question"]: finding["answer"] for finding in findings}
    same = [answers[q] for q in (SAME_HEADS, CIRCUIT_WORKS, SAME_FUNCTION)]
    if answers[BETTER] != "yes":
        return "No gain from fine-tuning could be shown on these prompts."
    if all(answer == "yes" for answer in same):
        return "The fine-tuned model is better, by the same mechanism."
    if "no" in same:
        return "The fine-tuned model is better, and its mechanism differs."
    return (
        "The fine-tuned model is better; its mechanism is partly the same, or the data don't "
        "decide."
    )


BETTER = "Is the fine-tuned model better?"
SAME_HEADS = "Are the same heads at work?"
CIRCUIT_WORKS = "Does the base model's circuit work in the fine-tuned model?"
SAME_FUNCTION = "Do the groups carry the same information?"
GAIN = "Can the gain be put down to one group?"


def _better(results: Mapping[str, Any]) -> Finding:
    record = results["cmap"]["tuned_into_base"]
    low, high = record["gain_interval"]
    answer: Answer = "yes" if low > 0 else "no" if high < 0 else "can't tell"
    return Finding(
        BETTER,
        answer,
        f"On the same {record['into']['prompts']} prompts the base model answers "
        f"{_share(record['into'])} right and the fine-tuned one {_share(record['from'])}, a "
        f"difference of {record['gain']:+.3f} {_interval(record['gain_interval'])}.",
        "accuracy",
    )


def _same_heads(results: Mapping[str, Any]) -> Finding:
    whole = results["same_circuit"]["whole"]
    shared = len(whole["shared"])
    p_value, jaccard = whole["p_value"], whole["jaccard"]
    low, high = whole["jaccard_interval"]
    if p_value >= SIGNIFICANT:
        answer: Answer = "can't tell" if high > MOSTLY else "no"
    elif low >= MOSTLY:
        answer = "yes"
    else:
        answer = "partly"
    return Finding(
        SAME_HEADS,
        answer,
        f"The circuits, {whole['first']} heads in the base and {whole['second']} in the fine-tuned "
        f"model, share {shared}: a Jaccard index of {_number(jaccard)} {_interval([low, high])}. "
        f"Drawn at random they would share {whole['shared_by_chance']:.1f} "
        f"(p = {p_value:.2g}). The base model's heads make up {_number(whole['precision'])} of the "
        f"fine-tuned model's circuit, which has {_number(whole['recall'])} of them.",
        "tuned_circuit",
    )


def _same_circuit_works(results: Mapping[str, Any]) -> Finding:
    found = results["models"]["tuned"]["faithfulness"]
    other = found["other_circuits"]["base"]
    control = found["random"]
    low, high = other["interval"]
    own_low, _ = found["interval"]
    whole = found["model"]["accuracy"]
    chance = control["highest"] / whole if control["accuracies"] and whole else 0.0
    value, own = other["faithfulness"], found["faithfulness"]
    if value is None or own is None:
        answer: Answer = "can't tell"
    elif high <= chance:
        answer = "no"
    elif low <= chance:
        answer = "can't tell"
    elif value >= AS_GOOD * own:
        answer = "yes"
    elif high < own_low:
        answer = "partly"
    else:
        answer = "can't tell"
    beside = f"; the best random circuit reaches {chance:.3f}" if control["accuracies"] else ""
    return Finding(
        CIRCUIT_WORKS,
        answer,
        "Run alone inside the fine-tuned model, the base model's circuit keeps "
        f"{_number(other['faithfulness'])} {_interval(other['interval'])} of its accuracy, the "
        f"fine-tuned model's own circuit {_number(found['faithfulness'])} "
        f"{_interval(found['interval'])}{beside}.",
        "faithfulness",
    )


def _same_function(results: Mapping[str, Any]) -> Finding:
    models = results["models"]
    base = main_information(models["base"])
    tuned = main_information(models["tuned"])
    compared = [group for group in GROUPS if group in base and group in tuned]
    same = [group for group in compared if base[group] == tuned[group]]
    if not compared:
        answer: Answer = "can't tell"
    elif len(same) == len(GROUPS):
        answer = "yes"
    elif len(same) < len(compared):
        answer = "no"
    else:
        answer = "partly"
    parts = [
        f"{group_words(group)} carries {_carried(base, group)} in the base model and "
        f"{_carried(tuned, group)} in the fine-tuned one"
        for group in GROUPS
    ]
    numbers = []
    for group in same:
        in_base, in_tuned = (_entry(models[role], group, base[group]) for role in ("base", "tuned"))
        numbers.append(f"{group_words(group)} {in_base} in the base, {in_tuned} in the tuned model")
    text = "; ".join(parts) + "."
    if numbers:
        text += " Targets brought by patching: " + "; ".join(numbers) + "."
    return Finding(SAME_FUNCTION, answer, text, "tuned_carries_own_heads")


def _what_brings_the_gain(results: Mapping[str, Any]) -> Finding:
    record = results["cmap"]["tuned_into_base"]
    low, _ = record["gain_interval"]
    entries = {e["group"]: e for e in record["entries"] if e["patch"] == OUTPUT}
    groups = sorted(
        (entries[group] for group in GROUPS if group in entries),
        key=lambda entry: -entry["accuracy"],
    )
    whole = entries.get(WHOLE_CIRCUIT)
    figure = "cmap_tuned_into_base"
    if low <= 0:
        return Finding(
            GAIN, "can't tell", "There is no gain to be shown, so none to be shared out.", figure
        )
    sentences = [
        f"with the outputs of {group_words(entry['group'])} taken from the fine-tuned model the "
        f"base model answers {_share(entry)} right, {_number(entry['recovered'])} "
        f"{_interval(entry['recovered_interval'])} of the gain"
        for entry in groups
    ]
    if whole is not None:
        sentences.append(
            f"with those of the whole circuit {_share(whole)}, {_number(whole['recovered'])} "
            f"{_interval(whole['recovered_interval'])} of it"
        )
    sentences[0] = "W" + sentences[0][1:]
    best = groups[0]
    bringing = [entry for entry in groups if entry["gain_interval"][0] > 0]
    apart = len(groups) < 2 or best["gain_interval"][0] > groups[1]["gain_interval"][1]
    if not bringing:
        answer: Answer = "no"
        lead = "No group brings a gain by itself. "
    elif apart:
        answer = "yes"
        lead = f"{group_words(best['group'])} brings the most. "
    else:
        answer = "partly"
        names = ", ".join(group_words(entry["group"]) for entry in bringing)
        lead = f"These bring some of it, and their intervals overlap: {names}. "
    return Finding(GAIN, answer, lead + "; ".join(sentences) + ".", figure)


def _carried(carried: Mapping[str, str], group: str) -> str:
    return information_words(carried[group]) if group in carried else "nothing that can be told"


def _entry(model: Mapping[str, Any], group: str, kind: str) -> str:
    for entry in model["information"]["own"]["entries"]:
        if entry["group"] == group and entry["desideratum"] == kind:
            return _share(entry)
    return "not measured"


def _share(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:.3f} {_interval(found['interval'])}"


def _number(value: float | None) -> str:
    return "an undefined share" if value is None or value != value else f"{value:.2f}"


def _interval(bounds: Any) -> str:
    low, high = bounds
    if low is None or high is None or low != low or high != high:
        return "[not defined]"
    return f"[{low:.3f}, {high:.3f}]"
