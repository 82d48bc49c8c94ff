"""Figures of where the gain lies."""

import plotly.graph_objects as go

from tl_entity.study.results import Study


def gain_figures(study: Study) -> dict[str, go.Figure]:
    """All figures of the gain, by file name."""
    gain = study.gain
    if gain is None or gain.found.shares is None:
        return {}
    base, tuned = (study.models[role].label for role in ("base", "tuned"))
    figures = {
        "gain_kinds": gain.found.shares.plot_bars(
            title=f"What {tuned} gains over {base}, by kind of weight"
        ),
        "gain_shares": gain.found.shares.plot(title="Share of the gain of each head and MLP"),
    }
    if gain.grafts is not None:
        figures["gain_grafts"] = gain.grafts.plot(
            title=f"{base} with the changes of some units alone, {tuned} without them"
        )
    if gain.corners is not None:
        figures["gain_corners"] = gain.corners.plot(
            title=f"{tuned} below a layer, or from it on, and {base} for the rest"
        )
    return figures
