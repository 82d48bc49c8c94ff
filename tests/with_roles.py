"""Random pairs whose tokens have roles."""

from dataclasses import replace

import torch

from tests.random_models import random_prompts
from tl_entity import PairBatch, PromptBatch

ROLES = ("even", "odd", "last")


def role_pairs(n_pairs: int = 4, *, left: bool = False, seed: int = 0) -> PairBatch:
    """Clean and corrupt prompts of equal lengths, pair by pair, padded on opposite sides; tokens
    are `even` or `odd` by their place, but the `last`."""
    clean = random_prompts(n_pairs, 9, left=left, seed=seed)
    corrupt = random_prompts(n_pairs, 9, left=not left, seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randint(0, 20, corrupt.tokens.shape, generator=generator)
    return PairBatch(
        _with_roles(clean), _with_roles(replace(corrupt, tokens=tokens)), clean.answers
    )


def _with_roles(prompts: PromptBatch) -> PromptBatch:
    place = prompts.mask.long().cumsum(1) - 1
    roles = torch.where(prompts.where("last"), 2, place % 2)
    return replace(prompts, roles=torch.where(prompts.mask, roles, -1), role_names=ROLES)
