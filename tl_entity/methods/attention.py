"""What heads attend to: the mean weight on each named position."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._typing import checked
from tl_entity.heads import Head
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import record
from tl_entity.tasks.batches import PromptBatch

FIRST_TOKEN = "first_token"
ELSEWHERE = "elsewhere"


@checked
@dataclass(frozen=True)
class AttentionSummary:
    """Where some heads look from one named position.

    Attributes:
        heads: the heads.
        from_position: the named position that looks.
        names: what is looked at: the named positions, the first token, and all the rest.
        weights: mean attention weight of each head on each of these; a row sums to one.
        common_offset: the distance back to the token looked at most, in the most prompts.
        offset_share: the share of prompts in which it is that distance.
    """

    heads: tuple[Head, ...]
    from_position: str
    names: tuple[str, ...]
    weights: Float[Tensor, "head name"]
    common_offset: Int[Tensor, " head"]
    offset_share: Float[Tensor, " head"]


@checked
@torch.no_grad()
def summarize_attention(
    model: HookedTransformer,
    prompts: PromptBatch,
    heads: Sequence[Head],
    *,
    from_position: str,
    batch_size: int = 32,
) -> AttentionSummary:
    """Mean attention weights of some heads, from one named position to the others.

    A named position that comes after `from_position` in every prompt is left out; where two names
    fall on one token of a prompt, its weight counts for the first.

    Raises:
        InputError: if a head or the position does not exist.
    """
    check_heads(model, heads)
    prompts = prompts.to(model.cfg.device or "cpu")
    seer = prompts.position(from_position)
    seen = {name: index for name, index in prompts.positions.items() if bool((index <= seer).any())}
    first = prompts.mask.int().argmax(1)
    seen[FIRST_TOKEN] = first.to(seer)
    layers = sorted({head.layer for head in heads})
    points: dict[str, str | None] = {hook_point("pattern", layer): None for layer in layers}
    rows = []
    for chunk in prompts.chunks(batch_size):
        cache = record(model, chunk, points)
        batch = torch.arange(len(chunk))
        at = chunk.position(from_position)
        rows.append(
            torch.stack(
                [cache[hook_point("pattern", h.layer)][batch, h.head, at].float() for h in heads]
            )
            if heads
            else torch.empty(0, *chunk.tokens.shape)
        )
    pattern = torch.cat(rows, 1)  # head batch key
    left = pattern.clone()
    weights = []
    for index in seen.values():
        where = index[None, :, None].expand(len(heads), -1, 1)
        weights.append(left.gather(2, where).squeeze(2).mean(1))
        left.scatter_(2, where, 0.0)
    weights.append(left.sum(2).mean(1))
    offsets = seer - pattern.argmax(2)
    common = offsets.mode(1).values if heads else offsets.new_empty(0)
    return AttentionSummary(
        heads=tuple(heads),
        from_position=from_position,
        names=(*seen, ELSEWHERE),
        weights=torch.stack(weights, 1),
        common_offset=common,
        offset_share=(offsets == common[:, None]).float().mean(1),
    )
