"""Path patching: how much each head or MLP matters through a chosen path (Prakash et al. 2024,
§3.1)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact import path_patching as exact_engine
from tl_entity.heads import Head
from tl_entity.hooks import path_patching as hooks_engine
from tl_entity.hooks.path_patching import Path, Senders
from tl_entity.hooks.points import HeadInput, check_heads
from tl_entity.hooks.vocabulary import check_metric, check_pairs
from tl_entity.methods.head_scores import HEADS_IN_A_LINE as HEADS_IN_A_LINE
from tl_entity.methods.head_scores import HeadScores as HeadScores
from tl_entity.methods.head_scores import MLPScores as MLPScores
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric, check_values
from tl_entity.runs.runner import Engine as Engine
from tl_entity.runs.runner import Runner, RunSettings
from tl_entity.tasks.batches import PairBatch

if TYPE_CHECKING:
    pass

Receivers = Sequence[Head] | Mapping[HeadInput, Sequence[Head]]
"""Heads patched into: those of one input, or by which of their inputs."""


@checked
def path_patch(
    model: Model,
    pairs: PairBatch,
    *,
    position: str = "last",
    receivers: Receivers | None = None,
    receiver_input: HeadInput | None = None,
    metric: Metric = RELATIVE_PROBABILITY,
    **how: Unpack[RunSettings],
) -> HeadScores:
    """Score every head of the model as a sender (Prakash et al. 2024, §3.1).

    The clean prompt is run with every head's `hook_z`, at `position` and all later tokens, held at
    its clean value, except one sender at `position`, which takes its value from the corrupt run at
    the corrupt prompt's own `position`; MLPs and norms are recomputed. Without receivers, this
    run's logits are scored. With receivers, their q, k or v at `position` are recorded in this run;
    the clean prompt is then run again, with just those overwritten and all else recomputed, and
    scored. A head's score is the mean over pairs of (P_patched - P_clean) / P_clean of the target
    at the last token, or of another metric's change. A relative change is at most
    exp(`tl_entity.metrics.MOST_LOG_CHANGE`) - 1.

    Under grouped-query attention, k and v receivers are query heads too: the shared vector is
    replaced for that head alone. A head at or above the highest receiver's layer scores exactly 0.

    Args:
        model: the model.
        pairs: clean and corrupt prompts, and the token whose probability is followed.
        position: where senders and receivers are.
        receivers: heads patched into; None for the logits. With an empty list nothing can be
            reached and all scores are 0. Heads by which of their inputs, such as
            `{"q": [...], "v": [...]}`, are patched into together.
        receiver_input: "q", "k" or "v" of the receivers; goes with a list of `receivers`.
        metric: how runs are scored, from `tl_entity.metrics` or your own.
        how: engine, batch_size, memory, progress, ranks or runner: see `Runner`. "exact" is fast,
            "hooks" plain TransformerLens, one full run a sender. With no batch_size, all pairs run
            together on the hooks engine and as many as memory allows on the exact engine. One
            sender on one pair is a run; there are n_layers * n_heads * len(pairs) of them.

    Raises:
        InputError: if the prompts lack the position, a receiver does not exist, receivers and
            their input do not go together, the metric lacks what it needs, the model does not
            know a token of the pairs or has hooks attached to it, or the exact engine does not fit
            the model.
        NotFiniteError: if weights, activations or scores are NaN or infinite, naming where.
    """
    path = _path_of("heads", position, receivers, receiver_input)
    runner = Runner.of(**how)
    clean, patched = _run(model, pairs, path, metric, runner)
    return HeadScores(
        per_example=metric.change(patched, clean),
        clean_values=clean,
        position=position,
        **_described(path),
        engine=runner.engine,
        metric=metric.name,
    )


@checked
def path_patch_mlps(
    model: Model,
    pairs: PairBatch,
    *,
    position: str = "last",
    receivers: Receivers | None = None,
    receiver_input: HeadInput | None = None,
    metric: Metric = RELATIVE_PROBABILITY,
    **how: Unpack[RunSettings],
) -> MLPScores:
    """Score every layer's MLP as a sender: `path_patch` with `mlp_out` at `position` in place of a
    head's output. Every head is held at its clean value; the MLPs above are recomputed.

    Arguments and errors are those of `path_patch`; a run is one layer on one pair.
    """
    path = _path_of("mlps", position, receivers, receiver_input)
    runner = Runner.of(**how)
    clean, patched = _run(model, pairs, path, metric, runner)
    return MLPScores(
        per_example=metric.change(patched, clean)[:, 0],
        clean_values=clean,
        position=position,
        **_described(path),
        engine=runner.engine,
        metric=metric.name,
    )


def _path_of(
    senders: Senders,
    position: str,
    receivers: Receivers | None,
    receiver_input: HeadInput | None,
) -> Path:
    if isinstance(receivers, Mapping):
        if receiver_input is not None:
            raise InputError(
                "Receivers that are given by their inputs go without a receiver_input."
            )
        return Path(senders, position, receivers)
    if receivers is None or receiver_input is None:
        if receivers is not None or receiver_input is not None:
            raise InputError("Receivers and receiver_input go together: give both or neither.")
        return Path(senders, position)
    return Path(senders, position, {receiver_input: tuple(receivers)})


def _described(path: Path) -> dict[str, Any]:
    """The receivers as results have them."""
    if path.receivers is None:
        return {"receivers": None, "receiver_input": None}
    inputs = [(which, tuple(heads)) for which, heads in path.receivers.items()]
    if len(inputs) == 1:
        return {"receivers": inputs[0][1], "receiver_input": inputs[0][0]}
    every = dict.fromkeys(head for _, heads in inputs for head in heads)
    return {"receivers": tuple(every), "receiver_input": None, "inputs": tuple(inputs)}


def _run(
    model: Model, pairs: PairBatch, path: Path, metric: Metric, runner: Runner
) -> tuple[Tensor, Tensor]:
    """The metric in the clean runs and with each sender patched."""
    for heads in (path.receivers or {}).values():
        check_heads(model, heads)
    check_pairs(model, pairs)
    check_metric(model, metric, pairs)
    exact = partial(exact_engine.patched_values, batch_size=runner.batch_size, memory=runner.memory)
    # The exact engine takes as many pairs at a time as its memory allows.
    size = runner.choose(exact=len(pairs), hooks=runner.batch_size or len(pairs))
    patched_values = runner.choose(exact=exact, hooks=hooks_engine.patched_values)

    def compute(some: PairBatch) -> tuple[Tensor, ...]:
        return patched_values(model, some, path, metric=metric, progress=runner.progress)

    clean, patched = runner.over(pairs.to(model.cfg.device or "cpu"), size, compute, model)
    check_values(metric, clean, " of the clean runs")
    check_values(metric, patched, " by layer, sender and pair")
    return clean, patched
