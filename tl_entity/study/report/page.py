"""Pages from templates."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tl_entity.plots.render import figure_html, figure_script, plotly_script
from tl_entity.study.report.cells import is_of_boxes
from tl_entity.study.report.circuits import circuit_sections
from tl_entity.study.report.gain import gain_sections
from tl_entity.study.report.groups import group_sections
from tl_entity.study.report.mechanism import mechanism_sections
from tl_entity.study.report.story import again_values, first_sections, paper_values
from tl_entity.study.store import with_circuit

if TYPE_CHECKING:
    import pandas as pd

_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor, and its template's name.
        heading: what stands above it.
        values: what the template is filled with.
    """

    name: str
    heading: str
    values: dict[str, Any]


def figure_page(figure: go.Figure, name: str) -> str:
    """A page of one figure, beside plotly.min.js in the same folder."""
    layout: Any = figure.layout
    title = _SPACES.sub(" ", str(layout.title.text or name).replace("<br>", " "))
    return (
        _environment()
        .get_template("figure.html")
        .render(
            title=title,
            style=_asset("page.css"),
            plotly=plotly_script().name,
            script=Markup(figure_script()),
            figure=Markup(figure_html(figure, name)),
        )
    )


def render_report(
    results: str,
    figures: dict[str, go.Figure],
    problem: str | None = None,
    *,
    tables: "Mapping[str, pd.DataFrame]",
) -> str:
    """The report.

    Args:
        results: the text of results.json.
        figures: of the same results, and each stage's heatmap alone as `base-value_fetcher`.
        problem: what else the reader must know.
        tables: of the same results.
    """
    whole = json.loads(results)
    title = " and ".join(model["label"] for model in whole["models"].values())
    what = "Entity tracking" if is_of_boxes(whole) else whole["task"]["name"]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=f"{what} in {title}",
            style=_asset("page.css") + _asset("sections.css"),
            plotly=Markup(plotly_script().read_text(encoding="utf-8")),
            script=Markup(figure_script()),
            sections=_sections(whole, problem, tables),
            drawn={
                name: Markup(figure_html(figure, f"figure-{name}"))
                for name, figure in figures.items()
            },
        )
    )


def _sections(
    whole: dict[str, Any], problem: str | None, tables: "Mapping[str, pd.DataFrame]"
) -> list[Section]:
    models = with_circuit(whole["models"])
    content = {**whole, "models": models}
    found = [Section(*each) for each in first_sections(whole, problem)]
    if models:
        found += [Section(*each) for each in mechanism_sections(content, tables)]
        if all("discovery" in model for model in models.values()):
            found += [Section(*each) for each in circuit_sections(content)]
        found += [Section(*each) for each in group_sections(content, tables)]
    found += [Section(*each) for each in gain_sections(whole, tables)]
    tested = bool(models) and all("faithfulness" in model for model in models.values())
    if tested and is_of_boxes(content):
        found.append(Section("paper", "Beside the paper", paper_values(content)))
    found.append(Section("again", "Settings, versions, running it again", again_values(whole)))
    return found


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("tl_entity.study.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Markup:
    return Markup(files("tl_entity.study.report").joinpath(name).read_text(encoding="utf-8"))
