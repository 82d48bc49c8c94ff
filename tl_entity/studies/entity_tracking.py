"""The paper's study: its task, its four groups, sizes, words and published figures (Prakash et al.
2024). Needs no torch before prompts are drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tl_entity.heads import ENTITY_TRACKING_POSITIONS, Circuit
from tl_entity.studies.design import (
    DrawPrompts,
    Draws,
    Part,
    Recipe,
    StudyDesign,
    StudyTask,
    Words,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tl_entity.tasks.batches import PairBatch, PromptBatch
    from tl_entity.tasks.boxes import BoxPrompt

NAME = "boxes"
"""The task's name."""

SAYS = "Which object is in the box asked about?"
"""What is asked."""

GROUPS: tuple[str, ...] = tuple(ENTITY_TRACKING_POSITIONS)
"""The four groups, in the order of discovery."""

LETTERS: Mapping[str, str] = dict(zip(GROUPS, "ABCD", strict=True))
"""The paper's letters for the groups."""

POSITION_WORDS: Mapping[str, str] = {
    "last": "last token",
    "query_label": "query label",
    "previous_query_label": "previous query label",
    "correct_object": "correct object",
    "first_token": "first token",
    "elsewhere": "elsewhere",
}
INFORMATION_WORDS: Mapping[str, str] = {
    "object_value": "object value",
    "box_label_value": "label value",
    "position": "position",
}
WORDS = Words(LETTERS, POSITION_WORDS, INFORMATION_WORDS)

DOES: Mapping[str, str] = {
    "value_fetcher": "look at the object in the box asked about, and write it as the answer.",
    "pos_transmitter": "look at the label in the question, and hand on which place was found.",
    "pos_detector": "look back for the same label, and find the place where it stands.",
    "struct_reader": "take in what stands together: which object belongs to this label.",
}
"""What each group of heads does, as the paper tells it."""

KNOCKOUTS: tuple[tuple[str, str], ...] = (
    ("last", "correct_object"),
    ("last", "query_label"),
    ("query_label", "previous_query_label"),
)
"""From which token to which attention is knocked out (paper, appendix)."""

PAPER_HEADS = 1024
PAPER_SIZES = (40, 7, 20, 5)
PAPER_RECEIVERS = (20, 5, 10)
"""Llama-7B's head count, circuit sizes, and how many of a group the next stage patched into."""

SMALLEST_GROUP = 2


def default_sizes(known: Circuit | None, n_heads: int) -> dict[str, int]:
    """Heads kept in each group: as many as were planted, or else the share they have in the
    paper."""
    if known is not None:
        return {group: len(known[group]) for group in GROUPS}
    scaled = (round(size * n_heads / PAPER_HEADS) for size in PAPER_SIZES)
    return {
        group: min(n_heads, max(SMALLEST_GROUP, size))
        for group, size in zip(GROUPS, scaled, strict=True)
    }


def default_receivers(sizes: Mapping[str, int]) -> dict[str, int]:
    """How many heads of each group the next stage patches into: the paper's share of the group."""
    return {
        group: min(sizes[group], max(SMALLEST_GROUP, round(sizes[group] * part / whole)))
        for group, part, whole in zip(GROUPS[:-1], PAPER_RECEIVERS, PAPER_SIZES, strict=False)
    }


def box_task(boxes: int) -> StudyTask:
    """The task, with so many boxes; accuracy is measured for 2 up to so many."""

    def pairs(tokenizer: "PreTrainedTokenizerBase", n: int, seed: int, part: Part) -> "PairBatch":
        from tl_entity.tasks.pairs import discovery_pairs

        return discovery_pairs(tokenizer, n, n_boxes=boxes, seed=seed)

    def information(tokenizer: "PreTrainedTokenizerBase", n: int) -> Draws:
        from tl_entity.tasks.desiderata import DESIDERATA, desideratum_draws

        return desideratum_draws(tokenizer, list(DESIDERATA), n, n_boxes=boxes)

    return StudyTask(
        name=NAME,
        says=SAYS,
        pairs=pairs,
        prompts=_prompts_of(boxes),
        inputs={"boxes": boxes},
        by_size={n: _prompts_of(n) for n in range(2, boxes + 1)},
        guessing=1 / boxes,
        information=information,
        beside="index",
        hidden=KNOCKOUTS,
        words=WORDS,
    )


def _prompts_of(boxes: int) -> DrawPrompts:
    def prompts(
        tokenizer: "PreTrainedTokenizerBase", n: int, seed: int, part: Part
    ) -> "PromptBatch":
        from tl_entity.tasks.boxes import box_prompts

        return box_prompts(tokenizer, n, n_boxes=boxes, seed=seed)

    return prompts


def paper_recipe(sizes: Mapping[str, int], receiver_sizes: Mapping[str, int]) -> Recipe:
    """The four stages by which the paper finds the circuit."""
    from tl_entity.methods.discovery import ENTITY_TRACKING_STAGES

    return Recipe(ENTITY_TRACKING_STAGES, sizes, receiver_sizes)


def paper_study(
    boxes: int,
    sizes: Mapping[str, int],
    receiver_sizes: Mapping[str, int],
    experiments: tuple[str, ...] | None = None,
) -> StudyDesign:
    """The paper's study.

    Args:
        boxes: in a prompt.
        sizes: heads kept, by group.
        receiver_sizes: heads of each group that the next stage patches into.
        experiments: what is done; None for all.
    """
    recipe = paper_recipe(sizes, receiver_sizes)
    return StudyDesign(box_task(boxes), recipe, experiments, from_python=False)


def example() -> "BoxPrompt":
    """The prompt that circuits are drawn over."""
    from tl_entity.tasks.boxes import BoxPrompt

    return BoxPrompt(("apple", "bell", "cup"), ("E", "Q", "M"), "Q")


@dataclass(frozen=True)
class PublishedModel:
    """What was published of one model, on prompts of seven boxes.

    Attributes:
        name: the model.
        accuracy: of the whole model.
        circuit_accuracy: of the circuit found in Llama-7B, run inside this model.
        faithfulness: the ratio of the two, as published.
        sizes: heads of the circuit found in *this* model by group, where published; for the
            fine-tunes another circuit than the one whose accuracy is given.
    """

    name: str
    accuracy: float
    circuit_accuracy: float
    faithfulness: float
    sizes: tuple[int, int, int, int] | None = None


PUBLISHED: tuple[PublishedModel, ...] = (
    PublishedModel("Llama-7B", 0.66, 0.66, 1.00, (40, 7, 20, 5)),
    PublishedModel("Vicuna-7B", 0.67, 0.65, 0.97),
    PublishedModel("Goat-7B", 0.82, 0.73, 0.89, (68, 28, 40, 39)),
    PublishedModel("FLoat-7B", 0.82, 0.72, 0.88, (68, 29, 40, 38)),
)
RANDOM_CIRCUIT_ACCURACY = (0.0, 0.01)
"""From lowest to highest, of random circuits of the sizes of Llama's."""

PUBLISHED_CMAP: dict[str, dict[str, float]] = {
    "Goat-7B": {
        "whole circuit": 0.82,
        "value_fetcher": 0.82,
        "pos_transmitter": 0.78,
        "pos_detector": 0.62,
        "struct_reader": 0.65,
    },
    "FLoat-7B": {
        "whole circuit": 0.82,
        "value_fetcher": 0.82,
        "pos_transmitter": 0.74,
        "pos_detector": 0.56,
        "struct_reader": 0.65,
    },
}
"""Llama-7B's accuracy with head outputs of a fine-tune, by fine-tune and by group: of the
*fine-tune's* circuit, each group cut down to heads that DCM selected in it."""

PUBLISHED_CMAP_SIZES: dict[str, tuple[int, int, int, int]] = {"Goat-7B": (56, 15, 18, 39)}
"""How many heads were patched, by group; Goat's whole circuit has 68/28/40/39, so that D is
whole."""

PUBLISHED_KINDS: dict[str, str] = {
    "value_fetcher": "object_value",
    "pos_transmitter": "position",
    "pos_detector": "position",
}
"""The desideratum by whose DCM heads a group is cut down for CMAP: what the paper says the group
carries. D is not cut down."""

PUBLISHED_KNOCKOUT: dict[int, float] = {16: 0.06, 20: 0.21, 24: 0.56, 31: 0.65}
"""Llama-7B's accuracy when the last token no longer sees the correct object from a layer up, by
that layer (of 32, counted from 0 as everywhere here; the released file counts from 1)."""

CITATION = (
    "Prakash, Shaham, Haklay, Belinkov, Bau: Fine-Tuning Enhances Existing Mechanisms: "
    "A Case Study on Entity Tracking. ICLR 2024, arXiv 2402.14811"
)
