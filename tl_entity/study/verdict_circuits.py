"""The verdict on circuits: are they the mechanism, and does the base's do as well in the
fine-tune?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tl_entity.methods.circuits import Faithfulness
from tl_entity.methods.compare import Comparison
from tl_entity.methods.completeness import Completeness, Removal
from tl_entity.stats import Interval
from tl_entity.study.experiment_results import Alone
from tl_entity.study.mechanism_figures import group_words
from tl_entity.study.results import Answer, Finding, ModelFindings
from tl_entity.study.verdict_rules import (
    AS_GOOD,
    CIRCUIT_WORKS,
    FAITHFUL,
    HALF_FAITHFUL,
    INCOMPLETE,
    MECHANISM,
    ends,
    interval_text,
    ratio,
)

WEAKEST_FIRST: tuple[Answer, ...] = ("no", "can't tell", "partly", "yes")
"""What is claimed of two models is claimed as far as it holds in the one where it holds less."""


@dataclass(frozen=True)
class Judged:
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


def judge_circuits(base: ModelFindings, tuned: ModelFindings) -> Finding:
    """Whether each model's circuit is its mechanism."""
    found = [
        _judge(name, alone.asked, model.completeness)
        for name, model in (("the base model", base), ("the fine-tuned model", tuned))
        if (alone := model.faithfulness) is not None
    ]
    answer: Answer = next(a for a in WEAKEST_FIRST if any(each.answer == a for each in found))
    text = " ".join(each.text for each in found)
    return Finding(MECHANISM, answer, text, "faithfulness", _reserve(found, answer))


def judge_other_circuit(tuned: ModelFindings, *, identical: bool) -> Finding:
    """Whether the base's circuit does as well in the fine-tune as its own.

    Args:
        tuned: the fine-tune.
        identical: whether the two circuits are the same.
    """
    assert tuned.faithfulness is not None
    alone = tuned.faithfulness.asked
    own, other = alone.circuit, alone.others["base"]
    low, high = ends(other.interval)
    chance = _chance(alone)
    difference = _difference(other, own)
    if math.isnan(low) or math.isnan(own.value) or chance is None:
        answer: Answer = "can't tell"
    elif high <= chance:
        answer = "no"
    elif low <= chance:
        answer = "can't tell"
    elif identical or difference.low >= -(1 - AS_GOOD) * own.value:
        answer = "yes"
    elif difference.high < 0:
        answer = "partly"
    else:
        answer = "can't tell"
    if identical:
        text = (
            "The two circuits are the same heads, so that one does as well as the other by itself "
            f"is no measurement. Run alone inside the fine-tuned model, they keep {ratio(other)} "
            "of its accuracy"
        )
    else:
        text = (
            f"Run alone inside the fine-tuned model, the base model's circuit keeps {ratio(other)} "
            f"of its accuracy, the fine-tuned model's own circuit {ratio(own)}, a difference of "
            f"{other.value - own.value:+.2f} {interval_text(difference)}"
        )
    return Finding(CIRCUIT_WORKS, answer, f"{text}; {_beside_chance(chance)}.", "faithfulness")


def same_circuits(same: Comparison) -> bool:
    """Whether both circuits have the same heads at the same tokens."""
    return bool(same.whole.shared) and not same.whole.lost and not same.whole.new


def _judge(name: str, alone: Alone, completeness: Completeness | None) -> Judged:
    found = alone.circuit
    low, high = ends(found.interval)
    chance = _chance(alone)
    controlled = chance is not None and low > chance
    # With nothing removed, nothing is lost.
    removals = [] if completeness is None else [*completeness.groups, *completeness.random]
    apart = [r for r in removals if r.interval.low > INCOMPLETE or r.interval.high < -INCOMPLETE]
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
        f"Run alone, the circuit of {name} keeps {ratio(found)} of its accuracy; "
        f"{_beside_chance(chance)}."
        # A reference, no bound: heads can hinder.
        f" All heads at the circuit's tokens keep {ratio(alone.every_head)}."
    )
    # A circuit that keeps little has little to lose.
    if removals and high >= HALF_FAITHFUL:
        text += (
            f" By {len(apart)} of {len(removals)} removals of the same heads, circuit and model "
            f"lose amounts more than {INCOMPLETE:g} apart beyond doubt"
        )
        text += f", most of all {_farthest(apart)}." if apart else "."
    return Judged(name, answer, ratio(found), faithful, text)


def _farthest(apart: Sequence[Removal]) -> str:
    found = max(apart, key=lambda removal: abs(removal.difference))
    drawn = found.name.startswith("random")
    return (
        f"without {'some of its heads' if drawn else group_words(found.name)} the circuit loses "
        f"{found.circuit_loss:.3f} and the model {found.model_loss:.3f}, a difference of "
        f"{found.difference:+.3f} {interval_text(found.interval)}"
    )


def _reserve(found: Sequence[Judged], answer: Answer) -> str:
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


def _chance(alone: Alone) -> float | None:
    """The faithfulness of the best random circuit; None if none was drawn."""
    whole = alone.circuit.of_model.accuracy
    return max(alone.accuracies) / whole if alone.accuracies and whole else None


def _beside_chance(chance: float | None) -> str:
    if chance is None:
        return "there is no random circuit to set beside it"
    return f"the best random circuit reaches {chance:.3f}"


def _difference(one: Faithfulness, other: Faithfulness) -> Interval:
    """Interval of one faithfulness less another, from the intervals of both (Zou and Donner 2008).
    It takes them to be independent; on the same prompts it is rather too wide than too narrow."""
    (low, high), (other_low, other_high) = ends(one.interval), ends(other.interval)
    difference = one.value - other.value
    return Interval(
        difference - math.hypot(one.value - low, other_high - other.value),
        difference + math.hypot(high - one.value, other.value - other_low),
    )
