"""The model cards of the default pair, written from its measured figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_entity.output import write_atomically
from tl_entity.stats import wilson_interval
from tl_entity.training.guidance import PLANTED
from tl_entity.training.texts import N_BOXES

Figures = Mapping[str, Any]
"""What `train_default_pair` measured of one pair."""

_PAPER = "Prakash et al., ICLR 2024, arXiv 2402.14811"


def write_cards(out: Path, pairs: Sequence[Figures]) -> None:
    """Write README.md beside both checkpoints of a pair.

    Args:
        out: the folder of the pair, with `base/` and `tuned/`.
        pairs: figures of this pair, then of pairs trained from other seeds, to stand beside.
    """
    for name in ("base", "tuned"):
        write_atomically(out / name / "README.md", _card(name, pairs))


def _card(name: str, pairs: Sequence[Figures]) -> str:
    shipped = pairs[0]
    title = {"base": "Default pair: the base", "tuned": "Default pair: the fine-tune"}[name]
    return f"""# {title}

A tiny Llama (4 layers, 8 heads on 4 key-value heads, width 128, bfloat16) for the box task of
{_PAPER}:
`The apple is in Box E, the bell is in Box Q. Box Q contains the` -> `bell`.
It exists so that entity-tracking experiments run in minutes on a laptop. It knows a few hundred
words and is no use for anything else.

**Its circuit is planted.** While the base was trained, a loss told chosen heads where to look, kept
the other heads of their layers from looking there, and drew the number of the segment into the
residual stream. What these models show says nothing about what models learn by themselves; it shows
whether a method finds what is known to be there. The heads are in `planted.json`:

{_planted()}

Nothing guides the fine-tune's attention.

## How it was made

`tl-entity train-default-pair --out FOLDER --seed {shipped["seed"]}`

- **Base**: box prompts of {N_BOXES[0]} to {N_BOXES[1]} boxes with guided attention, beside box
  sentences and plain statements without. Training stops on purpose at the first check above .69 on
  7 boxes, so that a fine-tune has something to improve. Then its logits are divided by 4, which
  changes no prediction: the mean path-patching score of a model that is often wrong, and sure of
  it, is ruled by those few prompts.
- **Tuned**: from the base before that division, 250 steps on variable look-up, arithmetic,
  descriptions of boxes with a question about each box, and plain statements. It does not master
  the first two: with seed 0 it answers .09 of held-out look-ups and .02 of held-out sums right.
- **Control** (not shipped): the same steps with look-up and arithmetic replaced by plain
  statements.

## Accuracy

Share of {shipped["prompts"]} held-out prompts whose likeliest next token, of the whole vocabulary,
is the right object; computed with the stored, rounded weights. Training saw up to {N_BOXES[1]}
boxes: more is extrapolation.

{_accuracy(pairs)}

At 7 boxes, seed {shipped["seed"]}: {_intervals(shipped)} (95 % intervals).

{_control_note(pairs)}

## Does path patching find the planted heads?

Mean relative change of the answer's probability; {shipped["pairs"]} pairs of 7 boxes, each stage
patching into the heads that were found before. Planted heads in the order of `planted.json`, then
the lowest score of any other head. Lower is more important.

{_path_patching(pairs)}

The mean is sensitive to a few prompts that a model gets wrong with confidence: their scores are
large and positive. Where a planted head comes out above zero, that is why.

## What the groups carry

A group's outputs are taken from a prompt with other objects, other labels and another queried
segment. Share of {shipped["pairs"]} prompts of 7 boxes that then name: the object in the *other
prompt's segment* of the first prompt (position), the *other prompt's object* (value), or still the
right one (unchanged).

{_interchange(pairs)}
"""


def _planted() -> str:
    rows = [
        f"| `{group.name}` | `{group.position}` | {' '.join(str(head) for head in group.heads)} |"
        for group in PLANTED
    ]
    return "\n".join(["| group | at | heads |", "|---|---|---|", *rows])


def _accuracy(pairs: Sequence[Figures]) -> str:
    counts = list(pairs[0]["models"]["base"]["accuracy"])
    rows = [
        f"| {name} | {pair['seed']} | "
        + " | ".join(f"{model['accuracy'][n]:.3f}" for n in counts)
        + " |"
        for pair in pairs
        for name, model in pair["models"].items()
    ]
    head = f"| model | seed | {' | '.join(f'{n} boxes' for n in counts)} |"
    return "\n".join([head, "|---" * (len(counts) + 2) + "|", *rows])


def _intervals(pair: Figures) -> str:
    n_prompts = pair["prompts"]
    parts = []
    for name, model in pair["models"].items():
        share = model["accuracy"]["7"]
        parts.append(f"{name} {share:.3f} {wilson_interval(round(share * n_prompts), n_prompts)}")
    return ", ".join(parts)


def _control_note(pairs: Sequence[Figures]) -> str:
    gains = []
    for pair in pairs:
        at_7 = {name: model["accuracy"]["7"] for name, model in pair["models"].items()}
        gains.append(
            f"seed {pair['seed']}: tuned {at_7['tuned'] - at_7['base']:+.3f}, "
            f"control {at_7['control'] - at_7['base']:+.3f}"
        )
    return (
        f"Gain over the base at 7 boxes: {'; '.join(gains)}. What the control gains comes from "
        "more training on box questions; only the difference between the two can be due to look-up "
        "and arithmetic."
    )


def _path_patching(pairs: Sequence[Figures]) -> str:
    rows = [
        f"| {name} | {pair['seed']} | `{group}` | "
        f"{' '.join(f'{score:+.3f}' for score in found['planted'])} | "
        f"{found['lowest_other']:+.3f} |"
        for pair in pairs
        for name, model in pair["models"].items()
        for group, found in model["path_patching"].items()
    ]
    head = "| model | seed | group | planted heads | lowest other |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def _interchange(pairs: Sequence[Figures]) -> str:
    rows = [
        f"| {name} | {pair['seed']} | `{group}` | {shares['position']:.3f} | "
        f"{shares['value']:.3f} | {shares['unchanged']:.3f} |"
        for pair in pairs
        for name, model in pair["models"].items()
        for group, shares in model["interchange"].items()
    ]
    head = "| model | seed | group | position | value | unchanged |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])
