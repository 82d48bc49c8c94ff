"""The answer at the end: same heads, same function, and what brings the gain.

Every sentence is made from the results of the methods, says their intervals, and names the figure
that shows them. Where intervals overlap what they would have to be apart from, it says that the
data can't tell.
"""

import math
from collections.abc import Sequence

from tl_entity.methods.activation_patching import UNPATCHED, Carried
from tl_entity.methods.cmap import CrossModelPatching
from tl_entity.methods.compare import Comparison
from tl_entity.study.mechanism_figures import group_words, information_words, main_information
from tl_entity.study.results import Answer, Finding, ModelFindings, Study
from tl_entity.study.settings import GROUPS
from tl_entity.study.verdict_circuits import judge_circuits, judge_other_circuit, same_circuits
from tl_entity.study.verdict_gain import judge_gain
from tl_entity.study.verdict_rules import (
    BETTER,
    CIRCUIT_WORKS,
    GAIN,
    MECHANISM,
    MOSTLY,
    SAME_FUNCTION,
    SAME_HEADS,
    SIGNIFICANT,
    ends,
    interval_text,
    number,
    share,
)
from tl_entity.study.verdict_rules import RULES as RULES
from tl_entity.tasks.desiderata import MAIN_DESIDERATA


def verdict(study: Study) -> tuple[Finding, ...]:
    """The findings on a base model and its fine-tune; none for a single model, for models whose
    heads can't be compared, or if an experiment was left out that they rest on."""
    models = study.models.values()
    complete = all(model.faithfulness and model.information for model in models)
    if study.same_circuit is None or not study.cmap or not complete:
        return ()
    base, tuned = study.models["base"], study.models["tuned"]
    transfers = {name: transfer.found for name, transfer in study.cmap.items()}
    return (
        _better(transfers["tuned_into_base"]),
        _same_heads(study.same_circuit),
        judge_circuits(base, tuned),
        judge_other_circuit(tuned, identical=same_circuits(study.same_circuit)),
        _same_function(base, tuned),
        judge_gain(
            transfers["tuned_into_base"],
            transfers.get("base_into_tuned"),
            transfers.get("control_into_base"),
        ),
    )


def headline(findings: Sequence[Finding]) -> str:
    """What it comes to, for the top of the page. Nothing is said to be the same mechanism that
    does not do most of the work, or whose groups can't take the other model's outputs."""
    if not findings:
        return ""
    answers = {finding.question: finding.answer for finding in findings}
    briefs = {finding.question: finding.brief for finding in findings}
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


def _better(found: CrossModelPatching) -> Finding:
    low, high = ends(found.gain_interval)
    return Finding(
        BETTER,
        "yes" if low > 0 else "no" if high < 0 else "can't tell",
        f"On the same {len(found.base)} prompts the base model answers "
        f"{share(found.base)} right and the fine-tuned one {share(found.tuned)}, a "
        f"difference of {found.gain:+.3f} {interval_text(found.gain_interval)}.",
        # The figure of accuracies has other prompts; this one shows both models on these.
        "cmap_tuned_into_base",
    )


def _same_heads(same: Comparison) -> Finding:
    whole, shared = same.whole, len(same.whole.shared)
    jaccard, again = whole.jaccard, same.ceiling[-1] if same.ceiling else None
    twice = math.nan if again is None else again.jaccard
    if math.isnan(jaccard):
        answer: Answer = "can't tell"
    elif whole.p_value >= SIGNIFICANT:
        # Few shared heads say something only of circuits that are found twice alike.
        answer = "no" if jaccard < MOSTLY <= twice else "can't tell"
    elif jaccard >= MOSTLY:
        answer = "yes"
    else:
        answer = "can't tell" if jaccard >= twice else "partly"
    text = (
        f"The circuits, {shared + len(whole.lost)} heads in the base and "
        f"{shared + len(whole.new)} in the fine-tuned "
        f"model, share {shared}: a Jaccard index of {number(jaccard)}. "
        f"Drawn at random within their layers they would share {whole.chance.expected:.1f} "
        f"(p = {whole.p_value:.2g}). "
        f"{number(whole.precision)} of the base model's heads are in the fine-tuned model's "
        f"circuit, and make up {number(whole.recall)} of it."
    )
    if again is not None:
        text += (
            f" The base model's circuit found once more from other prompts shares "
            f"{len(again.shared)} of its heads, a Jaccard index of {number(twice)}."
        )
    mostly = "" if same_circuits(same) else "mostly "
    return Finding(SAME_HEADS, answer, text, "comparison", f"the heads found are {mostly}the same")


def _same_function(base: ModelFindings, tuned: ModelFindings) -> Finding:
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


def _entries(model: ModelFindings, group: str) -> dict[str, Carried]:
    """What patching a group's own heads brings, by kind of information, most often first."""
    entries = [
        entry
        for entry in (model.information.found["own"].entries if model.information else ())
        if entry.group == group and entry.desideratum in MAIN_DESIDERATA
    ]
    entries.sort(key=lambda entry: -entry.accuracy)
    return {entry.desideratum: entry for entry in entries}


def _carried(model: ModelFindings, group: str, *, brief: bool) -> str:
    """The kind that is brought most often, and unless `brief` the others and the run with nothing
    patched, which it has to be apart from."""
    entries, unpatched = _entries(model, group), _entries(model, UNPATCHED)
    if not entries:
        return "nothing measured"
    words = [f"{information_words(kind)} {share(entry)}" for kind, entry in entries.items()]
    first = next(iter(entries))
    if brief:
        return words[0]
    if first in unpatched:
        words[0] += f" and {share(unpatched[first])} unpatched"
    return ", ".join(words)
