"""Attention over one prompt: every token's look back, with the named positions marked."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from tl_entity._typing import checked
from tl_entity.plots.heatmaps import SHADES
from tl_entity.plots.style import FAINT, INK, STYLE

MOST_WORDS = 24
"""Up to so many tokens have their text at the axes; of more, only those with a name have."""


@checked
@dataclass(frozen=True)
class Pattern:
    """Where a head looks over one prompt.

    Attributes:
        title: the head, and the model if there are several.
        weights: attention from each token (rows) to each; those to later tokens are not shown.
    """

    title: str
    weights: Float[np.ndarray, "query key"]


@checked
def attention_patterns(
    rows: Sequence[Sequence[Pattern]],
    tokens: Sequence[str],
    positions: Mapping[str, int],
    *,
    title: str,
) -> go.Figure:
    """Patterns side by side on one scale, with lines at the named positions.

    Args:
        rows: the panels, row by row; as many in each row.
        tokens: the prompt's tokens as text.
        positions: index of each named position.
        title: above all.
    """
    columns = max(map(len, rows), default=1)
    figure = make_subplots(
        rows=max(1, len(rows)),
        cols=columns,
        subplot_titles=[html.escape(pattern.title) for row in rows for pattern in row],
        horizontal_spacing=0.24 / columns,
        vertical_spacing=0.24 / max(1, len(rows)),
    )
    n = len(tokens)
    tokens = [html.escape(token) for token in tokens]  # figures read some HTML
    later = np.triu(np.ones((n, n), dtype=bool), 1)
    hover = [[f"{query} → {key}" for key in tokens] for query in tokens]
    for i, row in enumerate(rows):
        for j, pattern in enumerate(row):
            name = html.escape(pattern.title)
            figure.add_heatmap(
                z=np.where(later, np.nan, pattern.weights),
                zmin=0,
                zmax=1,
                colorscale=SHADES,
                showscale=i == j == 0,
                colorbar={"title": {"text": "weight"}, "thickness": 12, "outlinewidth": 0},
                customdata=hover,
                hovertemplate=f"%{{customdata}}: %{{z:.3f}}<extra>{name}</extra>",
                hoverongaps=False,
                row=i + 1,
                col=j + 1,
            )
    _name_tokens(figure, tokens, positions)
    figure.update_layout(
        template=STYLE,
        title_text=title,
        height=90 + 400 * max(1, len(rows)),
        margin={"l": 60, "r": 20, "t": 80, "b": 50},
        plot_bgcolor="#f3f4f6",
    )
    figure.update_annotations(font={"size": 13, "color": INK})
    if n > MOST_WORDS:  # named tokens may stand close together
        figure.update_xaxes(tickfont_size=11).update_yaxes(tickfont_size=11)
    return figure


def _name_tokens(figure: go.Figure, tokens: Sequence[str], positions: Mapping[str, int]) -> None:
    """Words along both axes, and lines at the named positions."""
    n = len(tokens)
    names: dict[int, list[str]] = {}
    for name, at in positions.items():
        names.setdefault(at, []).append(name)
    shown = sorted(names) if n > MOST_WORDS else range(n)
    labels = [f"<b>{tokens[at]}</b>" if at in names else tokens[at] for at in shown]
    said = [
        f"{', '.join(names.get(at, []))} {text}" for at, text in zip(shown, labels, strict=True)
    ]
    line = {"color": FAINT, "width": 1, "dash": "dot"}
    for at in names:
        figure.add_vline(at, line=line, layer="above")
        figure.add_hline(at, line=line, layer="above")
    figure.update_xaxes(
        tickvals=list(shown),
        ticktext=labels,
        tickangle=-60,
        showgrid=False,
        range=[-0.5, n - 0.5],
        constrain="domain",
    )
    figure.update_yaxes(
        tickvals=list(shown), ticktext=labels, showgrid=False, range=[n - 0.5, -0.5]
    )
    figure.update_yaxes(ticktext=said, col=1)
