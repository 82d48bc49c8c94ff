"""Tables and a figure of how often the answers are right."""

import ast
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from calibration_truth import right_answers

from tl_entity.methods.judgement import EDGES, INFORMATION, NODES, QUESTIONS, Rules, judge
from tl_entity.methods.pair_evidence import PairEvidence
from tl_entity.output import write_atomically
from tl_entity.plots.style import STYLE
from tl_entity.stats import wilson_interval
from tl_entity.training.known_pairs import KINDS, known_pair

SAME_OR_NOT = (NODES, EDGES, INFORMATION)
"""Questions by which a change is claimed or denied."""

CHOSEN_ON = tuple(KINDS)[::2]
"""Kinds that, with even seeds, rules are chosen on; with all others they are tested."""

GRIDS: dict[str, Sequence[float]] = {
    "changed": (0.1, 0.15, 0.2, 0.3),
    "same": (0.15, 0.25, 0.35, 0.5),
    "group_changed": (0.1, 0.2, 0.3),
    "group_open": (0.7, 0.9),
    "mostly": (0.3, 0.4, 0.5),
    "halves": (0.15, 0.25, 0.35, 0.5),
}
"""Values that are tried for each rule."""

MARK = "<!-- From here on written by benchmarks/calibration.py -->"

COST_OF_WRONG = 5
"""A wrong answer counts against so many right ones."""


@dataclass(frozen=True)
class Measured:
    """A pair that was measured, and its right answers."""

    kind: str
    seed: int
    n_prompts: int
    evidence: PairEvidence
    right: dict[str, set[str]]

    @property
    def chosen_on(self) -> bool:
        """Whether rules may be chosen by it."""
        return self.kind in CHOSEN_ON and self.seed % 2 == 0


def read(folder: Path) -> list[Measured]:
    """All pairs that were measured."""
    found: list[Measured] = []
    truths: dict[tuple[str, int], Any] = {}
    for path in sorted(folder.glob("*.evidence")):
        kind, seed, n = path.stem.split("-")
        measured = ast.literal_eval(path.with_suffix(".truth").read_text())
        key = kind, int(seed)
        if key not in truths:
            truths[key] = known_pair(*key).truth
        found.append(
            Measured(
                kind,
                int(seed),
                int(n),
                PairEvidence.load(path),
                right_answers(kind, truths[key], measured),
            )
        )
    return found


def outcomes(
    pairs: Iterable[Measured], rules: Rules, judging: Callable[..., Any] = judge
) -> dict[str, Counter[str]]:
    """For each question how often the answer is right, wrong, can't be told; and how often a change
    is claimed where there is none, or denied where there is one."""
    counts: dict[str, Counter[str]] = {question: Counter() for question in QUESTIONS}
    for pair in pairs:
        judgement = judging(pair.evidence, rules)
        for question, right in pair.right.items():
            answer = judgement[question].answer
            count = counts[question]
            count["pairs"] += 1
            # Where nothing can be known, saying so is right.
            count["right"] += answer in right
            untold = answer == "can't tell" and answer not in right
            count["can't tell"] += untold
            count["wrong"] += answer not in right and not untold
            if question in SAME_OR_NOT:
                same = right == {"yes"}
                count["same"] += same
                count["false changed"] += same and answer in ("no", "partly")
                count["false same"] += not same and answer == "yes"
    return counts


def choose_rules(pairs: Sequence[Measured], start: Rules) -> Rules:
    """Rules that do best on some pairs, one after another over their grids; ties stay where they
    are."""

    def worth(rules: Rules) -> int:
        found = outcomes(pairs, rules).values()
        return sum(c["right"] - COST_OF_WRONG * c["wrong"] for c in found)

    best = start
    for name, values in GRIDS.items():
        for value in values:
            tried = replace(best, **{name: value})
            if worth(tried) > worth(best):
                best = tried
    return best


def table(counts: dict[str, Counter[str]]) -> str:
    """One row a question."""
    lines = [
        "| question | pairs | right | wrong | can't tell | false changed | false same |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for question, c in counts.items():
        if not c["pairs"]:
            continue
        claims = ["", ""]
        if question in SAME_OR_NOT:
            claims = [
                f"{c['false changed']} of {c['same']}",
                f"{c['false same']} of {c['pairs'] - c['same']}",
            ]
        numbers = [_of(c[name], c["pairs"]) for name in ("right", "wrong", "can't tell")]
        lines.append(f"| {' | '.join([question, str(c['pairs']), *numbers, *claims])} |")
    return "\n".join(lines)


def _of(count: int, n: int) -> str:
    low, high = wilson_interval(count, n)
    return f"{count / n:.2f} [{low:.2f}, {high:.2f}]"


def by_kind(pairs: Sequence[Measured], rules: Rules) -> str:
    """One row a kind, a column a question: the answers given, wrong ones in bold."""
    lines = [
        "| kind | " + " | ".join(QUESTIONS) + " |",
        "| --- |" + " --- |" * len(QUESTIONS),
    ]
    for kind in KINDS:
        some = [pair for pair in pairs if pair.kind == kind]
        cells: list[str] = []
        for question in QUESTIONS:
            answers: Counter[str] = Counter()
            for pair in some:
                if question not in pair.right:
                    continue
                answer = judge(pair.evidence, rules)[question].answer
                wrong = answer not in pair.right[question] and answer != "can't tell"
                answers[f"**{answer}**" if wrong else answer] += 1
            cells.append(", ".join(f"{a} {n}" for a, n in answers.most_common()))
        if some:
            lines.append(f"| `{kind}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(of_size: dict[int, dict[str, Counter[str]]]) -> go.Figure:
    """Right, can't tell and wrong, a bar for each question and number of prompts."""
    colours = {"right": "#009e73", "can't tell": "#d5dae0", "wrong": "#d55e00"}
    rows = [
        (f"{question}  {n}", counts[question])
        for question in reversed(QUESTIONS)
        for n, counts in sorted(of_size.items(), reverse=True)
        if counts[question]["pairs"]
    ]
    drawn = go.Figure(
        [
            go.Bar(
                name=name,
                y=[label for label, _ in rows],
                x=[c[name] / c["pairs"] for _, c in rows],
                orientation="h",
                marker_color=colour,
            )
            for name, colour in colours.items()
        ]
    )
    drawn.update_layout(
        template=STYLE,
        barmode="stack",
        title="Answers on known pairs, by question and number of prompts",
        height=110 + 21 * len(rows),
        xaxis_title="share of the pairs",
        legend_traceorder="normal",
    )
    return drawn


def write_tables(folder: Path, out: Path) -> None:
    """Tables, behind a mark in the page; all answers as JSON, and the figure, beside it."""
    from tl_entity.plots.render import PngRenderer

    pairs = read(folder)
    rules = Rules()
    sizes = sorted({pair.n_prompts for pair in pairs})
    first = [pair for pair in pairs if pair.chosen_on and pair.n_prompts == 200]
    rest = [pair for pair in pairs if not pair.chosen_on and pair.n_prompts == 200]
    chosen = choose_rules(first, rules)
    parts = [
        f"## At 200 prompts, pairs that rules are tested on ({len(rest)})",
        table(outcomes(rest, rules)),
        f"## At 200 prompts, pairs that rules are chosen on ({len(first)})",
        table(outcomes(first, rules)),
        f"Rules chosen on these, from those of the package: {_changed(chosen, rules)}.",
        "## At 200 prompts, by kind",
        by_kind([pair for pair in pairs if pair.n_prompts == 200], rules),
    ]
    of_size: dict[int, dict[str, Counter[str]]] = {}
    for n in sizes:
        some = [pair for pair in pairs if pair.n_prompts == n]
        of_size[n] = outcomes(some, rules)
        if n != 200:
            parts += [f"## At {n} prompts ({len(some)} pairs)", table(of_size[n])]
    parts += ["## Wrong rules, planted", wrong_rules(pairs)]
    before = out.read_text(encoding="utf-8").split(MARK)[0]
    write_atomically(out, (before + "\n\n".join([MARK, *parts]) + "\n").encode())
    answers = [
        {
            "kind": pair.kind,
            "seed": pair.seed,
            "prompts": pair.n_prompts,
            "answers": {a.question: a.answer for a in judge(pair.evidence, rules).answers},
            "right": {question: sorted(right) for question, right in pair.right.items()},
        }
        for pair in pairs
    ]
    write_atomically(out.with_suffix(".json"), json.dumps(answers, indent=1).encode())
    with PngRenderer() as renderer:
        drawn = figure(of_size)
        write_atomically(out.with_suffix(".png"), renderer(drawn, width=900))


PLANTED: dict[str, dict[str, float]] = {
    "every difference is a change (`changed` .001, `same` .002)": {"changed": 0.001, "same": 0.002},
    "no difference is a change (`changed` .99, `same` .999, `mostly` .99)": {
        "changed": 0.99,
        "same": 0.999,
        "mostly": 0.99,
        "group_changed": 0.99,
        "group_open": 0.999,
    },
    "all that changed has nothing in common (`beyond_chance` 1e-9)": {"beyond_chance": 1e-9},
    "all that changed has something in common (`beyond_chance` .999)": {"beyond_chance": 0.999},
}


def wrong_rules(pairs: Sequence[Measured]) -> str:
    """What the tables say of rules that are wrong on purpose."""
    some = [pair for pair in pairs if pair.n_prompts == 200]
    lines = [
        "| rule | question | right | wrong | false changed | false same |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, changes in PLANTED.items():
        counts = outcomes(some, replace(Rules(), **changes))
        for question in SAME_OR_NOT:
            c = counts[question]
            numbers = [str(c[k]) for k in ("right", "wrong", "false changed", "false same")]
            lines.append(f"| {name} | {' | '.join([question, *numbers])} |")
    return "\n".join(lines)


def _changed(chosen: Rules, usual: Rules) -> str:
    found = {
        name: getattr(chosen, name)
        for name in GRIDS
        if getattr(chosen, name) != getattr(usual, name)
    }
    return ", ".join(f"`{name}` {value:g}" for name, value in found.items()) or "the same"
