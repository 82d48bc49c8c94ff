"""The verdict on what brings the gain."""

from collections.abc import Sequence

from tl_entity.methods.cmap import OUTPUT, WHOLE_CIRCUIT, CrossModelPatching, Patched
from tl_entity.stats import Interval
from tl_entity.study.mechanism_figures import group_words
from tl_entity.study.results import Answer, Finding
from tl_entity.study.settings import GROUPS
from tl_entity.study.verdict_rules import GAIN, MOST_OF_GAIN, ends, interval_text, number, share

FIGURE = "cmap_tuned_into_base"


def judge_gain(
    found: CrossModelPatching,
    back: CrossModelPatching | None,
    control: CrossModelPatching | None,
) -> Finding:
    """Whether the gain can be put down to one group.

    Args:
        found: heads of the fine-tune in the base.
        back: the other direction.
        control: heads of the control in the base.
    """
    groups, whole = _patched(found)
    if not ends(found.gain_interval).low > 0 or not groups:
        text = "There is no gain to be shown, so none to be shared out."
        return Finding(GAIN, "can't tell", text, FIGURE)
    answer, lead = _answer(groups, back, control)
    shares = [_of_the_gain(entry) for entry in (*groups, *([] if whole is None else [whole]))]
    harm = _harm(groups)
    text = (
        f"{lead} Right answers of the base model with outputs of the fine-tuned model's heads, and "
        f"their share of the gain: {'; '.join(shares)}."
    )
    if harm:
        text += f" {harm}"
    if back is not None:
        costs = [_of_the_gain(entry) for entry in _patched(back)[0]]
        text += (
            " Right answers of the fine-tuned model with outputs of the base model's heads, and "
            f"the share of the gain that these cost: {'; '.join(costs)}."
        )
    if control is not None:
        beside = [f"{group_words(e.group)} {share(e.evaluation)}" for e in _patched(control)[0]]
        text += f" With outputs of the control model's heads: {'; '.join(beside)}."
    return Finding(GAIN, answer, text, FIGURE, harm)


def _answer(
    groups: Sequence[Patched],
    back: CrossModelPatching | None,
    control: CrossModelPatching | None,
) -> tuple[Answer, str]:
    """The answer, and the sentence that gives its reason."""
    best, named = groups[0], _one_group(groups, 1)
    bringing = [entry for entry in groups if ends(entry.gain_interval).low > 0]
    name = group_words(best.group)
    if not bringing:
        return "no", "No group brings a gain by itself."
    if not _apart(groups, 1):
        return "partly", (
            "These bring some of it, and the intervals overlap those of the first: "
            f"{_names(bringing)}."
        )
    if named is None:
        return "partly", (
            f"{name} brings the most, but not beyond doubt {MOST_OF_GAIN:g} of the gain."
        )
    if back is None:
        return "partly", f"{name} brings the most; the other direction was not measured."
    if _one_group(_patched(back)[0], -1) != named:
        return "partly", f"{name} brings the most, but the other direction does not bear it out."
    if control is not None and not _beyond_control(best, _patched(control)[0]):
        return "partly", (
            f"{name} brings the most, but not beyond doubt more than the control model's heads."
        )
    return "yes", f"{name} brings the most, and costs the most in the other direction."


def _patched(found: CrossModelPatching) -> tuple[list[Patched], Patched | None]:
    """The groups' outputs patched, that with the largest share of the gain first, and the whole
    circuit's."""
    entries = {entry.group: entry for entry in found.entries if entry.patch == OUTPUT}
    sign = -1 if found.gain < 0 else 1
    groups = sorted(
        (entries[group] for group in GROUPS if group in entries),
        key=lambda entry: -sign * entry.gain,
    )
    return groups, entries.get(WHOLE_CIRCUIT)


def _one_group(groups: Sequence[Patched], sign: int) -> str | None:
    """The group that the gain can be put down to in one direction: it brings most of it, and more
    than every other. `sign` is -1 where what is brought is a loss."""
    if not groups or not ends(groups[0].recovered_interval).low >= MOST_OF_GAIN:
        return None
    return groups[0].group if _apart(groups, sign) else None


def _beyond_control(best: Patched, control: Sequence[Patched]) -> bool:
    """Whether a group brings more than the same heads of the control do."""
    return all(
        ends(best.gain_interval).low > ends(entry.gain_interval).high
        for entry in control
        if entry.group == best.group
    )


def _apart(groups: Sequence[Patched], sign: int) -> bool:
    """Whether the first group changes the accuracy more than every other."""

    def bounds(entry: Patched) -> Interval:
        return Interval(*sorted(sign * end for end in ends(entry.gain_interval)))

    return all(bounds(groups[0]).low > bounds(entry).high for entry in groups[1:])


def _harm(groups: Sequence[Patched]) -> str:
    """Names the groups that can't take the other model's outputs, if any."""
    harmed = [entry for entry in groups if ends(entry.recovered_interval).high < 0]
    return (
        f"Each by itself, outputs of {_names(harmed)} put into the base model lower its accuracy."
        if harmed
        else ""
    )


def _of_the_gain(entry: Patched) -> str:
    return (
        f"{group_words(entry.group)} {share(entry.evaluation)}, {number(entry.recovered)} "
        f"{interval_text(entry.recovered_interval)}"
    )


def _names(entries: Sequence[Patched]) -> str:
    return ", ".join(group_words(entry.group) for entry in entries)
