"""Figures as HTML and as PNG, without a browser or a network."""

import contextlib
import json
import threading
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly
import plotly.graph_objects as go
import psutil
from kaleido.scopes.plotly import PlotlyScope

from tl_entity._typing import checked


@checked
def figure_html(figure: go.Figure, name: str) -> str:
    """The figure as an HTML element; the page must have loaded plotly.js and `figure_script` before
    it.

    Args:
        figure: the figure.
        name: id of the element.
    """
    # "<" can end a script element early, wherever it stands.
    content = json.dumps(figure.to_plotly_json(), cls=plotly.utils.PlotlyJSONEncoder)
    content = content.replace("<", "\\u003c")
    height = _height(figure)
    # Drawn once the page is laid out: before, a figure would take the width of ones yet to come.
    return (
        f'<div id="{name}" class="plot" style="height:{height:.0f}px"></div>\n'
        f'<script>{{const e=document.getElementById("{name}");const f={content};'
        "const draw=()=>drawFigure(e,f);"
        'if(document.readyState==="loading")addEventListener("DOMContentLoaded",draw);else draw();}'
        "</script>"
    )


def figure_script() -> str:
    """The script that draws figures: in the colours and the width of what they are seen on."""
    return files("tl_entity.plots").joinpath("figure.js").read_text(encoding="utf-8")


def plotly_script() -> Path:
    """The plotly.js that comes with plotly: no network is needed."""
    return Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


RENDERER_SECONDS, RENDERER_ATTEMPTS = 30, 4
"""How long the renderer may take over a figure before it is started afresh, and how often."""


class PngRenderer:
    """Draws figures as PNG, with no browser and no network; one process serves many figures.

    Used as a context manager, so that the process ends with it. Now and then that process does not
    answer; it is then ended and started afresh.
    """

    def __init__(self) -> None:
        self._scope = PlotlyScope(plotlyjs=str(plotly_script()), mathjax=False)

    def __enter__(self) -> "PngRenderer":
        return self

    def __exit__(self, *raised: object) -> None:
        self._end()

    def __call__(self, figure: go.Figure, width: int = 1000, height: int | None = None) -> bytes:
        """The picture, at twice the given size in pixels, for sharp print.

        Raises:
            ValueError: if plotly.js cannot draw the figure.
            OSError: if the renderer cannot be started or does not answer.
        """
        height = height or round(_height(figure))
        for _ in range(RENDERER_ATTEMPTS):
            silent = threading.Event()

            def give_up(silent: threading.Event = silent) -> None:
                silent.set()
                self._end()

            watch = threading.Timer(RENDERER_SECONDS, give_up)
            watch.start()
            try:
                picture = self._scope.transform(
                    figure.to_plotly_json(), format="png", width=width, height=height, scale=2
                )
            except (ValueError, OSError):
                if not silent.is_set():
                    raise
                continue
            finally:
                watch.cancel()
            if not isinstance(picture, bytes):
                raise ValueError("The renderer gave no picture.")
            return picture
        raise OSError(f"the renderer did not answer within {RENDERER_SECONDS} seconds")

    def _end(self) -> None:
        # Its children hold the pipes open, so ending the process alone would not do.
        process = self._scope._proc  # pyright: ignore[reportPrivateUsage]
        if process is None or process.poll() is not None:
            return
        try:
            parent = psutil.Process(process.pid)
            family = [*parent.children(recursive=True), parent]
        except psutil.NoSuchProcess:
            return
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


@checked
def figure_png(figure: go.Figure, width: int = 1000, height: int | None = None) -> bytes:
    """One figure as PNG; see `PngRenderer`, which is faster for several."""
    with PngRenderer() as renderer:
        return renderer(figure, width, height)


def _height(figure: go.Figure) -> float:
    layout: Any = figure.layout
    return layout.height or 450
