"""Path patching: how much each head or MLP matters through a chosen path (Prakash et al. 2024,
§3.1)."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact import path_patching as exact_engine
from tl_entity.heads import Head
from tl_entity.hooks import path_patching as hooks_engine
from tl_entity.hooks.path_patching import Senders
from tl_entity.hooks.points import HeadInput, check_heads
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.ranks import shared_out
from tl_entity.stats import mean_intervals
from tl_entity.tasks.batches import PairBatch

Engine = Literal["exact", "hooks"]
"""`"exact"` recomputes only what can change; `"hooks"` runs the whole model for every sender."""


@checked
@dataclass(frozen=True)
class HeadScores:
    """How much the target's probability changes when each head takes its corrupt value.

    Attributes:
        per_example: change of the metric, one for each head and pair; by default the relative
            change of the target's probability, where -1 takes the target away altogether and 0
            changes nothing.
        clean_values: the metric in the clean runs; by default the target's log probability
            (natural).
        position: named position of senders and receivers.
        receivers: heads patched into; None for the logits.
        receiver_input: which of their inputs; None for the logits.
        engine: what computed the scores.
        metric: the metric's name.
    """

    per_example: Float[Tensor, "layer head batch"]
    clean_values: Float[Tensor, " batch"]
    position: str
    receivers: tuple[Head, ...] | None
    receiver_input: HeadInput | None
    engine: Engine
    metric: str = RELATIVE_PROBABILITY.name

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """Mean over the pairs; the lower, the more important the head."""
        return self.per_example.mean(-1)

    @property
    def intervals(self) -> Float64[np.ndarray, "layer head 2"]:
        """95 % interval of each mean score."""
        return mean_intervals(self.per_example.double().cpu().numpy())

    @property
    def top_layer(self) -> int:
        """Heads in this layer and above cannot reach a receiver: their scores are exactly 0."""
        if self.receivers is None:
            return self.per_example.shape[0]
        return max((receiver.layer for receiver in self.receivers), default=0)

    def ranked(self) -> list[Head]:
        """The heads that can reach a receiver, the most important first; ties in order of layer and
        head."""
        scores = self.scores.tolist()
        heads = [
            Head(layer, head)
            for layer in range(self.top_layer)
            for head in range(self.per_example.shape[1])
        ]
        return sorted(heads, key=lambda head: (scores[head.layer][head.head], head))

    def top(self, n: int, *, exclude: Collection[Head] = ()) -> tuple[Head, ...]:
        """The `n` most important heads, less those excluded; fewer if no more can reach."""
        return tuple([head for head in self.ranked() if head not in exclude][:n])


@checked
@dataclass(frozen=True)
class MLPScores:
    """How much the target's probability changes when each layer's MLP takes its corrupt output.

    Attributes:
        per_example: change of the metric, one for each layer and pair.
        clean_values: the metric in the clean runs.
        position: named position of senders and receivers.
        receivers: heads patched into; None for the logits.
        receiver_input: which of their inputs; None for the logits.
        engine: what computed the scores.
        metric: the metric's name.
    """

    per_example: Float[Tensor, "layer batch"]
    clean_values: Float[Tensor, " batch"]
    position: str
    receivers: tuple[Head, ...] | None
    receiver_input: HeadInput | None
    engine: Engine
    metric: str = RELATIVE_PROBABILITY.name

    @property
    def scores(self) -> Float[Tensor, " layer"]:
        """Mean over the pairs; the lower, the more important the MLP."""
        return self.per_example.mean(-1)

    @property
    def intervals(self) -> Float64[np.ndarray, "layer 2"]:
        """95 % interval of each mean score."""
        return mean_intervals(self.per_example.double().cpu().numpy())


@checked
def path_patch(
    model: HookedTransformer,
    pairs: PairBatch,
    *,
    position: str = "last",
    receivers: Sequence[Head] | None = None,
    receiver_input: HeadInput | None = None,
    engine: Engine = "exact",
    batch_size: int | None = None,
    metric: Metric = RELATIVE_PROBABILITY,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> HeadScores:
    """Score every head of the model as a sender (Prakash et al. 2024, §3.1).

    The clean prompt is run with every head's `hook_z`, at `position` and all later tokens, held at
    its clean value, except one sender at `position`, which takes its value from the corrupt run at
    the corrupt prompt's own `position`; MLPs and norms are recomputed. Without receivers, this
    run's logits are scored. With receivers, their q, k or v at `position` are recorded in this run;
    the clean prompt is then run again, with just those overwritten and all else recomputed, and
    scored. A head's score is the mean over pairs of (P_patched - P_clean) / P_clean of the target
    at the last token, or of another metric's change.

    Under grouped-query attention, k and v receivers are query heads too: the shared vector is
    replaced for that head alone. A head at or above the highest receiver's layer scores exactly 0.

    Args:
        model: the model.
        pairs: clean and corrupt prompts, and the token whose probability is followed.
        position: where senders and receivers are.
        receivers: heads patched into; None for the logits. With an empty list nothing can be
            reached and all scores are 0.
        receiver_input: "q", "k" or "v" of the receivers; goes with `receivers`.
        engine: "exact" (fast) or "hooks" (plain TransformerLens, one full run a sender).
        batch_size: pairs run together; all on the hooks engine and as many as memory allows on the
            exact engine if left out. Results do not depend on it beyond rounding.
        metric: how runs are scored, from `tl_entity.metrics` or your own.
        memory: bytes that the exact engine's intermediate results may take; found from the device
            if left out. Results do not depend on it beyond rounding.
        progress: called with the number of runs done since the last call, where one sender on one
            pair is a run; a path patching has n_layers * n_heads * len(pairs) of them.

    Raises:
        InputError: if the prompts lack the position, a receiver does not exist, receivers and
            their input do not go together, the metric lacks what it needs, or the exact engine
            does not fit the model.
    """
    clean, patched = _run(
        "heads",
        model,
        pairs,
        position,
        receivers,
        receiver_input,
        engine,
        batch_size,
        metric,
        memory,
        progress,
    )
    return HeadScores(
        per_example=metric.change(patched, clean),
        clean_values=clean,
        position=position,
        receivers=None if receivers is None else tuple(receivers),
        receiver_input=receiver_input,
        engine=engine,
        metric=metric.name,
    )


@checked
def path_patch_mlps(
    model: HookedTransformer,
    pairs: PairBatch,
    *,
    position: str = "last",
    receivers: Sequence[Head] | None = None,
    receiver_input: HeadInput | None = None,
    engine: Engine = "exact",
    batch_size: int | None = None,
    metric: Metric = RELATIVE_PROBABILITY,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> MLPScores:
    """Score every layer's MLP as a sender: `path_patch` with `mlp_out` at `position` in place of a
    head's output. Every head is held at its clean value; the MLPs above are recomputed.

    Arguments and errors are those of `path_patch`; a run is one layer on one pair.
    """
    clean, patched = _run(
        "mlps",
        model,
        pairs,
        position,
        receivers,
        receiver_input,
        engine,
        batch_size,
        metric,
        memory,
        progress,
    )
    return MLPScores(
        per_example=metric.change(patched, clean)[:, 0],
        clean_values=clean,
        position=position,
        receivers=None if receivers is None else tuple(receivers),
        receiver_input=receiver_input,
        engine=engine,
        metric=metric.name,
    )


def _run(
    senders: Senders,
    model: HookedTransformer,
    pairs: PairBatch,
    position: str,
    receivers: Sequence[Head] | None,
    receiver_input: HeadInput | None,
    engine: Engine,
    batch_size: int | None,
    metric: Metric,
    memory: int | None,
    progress: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """The metric in the clean runs and with each sender patched, by one of the engines."""
    if (receivers is None) != (receiver_input is None):
        raise InputError("Receivers and receiver_input go together: give both or neither.")
    check_heads(model, receivers or ())
    if bool(((pairs.targets < 0) | (pairs.targets >= model.cfg.d_vocab)).any()):
        raise InputError("A pair has no target: every target must be a token of the vocabulary.")
    how: dict[str, Any] = {
        "position": position,
        "senders": senders,
        "receivers": receivers,
        "receiver_input": receiver_input,
        "metric": metric,
        "progress": progress,
    }

    def compute(mine: PairBatch) -> tuple[Tensor, ...]:
        if engine == "exact":
            return exact_engine.patched_values(
                model, mine, **how, batch_size=batch_size, memory=memory
            )
        parts = [
            hooks_engine.patched_values(model, chunk, **how)
            for chunk in mine.chunks(len(mine) if batch_size is None else batch_size)
        ]
        return torch.cat([clean for clean, _ in parts]), torch.cat([p for _, p in parts], -1)

    clean, patched = shared_out(pairs.to(model.cfg.device or "cpu"), compute)
    return clean, patched
