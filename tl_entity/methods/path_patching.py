"""Path patching: how much each head or MLP matters through a chosen path (Prakash et al. 2024,
§3.1)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float64
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
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric, check_values
from tl_entity.results import ROWS_SHOWN, plain
from tl_entity.runs.runner import Engine as Engine
from tl_entity.runs.runner import Runner, RunSettings
from tl_entity.scores import ScoreMap, Scores, colour_bound
from tl_entity.stats import Z_95
from tl_entity.tasks.batches import PairBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_entity.plots.heatmaps import HeadMap

Receivers = Sequence[Head] | Mapping[HeadInput, Sequence[Head]]
"""Heads patched into: those of one input, or by which of their inputs."""

HEADS_IN_A_LINE = 3
"""Heads that a line of text about a score map names."""


@checked
@dataclass(frozen=True)
class HeadScores(ScoreMap):
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
        inputs: the heads by input, where several inputs are patched together; `receiver_input` is
            None then.
    """

    per_example: Float[Tensor, "layer head batch"]
    clean_values: Float[Tensor, " batch"]
    position: str
    receivers: tuple[Head, ...] | None
    receiver_input: HeadInput | None
    engine: Engine
    metric: str = RELATIVE_PROBABILITY.name
    inputs: tuple[tuple[HeadInput, tuple[Head, ...]], ...] = ()

    def __str__(self) -> str:
        best = ", ".join(
            f"{head} {self.scores[head].item():+.3f}" for head in self.top(HEADS_IN_A_LINE)
        )
        return (
            f"{_path(self)}, {self.per_example.shape[-1]} pairs; "
            f"most important by {self.metric}: {best or 'none can reach'}"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a head, in order of layer and head: score, its 95 % interval, its rank (1 the
        most important), none if it can't reach a receiver."""
        import pandas as pd

        ranks = {head: rank for rank, head in enumerate(self.ranked(), start=1)}
        heads = [Head(*index) for index in np.ndindex(*self.per_example.shape[:2])]
        bounds = self.intervals.reshape(-1, 2)
        return pd.DataFrame(
            {
                "head": [str(head) for head in heads],
                "layer": [head.layer for head in heads],
                "index": [head.head for head in heads],
                "score": self.scores.flatten().tolist(),
                "low": bounds[:, 0],
                "high": bounds[:, 1],
                "rank": pd.array([ranks.get(head) for head in heads], dtype="Int64"),
            }
        )

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The `n` most important heads, the most important first; None for all that can reach."""
        rows = self.to_dataframe().dropna(subset="rank").sort_values(by="rank")
        rows = rows.loc[:, ["rank", "head", "score", "low", "high"]].reset_index(drop=True)
        return rows if n is None else rows.head(n)

    def plot(
        self,
        *,
        chosen: int | Sequence[Head] = 5,
        known: Sequence[Head] = (),
        title: str | None = None,
    ) -> "go.Figure":
        """A heatmap, layer by head; red where the score is below zero.

        Args:
            chosen: heads to outline; a number for so many of the most important ones, of those
                that score below zero.
            known: heads to mark with a dot.
            title: above the figure; says what was patched if left out.
        """
        from tl_entity.plots.heatmaps import head_heatmap

        return head_heatmap(self.panel(chosen=chosen, known=known, title=title))

    def to_json(self) -> dict[str, Any]:
        """What was patched into what, and every head's mean score with its interval."""
        return {
            "position": self.position,
            "receivers": plain(self.receivers),
            "receiver_input": self.receiver_input,
            "top_layer": self.top_layer,
            "scores": plain(self.scores),
            "intervals": plain(self.intervals),
        }

    def panel(
        self,
        *,
        chosen: int | Sequence[Head] = 5,
        known: Sequence[Head] = (),
        elsewhere: Sequence[Head] = (),
        title: str | None = None,
    ) -> "HeadMap":
        """What `plot` shows, to be put beside others by `tl_entity.plots.heatmaps`."""
        from tl_entity.plots.heatmaps import HeadMap

        scores = self.scores.double().cpu().numpy()
        if isinstance(chosen, int):
            chosen = [head for head in self.top(chosen) if scores[head] < 0]
        return HeadMap(
            title=f"Path patching, {_path(self)}" if title is None else title,
            scores=scores,
            intervals=self.intervals,
            chosen=tuple(chosen),
            known=tuple(known),
            elsewhere=tuple(elsewhere),
            top_layer=self.top_layer,
            metric=self.metric,
            bound=colour_bound(self.metric),
        )

    @property
    def named(self) -> Scores:
        """The same as scores with named axes."""
        return Scores.numbered(
            self.per_example,
            ("layer", "head"),
            metric=self.metric,
            sign=-1,
            about=f"path patching, {_path(self)}",
        )

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

    @property
    def evidence(self) -> Float64[np.ndarray, "layer head"]:
        """How far each mean score lies below zero, in standard errors; of a single pair, which has
        no spread, how far the score itself does."""
        mean = -self.scores.double().cpu().numpy()
        if self.per_example.shape[-1] < 2:
            return mean
        error = (self.intervals[..., 1] - self.intervals[..., 0]) / (2 * Z_95)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(mean == 0, 0.0, mean / error)

    def found(self, n: int) -> tuple[Head, ...]:
        """Those of the `n` most important heads whose 95 % interval lies below zero; of a single
        pair, which has no interval, those whose score does."""
        single = self.per_example.shape[-1] < 2
        high = self.scores.double().cpu().numpy() if single else self.intervals[..., 1]
        return tuple(head for head in self.top(n) if high[head.layer, head.head] < 0)

    def top(self, n: int, *, exclude: Collection[Head] = ()) -> tuple[Head, ...]:
        """The `n` most important heads, less those excluded; fewer if no more can reach."""
        return tuple([head for head in self.ranked() if head not in exclude][:n])


@checked
@dataclass(frozen=True)
class MLPScores(ScoreMap):
    """How much the target's probability changes when each layer's MLP takes its corrupt output.

    Attributes:
        per_example: change of the metric, one for each layer and pair.
        clean_values: the metric in the clean runs.
        position: named position of senders and receivers.
        receivers: heads patched into; None for the logits.
        receiver_input: which of their inputs; None for the logits.
        engine: what computed the scores.
        metric: the metric's name.
        inputs: the heads by input, where several inputs are patched together; `receiver_input` is
            None then.
    """

    per_example: Float[Tensor, "layer batch"]
    clean_values: Float[Tensor, " batch"]
    position: str
    receivers: tuple[Head, ...] | None
    receiver_input: HeadInput | None
    engine: Engine
    metric: str = RELATIVE_PROBABILITY.name
    inputs: tuple[tuple[HeadInput, tuple[Head, ...]], ...] = ()

    def __str__(self) -> str:
        scores = self.scores.tolist()
        best = min(range(len(scores)), key=scores.__getitem__)
        return (
            f"MLPs, {_path(self)}, {self.per_example.shape[-1]} pairs; "
            f"most important by {self.metric}: layer {best} {scores[best]:+.3f}"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a layer: score and its 95 % interval."""
        import pandas as pd

        scores, bounds = self.scores.tolist(), self.intervals
        return pd.DataFrame(
            {
                "layer": range(len(scores)),
                "score": scores,
                "low": bounds[:, 0],
                "high": bounds[:, 1],
            }
        )

    def to_json(self) -> dict[str, Any]:
        """What was patched into what, and every layer's mean score with its interval."""
        return {
            "position": self.position,
            "receivers": plain(self.receivers),
            "receiver_input": self.receiver_input,
            "scores": plain(self.scores),
            "intervals": plain(self.intervals),
        }

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The `n` most important layers, the most important first; None for all."""
        rows = self.to_dataframe().sort_values("score", kind="stable").reset_index(drop=True)
        return rows if n is None else rows.head(n)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Bars, one a layer, with 95 % intervals."""
        return self.named.plot(title=title)

    @property
    def named(self) -> Scores:
        """The same as scores with named axes."""
        return Scores.numbered(
            self.per_example,
            ("layer",),
            metric=self.metric,
            sign=-1,
            about=f"MLPs, {_path(self)}",
        )

    def found(self, n: int) -> tuple[int, ...]:
        """Those of the `n` most important layers whose 95 % interval lies below zero; of a single
        pair, which has no interval, those whose score does."""
        scores = self.scores.double().cpu().numpy()
        high = scores if self.per_example.shape[-1] < 2 else self.intervals[:, 1]
        order = sorted(range(len(scores)), key=lambda layer: (scores[layer], layer))
        return tuple(layer for layer in order[:n] if high[layer] < 0)


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


def _path(scores: HeadScores | MLPScores) -> str:
    """The path that was patched, in words."""
    if scores.receivers is None:
        return f"{scores.position} into the logits"
    inputs = scores.inputs or [(scores.receiver_input, scores.receivers)]
    return f"{scores.position} into " + " and ".join(
        f"{which} of {_named(heads)}" for which, heads in inputs
    )


def _named(heads: Sequence[Head]) -> str:
    if len(heads) > HEADS_IN_A_LINE:
        return f"{len(heads)} heads"
    return " ".join(map(str, heads)) or "no heads"


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
