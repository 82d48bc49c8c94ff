"""The answer at the end: same heads, same function, and what brings the gain.

Every sentence is made from the numbers in results.json, says their intervals, and names the figure
that shows them. Where intervals overlap what they would have to be apart from, it says that the
data can't tell.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tl_entity.methods.activation_patching import UNPATCHED
from tl_entity.methods.cmap import OUTPUT, WHOLE_CIRCUIT
from tl_entity.study.mechanism_figures import group_words, information_words, main_information
from tl_entity.study.settings import GROUPS
from tl_entity.study.store import read_number
from tl_entity.tasks.desiderata import MAIN_DESIDERATA

SIGNIFICANT = 0.01
"""Circuits are said to share more than chance below this p-value."""

MOSTLY = 0.5
"""From this Jaccard index up, circuits are said to be mostly the same."""

AS_GOOD = 0.9
"""A circuit with this share of another's faithfulness is said to do as well."""

FAITHFUL = 0.8
"""From this faithfulness up, a circuit is said to be the mechanism. The base's published circuit
has 0.88 to 1.00 in the four published models (paper, accuracies of its circuit evaluation)."""

HALF_FAITHFUL = 0.5
"""Below this faithfulness more of the mechanism lies outside the circuit than in it."""

INCOMPLETE = 0.1
"""A circuit lacks something if it loses more than this accuracy more, or less, than the model by
the same heads; less than a tenth may be the ablation's doing."""

MOST_OF_GAIN = 0.5
"""A gain can be put down to one group only if this group brings at least this share of it: with
less, as much comes from elsewhere."""

RULES = (
    "The answers follow from the numbers by fixed rules, and what has to be beyond something is so "
    "with its whole interval. Heads are the same if the overlap is beyond that of circuits drawn "
    f"at random within their layers (p below {SIGNIFICANT:g}) and the Jaccard index, which has no "
    f"interval, is at least {MOSTLY:g}. They are not if neither is so and the base's circuit "
    f"found twice has an index of at least {MOSTLY:g}; where that has no higher an index than the "
    "two circuits, the data can't tell. A circuit is the "
    f"mechanism if its faithfulness is at least {FAITHFUL:g} and beyond every random circuit, and "
    f"it nowhere loses {INCOMPLETE:g} more or less than the model by the same heads; it is not if "
    f"its faithfulness is below {HALF_FAITHFUL:g}; of two models the weaker answer counts. A "
    "circuit does as well as another if it is beyond every random circuit and the difference can't "
    f"be more than {1 - AS_GOOD:.0%} of the other's faithfulness. A group carries the kind of "
    "information that brings its target more often than every other kind and than the run with "
    "nothing patched. The gain is put down to a group if it brings more than every other group and "
    f"at least {MOST_OF_GAIN:g} of the gain, costs as much when the base model's heads are put "
    "into the fine-tuned model, and brings more than the control model's heads do, if there is "
    "one. Otherwise the answer is partly, or the data can't tell."
)
"""How the answers are come by, for the page that shows them."""

Answer = Literal["yes", "partly", "no", "can't tell"]

WEAKEST_FIRST: tuple[Answer, ...] = ("no", "can't tell", "partly", "yes")
"""What is claimed of two models is claimed as far as it holds in the one where it holds less."""


@dataclass(frozen=True)
class Finding:
    """One question and what the numbers say.

    Attributes:
        question: what was asked.
        answer: in a word.
        text: in a sentence or two, with numbers and intervals.
        figure: name of the figure that shows it.
        brief: what the headline has to say of it; empty if nothing.
    """

    question: str
    answer: Answer
    text: str
    figure: str
    brief: str = ""


@dataclass(frozen=True)
class Alone:
    """What a model's own circuit does by itself.

    Attributes:
        name: of the model, in words.
        answer: whether the circuit is the mechanism.
        share: its faithfulness with the interval.
        faithful: whether what it lacks, if anything, shows only once heads are removed.
        text: all this in sentences.
    """

    name: str
    answer: Answer
    share: str
    faithful: bool
    text: str


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
        _mechanism(results),
        _same_circuit_works(results),
        _same_function(results),
        _what_brings_the_gain(results),
    ]
    return [asdict(finding) for finding in findings]


def headline(findings: list[dict[str, Any]]) -> str:
    """What it comes to, for the top of the page. Nothing is said to be the same mechanism that
    does not do most of the work, or whose groups can't take the other model's outputs."""
    if not findings:
        return ""
    answers = {finding["question"]: finding["answer"] for finding in findings}
    briefs = {finding["question"]: finding["brief"] for finding in findings}
    same = [answers[q] for q in (SAME_HEADS, CIRCUIT_WORKS, SAME_FUNCTION)]
    if answers[BETTER] != "yes":
        return "No gain from fine-tuning could be shown on these prompts."
    all_same = all(answer == "yes" for answer in same)
    reserve, harm = briefs[MECHANISM], briefs[GAIN]
    if all_same and not reserve and not harm:
        return "The fine-tuned model is better, by the same mechanism."
    if all_same:
        found = f"{briefs[SAME_HEADS]} and carry the same information"
    elif "no" in same:
        found = "what was found of its mechanism differs" if reserve else "its mechanism differs"
    else:
        found = "what was found of its mechanism is partly the same, or the data don't decide"
    joint = ", but " if all_same else "; "
    return f"The fine-tuned model is better; {found}{joint if reserve else ''}{reserve}." + (
        f" {harm}" if harm else ""
    )


BETTER = "Is the fine-tuned model better?"
SAME_HEADS = "Are the same heads at work?"
MECHANISM = "Is the circuit the mechanism?"
CIRCUIT_WORKS = "Does the base model's circuit do as well in the fine-tuned model as its own?"
SAME_FUNCTION = "Do the groups carry the same information?"
GAIN = "Can the gain be put down to one group?"

_MODEL_WORDS = {"base": "the base model", "tuned": "the fine-tuned model"}


def _better(results: Mapping[str, Any]) -> Finding:
    record = results["cmap"]["tuned_into_base"]
    low, high = _ends(record["gain_interval"])
    answer: Answer = "yes" if low > 0 else "no" if high < 0 else "can't tell"
    return Finding(
        BETTER,
        answer,
        f"On the same {record['into']['prompts']} prompts the base model answers "
        f"{_share(record['into'])} right and the fine-tuned one {_share(record['from'])}, a "
        f"difference of {record['gain']:+.3f} {_interval(record['gain_interval'])}.",
        # The figure of accuracies has other prompts; this one shows both models on these.
        "cmap_tuned_into_base",
    )


def _same_heads(results: Mapping[str, Any]) -> Finding:
    whole = results["same_circuit"]["whole"]
    shared = len(whole["shared"])
    p_value, jaccard = whole["p_value"], whole["jaccard"]
    again = (results["same_circuit"].get("ceiling") or {}).get("whole")
    twice = math.nan if again is None else read_number(again["jaccard"])
    if jaccard is None or math.isnan(jaccard):
        answer: Answer = "can't tell"
    elif p_value >= SIGNIFICANT:
        # Few shared heads say something only of circuits that are found twice alike.
        answer = "no" if jaccard < MOSTLY <= twice else "can't tell"
    elif jaccard >= MOSTLY:
        answer = "yes"
    else:
        answer = "can't tell" if jaccard >= twice else "partly"
    text = (
        f"The circuits, {whole['first']} heads in the base and {whole['second']} in the fine-tuned "
        f"model, share {shared}: a Jaccard index of {_number(jaccard)}. "
        f"Drawn at random within their layers they would share {whole['shared_by_chance']:.1f} "
        f"(p = {p_value:.2g}). "
        f"{_number(whole['precision'])} of the base model's heads are in the fine-tuned model's "
        f"circuit, and make up {_number(whole['recall'])} of it."
    )
    if again is not None:
        text += (
            f" The base model's circuit found once more from other prompts shares "
            f"{len(again['shared'])} of its heads, a Jaccard index of {_number(twice)}."
        )
    return Finding(
        SAME_HEADS,
        answer,
        text,
        "comparison",
        "the heads found are the same"
        if _same_circuits(results)
        else "the heads found are mostly the same",
    )


def _mechanism(results: Mapping[str, Any]) -> Finding:
    found = [_alone(name, results["models"][role]) for role, name in _MODEL_WORDS.items()]
    answer: Answer = next(a for a in WEAKEST_FIRST if any(each.answer == a for each in found))
    text = " ".join(each.text for each in found)
    return Finding(MECHANISM, answer, text, "faithfulness", _reserve(found, answer))


def _alone(name: str, model: Mapping[str, Any]) -> Alone:
    found = model["faithfulness"]
    low, high = _ends(found["interval"])
    share = f"{_number(found['faithfulness'])} {_interval(found['interval'])}"
    chance = _chance(found)
    controlled = chance is not None and low > chance
    removals, apart = _completeness(model)
    faithful = low >= FAITHFUL and controlled
    if high < HALF_FAITHFUL:
        answer: Answer = "no"
    elif not low >= HALF_FAITHFUL or not controlled:
        answer = "can't tell"
    elif faithful and not apart:
        answer = "yes"
    else:
        answer = "partly"
    text = (
        f"Run alone, the circuit of {name} keeps {share} of its accuracy; {_beside_chance(chance)}."
    )
    if "every_head" in found:
        # A reference, no bound: heads can hinder.
        every = found["every_head"]
        text += (
            f" All heads at the circuit's tokens keep {_number(every['faithfulness'])} "
            f"{_interval(every['interval'])}."
        )
    # A circuit that keeps little has little to lose.
    if removals and high >= HALF_FAITHFUL:
        text += (
            f" By {len(apart)} of {len(removals)} removals of the same heads, circuit and model "
            f"lose amounts more than {INCOMPLETE:g} apart beyond doubt"
        )
        text += f", most of all {_farthest(apart)}." if apart else "."
    return Alone(name, answer, share, faithful, text)


def _completeness(
    model: Mapping[str, Any],
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The removals that were tried, and those by which circuit and model lose different amounts."""
    if "completeness" not in model:
        return [], []
    # With nothing removed, nothing is lost.
    removals = [e for e in model["completeness"]["entries"] if e["kind"] != "whole"]
    apart: list[Mapping[str, Any]] = []
    for entry in removals:
        low, high = _ends(entry["difference_interval"])
        if low > INCOMPLETE or high < -INCOMPLETE:
            apart.append(entry)
    return removals, apart


def _farthest(apart: Sequence[Mapping[str, Any]]) -> str:
    entry = max(apart, key=lambda entry: abs(entry["difference"]))
    what = "some of its heads" if entry["kind"] == "random" else group_words(entry["removed"])
    return (
        f"without {what} the circuit loses {entry['circuit_loss']:.3f} and the model "
        f"{entry['model_loss']:.3f}, a difference of {entry['difference']:+.3f} "
        f"{_interval(entry['difference_interval'])}"
    )


def _reserve(found: Sequence[Alone], answer: Answer) -> str:
    """What the headline must add to the heads that were found; they come first in it."""
    if answer == "yes":
        return ""
    shares = " and ".join(f"{each.share} of the accuracy of {each.name}" for each in found)
    short = [each for each in found if each.answer == answer]
    where = " and ".join(each.name for each in short)
    if answer == "no":
        return (
            f"by themselves these heads carry only {shares}, so most of the mechanism of {where} "
            "lies outside them"
        )
    if answer == "can't tell":
        return (
            f"whether these heads are the mechanism of {where} can't be told: by themselves they "
            f"carry {shares}"
        )
    lacks = f"so part of the mechanism of {where} lies outside them"
    if all(each.faithful for each in short):
        return (
            f"though these heads by themselves carry {shares}, circuit and model lose different "
            f"amounts by the same heads, {lacks}"
        )
    return f"by themselves these heads carry {shares}, {lacks}"


def _same_circuit_works(results: Mapping[str, Any]) -> Finding:
    found = results["models"]["tuned"]["faithfulness"]
    other = found["other_circuits"]["base"]
    low, high = _ends(other["interval"])
    chance = _chance(found)
    identical = _same_circuits(results)
    difference = _difference(other, found)
    own = math.nan if found["faithfulness"] is None else found["faithfulness"]
    if math.isnan(low) or math.isnan(own) or chance is None:
        answer: Answer = "can't tell"
    elif high <= chance:
        answer = "no"
    elif low <= chance:
        answer = "can't tell"
    elif identical or difference[0] >= -(1 - AS_GOOD) * own:
        answer = "yes"
    elif difference[1] < 0:
        answer = "partly"
    else:
        answer = "can't tell"
    base_share = f"{_number(other['faithfulness'])} {_interval(other['interval'])}"
    if identical:
        text = (
            "The two circuits are the same heads, so that one does as well as the other by itself "
            f"is no measurement. Run alone inside the fine-tuned model, they keep {base_share} of "
            "its accuracy"
        )
    else:
        own_share = f"{_number(found['faithfulness'])} {_interval(found['interval'])}"
        text = (
            f"Run alone inside the fine-tuned model, the base model's circuit keeps {base_share} "
            f"of its accuracy, the fine-tuned model's own circuit {own_share}, a difference of "
            f"{sum(_values(other, -1, found)):+.2f} {_interval(difference)}"
        )
    return Finding(CIRCUIT_WORKS, answer, f"{text}; {_beside_chance(chance)}.", "faithfulness")


def _same_function(results: Mapping[str, Any]) -> Finding:
    base, tuned = results["models"]["base"], results["models"]["tuned"]
    base_kinds, tuned_kinds = main_information(base), main_information(tuned)
    same, other = 0, 0
    parts: list[str] = []
    for group in GROUPS:
        in_base, in_tuned = base_kinds.get(group), tuned_kinds.get(group)
        told = in_base is not None and in_tuned is not None
        agree = told and in_base == in_tuned
        same += agree
        other += told and not agree
        what = "the same" if agree else "another kind" if told else "can't tell"
        words = [_carried(model, group, brief=agree) for model in (base, tuned)]
        parts.append(
            f"{group_words(group)}: {what} ({words[0]} in the base model, {words[1]} in the "
            "fine-tuned one)"
        )
    if same == len(GROUPS):
        answer: Answer = "yes"
    elif same:
        answer = "partly"
    else:
        answer = "no" if other else "can't tell"
    text = "How often patching brings the target of a kind of information. " + "; ".join(parts)
    return Finding(SAME_FUNCTION, answer, text + ".", "tuned_carries_own_heads")


def _what_brings_the_gain(results: Mapping[str, Any]) -> Finding:
    record = results["cmap"]["tuned_into_base"]
    back = results["cmap"].get("base_into_tuned")
    control = results["cmap"].get("control_into_base")
    figure = "cmap_tuned_into_base"
    groups, whole = _patched(record)
    low, _ = _ends(record["gain_interval"])
    if not low > 0 or not groups:
        return Finding(
            GAIN, "can't tell", "There is no gain to be shown, so none to be shared out.", figure
        )
    best, named = groups[0], _one_group(groups, 1)
    bringing = [entry for entry in groups if _ends(entry["gain_interval"])[0] > 0]
    name = group_words(best["group"])
    answer: Answer = "partly"
    if not bringing:
        answer = "no"
        lead = "No group brings a gain by itself."
    elif not _apart(groups, 1):
        lead = (
            "These bring some of it, and the intervals overlap those of the first: "
            f"{_names(bringing)}."
        )
    elif named is None:
        lead = f"{name} brings the most, but not beyond doubt {MOST_OF_GAIN:g} of the gain."
    elif back is None:
        lead = f"{name} brings the most; the other direction was not measured."
    elif _one_group(_patched(back)[0], -1) != named:
        lead = f"{name} brings the most, but the other direction does not bear it out."
    elif control is not None and not _beyond_control(best, _patched(control)[0]):
        lead = f"{name} brings the most, but not beyond doubt more than the control model's heads."
    else:
        answer = "yes"
        lead = f"{name} brings the most, and costs the most in the other direction."
    shares = [_of_the_gain(entry) for entry in groups]
    if whole is not None:
        shares.append(_of_the_gain(whole))
    text = (
        f"{lead} Right answers of the base model with outputs of the fine-tuned model's heads, and "
        f"their share of the gain: {'; '.join(shares)}."
    )
    harm = _harm(groups)
    if harm:
        text += f" {harm}"
    if back is not None:
        costs = [_of_the_gain(entry) for entry in _patched(back)[0]]
        text += (
            " Right answers of the fine-tuned model with outputs of the base model's heads, and "
            f"the share of the gain that these cost: {'; '.join(costs)}."
        )
    if control is not None:
        beside = [f"{group_words(e['group'])} {_share(e)}" for e in _patched(control)[0]]
        text += f" With outputs of the control model's heads: {'; '.join(beside)}."
    return Finding(GAIN, answer, text, figure, harm)


def _patched(
    record: Mapping[str, Any],
) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
    """The groups' outputs patched, that with the largest share of the gain first, and the whole
    circuit's."""
    entries = {e["group"]: e for e in record["entries"] if e["patch"] == OUTPUT}
    sign = -1 if record["gain"] < 0 else 1
    groups = sorted(
        (entries[group] for group in GROUPS if group in entries),
        key=lambda entry: -sign * entry["gain"],
    )
    return groups, entries.get(WHOLE_CIRCUIT)


def _one_group(groups: Sequence[Mapping[str, Any]], sign: int) -> str | None:
    """The group that the gain can be put down to in one direction: it brings most of it, and more
    than every other. `sign` is -1 where what is brought is a loss."""
    if not groups or not _ends(groups[0]["recovered_interval"])[0] >= MOST_OF_GAIN:
        return None
    return groups[0]["group"] if _apart(groups, sign) else None


def _beyond_control(best: Mapping[str, Any], control: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a group brings more than the same heads of the control do."""
    return all(
        _ends(best["gain_interval"])[0] > _ends(entry["gain_interval"])[1]
        for entry in control
        if entry["group"] == best["group"]
    )


def _apart(groups: Sequence[Mapping[str, Any]], sign: int) -> bool:
    """Whether the first group changes the accuracy more than every other."""

    def ends(entry: Mapping[str, Any]) -> tuple[float, float]:
        low, high = sorted(sign * end for end in _ends(entry["gain_interval"]))
        return low, high

    return all(ends(groups[0])[0] > ends(entry)[1] for entry in groups[1:])


def _harm(groups: Sequence[Mapping[str, Any]]) -> str:
    """Names the groups that can't take the other model's outputs, if any."""
    harmed = [entry for entry in groups if _ends(entry["recovered_interval"])[1] < 0]
    return (
        f"Each by itself, outputs of {_names(harmed)} put into the base model lower its accuracy."
        if harmed
        else ""
    )


def _of_the_gain(entry: Mapping[str, Any]) -> str:
    return (
        f"{group_words(entry['group'])} {_share(entry)}, {_number(entry['recovered'])} "
        f"{_interval(entry['recovered_interval'])}"
    )


def _names(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(group_words(entry["group"]) for entry in entries)


def _same_circuits(results: Mapping[str, Any]) -> bool:
    """Whether both circuits have the same heads at the same tokens."""
    whole = results["same_circuit"]["whole"]
    return 0 < len(whole["shared"]) == whole["first"] == whole["second"]


def _chance(found: Mapping[str, Any]) -> float | None:
    """The faithfulness of the best random circuit; None if none was drawn."""
    control, whole = found["random"], found["model"]["accuracy"]
    return control["highest"] / whole if control["accuracies"] and whole else None


def _beside_chance(chance: float | None) -> str:
    if chance is None:
        return "there is no random circuit to set beside it"
    return f"the best random circuit reaches {chance:.3f}"


def _values(one: Mapping[str, Any], sign: int, other: Mapping[str, Any]) -> tuple[float, float]:
    first, second = one["faithfulness"], other["faithfulness"]
    return (
        math.nan if first is None else first,
        math.nan if second is None else sign * second,
    )


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Interval of one faithfulness less another, from the intervals of both (Zou and Donner 2008).
    It takes them to be independent; on the same prompts it is rather too wide than too narrow."""
    first, second = _values(one, 1, other)
    (low, high), (other_low, other_high) = _ends(one["interval"]), _ends(other["interval"])
    difference = first - second
    return (
        difference - math.hypot(first - low, other_high - second),
        difference + math.hypot(high - first, second - other_low),
    )


def _entries(model: Mapping[str, Any], group: str) -> dict[str, Mapping[str, Any]]:
    """What patching a group's own heads brings, by kind of information, most often first."""
    entries = [
        entry
        for entry in model["information"]["own"]["entries"]
        if entry["group"] == group and entry["desideratum"] in MAIN_DESIDERATA
    ]
    entries.sort(key=lambda entry: -entry["accuracy"])
    return {entry["desideratum"]: entry for entry in entries}


def _carried(model: Mapping[str, Any], group: str, *, brief: bool) -> str:
    """The kind that is brought most often, and unless `brief` the others and the run with nothing
    patched, which it has to be apart from."""
    entries, unpatched = _entries(model, group), _entries(model, UNPATCHED)
    if not entries:
        return "nothing measured"
    words = [f"{information_words(kind)} {_share(entry)}" for kind, entry in entries.items()]
    first = next(iter(entries))
    if brief:
        return words[0]
    if first in unpatched:
        words[0] += f" and {_share(unpatched[first])} unpatched"
    return ", ".join(words)


def _share(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:.3f} {_interval(found['interval'])}"


def _number(value: float | None) -> str:
    return "an undefined share" if value is None or value != value else f"{value:.2f}"


def _ends(bounds: Any) -> tuple[float, float]:
    """Both ends of an interval; NaN, which is neither above nor below anything, for an interval
    that is not defined."""
    low, high = map(read_number, bounds)
    return (math.nan, math.nan) if math.isnan(low) or math.isnan(high) else (low, high)


def _interval(bounds: Any) -> str:
    low, high = _ends(bounds)
    if math.isnan(low) or math.isnan(high):
        return "[not defined]"
    return f"[{low:.3f}, {high:.3f}]"
