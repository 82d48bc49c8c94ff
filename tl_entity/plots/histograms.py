"""How many prompts, by how probable the model finds their answer."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float64

from tl_entity._typing import checked
from tl_entity.plots.style import SERIES_COLOURS, STYLE


@checked
def probability_histogram(
    series: Mapping[str, Float64[np.ndarray, " _"]], *, title: str, bins: int = 20
) -> go.Figure:
    """Counts of probabilities from 0 to 1, the series stacked.

    Args:
        series: by name.
        title: above all.
        bins: how many bars, equally wide.
    """
    figure = go.Figure()
    width = 1 / bins
    for (name, values), colour in zip(
        series.items(), [*SERIES_COLOURS] * len(series), strict=False
    ):
        counts, edges = np.histogram(values, bins=bins, range=(0.0, 1.0))
        figure.add_bar(
            x=(edges[:-1] + width / 2).tolist(),
            y=counts.tolist(),
            width=width,
            name=name,
            marker_color=colour,
            customdata=[f"{low:.2f} to {low + width:.2f}" for low in edges[:-1]],
            hovertemplate="probability %{customdata}: %{y} prompts<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        template=STYLE,
        title_text=title,
        barmode="stack",
        bargap=0.05,
        height=340,
        margin={"l": 60, "r": 20, "t": 50, "b": 95},
    )
    figure.update_xaxes(title_text="probability of the answer", range=[0, 1])
    return figure.update_yaxes(title_text="prompts")
