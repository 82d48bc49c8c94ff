"""A short text by which the same prompts are known again."""

import hashlib

from tl_entity._typing import checked
from tl_entity.tasks.batches import PairBatch, PromptBatch


@checked
def fingerprint(prompts: PromptBatch | PairBatch) -> str:
    """A text that is equal only for the same prompts: tokens, answers and positions; of pairs, both
    prompts, targets and foils. What they are padded with makes no difference."""
    if isinstance(prompts, PairBatch):
        foils = None if prompts.foils is None else prompts.foils.tolist()
        told = [prompts.targets.tolist(), foils]
        told += [*_told(prompts.clean), *_told(prompts.corrupt)]
    else:
        told = [prompts.answers.tolist(), *_told(prompts)]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _told(prompts: PromptBatch) -> list[object]:
    mask = prompts.mask
    begins = mask.int().argmax(1)
    positions = {name: (at - begins).tolist() for name, at in prompts.positions.items()}
    tokens = [row[here].tolist() for row, here in zip(prompts.tokens, mask, strict=True)]
    return [tokens, sorted(positions.items())]
