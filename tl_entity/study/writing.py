"""What a study leaves in its folder: results, tables, figures, the report."""

from collections.abc import Callable

import plotly.graph_objects as go

from tl_entity.plots.render import PngRenderer, plotly_script
from tl_entity.results import pack
from tl_entity.study.figures import figures_of, single_heatmaps
from tl_entity.study.folder import STUDY
from tl_entity.study.gain_figures import gain_figures
from tl_entity.study.mechanism_figures import mechanism_figures
from tl_entity.study.node_figures import node_figures
from tl_entity.study.report import figure_page, render_report
from tl_entity.study.results import Study
from tl_entity.study.store import REPORT, RESULTS, Store, to_json
from tl_entity.study.tables import tables_of, to_markdown


def all_figures(study: Study) -> dict[str, go.Figure]:
    """Every figure of a study, by its file's name."""
    return {
        **figures_of(study),
        **node_figures(study),
        **mechanism_figures(study),
        **gain_figures(study),
    }


def write_study(store: Store, study: Study, say: Callable[[str], object]) -> None:
    """Write results, tables, figures and report below the store's folder.

    Args:
        store: of the study.
        study: what was found.
        say: told what else a person should know.
    """
    figures = all_figures(study)
    tables = tables_of(study)
    for name, table in tables.items():
        store.write(f"tables/{name}.csv", table.to_csv(index=False))
        store.write(f"tables/{name}.md", to_markdown(table))
    store.write(f"figures/{plotly_script().name}", plotly_script().read_bytes())
    for name, figure in figures.items():
        store.write(f"figures/{name}.html", figure_page(figure, name))
    problem = _draw(store, figures) if study.settings.png else None
    if problem is not None:
        say(problem)
    stages = {
        f"{role}-{group}": figure
        for role in study.with_circuit
        for group, figure in single_heatmaps(study, role).items()
    }
    text = to_json(study.to_json())
    # From the text, so that the page shows exactly what the file holds.
    store.write(REPORT, render_report(text, {**figures, **stages}, problem, tables=tables))
    store.write(STUDY, pack(study))
    store.write(RESULTS, text)


def _draw(store: Store, figures: dict[str, go.Figure]) -> str | None:
    """Write every figure as PNG; what went wrong, if anything did."""
    with PngRenderer() as renderer:
        try:
            for name, figure in figures.items():
                store.write(f"figures/{name}.png", renderer(figure))
        except (OSError, ValueError) as error:
            return f"The PNG figures could not be drawn ({error}); the HTML ones are there."
    return None
