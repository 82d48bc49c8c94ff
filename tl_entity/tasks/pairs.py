"""Clean and corrupt prompts for finding the circuit (design after Prakash et al. 2024, §3.1)."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import PairBatch
from tl_entity.tasks.boxes import BoxPrompt, mark_sentence, sample_prompts, usable_words
from tl_entity.tasks.marked import tokenize_marked


@dataclass(frozen=True)
class DiscoveryPair:
    """A clean prompt and a corrupt one that shares nothing with it but the form.

    Attributes:
        clean: a prompt with an answer.
        corrupt: other objects, other labels, and a queried label that none of its boxes has.
        stand_in: the corrupt segment, drawn at random, whose label takes the place of the previous
            query label, which the corrupt prompt lacks.
    """

    clean: BoxPrompt
    corrupt: BoxPrompt
    stand_in: int


@checked
def sample_discovery_pairs(
    n_pairs: int,
    *,
    n_boxes: int = 7,
    seed: int,
    objects: tuple[str, ...],
    labels: tuple[str, ...],
) -> list[DiscoveryPair]:
    """Random pairs; the same seed gives the same pairs.

    Raises:
        InputError: as `sample_prompts`, and if there are too few labels or objects for the two
            prompts of a pair to share none (2 n_boxes + 1 labels, 2 n_boxes objects).
    """
    clean_prompts = sample_prompts(
        n_pairs, n_boxes=n_boxes, seed=seed, objects=objects, labels=labels
    )
    if len(labels) < 2 * n_boxes + 1 or len(objects) < 2 * n_boxes:
        raise InputError(
            f"Pairs of {n_boxes} boxes need {2 * n_boxes + 1} labels and {2 * n_boxes} objects, "
            f"but {len(labels)} and {len(objects)} can be used; ask for fewer boxes."
        )
    # A string seed keeps this stream apart from the one the clean prompts were drawn from.
    generator = random.Random(f"corrupt {seed}")
    pairs = []
    for clean in clean_prompts:
        *other_labels, absent = generator.sample(
            [label for label in labels if label not in clean.labels], n_boxes + 1
        )
        other_objects = generator.sample(
            [noun for noun in objects if noun not in clean.objects], n_boxes
        )
        corrupt = BoxPrompt(tuple(other_objects), tuple(other_labels), absent)
        pairs.append(DiscoveryPair(clean, corrupt, generator.randrange(n_boxes)))
    return pairs


@checked
def discovery_pairs(
    tokenizer: PreTrainedTokenizerBase, n_pairs: int, *, n_boxes: int = 7, seed: int
) -> PairBatch:
    """Random clean and corrupt prompts as tokens; the targets are the clean answers.

    Raises:
        InputError: as `sample_discovery_pairs`, counting only objects and labels of one token.
    """
    objects, labels = usable_words(tokenizer)
    pairs = sample_discovery_pairs(
        n_pairs, n_boxes=n_boxes, seed=seed, objects=objects, labels=labels
    )
    clean = tokenize_marked([mark_sentence(pair.clean.text) for pair in pairs], tokenizer)
    corrupt = tokenize_marked(
        [mark_sentence(pair.corrupt.text, label_stands_in=pair.stand_in) for pair in pairs],
        tokenizer,
    )
    return PairBatch(clean, corrupt, targets=clean.answers)
