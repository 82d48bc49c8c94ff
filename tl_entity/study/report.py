"""report.html: one page that needs nothing but itself, made from the content of results.json."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from tl_entity.heads import Head
from tl_entity.hooks.ablations import LEAVES
from tl_entity.methods.overlap import NO_OVERLAP_INTERVAL
from tl_entity.plots.render import figure_html, plotly_script
from tl_entity.study.figures import (
    LETTERS,
    position_words,
    sorted_counts,
    stage_title,
)
from tl_entity.study.html import (
    MINUS,
    NO_VALUE,
    figure_element,
    heads_html,
    page,
    ratio_text,
    share_text,
    table,
)
from tl_entity.study.mechanism_report import mechanism_sections, verdict_section
from tl_entity.study.published import CITATION, PUBLISHED, RANDOM_CIRCUIT_ACCURACY
from tl_entity.study.results import Finding
from tl_entity.study.settings import GROUPS
from tl_entity.study.store import with_circuit
from tl_entity.study.tables import scores_by_ablation
from tl_entity.study.verdict import headline

if TYPE_CHECKING:
    import pandas as pd

PLANTED_NOTE = (
    "was planted: we trained the model ourselves, and guided the attention of chosen heads in "
    "training. That makes this a test of the method, whose right answer is known; it is no "
    "evidence on what training brings about by itself."
)


def figure_page(figure: go.Figure, name: str) -> str:
    """A page of one figure, beside plotly.min.js in the same folder."""
    layout: Any = figure.layout
    return page(
        str(layout.title.text or name),
        f'<script src="{plotly_script().name}"></script>',
        figure_html(figure, name),
    )


def render_report(
    results: str,
    figures: dict[str, go.Figure],
    problem: str | None = None,
    *,
    tables: "Mapping[str, pd.DataFrame]",
) -> str:
    """The report.

    Args:
        results: the text of results.json.
        figures: of the same results, and each stage's heatmap alone as `base_value_fetcher`.
        problem: what else the reader must know.
        tables: of the same results.
    """
    content = json.loads(results)
    models, settings = content["models"], content["settings"]
    roles = list(models)
    title = " and ".join(models[role]["label"] for role in roles)
    sections: list[tuple[str, str, str]] = [
        ("accuracy", "Accuracy", _accuracy_section(content, figures)),
    ]
    whole, models = content, with_circuit(models)
    content = {**whole, "models": models}
    if models:
        sections.append(("circuits", "Circuits", _circuits_section(content, figures)))
    if _has(models, "faithfulness"):
        sections.append(("faithfulness", "Faithfulness", _faithfulness_section(content, figures)))
    if content["same_circuit"] is not None:
        sections.append(("same", "The same heads?", _same_section(content, figures)))
    if _has(models, "attention"):
        sections.append(("attention", "Attention", _attention_section(content, figures)))
    if models:
        sections += mechanism_sections(content, figures, tables)
    if any(model["planted"] for model in models.values()):
        sections.append(("planted", "Planted heads", _planted_section(content)))
    if content["verdict"]:
        sections.append(("verdict", "The verdict", verdict_section(content)))
    if _has(models, "faithfulness"):
        sections.append(("paper", "Beside the paper", _paper_section(content)))
    sections += [
        ("again", "Settings, versions, running it again", _settings_section(whole)),
    ]
    links = "".join(f'<a href="#{name}">{escape(text)}</a> ' for name, text, _ in sections)
    notes = "".join(f"<p>{escape(note)}</p>" for note in _notes(whole, problem))
    body = (
        f"<h1>Entity tracking in {escape(title)}</h1>"
        f'<p class="soft">Prompts of {settings["boxes"]} boxes, such as <q>The apple is in Box E, '
        "the bell is in Box Q. Box Q contains the</q> with the answer <q>bell</q>. "
        "Brackets hold 95 % intervals.</p>"
        f"{_lead(whole)}{notes}"
        f'<nav aria-label="Contents">{links}</nav>'
        + "".join(
            f'<section id="{name}"><h2>{escape(text)}</h2>{html}</section>'
            for name, text, html in sections
        )
    )
    return page(
        f"Entity tracking in {title}",
        f"<script>{plotly_script().read_text(encoding='utf-8')}</script>",
        body,
    )


def summary(results: dict[str, Any]) -> list[str]:
    """The main findings, a line each, for a terminal."""
    models, boxes = results["models"], results["settings"]["boxes"]
    lines = []
    for model in models.values():
        lines.append(
            f"{model['label']}: accuracy {share_text(model['accuracy'][str(boxes)])} "
            f"on {boxes} boxes"
        )
        if model["no_circuit"] is not None:
            lines.append(f"{model['label']}: no circuit was looked for; {model['no_circuit']}.")
            continue
        sizes = "/".join(str(len(model["circuit"][group])) for group in GROUPS)
        line = f"{model['label']}: circuit of {_size(model)} heads ({sizes})"
        if "faithfulness" in model:
            control = model["faithfulness"]["random"]
            beside = f", random circuits {control['mean']:.3f}" if control["accuracies"] else ""
            line += f", faithfulness {ratio_text(model['faithfulness'])}{beside}"
        lines.append(line)
    lines += [f"{finding['question']} {finding['answer']}" for finding in results["verdict"]]
    return lines


def _has(models: dict[str, Any], experiment: str) -> bool:
    return bool(models) and all(experiment in model for model in models.values())


def _notes(content: dict[str, Any], problem: str | None) -> Iterable[str]:
    models = content["models"]
    if any(model["planted"] for model in models.values()):
        names = " and ".join(model["label"] for model in models.values() if model["planted"])
        yield f"The circuit of {names} {PLANTED_NOTE}"
    for model in models.values():
        if model["no_circuit"] is not None:
            yield f"No circuit was looked for in {model['label']}: {model['no_circuit']}."
    if len(models) > 1 and content["not_compared"] is not None:
        yield f"The two models could not be compared head by head: {content['not_compared']}"
    if problem is not None:
        yield problem


def _lead(content: dict[str, Any]) -> str:
    """The conclusion, and the few numbers that a reader wants first."""
    models, boxes = content["models"], content["settings"]["boxes"]
    header = ["model", f"accuracy, {boxes} boxes"]
    tested = _has(with_circuit(models), "faithfulness")
    if tested:
        header += ["heads in its circuit", "circuit alone", "faithfulness"]
        header += ["faithfulness of every head at these tokens", "random circuits alone"]
    rows = []
    for model in models.values():
        row = [escape(model["label"]), share_text(model["accuracy"][str(boxes)])]
        if "faithfulness" in model:
            found, total = model["faithfulness"], model["n_layers"] * model["n_heads"]
            row += [f"{_size(model)} of {total}", share_text(found["circuit"]), ratio_text(found)]
            row += [ratio_text(found["every_head"])]
            row += [f"{found['random']['mean']:.3f}" if found["random"]["accuracies"] else NO_VALUE]
        rows.append(row + [NO_VALUE] * (len(header) - len(row)))
    html = table(header, rows)
    if tested:
        html += (
            '<p class="soft">Alone: with all other heads ablated, at every token. What every head '
            "at the circuit's tokens lacks is done at other tokens, or undone by some of these "
            "heads.</p>"
        )
    if content["verdict"]:
        said = escape(headline([Finding(**found) for found in content["verdict"]]))
        html = f'<p class="lead">{said} <a href="#verdict">The verdict</a></p>{html}'
    return html


def _accuracy_section(content: dict[str, Any], figures: dict[str, go.Figure]) -> str:
    models = content["models"]
    prompts = content["settings"]["prompts"]
    counts = [n for n, _ in sorted_counts(next(iter(models.values())))]
    rows = [
        [escape(n), *(share_text(model["accuracy"][n]) for model in models.values())]
        for n in counts
    ]
    return (
        f"<p>Share of {prompts} random prompts whose most likely next token, of the whole "
        "vocabulary, is the right object.</p>"
        + figure_element(figures, "accuracy", "Bars: 95 % Wilson intervals.")
        + table(["boxes", *(escape(model["label"]) for model in models.values())], rows)
    )


def _circuits_section(content: dict[str, Any], figures: dict[str, go.Figure]) -> str:
    planted = any(model["planted"] for model in content["models"].values())
    known = '<b><span class="known"></span>planted</b>' if planted else ""
    return (
        "<p>Found back to front by path patching: each head in turn takes its value from a corrupt "
        "prompt, and its change travels only along the path named above the map. The score is the "
        "relative change of the right object's probability: &minus;1 takes it away altogether, 0 "
        "changes nothing. Where a model is sure of a wrong answer, that probability is tiny and "
        "any change many times its size, so a few such prompts can outweigh all others.</p>"
        '<p class="key soft">Red: the answer needs the head. Blue: it does better without.'
        f' <b><span class="chosen"></span>chosen</b> {known}'
        ' <b><span class="hatched"></span>cannot reach the receivers</b></p>'
        + "".join(_circuit(content, role, figures) for role in content["models"])
        + '<p class="soft">A head chosen in two groups at one position counts for the later stage, '
        "so that a group can be smaller than asked for.</p>"
    )


def _circuit(content: dict[str, Any], role: str, figures: dict[str, go.Figure]) -> str:
    model = content["models"][role]
    pairs = model["pairs"]
    chosen_from = (
        f"Scores are means over {pairs['kept']} pairs of a clean and a corrupt prompt, "
        + (
            f"those of {pairs['tried']} tried whose clean prompt the model answers right."
            if pairs["answered_right_only"]
            else "whether the model answers them right or not."
        )
    )
    rows = []
    for group in GROUPS:
        stage = model["discovery"][group]
        heads = model["circuit"][group]
        rows.append(
            [
                f"{LETTERS[group]} <code>{group}</code>",
                escape(position_words(stage["position"])),
                "logits"
                if stage["receivers"] is None
                else f"{stage['receiver_input']} of {heads_html(stage['receivers'])}",
                heads_html(heads),
                _span_of_scores(stage, heads),
            ]
        )
    plots = "".join(
        f"<figure><figcaption>{escape(stage_title(model['discovery'][group], group))}</figcaption>"
        f"{figure_html(figures[f'{role}_{group}'], f'figure-{role}-{group}')}</figure>"
        for group in GROUPS
    )
    return (
        f"<h3>{escape(model['label'])}</h3><p>{chosen_from}</p>"
        f'<div class="pair">{plots}</div>'
        + table(
            ["group", "at", "patched into", "heads chosen, the most important first", "scores"],
            rows,
        )
        + figure_element(
            figures,
            f"{role}_circuit",
            "The circuit over a short prompt: each group above the token where it sits, at the "
            "mean layer of its heads. Arrows: what each was patched into. In italics what patching "
            "shows it to carry.",
        )
    )


def _faithfulness_section(content: dict[str, Any], figures: dict[str, go.Figure]) -> str:
    rows = []
    for model in content["models"].values():
        found, name = model["faithfulness"], escape(model["label"])
        rows.append([name, "none", "whole model", share_text(found["model"]), ""])
        for ablation, kept, score in scores_by_ablation(found):
            what = f"{kept} ({_size(model)} heads)" if kept == "its circuit" else kept
            rows.append(
                [name, ablation, escape(what), share_text(score["circuit"]), ratio_text(score)]
            )
        for ablation, part in {found["ablation"]: found, "index": found["by_index"]}.items():
            if part["random"]["accuracies"]:
                rows.append([name, ablation, *_random_cells(part)])
    prompts = content["settings"]["prompts"]
    left = "".join(
        f"<li><code>{kind}</code>: leaves {LEAVES[kind]}</li>"
        for kind in dict.fromkeys((content["settings"]["ablation"], "index"))
    )
    return (
        f"<p>On {prompts} prompts that discovery has not seen: accuracy with every head outside "
        "the circuit ablated, at every token; and the circuit's own heads too, except at their own "
        "position. Faithfulness is this accuracy over the whole model's. Two of these positions "
        "depend on what is asked, so heads there are told where to look. Every head at the "
        "circuit's positions is a reference, no bound: some of them may hinder.</p>"
        f"<p>What the output of an ablated head is replaced by decides what it still tells:</p>"
        f"<ul>{left}</ul>"
        + figure_element(
            figures,
            "faithfulness",
            f"Ablation: {content['settings']['ablation']}. 95 % Wilson intervals; for random "
            "circuits, from the lowest to the highest.",
        )
        + table(["model", "ablation", "what is left", "accuracy", "faithfulness"], rows)
    )


def _random_cells(found: dict[str, Any]) -> list[str]:
    control, whole = found["random"], found["model"]["accuracy"]
    return [
        f"{len(control['accuracies'])} random circuits of these sizes",
        f"{control['mean']:.3f} (from {control['lowest']:.3f} to {control['highest']:.3f})",
        f"{control['mean'] / whole:.3f}" if whole else NO_VALUE,
    ]


def _same_section(content: dict[str, Any], figures: dict[str, go.Figure]) -> str:
    same, names = content["same_circuit"], [m["label"] for m in content["models"].values()]
    parts = {**{group: same["groups"][group] for group in GROUPS}, "whole circuit": same["whole"]}
    ceiling = same.get("ceiling")
    again = {} if ceiling is None else {**ceiling["groups"], "whole circuit": ceiling["whole"]}
    rows = [
        [
            f"{LETTERS[name]} <code>{name}</code>" if name in LETTERS else name,
            heads_html(found["shared"]),
            heads_html(found["only_first"]),
            heads_html(found["only_second"]),
            f"{found['shared_by_chance']:.2f}",
            f"{found['p_value']:.2g}",
            *(
                _two_places(found[measure])
                for measure in ("precision", "recall", "jaccard", "rank_correlation")
            ),
            *([_two_places(again[name]["jaccard"])] if again else []),
        ]
        for name, found in parts.items()
    ]
    over_all = same["whole"].get("shared_by_chance_over_all_layers")
    return (
        "<p>Heads in the same group of both circuits, beside how many circuits would share that "
        "have as many heads in each layer as these and else are drawn at random, and how probable "
        "it is that chance shares as many. Precision is the share of the first circuit's heads "
        "that the second one has too, recall the share of the second one's that the first has too, "
        "and the Jaccard index that of the heads of either that are in both. The rank correlation "
        "is Spearman's, of the score maps over the heads that can reach the receivers in both "
        f"models. {escape(NO_OVERLAP_INTERVAL)}"
        + ("" if again else " It was not found again here (<code>--ceiling</code>).")
        + "</p>"
        + figure_element(
            figures,
            "comparison",
            "Jaccard index of each group. Drawn at random, layer by layer: the mean, and the range "
            "of 95 % of the draws.",
        )
        + (
            ""
            if over_all is None
            else '<p class="soft">Drawn over all layers, which takes where in depth important '
            f"heads lie for a finding, the whole circuits would share {over_all:.2f}.</p>"
        )
        + table(
            [
                "group",
                "in both",
                f"only {escape(names[0])}",
                f"only {escape(names[1])}",
                "by chance",
                "p",
                "precision",
                "recall",
                "Jaccard index",
                "rank correlation",
                *(["Jaccard index, base found twice"] if again else []),
            ],
            rows,
        )
    )


def _two_places(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.2f}".replace("-", MINUS)


def _attention_section(content: dict[str, Any], figures: dict[str, go.Figure]) -> str:
    parts = [
        "<p>Mean attention weight of each head of the circuit, from its group's position to the "
        "named positions. The last columns give the distance back to the token that is looked at "
        "most, where that is the same in most prompts.</p>"
    ]
    for role, model in content["models"].items():
        rows = []
        for group in GROUPS:
            seen = model["attention"][group]
            for index, head in enumerate(seen["heads"]):
                weights = seen["weights"][index]
                best = max(range(len(weights)), key=weights.__getitem__)
                rows.append(
                    [
                        f"{LETTERS[group]} <code>{group}</code>",
                        str(Head(*head)),
                        escape(position_words(seen["from"])),
                        escape(position_words(seen["to"][best])),
                        f"{weights[best]:.2f}",
                        f"{seen['common_offset'][index]}",
                        f"{seen['offset_share'][index]:.0%}",
                    ]
                )
        parts.append(
            figure_element(figures, f"{role}_attention", "Rows add up to 1; a gap: no such token.")
        )
        parts.append(
            "<details><summary>As a table</summary>"
            + table(
                [
                    "group",
                    "head",
                    "looks from",
                    "mostly to",
                    "weight",
                    "tokens back",
                    "in prompts",
                ],
                rows,
            )
            + "</details>"
        )
    return "".join(parts)


def _planted_section(content: dict[str, Any]) -> str:
    parts = [
        "<p>The heads whose attention we guided in training, beside those that path patching "
        "chose by their scores alone. How many heads a group keeps is among the settings.</p>"
    ]
    for model in content["models"].values():
        known = model["planted"]
        if not known:
            continue
        rows = [
            [
                f"{LETTERS[group]} <code>{group}</code>",
                heads_html(found["planted"]),
                heads_html(found["found"]),
                heads_html(found["missed"]),
                heads_html(found["not_planted"]),
            ]
            for group, found in ((group, known["groups"][group]) for group in GROUPS)
        ]
        parts.append(
            table(
                ["group", "planted", "found", "missed", "chosen, not planted"],
                rows,
                caption=f"{escape(model['label'])}: {known['found']} of {known['planted']} planted "
                f"heads found, among {known['chosen']} chosen.",
            )
        )
    return "".join(parts)


def _paper_section(content: dict[str, Any]) -> str:
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
            f"{escape(models[role]['label'])} (here, {boxes} boxes)",
            share_text(found["model"]),
            share_text(found["circuit"]),
            ratio_text(found),
        ]
        for role, found in of_the_base.items()
    ]
    rows += [
        [
            f"{paper.name} (published, 7 boxes)",
            f"{paper.accuracy:.2f}",
            f"{paper.circuit_accuracy:.2f}",
            f"{paper.faithfulness:.2f}",
        ]
        for paper in PUBLISHED
    ]
    sizes = [
        [
            f"{escape(model['label'])} (here)",
            "/".join(str(len(model["circuit"][group])) for group in GROUPS),
        ]
        for model in models.values()
    ]
    sizes += [
        [f"{paper.name} (published)", "/".join(map(str, paper.sizes))]
        for paper in PUBLISHED
        if paper.sizes is not None
    ]
    low, high = RANDOM_CIRCUIT_ACCURACY
    return (
        f"<p>Published figures from {escape(CITATION)}. They are of other, far larger models, and "
        "are set here to show which quantities correspond, not to be matched. The circuit is in "
        f"every model that of the base: there Llama-7B's, here that of "
        f"{escape(models[first]['label'])}. Random circuits answered from {low:g} to {high:g} "
        "right there.</p>"
        + table(["model", "accuracy", "of the base's circuit", "faithfulness"], rows)
        + "<p>Heads of the circuit found in each model itself:</p>"
        + table(["model", "heads A/B/C/D"], sizes)
    )


def _settings_section(content: dict[str, Any]) -> str:
    settings = content["settings"]
    shown = [
        [escape(name.replace("_", " ")), f"<code>{escape(_plain(value))}</code>"]
        for name, value in settings.items()
    ]
    versions = [[escape(name), escape(value)] for name, value in content["versions"].items()]
    seeds = [[escape(name), str(value)] for name, value in content["seeds"].items()]
    return (
        f"<p>To run it again:</p><pre>{escape(command(settings))}</pre>"
        + f'<div class="settings">{table(["setting", "value"], shown)}</div>'
        + table(["software", "version"], versions)
        + "<details><summary>Seeds drawn from the one given, by purpose</summary>"
        + table(["purpose", "seed"], seeds)
        + "</details>"
    )


def command(settings: dict[str, Any]) -> str:
    """The command line that does the same again, all settings written out."""
    sizes = ",".join(str(settings["sizes"][group]) for group in GROUPS)
    receivers = ",".join(
        str(settings["receiver_sizes"].get(group, settings["sizes"][group]))
        for group in GROUPS[:-1]
    )
    words = ["tl-entity", "reproduce", "--base", settings["base"]]
    words += ["--tuned", settings["tuned"] or "none"]
    if settings["control"] is not None:
        words += ["--control", settings["control"]]
    for role in ("base", "tuned", "control"):
        if settings[f"{role}_adapter"] is not None:
            words += [f"--{role}-adapter", settings[f"{role}_adapter"]]
    words += ["--prompts", str(settings["prompts"])]
    if settings["pairs"] is not None:
        words += ["--pairs", str(settings["pairs"])]
    words += ["--boxes", str(settings["boxes"])]
    words += ["--sizes", sizes, "--receiver-sizes", receivers]
    words += ["--random-circuits", str(settings["random_circuits"])]
    words += ["--mask-pairs", str(settings["mask_pairs"])]
    words += ["--sparsity", ",".join(map(str, settings["sparsities"]))]
    words += ["--mask-seeds", str(settings["mask_seeds"]), "--draws", str(settings["draws"])]
    if settings["only"] is not None:
        words += ["--only", ",".join(settings["only"])]
    words += ["--ceiling"] * settings.get("ceiling", False)
    words += ["--all-pairs"] * settings["all_pairs"]
    words += ["--seed", str(settings["seed"]), "--engine", settings["engine"]]
    if settings["batch_size"] is not None:
        words += ["--batch-size", str(settings["batch_size"])]
    if settings["memory"] is not None:
        words += ["--memory", f"{settings['memory']:g}"]
    words += ["--dtype", settings["dtype"]]
    words += ["--matmul-precision", settings["matmul_precision"]]
    words += ["--no-png"] * (not settings["png"])
    if settings["device"] is not None:
        words += ["--device", settings["device"]]
    return shlex.join([*words, "--out", "results"])


def _size(model: dict[str, Any]) -> int:
    return sum(len(model["circuit"][group]) for group in GROUPS)


def _span_of_scores(stage: dict[str, Any], heads: Sequence[Sequence[int]]) -> str:
    scores = [stage["scores"][layer][head] for layer, head in heads]
    if not scores:
        return ""
    text = f"{min(scores):+.3f}" + (f" to {max(scores):+.3f}" if len(scores) > 1 else "")
    return f'<span style="white-space:nowrap">{text.replace("-", MINUS)}</span>'


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return "none" if value is None else str(value)
