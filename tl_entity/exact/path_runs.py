"""The clean and the corrupt run that path patching needs, and metrics of final streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._pieces import RECORDED, piece
from tl_entity.exact.blocks import (
    log_normalizer,
    row_slices,
    unembed,
)
from tl_entity.exact.window import (
    KeysAndValues,
)
from tl_entity.hooks.path_patching import Path
from tl_entity.hooks.points import HeadInput, hook_point
from tl_entity.hooks.run import record
from tl_entity.hooks.watch import assure_finite
from tl_entity.metrics import Metric
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch

ByLayer = Mapping[int, Mapping[HeadInput, Sequence[int]]]
"""Head indices by layer and by which of their inputs is patched."""


Inputs = dict[int, dict[HeadInput, Float[Tensor, "senders member receivers d_head"]]]
"""What receivers get from each sender below them."""


LOGITS_CHUNK_BYTES = 64 * 2**20
"""Rows are unembedded in slices whose logits take about this much memory."""


def sizes_of(by_layer: ByLayer) -> tuple[object, ...]:
    return tuple(
        (layer, which, len(heads))
        for layer, inputs in by_layer.items()
        for which, heads in inputs.items()
    )


@dataclass(frozen=True)
class Runs:
    """What the passes need of the clean and the corrupt run, and nothing more.

    Attributes:
        pairs: the pairs that were run.
        at: token index of the senders in each clean prompt.
        last: token index of the answer in each clean prompt.
        metric: how runs are scored.
        clean: the metric in the clean run.
        deltas: corrupt minus clean outputs of each layer's senders: `z` of heads, or `mlp_out`.
        points: the recorded activations of the clean run by hook point name.
        path: what is patched, and into what.
        top: layers from here up hold no sender that can reach a receiver.
    """

    pairs: PairBatch
    at: Int[Tensor, " batch"]
    last: Int[Tensor, " batch"]
    metric: Metric
    clean: Float[Tensor, " batch"]
    deltas: list[Float[Tensor, "batch *sender width"]]
    points: dict[str, Tensor]
    path: Path
    top: int

    @classmethod
    @piece(RECORDED)
    def record(
        cls,
        model: Model,
        pairs: PairBatch,
        path: Path,
        top: int,
        metric: Metric,
    ) -> "Runs":
        position, receivers = path.position, path.by_layer
        n_layers = model.cfg.n_layers
        sent = [hook_point("z" if path.senders == "heads" else "mlp_out", n) for n in range(top)]
        points: dict[str, str | None] = dict.fromkeys(sent, position)
        for layer in range(top):
            points |= {hook_point(name, layer): position for name in ("attn_out", "resid_mid")}
        for layer in range(min(receivers, default=n_layers), n_layers):
            points |= {hook_point(name, layer): None for name in ("rot_k", "v")}
            if layer in receivers:
                points |= {hook_point(name, layer): None for name in ("resid_pre", "resid_mid")}
        final = hook_point("resid_post", n_layers - 1)
        seen = record(model, pairs.clean, {**points, final: ANSWER_POSITION})
        corrupt = record(model, pairs.corrupt, dict.fromkeys(sent, position)) if top else {}
        return cls(
            pairs=pairs,
            at=pairs.clean.position(position),
            last=pairs.clean.position(ANSWER_POSITION),
            metric=metric,
            clean=metric_values(model, seen.pop(final)[None], pairs, metric)[0],
            deltas=[corrupt[name] - seen[name] for name in sent],
            points=seen,
            path=path,
            top=top,
        )

    def __getitem__(self, point: tuple[str, int]) -> Tensor:
        return self.points[hook_point(*point)]

    def keys_and_values(self, layer: int) -> KeysAndValues:
        """The clean run's, of every token."""
        return self["rot_k", layer], self["v", layer]

    def at_senders(self, name: str, layer: int) -> Float[Tensor, "batch d_model"]:
        """The clean activation at the senders' token."""
        activation = self[name, layer]
        if activation.ndim == 2:
            return activation
        rows = torch.arange(len(activation), device=activation.device)
        return activation[rows, self.at.to(activation.device)]

    @property
    def moved(self) -> Bool[Tensor, "senders batch"]:
        """Where a sender's corrupt value differs from its clean one at all."""
        moved = [(delta != 0).any(-1).view(len(delta), -1).T for delta in self.deltas]
        return torch.cat([some.to(self.clean.device) for some in moved])

    @property
    def per_layer(self) -> int:
        """Senders in a layer."""
        return self.deltas[0].shape[1] if self.path.senders == "heads" else 1


@piece(alike=lambda model, resid, pairs, metric: (resid.shape, metric))
def metric_values(
    model: Model,
    resid: Float[Tensor, "senders batch d_model"],
    pairs: PairBatch,
    metric: Metric,
) -> Float[Tensor, "senders batch"]:
    """The metric from the final residual stream."""
    tokens = None if metric.tokens is None else metric.tokens(pairs)
    # Copies of the logits in float32, or the few columns of the unembedding that are needed.
    widths = 3 * model.cfg.d_vocab_out if tokens is None else tokens.shape[1] * model.cfg.d_model
    values = []
    assure_finite(resid)
    for some in row_slices(len(resid), 4 * widths * len(pairs), LOGITS_CHUNK_BYTES):
        rows = resid[some]
        wanted = None if tokens is None else tokens.expand(len(rows), -1, -1)
        logits = unembed(model, rows, wanted)
        if tokens is not None and metric.log_probabilities:
            normalizer = log_normalizer(model, rows)[..., None]
            logits = logits.to(normalizer.dtype) - normalizer
        values.append(metric.value(logits, pairs))
    return torch.cat(values)
