"""The answers: yes, no, partly or can't tell, by rules that were tried on pairs whose truth is
known (docs/trust.md)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tl_entity.errors import InputError
from tl_entity.methods.pair_evidence import Alone, PairEvidence, Share
from tl_entity.results import Result
from tl_entity.stats import NO_INTERVAL, Changes, GroupChange, Interval

if TYPE_CHECKING:
    import pandas as pd

Answer = Literal["yes", "partly", "no", "can't tell"]
"""What can be said to a question."""

BETTER = "Is the fine-tune better?"
ABILITY = "Does it find the right one of the choices more often?"
MECHANISM = "Was a faithful mechanism found in both?"
NODES = "Do the same nodes do the work?"
EDGES = "Are their inputs from the same nodes?"
INFORMATION = "Do they carry the same information?"
GAIN = "Does the gain lie in the weights of attention heads?"
ROBUST = "Do both halves of the prompts say the same of the nodes?"

QUESTIONS: tuple[str, ...] = (
    BETTER,
    ABILITY,
    MECHANISM,
    NODES,
    EDGES,
    INFORMATION,
    GAIN,
    ROBUST,
)
"""All questions, in the order in which they are answered."""

HEADS = "attention heads"
"""The part of the weights that `GAIN` asks about."""

PARTS_NAMED = 3
"""So many parts are named in a sentence."""


@dataclass(frozen=True)
class Rules:
    """What the answers go by. `lost` and `new` are shares of the first and second model's effects
    by parts that do at most a third as much in the other.

    Attributes:
        no_gain: a gain in accuracy that is surely below this is none.
        faithful: a mechanism must surely keep this share of accuracy and agree as often.
        changed: lost or new must surely be more than this for nodes, or what is carried, to have
            changed.
        same: lost and new must surely be less than this for nodes, inputs, or what is carried, to
            be the same.
        beyond_chance: below this p-value, what changed nodes have in common is no chance. Then they
            are partly the same, else not.
        group_weight: inputs with less than this share of all effects are not looked at by
            themselves.
        group_changed: within one input lost or new must surely, all looked at together, be more
            than this for it to have changed.
        group_open: if one input may have changed by more than this, it can't be told.
        mostly: lost and new, over all inputs, must surely be more than this for them not to be the
            same; otherwise they are so in part.
        gain_share: of the gain, beyond which it lies mostly there.
        halves: if halves of the prompts surely differ by less than this, they say the same.
    """

    no_gain: float = 0.05
    faithful: float = 0.7
    changed: float = 0.3
    same: float = 0.5
    beyond_chance: float = 0.05
    group_weight: float = 0.04
    group_changed: float = 0.2
    group_open: float = 0.9
    mostly: float = 0.4
    gain_share: float = 0.5
    halves: float = 0.35

    def __post_init__(self) -> None:
        if not all(0 < getattr(self, name) < 1 for name in self.__dataclass_fields__):
            raise InputError("Every rule is a share or a p-value, above 0 and below 1.")


@dataclass(frozen=True)
class Answered:
    """A question and its answer.

    Attributes:
        question: what was asked.
        answer: in a word.
        sentence: in plain words; where the answer is "partly", it names the part.
        value: the number that the answer rests on; NaN if there is none.
        interval: its 95 % interval.
        value_name: what the number is.
        reason: why it can't be told; empty if it can.
    """

    question: str
    answer: Answer
    sentence: str
    value: float = math.nan
    interval: Interval = NO_INTERVAL
    value_name: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.question} {self.answer.capitalize()}. {self.sentence}"


@dataclass(frozen=True)
class Judgement(Result):
    """The answers on a base and its fine-tune.

    Attributes:
        answers: one for each question.
        evidence: what they rest on.
        rules: what they go by.
    """

    answers: tuple[Answered, ...]
    evidence: PairEvidence
    rules: Rules

    def __getitem__(self, question: str) -> Answered:
        """The answer to one question.

        Raises:
            KeyError: if it was not asked.
        """
        for answered in self.answers:
            if answered.question == question:
                return answered
        raise KeyError(question)

    def __str__(self) -> str:
        return " ".join(map(str, self.answers))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a question: the answer, the sentence, the number with its interval, and the
        reason if it can't be told."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "question": a.question,
                    "answer": a.answer,
                    "sentence": a.sentence,
                    "of": a.value_name,
                    "value": a.value,
                    "low": a.interval.low,
                    "high": a.interval.high,
                    "reason": a.reason,
                }
                for a in self.answers
            ]
        )

    def table(self, n: int | None = None) -> "pd.DataFrame":
        """Question, answer, and the number with its interval."""
        rows = self.to_dataframe().drop(columns=["sentence", "reason"])
        return rows if n is None else rows.head(n)


def judge(evidence: PairEvidence, rules: Rules) -> Judgement:
    """Answer all questions from what was measured."""
    asked: tuple[Callable[[PairEvidence, Rules], Answered], ...] = (
        _better,
        _ability,
        _mechanism,
        _nodes,
        _edges,
        _information,
        _gain,
        _robust,
    )
    return Judgement(tuple(ask(evidence, rules) for ask in asked), evidence, rules)


def _unknown(question: str, reason: str, name: str = "") -> Answered:
    sentence = f"It can't be told: {reason[:1].lower()}{reason[1:].rstrip('.')}."
    return Answered(question, "can't tell", sentence, value_name=name, reason=reason)


def _of_share(question: str, share: Share, rules: Rules, what: str) -> Answered:
    low, high = share.interval
    size = f"{abs(share.difference):.2f}"
    if low > 0:
        answer, sentence = "yes", f"It {what} more often, by {size} of the prompts."
    elif high < 0:
        answer, sentence = "no", f"It {what} less often, by {size} of the prompts."
    elif high < rules.no_gain:
        answer, sentence = "no", f"It {what} as often; a gain of {rules.no_gain:g} is excluded."
    else:
        reason = f"the gain may be nothing or as much as {high:.2f}"
        return Answered(
            question,
            "can't tell",
            f"It can't be told: {reason}.",
            share.difference,
            share.interval,
            "gain",
            reason,
        )
    return Answered(question, answer, sentence, share.difference, share.interval, "gain")  # type: ignore[arg-type]


def _better(evidence: PairEvidence, rules: Rules) -> Answered:
    return _of_share(BETTER, evidence.better, rules, "answers right")


def _ability(evidence: PairEvidence, rules: Rules) -> Answered:
    if evidence.ability is None:
        return _unknown(ABILITY, evidence.missing["ability"])
    return _of_share(ABILITY, evidence.ability, rules, "puts the right choice ahead of the others")


def _mechanism(evidence: PairEvidence, rules: Rules) -> Answered:
    name = "faithfulness of the weaker"
    for key, alone in (("base", evidence.base_alone), ("tuned", evidence.tuned_alone)):
        if alone is None:
            return _unknown(MECHANISM, evidence.missing[f"{key} mechanism"], name)
    assert evidence.base_alone is not None and evidence.tuned_alone is not None
    both = (evidence.base_alone, evidence.tuned_alone)
    weaker = min(both, key=lambda alone: min(_lower(alone)))
    low = min(_lower(weaker))
    high = min(weaker.faithfulness_interval.high, weaker.agreement_interval.high)
    said = (
        f"The weaker keeps {weaker.faithfulness:.2f} of the accuracy with {weaker.n_nodes} of "
        f"{weaker.n_all} nodes."
    )
    numbers = (weaker.faithfulness, weaker.faithfulness_interval, name)
    if low >= rules.faithful:
        return Answered(MECHANISM, "yes", said, *numbers)
    if high < rules.faithful:
        return Answered(MECHANISM, "no", said, *numbers)
    reason = f"the weaker may agree with its model less than {rules.faithful:g} of the time"
    return Answered(MECHANISM, "can't tell", f"{said[:-1]}, but {reason}.", *numbers, reason)


def _lower(alone: Alone) -> Interval:
    return Interval(alone.faithfulness_interval.low, alone.agreement_interval.low)


def _most(changes: Changes) -> tuple[float, Interval, str]:
    """What is lost or new, whichever is more."""
    if changes.lost >= changes.new:
        return changes.lost, changes.lost_interval, "share lost"
    return changes.new, changes.new_interval, "share new"


def _nodes(evidence: PairEvidence, rules: Rules) -> Answered:
    found = evidence.nodes
    if found is None:
        return _unknown(NODES, evidence.missing["nodes"])
    changes = found.changes
    most, interval, name = _most(changes)
    highest = max(changes.lost_interval.high, changes.new_interval.high)
    lowest = max(changes.lost_interval.low, changes.new_interval.low)
    numbers = (most, interval, name)
    if lowest > rules.changed:
        if found.p_value >= rules.beyond_chance:
            return Answered(
                NODES,
                "no",
                f"Of the work, {most:.2f} is by nodes that hardly do any in the other model; what "
                "the two have in common is no more than chance.",
                *numbers,
            )
        which = [str(n.node) for n in found.nodes if n.p_value < rules.beyond_chance]
        return Answered(
            NODES,
            "partly",
            f"Of the work, {most:.2f} is by nodes that hardly do any in the other model"
            f"{_named(which)}; the rest is by the same ones.",
            *numbers,
        )
    if highest < rules.same:
        return Answered(
            NODES,
            "yes",
            f"Of the work, {most:.2f} is by nodes that hardly do any in the other model.",
            *numbers,
        )
    reason = f"of the work, anything up to {highest:.2f} may be by other nodes"
    return Answered(NODES, "can't tell", f"It can't be told: {reason}.", *numbers, reason)


def _named(parts: list[str]) -> str:
    if not parts:
        return ""
    more = "" if len(parts) <= PARTS_NAMED else " and others"
    return f", such as {', '.join(parts[:PARTS_NAMED])}{more}"


def changed_groups(changes: Changes, rules: Rules) -> list[GroupChange]:
    """The groups of enough weight in which surely something changed, the heaviest first."""
    return sorted(
        (
            group
            for group in changes.groups
            if group.weight >= rules.group_weight
            and max(group.lost_interval.low, group.new_interval.low) > rules.group_changed
        ),
        key=lambda group: -group.weight,
    )


def _edges(evidence: PairEvidence, rules: Rules) -> Answered:
    if evidence.edges is None:
        return _unknown(EDGES, evidence.missing["edges"])
    changes, changed = evidence.edges, changed_groups(evidence.edges, rules)
    may_have = [
        group.name
        for group in changes.groups
        if group.weight >= rules.group_weight
        and max(group.lost_interval.high, group.new_interval.high) > rules.group_open
    ]
    most, interval, name = _most(changes)
    said = f"Of what reaches the nodes, {most:.2f} is from others than in the other model"
    numbers = (most, interval, name)
    if min(changes.lost_interval.low, changes.new_interval.low) > rules.mostly:
        return Answered(EDGES, "no", f"{said}.", *numbers)
    if changed:
        which = [group.name for group in changed]
        return Answered(EDGES, "partly", f"{said}{_named(which)}.", *numbers)
    highest = max(changes.lost_interval.high, changes.new_interval.high)
    if highest < rules.same and not may_have:
        return Answered(EDGES, "yes", f"{said}.", *numbers)
    reason = f"of what reaches the nodes, anything up to {highest:.2f} may be from others"
    if may_have and highest < rules.same:
        reason = f"{may_have[0]} may be from others wholly"
    return Answered(EDGES, "can't tell", f"It can't be told: {reason}.", *numbers, reason)


def _information(evidence: PairEvidence, rules: Rules) -> Answered:
    changes = evidence.information
    if changes is None:
        return _unknown(INFORMATION, evidence.missing["information"])
    most, interval, name = _most(changes)
    numbers = (most, interval, name)
    if min(changes.lost_interval.low, changes.new_interval.low) > rules.mostly:
        sentence = (
            f"Of what is carried, {most:.2f} is of a kind that the other model hardly carries."
        )
        return Answered(INFORMATION, "no", sentence, *numbers)
    if max(changes.lost_interval.low, changes.new_interval.low) > rules.changed:
        groups = sorted(changes.groups, key=lambda g: -g.weight * max(g.lost, g.new))
        sentence = f"Another kind is carried at {groups[0].name}; over all, {most:.2f} is other."
        return Answered(INFORMATION, "partly", sentence, *numbers)
    highest = max(changes.lost_interval.high, changes.new_interval.high)
    if highest < rules.same:
        sentence = (
            f"Of what is carried, {most:.2f} is of a kind that the other model hardly carries."
        )
        return Answered(INFORMATION, "yes", sentence, *numbers)
    reason = f"of what is carried, anything up to {highest:.2f} may be other"
    return Answered(INFORMATION, "can't tell", f"It can't be told: {reason}.", *numbers, reason)


def _gain(evidence: PairEvidence, rules: Rules) -> Answered:
    name = f"share of the gain in {HEADS}"
    if evidence.gain is None:
        return _unknown(GAIN, evidence.missing["gain"], name)
    if not evidence.gain.parts:
        return _unknown(GAIN, "There is no gain or loss to be shared out on these prompts", name)
    share, interval = evidence.gain.parts[HEADS]
    largest = max(evidence.gain.parts.items(), key=lambda item: item[1][0])
    said = f"Most of it, {largest[1][0]:.2f}, lies in {largest[0]}."
    if interval.low > rules.gain_share:
        return Answered(GAIN, "yes", said, share, interval, name)
    if interval.high < rules.gain_share:
        return Answered(GAIN, "no", said, share, interval, name)
    reason = f"the heads' share may be {interval.low:.2f} or {interval.high:.2f}"
    return Answered(
        GAIN, "can't tell", f"It can't be told: {reason}.", share, interval, name, reason
    )


def _robust(evidence: PairEvidence, rules: Rules) -> Answered:
    name = "difference of the halves"
    if evidence.nodes is None:
        return _unknown(ROBUST, evidence.missing["nodes"], name)
    changes = evidence.nodes.changes
    low, high = changes.difference_interval
    numbers = (changes.difference, changes.difference_interval, name)
    if -rules.halves < low and high < rules.halves:
        sentence = f"What they call lost or new differs by {abs(changes.difference):.2f}."
        return Answered(ROBUST, "yes", sentence, *numbers)
    if low > 0 or high < 0:
        sentence = f"What they call lost or new differs by {abs(changes.difference):.2f}."
        return Answered(ROBUST, "no", sentence, *numbers)
    reason = f"the halves may differ by {max(-low, high):.2f}"
    return Answered(ROBUST, "can't tell", f"It can't be told: {reason}.", *numbers, reason)
