"""Scores with named axes: of heads, of MLPs, of layers and tokens, of whatever is measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.metrics import RELATIVE_PROBABILITY
from tl_entity.results import ROWS_SHOWN, Result, plain
from tl_entity.stats import mean_intervals

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Sign = Literal[-1, 1]
"""Which scores are important: -1 for those far below zero, 1 for those far above."""


def colour_bound(metric: str) -> float | None:
    """Where the colours of a metric's scores end: a relative change of a probability can't fall
    below -1; other metrics have no such bound."""
    return 1.0 if metric == RELATIVE_PROBABILITY.name else None


class ScoreMap(Result):
    """A score for each place along named axes: what `Scores`, `HeadScores` and `MLPScores` have in
    common. A class says what its axes are, what the scores are of, and which are important."""

    per_example: Tensor
    metric: str

    @property
    def scores(self) -> Tensor:
        """Mean over the examples."""
        return self.per_example.mean(-1)

    @property
    def intervals(self) -> Float64[np.ndarray, "*axes 2"]:
        """95 % interval of each mean score."""
        return mean_intervals(self.per_example.double().cpu().numpy())


@checked
@dataclass(frozen=True)
class Scores(ScoreMap):
    """A score for each place along named axes, for every example.

    Attributes:
        per_example: the scores; the last axis is that of the examples.
        axes: the other axes by name, in order, each with the names of its places.
        metric: what the scores are.
        sign: -1 where scores below zero are the important ones, 1 where those above are.
        about: what was measured, in a few words.
    """

    per_example: Float[Tensor, "*axes batch"]
    axes: Mapping[str, tuple[str, ...]]
    metric: str
    sign: Sign
    about: str

    def __post_init__(self) -> None:
        lengths = tuple(map(len, self.axes.values()))
        if lengths != tuple(self.per_example.shape[:-1]):
            raise InputError(
                f"Scores of shape {tuple(self.per_example.shape)} have no axes "
                f"{', '.join(f'{name} of {len(names)}' for name, names in self.axes.items())} "
                "ahead of that of the examples."
            )

    @classmethod
    def numbered(
        cls, per_example: Tensor, axes: Sequence[str], *, metric: str, sign: Sign, about: str
    ) -> "Scores":
        """With places named by their number, from 0.

        Raises:
            InputError: if the axes are not as many as those of the scores, less the examples'.
        """
        if len(axes) != per_example.ndim - 1 or len(set(axes)) != len(axes):
            raise InputError(
                f"Scores of {per_example.ndim} axes, the last that of the examples, can't have "
                f"the axes {', '.join(axes)}: name each of the others, once."
            )
        places = [tuple(map(str, range(length))) for length in per_example.shape[:-1]]
        named = dict(zip(axes, places, strict=True))
        return cls(per_example, named, metric, sign, about)

    def __str__(self) -> str:
        first = self.ranked()[0] if self.per_example[..., 0].numel() else None
        best = "none" if first is None else f"{self.place(first)} {self.scores[first].item():+.3f}"
        return (
            f"{self.about}, {self.per_example.shape[-1]} examples; most important by "
            f"{self.metric}: {best}"
        )

    def place(self, index: Sequence[int]) -> str:
        """Where an index is: `layer 3, token 12`."""
        named = zip(self.axes.items(), index, strict=True)
        return ", ".join(f"{axis} {names[at]}" for (axis, names), at in named)

    def at(self, **places: str | int) -> "Scores":
        """The scores at one place of some axes, such as `scores.at(head=3)`; the others stay.

        Args:
            places: by axis, the place's name, or its number.

        Raises:
            InputError: if there is no such axis or place, or no axis would stay.
        """
        index: list[int | slice] = [slice(None)] * len(self.axes)
        left, about = dict(self.axes), self.about
        for axis, place in places.items():
            if axis not in left:
                raise InputError(f"The scores have no axis {axis!r}; there are {', '.join(left)}.")
            names = left.pop(axis)
            if str(place) not in names:
                raise InputError(
                    f"The axis {axis!r} has no {place!r}; there are {', '.join(names)}."
                )
            index[list(self.axes).index(axis)] = names.index(str(place))
            about += f", {axis} {place}"
        if not left:
            raise InputError("Every axis was given; leave one of them, or read `per_example`.")
        return Scores(self.per_example[tuple(index)], left, self.metric, self.sign, about)

    def ranked(self) -> list[tuple[int, ...]]:
        """All places, the most important first; ties in order."""
        scores = self.sign * self.scores.double().cpu().numpy()
        order = np.argsort(-scores, axis=None, kind="stable")
        return [tuple(map(int, np.unravel_index(at, scores.shape))) for at in order]

    def top(self, n: int) -> list[tuple[int, ...]]:
        """The `n` most important places."""
        return self.ranked()[:n]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a place: where it is, its score, the 95 % interval, its rank (1 the most
        important)."""
        import pandas as pd

        scores, bounds = self.scores.tolist(), self.intervals.reshape(-1, 2)
        places = list(np.ndindex(*self.per_example.shape[:-1]))
        ranks = {place: rank for rank, place in enumerate(self.ranked(), start=1)}
        columns = {
            axis: [names[place[which]] for place in places]
            for which, (axis, names) in enumerate(self.axes.items())
        }
        flat = np.array(scores, dtype=np.float64).reshape(-1)
        return pd.DataFrame(
            {
                **columns,
                "score": flat,
                "low": bounds[:, 0],
                "high": bounds[:, 1],
                "rank": [ranks[place] for place in places],
            }
        )

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The `n` most important places, the most important first; None for all."""
        rows = self.to_dataframe().sort_values("rank").reset_index(drop=True)
        return rows if n is None else rows.head(n)

    def to_json(self) -> dict[str, Any]:
        """What was measured, the names along each axis, the mean scores and their intervals."""
        return {
            "about": self.about,
            "metric": self.metric,
            "sign": self.sign,
            "axes": [{"name": axis, "places": list(names)} for axis, names in self.axes.items()],
            "scores": plain(self.scores),
            "intervals": plain(self.intervals),
        }

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """A heatmap of two axes, bars along one; red where the answer needs the place.

        Raises:
            InputError: if there are more axes than two.
        """
        title = self.about if title is None else title
        axes = list(self.axes.items())
        if len(axes) == 1:
            return self._bars(title)
        if len(axes) != 2:
            raise InputError(
                f"A figure has two axes, and these scores have {len(axes)}: "
                f"{', '.join(self.axes)}; take a part of them."
            )
        from tl_entity.plots.score_maps import score_heatmap

        (first, rows), (second, columns) = axes
        scores = self.scores.double().cpu().numpy()
        largest = float(np.abs(scores).max(initial=0))
        return score_heatmap(
            rows,
            columns,
            scores,
            self.intervals,
            axes=(first, second),
            metric=self.metric,
            limit=min(largest, colour_bound(self.metric) or math.inf) or 1.0,
            low_is_red=self.sign < 0,
            title=title,
        )

    def _bars(self, title: str) -> "go.Figure":
        from tl_entity.plots.bars import Bar, grouped_bars

        ((axis, names),) = self.axes.items()
        found = zip(names, self.scores.tolist(), self.intervals.tolist(), strict=True)
        bars = {name: Bar(score, *bounds) for name, score, bounds in found}
        figure = grouped_bars({self.about: bars}, title=title, axis=self.metric)
        figure.update_xaxes(title_text=axis, type="category")
        return figure.update_yaxes(autorange=True, range=None, tickformat=None, dtick=None)
