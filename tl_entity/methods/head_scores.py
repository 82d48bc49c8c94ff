"""What path patching finds: a score for every head, or for every MLP."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.heads import Head
from tl_entity.hooks.points import HeadInput
from tl_entity.metrics import RELATIVE_PROBABILITY
from tl_entity.results import ROWS_SHOWN, plain
from tl_entity.runs.runner import Engine
from tl_entity.scores import ScoreMap, Scores, colour_bound
from tl_entity.stats import Z_95

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_entity.plots.heatmaps import HeadMap


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
