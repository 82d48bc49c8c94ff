"""Hooks that give one model's heads what another model computes on the same prompts."""

import torch
from transformer_lens import HookedTransformer

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, HeadsAt, heads_by_position
from tl_entity.hooks.edits import Hook, patch_heads
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import record
from tl_entity.tasks.batches import PromptBatch

SHARED_SIZES = ("n_layers", "d_model", "n_heads", "n_key_value_heads", "d_head", "d_vocab")


@checked
def check_same_architecture(one: HookedTransformer, other: HookedTransformer) -> None:
    """Make sure that activations of one model have their place in the other.

    Raises:
        InputError: naming the first size that differs.
    """
    for size in SHARED_SIZES:
        ours, theirs = getattr(one.cfg, size), getattr(other.cfg, size)
        if ours != theirs:
            raise InputError(
                f"The models differ in {size} ({ours} and {theirs}); "
                "activations can only be patched between models of one architecture."
            )


@checked
@torch.no_grad()
def patch_from_model(
    source: HookedTransformer,
    into: HookedTransformer,
    prompts: PromptBatch,
    heads: Circuit | HeadsAt,
    *,
    point: str = "z",
) -> list[Hook]:
    """Hooks for `into` that give its heads, at named positions, what `source` computes on the same
    prompts (cross-model activation patching, CMAP; Prakash et al. 2024, §5).

    Args:
        source: the model read, such as the fine-tuned one.
        into: the model to be run with the hooks, such as the base.
        prompts: the prompts of both runs.
        heads: a circuit, or heads by named position.
        point: z for the heads' outputs; q, k or v for what they read.

    Raises:
        InputError: if the models differ in architecture, or a head or position does not exist.
    """
    check_same_architecture(source, into)
    by_position = heads_by_position(heads)
    chosen = [head for at in by_position.values() for head in at]
    check_heads(source, chosen)
    points: dict[str, str | None] = {hook_point(point, head.layer): None for head in chosen}
    return patch_heads(record(source, prompts, points), by_position, into=prompts, point=point)
