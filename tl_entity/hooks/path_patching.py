"""Path patching by plain hooks: one run a sender. The slow truth that `exact` must agree with."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Path:
    """From which senders a change goes, and by way of which inputs of which heads.

    Attributes:
        senders: every head, or every layer's MLP (one sender a layer).
        position: where senders and receivers are.
        receivers: the heads whose q, k or v is patched, by which of them; None to patch the logits
            directly.
    """

    senders: Senders = "heads"
    position: str = "last"
    receivers: Mapping[HeadInput, Sequence[Head]] | None = None

    @property
    def by_layer(self) -> dict[int, dict[HeadInput, list[int]]]:
        """Head indices by layer and input, each in order, the lowest layer first."""
        found: dict[int, dict[HeadInput, list[int]]] = {}
        for which, heads in (self.receivers or {}).items():
            for layer, head in sorted(set(heads)):
                found.setdefault(layer, {}).setdefault(which, []).append(head)
        return dict(sorted(found.items()))

    def top(self, n_layers: int) -> int:
        """Senders in this layer and above reach no receiver."""
        return n_layers if self.receivers is None else max(self.by_layer, default=0)


@checked
@torch.no_grad()
def patched_values(
    model: Model,
    pairs: PairBatch,
    path: Path,
    *,
    metric: Metric = RELATIVE_PROBABILITY,
    progress: Callable[[int], object] = lambda runs: None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "layer sender batch"]]:
    """The metric in the clean run, and with each sender patched in turn.

    The definition is that of `tl_entity.methods.path_patching.path_patch`. Senders that cannot
    reach a receiver are not run: they keep the clean value.

    Args:
        model: the model.
        pairs: clean and corrupt prompts.
        path: what is patched, and into what.
        metric: how runs are scored.
        progress: called with the number of runs done since the last call, one for each sender and
            pair.
    """
    # The clean run too, so that an edit that changes nothing leaves no trace of rounding.
    apart = nullcontext() if set(path.receivers or ()) <= {"q"} else separate_kv_heads(model)
    with guarded(model), apart:
        layers = range(model.cfg.n_layers)
        z_points: dict[str, str | None] = {hook_point("z", layer): None for layer in layers}
        clean_z = record(model, pairs.clean, z_points)
        name = "z" if path.senders == "heads" else "mlp_out"
        corrupt = record(model, pairs.corrupt, {hook_point(name, layer): None for layer in layers})

        def scored(hooks: Sequence[Hook]) -> Tensor:
            return metric.of_logits(answer_logits(model, pairs.clean, hooks), pairs)

        n_senders = model.cfg.n_heads if path.senders == "heads" else 1
        clean = scored([])
        patched = clean.expand(model.cfg.n_layers, n_senders, -1).clone()
        frozen = freeze_heads(clean_z, pairs.clean, layers=layers, from_position=path.position)
        top = path.top(model.cfg.n_layers)
        if path.receivers is None:
            # With attention held, a change elsewhere never reaches the token that is scored.
            at_answer = pairs.clean.position(ANSWER_POSITION)
            reaches = bool((pairs.clean.position(path.position) == at_answer).any())
            top = top if reaches else 0
        progress(n_senders * (model.cfg.n_layers - top) * len(pairs))
        for layer in range(top):
            for index in range(n_senders):
                if path.senders == "heads":
                    sender = patch_heads(
                        corrupt,
                        {path.position: [Head(layer, index)]},
                        into=pairs.clean,
                        source=pairs.corrupt,
                    )
                else:
                    sender = [_mlp_hook(corrupt, layer, path.position, pairs)]
                hooks: list[Hook] = [*frozen, *sender]
                if path.receivers is not None:
                    hooks = _receiver_hooks(model, pairs, hooks, path)
                patched[layer, index] = scored(hooks)
                progress(len(pairs))
    return clean, patched


def _mlp_hook(corrupt: dict[str, Tensor], layer: int, position: str, pairs: PairBatch) -> Hook:
    name = hook_point("mlp_out", layer)
    activation = corrupt[name]
    rows = torch.arange(len(pairs), device=activation.device)
    values = activation[rows, pairs.corrupt.position(position)]
    return name, ReplaceToken(pairs.clean.position(position), values)


def _receiver_hooks(model: Model, pairs: PairBatch, hooks: list[Hook], path: Path) -> list[Hook]:
    """Run with the sender patched and return hooks that overwrite only the receivers' inputs."""
    points = {
        hook_point(which, layer): heads
        for layer, inputs in path.by_layer.items()
        for which, heads in inputs.items()
    }
    seen = record(model, pairs.clean, dict.fromkeys(points, path.position), hooks=hooks)
    positions = pairs.clean.position(path.position)
    return [
        (point, ReplaceHeads(positions, torch.tensor(heads), seen[point][:, heads]))
        for point, heads in points.items()
    ]
