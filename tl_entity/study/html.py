"""The pieces of HTML that the report is made of."""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from tl_entity.heads import Head
from tl_entity.plots.render import figure_html
from tl_entity.results import read_number

if TYPE_CHECKING:
    import pandas as pd

NO_VALUE, MINUS = "&ndash;", "&minus;"
NONE = '<span class="soft">none</span>'


_INTERVAL, _UNBROKEN = re.compile(r"\[([^],[]+), ([^],[]+)\]"), r"[\1,&nbsp;\2]"
"""No interval is broken over two lines."""

ON_PAPER = """<script>
const figures = () => [...document.querySelectorAll(".js-plotly-plot")];
addEventListener("beforeprint", () => figures().forEach(f => Plotly.relayout(f, {width: 680})));
addEventListener("afterprint", () => figures().forEach(
  f => Plotly.relayout(f, {width: null, autosize: true})));
</script>"""
"""Figures are as wide as the window they were drawn in, which may be wider than paper."""


def page(title: str, script: str, body: str) -> str:
    """A whole page."""
    style = files("tl_entity.study").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>\n<style>{style}</style>\n'
        f"{script}\n{ON_PAPER}\n</head><body>\n{body}\n</body></html>\n"
    )


def figure_element(figures: dict[str, go.Figure], name: str, caption: str) -> str:
    """A figure with its caption."""
    drawn = figure_html(figures[name], f"figure-{name}")
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_INTERVAL.sub(_UNBROKEN, cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def heads_html(heads: Sequence[Sequence[int]]) -> str:
    """Heads by name."""
    return " ".join(str(Head(*head)) for head in heads) or NONE


def share_text(found: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = found["interval"]
    return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def ratio_text(found: Mapping[str, Any]) -> str:
    """A faithfulness with its interval."""
    value, (low, high) = found["faithfulness"], map(read_number, found["interval"])
    if value is None or math.isnan(value):
        return "not defined (nothing is answered right)"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def frame_table(frame: "pd.DataFrame", names: dict[str, str]) -> str:
    """Some columns of a data frame under other names, numbers to three places."""

    def cell(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return NO_VALUE if math.isnan(value) else f"{value:.3f}".replace("-", MINUS)
        return NO_VALUE if value is None else escape(str(value)) or NONE

    rows = [[cell(value) for value in row] for row in frame[list(names)].to_numpy(object).tolist()]
    return table([escape(name) for name in names.values()], rows)
