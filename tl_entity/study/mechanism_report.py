"""The report's sections on what the heads do, and its last page, the verdict."""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from tl_entity.study.html import figure_element, frame_table, table
from tl_entity.study.mechanism_figures import group_words, information_words
from tl_entity.study.published import PUBLISHED_CMAP, PUBLISHED_CMAP_SIZES, PUBLISHED_KNOCKOUT
from tl_entity.study.results import Finding
from tl_entity.study.settings import GROUPS
from tl_entity.study.tables import AS_PUBLISHED, CONTROL
from tl_entity.study.verdict import RULES, headline
from tl_entity.tasks.desiderata import DESIDERATA

if TYPE_CHECKING:
    import pandas as pd

Section = tuple[str, str, str]
"""Anchor, heading, content."""


def mechanism_sections(
    content: dict[str, Any], figures: dict[str, go.Figure], tables: "Mapping[str, pd.DataFrame]"
) -> list[Section]:
    """What the groups carry, what the circuit loses, where information passes, what is brought from
    the other model."""
    roles = list(content["models"])
    made = next(iter(content["models"].values()))
    sections: list[Section] = []
    if "information" in made:
        sections.append(
            ("information", "What the groups carry", _information(content, figures, tables))
        )
    if "completeness" in made:
        sections.append(("completeness", "Completeness", _completeness(roles, figures, tables)))
    if "minimality" in made:
        sections.append(("minimality", "Minimality", _minimality(content, figures, tables)))
    if "knockout" in made:
        sections.append(("knockout", "Where information passes", _knockout(roles, figures, tables)))
    if content["cmap"]:
        sections.append(("cmap", "Heads of the other model", _cmap(content, figures, tables)))
    if AS_PUBLISHED in content["cmap"]:
        shown = _as_published(content, figures, tables)
        sections.append(("published_cmap", "Heads of the fine-tune's own circuit", shown))
    if CONTROL in content["cmap"]:
        sections.append(("control", "Heads of a control model", _control(content, figures, tables)))
    return sections


def verdict_section(content: dict[str, Any]) -> str:
    """Every question with its answer, the numbers, and where they are shown."""
    findings = content["verdict"]
    rows = [
        [
            escape(finding["question"]),
            f"<b>{escape(finding['answer'])}</b>",
            f'{escape(finding["text"])} <a href="#figure-{finding["figure"]}">figure</a>',
        ]
        for finding in findings
    ]
    return (
        f'<p class="lead">{escape(headline([Finding(**found) for found in findings]))}</p>'
        + table(["question", "answer", "what the numbers say"], rows)
        + f'<p class="soft">{escape(RULES)}</p>'
    )


def _information(content: dict[str, Any], figures: dict[str, go.Figure], tables: Any) -> str:
    parts = [
        "<p>Pairs of prompts that differ in one kind of information. DCM trains a mask over a "
        "group's heads: which of them must be taken from the other prompt for the model to answer "
        "with what that information leads to? The heads it selects are then patched on fresh "
        "prompts, and the share of answers that are the target is counted. Unpatched is how often "
        "the target is given by itself.</p>"
    ]
    for role, model in content["models"].items():
        for heads in model["information"]:
            parts.append(
                figure_element(
                    figures,
                    f"{role}_carries_{heads}_heads",
                    "Pooled over the draws. The further columns alter the other prompt's text, and "
                    "the last is a control.",
                )
            )
    parts.append(
        "<details><summary>What the columns are</summary>"
        + table(
            ["pairs", "what they are"],
            [
                [escape(information_words(kind.name)), escape(kind.says)]
                for kind in DESIDERATA.values()
            ],
        )
        + "</details>"
    )
    if "masks" in tables:
        masks = tables["masks"]
        each: dict[str, str] = {}
        several = ""
        if not masks["chosen"].all():
            # A price has few places, but not always three.
            masks = masks.assign(sparsity=masks["sparsity"].map("{:g}".format))
            each = {"sparsity": "price of a head", "seed": "seed", "chosen": "patched"}
            several = (
                "<p>A mask for each price of a head and each draw of pairs. Those patched are of "
                "the mask with the highest validation accuracy, and of equals with the fewest "
                "heads.</p>"
            )
        parts.append(f"<details><summary>Heads that DCM selected</summary>{several}")
        parts.append(
            frame_table(
                masks,
                {
                    "model": "model",
                    "group": "group",
                    "desideratum": "pairs",
                    **each,
                    "candidates": "candidates",
                    "selected": "selected",
                    "accuracy": "test accuracy",
                    "with_all_candidates": "all candidates patched",
                    "with_none": "none patched",
                },
            )
            + "</details>"
        )
    left_out = {
        name: reason
        for model in content["models"].values()
        for name, reason in model["dcm"]["left_out"].items()
    }
    for name, reason in left_out.items():
        parts.append(
            f'<p class="soft">{escape(information_words(name))} is left out: {escape(reason)}</p>'
        )
    return "".join(parts)


def _completeness(roles: list[str], figures: dict[str, go.Figure], tables: Any) -> str:
    return (
        "<p>The same heads K are ablated in the whole model and in the circuit. A circuit that has "
        "all that matters loses as much as the model does: the points lie on the line. Far above "
        "it, the model has heads that stand in for those removed and that the circuit lacks. Far "
        "below it, the circuit had little to lose: what it lacks with nothing removed is its "
        "faithfulness, and is not counted here again.</p>"
        + "".join(
            figure_element(
                figures,
                f"{role}_completeness",
                "95 % intervals of losses on the same prompts (Bonett and Price).",
            )
            for role in roles
        )
        + "<details><summary>As a table</summary>"
        + frame_table(
            tables["completeness"],
            {
                "model": "model",
                "removed": "K",
                "circuit_without": "circuit without K",
                "circuit_loses": "loses",
                "model_without": "model without K",
                "model_loses": "loses",
                "difference": "difference",
                "low": "low",
                "high": "high",
            },
        )
        + "</details>"
    )


def _minimality(content: dict[str, Any], figures: dict[str, go.Figure], tables: Any) -> str:
    if "minimality" not in tables:
        return "<p>No circuit has a head, so there is none to be needed.</p>"
    counts = []
    for model in content["models"].values():
        entries = model["minimality"]["entries"]
        kept = sum(entry["kept"] for entry in entries)
        counts.append(f"{escape(model['label'])}: {kept} of {len(entries)} heads are kept")
    return (
        "<p>For each head, other heads of its group are removed first, those that stand in for one "
        "another; what removing the head itself then costs, relative to what is left, is its "
        f"minimality. From 1 % up a head is kept. {'; '.join(counts)}. Of a circuit that alone "
        "answers hardly more than by guessing, this tells nothing. The paper's ablation, by token "
        "index, is in the table too: under it a head that only tells which token it is seems "
        "needless.</p>"
        + "".join(
            figure_element(
                figures,
                f"{role}_minimality",
                "Heads by group, 95 % score intervals of the ratio. Where nothing is left without "
                "a head, its minimality is infinite: drawn to the top, and marked &infin;. Where "
                "that can't be ruled out, the interval reaches to the top: &uarr;.",
            )
            for role in content["models"]
        )
        + "<details><summary>As a table</summary>"
        + frame_table(
            tables["minimality"],
            {
                "model": "model",
                "ablation": "ablation",
                "group": "group",
                "head": "head",
                "removed_first": "removed first",
                "accuracy_then": "accuracy then",
                "and_without_the_head": "and without the head",
                "minimality": "minimality",
                "low": "low",
                "high": "high",
                "kept": "kept",
            },
        )
        + "</details>"
    )


_KNOCKOUT_BANDS = "Bands: 95 % Wilson intervals; of the grey curves, the lowest and highest draw."


def _knockout(roles: list[str], figures: dict[str, go.Figure], tables: Any) -> str:
    published = ", ".join(
        f"{accuracy:.2f} from layer {layer}" for layer, accuracy in PUBLISHED_KNOCKOUT.items()
    )
    return (
        "<p>One token no longer sees another, from a layer up. While accuracy stays low, what is "
        "needed passes between the two in that layer or above; where the curve is back at the "
        "whole model's, it has passed. In grey, the same for tokens drawn at random. Published for "
        "Llama-7B (32 layers, counted from 0), last token to correct object: "
        f"{published}.</p>"
        + "".join(figure_element(figures, f"{role}_knockout", _KNOCKOUT_BANDS) for role in roles)
        + "<details><summary>As a table</summary>"
        + frame_table(
            tables["knockout"],
            {
                "model": "model",
                "from": "from",
                "to": "to",
                "first_layer": "first layer",
                "accuracy": "accuracy",
                "low": "low",
                "high": "high",
                "control": "random tokens",
            },
        )
        + "</details>"
    )


def _cmap(content: dict[str, Any], figures: dict[str, go.Figure], tables: Any) -> str:
    return (
        "<p>On the same prompts one model answers while some of its heads take what the other "
        "computes: their outputs, or only the queries, keys or values they work with. Both "
        "directions; the dashed lines are the two models alone.</p>"
        + "".join(
            figure_element(figures, f"cmap_{name}", "95 % Wilson intervals.")
            for name in content["cmap"]
            if name not in (CONTROL, AS_PUBLISHED)
        )
        + f"<p class='soft'>{_SHARES}</p>"
        + "<details><summary>As a table</summary>"
        + frame_table(tables["cmap"], _CMAP_COLUMNS)
        + "</details>"
    )


_SHARES = (
    "A share of the difference has a score interval, and stands there only where the difference "
    "itself is beyond doubt on these prompts: of what may be nothing, any share would do."
)


def _as_published(content: dict[str, Any], figures: dict[str, go.Figure], tables: Any) -> str:
    base, tuned = (escape(model["label"]) for model in content["models"].values())
    sizes = content["cmap"][AS_PUBLISHED]["heads"]
    patched = "/".join(str(len(sizes[group])) for group in GROUPS)
    theirs = ", ".join(
        f"{name} {'/'.join(map(str, found))}" for name, found in PUBLISHED_CMAP_SIZES.items()
    )
    return (
        f"<p>What the paper patches: outputs of the circuit found in {tuned}, not of that of "
        f"{base}, each group cut down to the heads that DCM selected in it for what the paper says "
        "the group carries (A the object's value, B and C the position; D is whole). Heads here, "
        f"A/B/C/D: {patched}; published: {theirs}.</p>"
        + figure_element(figures, f"cmap_{AS_PUBLISHED}", "95 % Wilson intervals.")
        + table(
            [
                "published: Llama-7B with head outputs of",
                *map(group_words, GROUPS),
                "whole circuit",
            ],
            [
                [name, *(f"{found[group]:.2f}" for group in (*GROUPS, "whole circuit"))]
                for name, found in PUBLISHED_CMAP.items()
            ],
        )
        + "<details><summary>As a table</summary>"
        + frame_table(tables[f"cmap_{AS_PUBLISHED}"], _CMAP_COLUMNS)
        + "</details>"
    )


def _control(content: dict[str, Any], figures: dict[str, go.Figure], tables: Any) -> str:
    base, tuned, control = (
        escape(each["label"]) for each in (*content["models"].values(), content["control"])
    )
    return (
        f"<p>{base} again, on the same prompts, now with heads of {control}, which stands beside "
        f"{tuned} as a control. What its heads bring as well is not owed to what {tuned} alone has "
        "learnt; what they do not bring comes with that.</p>"
        + figure_element(figures, f"cmap_{CONTROL}", "95 % Wilson intervals.")
        + "<details><summary>As a table</summary>"
        + frame_table(tables[f"cmap_{CONTROL}"], _CMAP_COLUMNS)
        + "</details>"
    )


_CMAP_COLUMNS = {
    "into": "model",
    "from": "heads of",
    "group": "group",
    "patch": "patched",
    "accuracy": "accuracy",
    "low": "low",
    "high": "high",
    "recovered": "share of the difference",
    "recovered_low": "low",
    "recovered_high": "high",
}
