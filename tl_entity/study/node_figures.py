"""Figures of the mechanisms: how faithful so many nodes are, which act where, what is shared."""

import plotly.graph_objects as go

from tl_entity.study.results import Study


def node_figures(study: Study) -> dict[str, go.Figure]:
    """All figures of the mechanisms, by file name."""
    figures: dict[str, go.Figure] = {}
    for role, model in study.models.items():
        mechanism = None if model.mechanism is None else model.mechanism.shown
        if model.mechanism is None or mechanism is None:
            continue
        share = f"{len(mechanism)} of {mechanism.n_all} nodes"
        figures[f"{role}_mechanism"] = mechanism.plot(
            title=f"{model.label}: how it answers with so many nodes alone"
        )
        shown = mechanism.map(title=f"{model.label}: where its {share} act")
        # As wide as the page, or as it is on a phone.
        figures[f"{role}_mechanism_map"] = shown.update_layout(width=None)
        edges = model.mechanism.edges
        if edges is not None and edges.edges is not None:
            figures[f"{role}_mechanism_edges"] = edges.edges.plot(
                title=f"{model.label}: the strongest edges of its mechanism"
            )
    if study.same_mechanism is not None:
        base, tuned = (study.models[role].label for role in ("base", "tuned"))
        figures["mechanisms"] = study.same_mechanism.found.plot(
            title=f"The mechanisms of {base} and {tuned}"
        )
    return figures
