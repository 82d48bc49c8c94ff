"""Path patching by plain hooks: one run a sender. The slow truth that `exact` must agree with."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.heads import Head
from tl_entity.hooks.edits import Hook, ReplaceHeads, ReplaceToken, freeze_heads, patch_heads
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import HeadInput, hook_point, separate_kv_heads
from tl_entity.hooks.run import answer_logits, record
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch

Senders = Literal["heads", "mlps"]
"""What is patched in turn: every attention head, or every layer's MLP."""


@checked
@torch.no_grad()
def patched_values(
    model: Model,
    pairs: PairBatch,
    *,
    position: str,
    senders: Senders = "heads",
    receivers: Sequence[Head] | None = None,
    receiver_input: HeadInput | None = None,
    metric: Metric = RELATIVE_PROBABILITY,
    progress: Callable[[int], object] = lambda runs: None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "layer sender batch"]]:
    """The metric in the clean run, and with each sender patched in turn.

    The definition is that of `tl_entity.methods.path_patching.path_patch`. Senders that cannot
    reach a receiver are not run: they keep the clean value.

    Args:
        model: the model.
        pairs: clean and corrupt prompts.
        position: where senders and receivers are.
        senders: every head, or every layer's MLP (one sender a layer).
        receivers: heads whose input is patched; None to patch the logits directly.
        receiver_input: what of the receivers is patched; needed exactly if there are receivers.
        metric: how runs are scored.
        progress: called with the number of runs done since the last call, one for each sender and
            pair.
    """
    # The clean run too, so that an edit that changes nothing leaves no trace of rounding.
    apart = separate_kv_heads(model) if receiver_input in ("k", "v") else nullcontext()
    with guarded(model), apart:
        layers = range(model.cfg.n_layers)
        z_points: dict[str, str | None] = {hook_point("z", layer): None for layer in layers}
        clean_z = record(model, pairs.clean, z_points)
        name = "z" if senders == "heads" else "mlp_out"
        corrupt = record(model, pairs.corrupt, {hook_point(name, layer): None for layer in layers})

        def scored(hooks: Sequence[Hook]) -> Tensor:
            return metric.of_logits(answer_logits(model, pairs.clean, hooks), pairs)

        n_senders = model.cfg.n_heads if senders == "heads" else 1
        clean = scored([])
        patched = clean.expand(model.cfg.n_layers, n_senders, -1).clone()
        frozen = freeze_heads(clean_z, pairs.clean, layers=layers, from_position=position)
        if receivers is not None:
            top = max((receiver.layer for receiver in receivers), default=0)
        else:
            # With attention held, a change elsewhere never reaches the token that is scored.
            at_answer = pairs.clean.position(ANSWER_POSITION)
            reaches = bool((pairs.clean.position(position) == at_answer).any())
            top = model.cfg.n_layers if reaches else 0
        progress(n_senders * (model.cfg.n_layers - top) * len(pairs))
        for layer in range(top):
            for index in range(n_senders):
                if senders == "heads":
                    sender = patch_heads(
                        corrupt,
                        {position: [Head(layer, index)]},
                        into=pairs.clean,
                        source=pairs.corrupt,
                    )
                else:
                    sender = [_mlp_hook(corrupt, layer, position, pairs)]
                hooks: list[Hook] = [*frozen, *sender]
                if receivers is not None:
                    assert receiver_input is not None
                    hooks = _receiver_hooks(
                        model, pairs, hooks, position, receivers, receiver_input
                    )
                patched[layer, index] = scored(hooks)
                progress(len(pairs))
    return clean, patched


def _mlp_hook(corrupt: dict[str, Tensor], layer: int, position: str, pairs: PairBatch) -> Hook:
    name = hook_point("mlp_out", layer)
    activation = corrupt[name]
    rows = torch.arange(len(pairs), device=activation.device)
    values = activation[rows, pairs.corrupt.position(position)]
    return name, ReplaceToken(pairs.clean.position(position), values)


def _receiver_hooks(
    model: Model,
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
