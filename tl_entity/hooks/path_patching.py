"""Path patching by plain hooks: one run a sender. The slow truth that `exact` must agree with."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._typing import checked
from tl_entity.heads import Head
from tl_entity.hooks.edits import Hook, ReplaceHeads, freeze_heads, patch_heads
from tl_entity.hooks.points import HeadInput, hook_point, separate_kv_heads
from tl_entity.hooks.run import answer_logits, record
from tl_entity.metrics import log_probability
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch


@checked
@torch.no_grad()
def patched_log_probabilities(
    model: HookedTransformer,
    pairs: PairBatch,
    *,
    position: str,
    receivers: Sequence[Head] | None = None,
    receiver_input: HeadInput | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "layer head batch"]]:
    """The target's log probability in the clean run, and with each sender patched in turn.

    The definition is that of `tl_entity.methods.path_patching.path_patch`. Senders that cannot
    reach a receiver are not run: they keep the clean value.

    Args:
        model: the model.
        pairs: clean and corrupt prompts.
        position: where senders and receivers are.
        receivers: heads whose input is patched; None to patch the logits directly.
        receiver_input: what of the receivers is patched; needed exactly if there are receivers.
        progress: called with the number of runs done since the last call, one for each sender and
            pair.
    """
    # The clean run too, so that an edit that changes nothing leaves no trace of rounding.
    with separate_kv_heads(model) if receiver_input in ("k", "v") else nullcontext():
        layers = range(model.cfg.n_layers)
        z_points: dict[str, str | None] = {hook_point("z", layer): None for layer in layers}
        clean_z = record(model, pairs.clean, z_points)
        corrupt_z = record(model, pairs.corrupt, z_points)
        clean = log_probability(answer_logits(model, pairs.clean), pairs.targets)
        patched = clean.expand(model.cfg.n_layers, model.cfg.n_heads, -1).clone()
        frozen = freeze_heads(clean_z, pairs.clean, layers=layers, from_position=position)
        if receivers is not None:
            top = max((receiver.layer for receiver in receivers), default=0)
        else:
            # With attention held, a change elsewhere never reaches the token that is scored.
            scored = pairs.clean.position(ANSWER_POSITION)
            reaches = bool((pairs.clean.position(position) == scored).any())
            top = model.cfg.n_layers if reaches else 0
        progress(model.cfg.n_heads * (model.cfg.n_layers - top) * len(pairs))
        for layer in range(top):
            for head in range(model.cfg.n_heads):
                sender = patch_heads(
                    corrupt_z,
                    {position: [Head(layer, head)]},
                    into=pairs.clean,
                    source=pairs.corrupt,
                )
                hooks: list[Hook] = [*frozen, *sender]
                if receivers is not None:
                    assert receiver_input is not None
                    hooks = _receiver_hooks(
                        model, pairs, hooks, position, receivers, receiver_input
                    )
                logits = answer_logits(model, pairs.clean, hooks)
                patched[layer, head] = log_probability(logits, pairs.targets)
                progress(len(pairs))
    return clean, patched


def _receiver_hooks(
    model: HookedTransformer,
    pairs: PairBatch,
    hooks: list[Hook],
    position: str,
    receivers: Sequence[Head],
    receiver_input: HeadInput,
) -> list[Hook]:
    """Run with the sender patched and return hooks that overwrite only the receivers' input."""
    by_layer: dict[int, list[int]] = {}
    for receiver in receivers:
        by_layer.setdefault(receiver.layer, []).append(receiver.head)
    points = {layer: hook_point(receiver_input, layer) for layer in by_layer}
    seen = record(model, pairs.clean, dict.fromkeys(points.values(), position), hooks=hooks)
    return [
        (
            point,
            ReplaceHeads(
                pairs.clean.position(position),
                torch.tensor(by_layer[layer]),
                seen[point][:, by_layer[layer]],
            ),
        )
        for layer, point in points.items()
    ]
