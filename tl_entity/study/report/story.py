"""What the page begins with, for a reader in a hurry, and what it ends with."""

from typing import Any

from markupsafe import Markup

from tl_entity.heads import ENTITY_TRACKING_POSITIONS
from tl_entity.studies.entity_tracking import (
    CITATION,
    DOES,
    GROUPS,
    LETTERS,
    POSITION_WORDS,
    PUBLISHED,
    RANDOM_CIRCUIT_ACCURACY,
)
from tl_entity.study.mechanism_figures import EXAMPLE
from tl_entity.study.report.cells import (
    NO_VALUE,
    Table,
    is_of_boxes,
    main_accuracy,
    mechanism_sentence,
    prompts_words,
    ratio_text,
    share_text,
    size,
    sizes_text,
    table,
    unbroken,
)
from tl_entity.study.report.command import command
from tl_entity.study.results import Finding
from tl_entity.study.store import with_circuit
from tl_entity.study.verdict import (
    BETTER,
    MECHANISM,
    RULES,
    SAME_FUNCTION,
    SAME_HEADS,
    headline,
)
from tl_entity.tasks.boxes import mark_sentence

Values = tuple[str, str, dict[str, Any]]
"""Anchor, heading, and what the template is filled with."""

PLAINLY: dict[str, dict[str, str]] = {
    BETTER: {
        "yes": "The fine-tuned model is better.",
        "no": "The fine-tuned model is no better.",
        "can't tell": "Whether the fine-tuned model is better, these prompts can't tell.",
    },
    SAME_HEADS: {
        "yes": "The same heads are at work in both.",
        "partly": "Some of the same heads are at work in both.",
        "no": "Other heads are at work in it.",
        "can't tell": "Whether the same heads are at work in both stays open.",
    },
    MECHANISM: {
        "yes": "By themselves they do most of the work.",
        "partly": "By themselves they do a part of the work.",
        "no": "But they are not the whole of it: by themselves they do less than half of the work, "
        "and the rest is done elsewhere.",
        "can't tell": "How much of the work they do by themselves stays open.",
    },
    SAME_FUNCTION: {
        "yes": "In both models they carry the same information.",
        "partly": "Some of the groups carry the same information in both models.",
        "no": "They do not carry the same information in both models.",
        "can't tell": "Whether they carry the same information in both models stays open.",
    },
}
"""What each answer of the verdict means, in plain words."""


def first_sections(whole: dict[str, Any], problem: str | None) -> list[Values]:
    """The page up to the accuracies."""
    found = [("glance", "At a glance", _glance_values(whole, problem))]
    if whole["verdict"]:
        found.append(("verdict", "The verdict", _verdict_values(whole)))
    found.append(("accuracy", "Accuracy", _accuracy_values(whole)))
    return found


def example_words() -> list[tuple[str, str]]:
    """The example's text in pieces, each with the named position that it is at, or none."""
    text = EXAMPLE.text
    spans = {span: name for name, span in mark_sentence(text).spans.items()}
    spans[text.rindex("the"), len(text)] = "last"
    pieces: list[tuple[str, str]] = []
    at = 0
    for (first, end), name in sorted(spans.items()):
        pieces += [(text[at:first], ""), (text[first:end], name)]
        at = end
    return pieces


def marked_words(task: dict[str, Any]) -> list[tuple[str, str]]:
    """The same of another task's example, token by token."""
    named = {at: name for name, at in sorted(task["positions"].items())}
    pieces: list[tuple[str, str]] = []
    for at, token in enumerate(task["example"]):
        word = token.lstrip()
        # No mark covers the space ahead of its word.
        pieces += [(token[: len(token) - len(word)], ""), (word, named.get(at, ""))]
    return pieces


def _glance_values(whole: dict[str, Any], problem: str | None) -> dict[str, Any]:
    models, of_boxes = whole["models"], is_of_boxes(whole)
    circuits = {role: m for role, m in with_circuit(models).items() if "discovery" in m}
    groups = [
        {
            "letter": LETTERS[group],
            "name": group,
            "does": DOES[group],
            "at": ENTITY_TRACKING_POSITIONS[group],
        }
        for group in reversed(GROUPS if of_boxes else ())
    ]
    return {
        "of_boxes": of_boxes,
        "says": whole["task"]["says"],
        "example": example_words() if of_boxes else marked_words(whole["task"]),
        "answer": EXAMPLE.answer if of_boxes else whole["task"]["answer"],
        "prompts": prompts_words(whole),
        "models": [
            {"label": model["label"], "accuracy": _percent(main_accuracy(whole, model))}
            for model in models.values()
        ],
        "plainly": _plainly(whole["verdict"]),
        "headline": unbroken(headline([Finding(**found) for found in whole["verdict"]])),
        "mechanisms": [
            unbroken(mechanism_sentence(model))
            for model in models.values()
            if "nodes" in model.get("mechanism", {})
        ],
        "groups": groups,
        "words": POSITION_WORDS,
        "picture": f"{next(iter(circuits))}_circuit" if circuits else None,
        "pictured": next(iter(circuits.values()))["label"] if circuits else "",
        # The verdict has the same numbers.
        "numbers": None if whole["verdict"] else _numbers(whole),
        "planted": [model["label"] for model in models.values() if model["planted"]],
        "no_circuit": [m for m in models.values() if m["no_circuit"] is not None],
        "not_compared": whole["not_compared"] if len(models) > 1 else None,
        "problem": problem,
    }


def _percent(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.0%} [{low:.0%},\u00a0{high:.0%}]".replace("%", "\u00a0%")


def _plainly(findings: list[dict[str, Any]]) -> list[str]:
    """The verdict in words that need no explanation; nothing where there is none."""
    answers = {finding["question"]: finding["answer"] for finding in findings}
    return [
        said[answers[question]]
        for question, said in PLAINLY.items()
        if answers.get(question) in said
    ]


def _verdict_values(whole: dict[str, Any]) -> dict[str, Any]:
    findings = [{**each, "text": unbroken(each["text"])} for each in whole["verdict"]]
    return {"findings": findings, "rules": RULES}


def _numbers(whole: dict[str, Any]) -> Table:
    """The few numbers that a reader wants first."""
    models = whole["models"]
    circuits = with_circuit(models)
    header = ["model", f"accuracy, {prompts_words(whole)}"]
    tested = bool(circuits) and all("faithfulness" in model for model in circuits.values())
    if tested:
        header += ["heads in its circuit", "circuit alone", "faithfulness", "random circuits alone"]
    rows: list[list[str]] = []
    for model in models.values():
        row = [model["label"], share_text(main_accuracy(whole, model))]
        if "faithfulness" in model:
            found, total = model["faithfulness"], model["n_layers"] * model["n_heads"]
            row += [f"{size(model)} of {total}", share_text(found["circuit"]), ratio_text(found)]
            row += [f"{found['random']['mean']:.3f}" if found["random"]["accuracies"] else NO_VALUE]
        rows.append(row + [NO_VALUE] * (len(header) - len(row)))
    return table(header, rows)


def _accuracy_values(whole: dict[str, Any]) -> dict[str, Any]:
    models, of_boxes = whole["models"].values(), is_of_boxes(whole)
    measured = next(iter(models))["accuracy"]
    counts = sorted(measured, key=int) if of_boxes else list(measured)
    rows = [[n, *(share_text(model["accuracy"][n]) for model in models)] for n in counts]
    first = "boxes" if of_boxes else "counted as right"
    return {
        "of_boxes": of_boxes,
        "prompts": measured[counts[-1]]["prompts"],
        "table": table([first, *(model["label"] for model in models)], rows),
    }


def paper_values(content: dict[str, Any]) -> dict[str, Any]:
    """Published figures beside ours."""
    boxes, models = content["settings"]["boxes"], content["models"]
    first, *others = models
    # Of every model the first one's circuit, as there: its own circuit was measured in none but it.
    of_the_base = {first: models[first]["faithfulness"]} | {
        role: models[role]["faithfulness"]["other_circuits"][first]
        for role in others
        if first in models[role]["faithfulness"]["other_circuits"]
    }
    rows = [
        [
            f"{models[role]['label']} (here, {boxes} boxes)",
            share_text(found["model"]),
            share_text(found["circuit"]),
            ratio_text(found),
            sizes_text(models[role]["circuit"], GROUPS),
        ]
        for role, found in of_the_base.items()
    ]
    rows += [
        [
            f"{paper.name} (published, 7 boxes)",
            f"{paper.accuracy:.2f}",
            f"{paper.circuit_accuracy:.2f}",
            f"{paper.faithfulness:.2f}",
            NO_VALUE if paper.sizes is None else "/".join(map(str, paper.sizes)),
        ]
        for paper in PUBLISHED
    ]
    header = ["model", "accuracy", "of the base's circuit", "faithfulness", "own heads A/B/C/D"]
    low, high = RANDOM_CIRCUIT_ACCURACY
    return {
        "citation": CITATION,
        "base": models[first]["label"],
        "random": (f"{low:g}", f"{high:g}"),
        "table": table(header, rows),
    }


def again_values(whole: dict[str, Any]) -> dict[str, Any]:
    """How to do it again."""
    settings = whole["settings"]
    return {
        "command": None if whole["task"]["from_python"] else command(settings),
        "settings": table(
            ["setting", "value"],
            [
                [name.replace("_", " "), Markup("<code>{}</code>").format(_plain(value))]
                for name, value in settings.items()
            ],
        ),
        "versions": table(["software", "version"], _rows(whole["versions"])),
        "seeds": table(["purpose", "seed"], _rows(whole["seeds"])),
    }


def _rows(entries: dict[str, Any]) -> list[list[str]]:
    return [[name, str(value)] for name, value in entries.items()]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return "none" if value is None else str(value)
