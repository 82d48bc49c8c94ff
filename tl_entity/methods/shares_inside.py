"""How much of the gain lies in some heads, beside other heads, MLPs and random units."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float64

from tl_entity._typing import checked
from tl_entity.heads import Head
from tl_entity.results import Result
from tl_entity.stats import Interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class Part(NamedTuple):
    """What several units have of the gain together.

    Attributes:
        n_units: how many units they are.
        share: the sum of their shares, the mean over prompts.
        interval: its 95 % interval over prompts.
        of_gain: their share divided by the gain.
    """

    n_units: int
    share: float
    interval: Interval
    of_gain: float

    def __str__(self) -> str:
        return f"{self.share:+.3f} {self.interval} of {self.n_units} units, {self.of_gain:.1%}"


@checked
@dataclass(frozen=True)
class SharesInside(Result):
    """How much of the gain lies in some heads.

    Attributes:
        heads: the heads.
        parts: `inside`, `shared` (k and v read both by heads inside and outside), `other heads`,
            `MLPs`, `other` (norms, embeddings, the bias of all heads' outputs).
        random: the share of random units, as many of each layer and kind as inside, in each draw.
        gain: the whole gain.
        gain_interval: its 95 % interval over prompts.
        metric: the metric's name.
    """

    heads: tuple[Head, ...]
    parts: Mapping[str, Part]
    random: Float64[np.ndarray, " draws"]
    gain: float
    gain_interval: Interval
    metric: str

    @property
    def at_least(self) -> float:
        """The share of random draws with at least as much of the gain as the units inside, the
        units themselves counted as one draw."""
        reached = int((self.random >= self.parts["inside"].share).sum())
        return (reached + 1) / (len(self.random) + 1)

    def __str__(self) -> str:
        inside = self.parts["inside"]
        low, mean, high = _spread(self.random)
        return (
            f"{inside.of_gain:.1%} of the gain in {len(self.heads)} heads ({inside.n_units} units);"
            f" as many at random of the same layers and kinds: "
            f"{relative_to(mean, self.gain):.1%} "
            f"({relative_to(low, self.gain):.1%} to {relative_to(high, self.gain):.1%})"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a part, and one for random units: mean, and 95 % of the draws."""
        import pandas as pd

        rows = [
            {"part": name, "n_units": p.n_units, "share": p.share, "low": p.interval.low,
             "high": p.interval.high, "of_gain": p.of_gain}
            for name, p in self.parts.items()
        ]  # fmt: skip
        low, mean, high = _spread(self.random)
        inside = self.parts["inside"].n_units
        rows.append(
            {"part": "random", "n_units": inside, "share": mean, "low": low, "high": high,
             "of_gain": relative_to(mean, self.gain)}
        )  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """What each part brings, one upon the other up to the gain."""
        from tl_entity.plots.bars import Bar
        from tl_entity.plots.gain import adding_bars

        parts = {name: Bar(p.share, *p.interval) for name, p in self.parts.items() if p.n_units}
        gain = Bar(self.gain, *self.gain_interval)
        return adding_bars(
            parts, gain, title=str(self) if title is None else title, axis=self.metric
        )


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    """The 2.5 % quantile, the mean, and the 97.5 % quantile."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(values.mean()), float(high)


def relative_to(value: float, whole: float) -> float:
    """value / whole; infinite where the whole is nothing and the value is not."""
    if whole:
        return value / whole
    return math.copysign(math.inf, value) if value else 0.0
