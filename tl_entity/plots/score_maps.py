"""What all score maps have in common: colours, their limits, and the bar that names the metric."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_entity._typing import checked
from tl_entity.plots.style import STYLE

IMPORTANT_TO_HARMFUL = [
    [0.0, "#67001f"],
    [0.15, "#b2182b"],
    [0.3, "#d6604d"],
    [0.42, "#f4a582"],
    [0.5, "#ffffff"],
    [0.58, "#92c5de"],
    [0.7, "#4393c3"],
    [0.85, "#2166ac"],
    [1.0, "#053061"],
]
"""Diverging colours: red where the answer loses by the edit, white at 0, blue where it gains."""

STANDS_OUT = 2.0
"""A score stands out of the noise if it is more than so many half widths of its 95 % interval from
0, which of a thousand scores of nothing hardly one is."""


class Drawn(Protocol):
    """A score map, as far as its colours go.

    Attributes:
        scores: the scores; 0 is no effect.
        intervals: lower and upper bound of each.
        bound: where colours are darkest at most; None for the largest score there is.
    """

    @property
    def scores(self) -> np.ndarray: ...
    @property
    def intervals(self) -> np.ndarray | None: ...
    @property
    def bound(self) -> float | None: ...


def colour_limit(panels: Sequence[Drawn]) -> float:
    """The score at which colours are darkest: the largest in size, but no more than the metric's
    bound.

    A relative change of a probability cannot fall below -1, but one prompt can lift it far above 1;
    cut there, such a score does not turn the others pale. A difference of logits has no bound.
    """
    largest = max((float(np.abs(panel.scores).max(initial=0)) for panel in panels), default=1.0)
    bounds = [panel.bound for panel in panels if panel.bound is not None]
    return min([largest, *bounds]) or 1.0


def shared_limits(panels: Sequence[Sequence[Drawn]], *, at_most: float = 4.0) -> list[float]:
    """One colour limit for all stages; if theirs differ by more than a factor, one for each stage
    in which a score stands out of the noise. What is but noise is not drawn as if it were strong.

    Args:
        panels: for each stage the panels (of several models) that must be comparable.
        at_most: this factor.
    """
    limits = [colour_limit(stage) for stage in panels]
    highest = max(limits)
    if highest <= at_most * min(limits):
        return [highest] * len(limits)
    return [
        limit if any(map(_stands_out, stage)) else highest
        for limit, stage in zip(limits, panels, strict=True)
    ]


def colour_bar(metric: str) -> dict[str, Any]:
    """A bar that says what the colours are, written along it."""
    return {
        "title": {"text": metric, "side": "right"},
        "thickness": 12,
        "outlinewidth": 0,
        "tickformat": ".2~g",
    }


@checked
def score_heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    scores: Float[np.ndarray, "row column"],
    intervals: Float[np.ndarray, "row column 2"],
    *,
    axes: tuple[str, str],
    metric: str,
    limit: float,
    low_is_red: bool,
    title: str,
) -> go.Figure:
    """Scores by any two axes, the first row at the bottom.

    Args:
        rows: names along the first axis.
        columns: names along the second.
        scores: the scores.
        intervals: lower and upper bound of each.
        axes: what the two axes are.
        metric: what the scores are.
        limit: the score at which colours are darkest, in both directions.
        low_is_red: whether scores below 0 are red, and not those above.
        title: above the figure.
    """
    hover = [
        [
            f"<b>{axes[0]} {row}, {axes[1]} {column}</b><br>{metric} {scores[i, j]:+.4f}<br>"
            f"95 % interval {intervals[i, j, 0]:+.4f} to {intervals[i, j, 1]:+.4f}"
            for j, column in enumerate(columns)
        ]
        for i, row in enumerate(rows)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=scores,
            zmin=-limit,
            zmax=limit,
            colorscale=IMPORTANT_TO_HARMFUL,
            reversescale=not low_is_red,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorbar=colour_bar(metric),
            name="scores",
        )
    )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=min(760, 150 + 18 * max(8, len(rows))),
        margin={"l": 60, "r": 20, "t": 50, "b": 60},
    )
    # By number, as names may come twice: tokens do.
    for update, name, names in (
        (figure.update_yaxes, axes[0], rows),
        (figure.update_xaxes, axes[1], columns),
    ):
        step = max(1, len(names) // 40)
        shown = list(range(0, len(names), step))
        update(title_text=name, tickvals=shown, ticktext=[names[i] for i in shown], showgrid=False)
    return figure


def _stands_out(panel: Drawn) -> bool:
    """Whether a score is beyond what chance makes of no effect; taken to be where that is not
    known."""
    if panel.intervals is None or np.isnan(panel.intervals).any():
        return True
    half = (panel.intervals[..., 1] - panel.intervals[..., 0]) / 2
    return bool((np.abs(panel.scores) > STANDS_OUT * half).any())
