"""The look that all figures share."""

import plotly.graph_objects as go

INK, FAINT, UNREACHABLE = "#1f2933", "#9aa5b1", "#d5dae0"

SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#999999", "#cc79a7")
"""Colours of bars and lines (the palette of Okabe and Ito)."""

STYLE = go.layout.Template(
    layout={
        "font": {
            "family": "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif",
            "size": 13,
            "color": INK,
        },
        "title": {
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 14, "t": 14},
        },
        "title_font_size": 15,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": SERIES_COLOURS,
        "hoverlabel": {"bgcolor": "white", "font_color": INK, "bordercolor": FAINT},
        "xaxis": {
            "title_standoff": 8,
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
            "automargin": True,
        },
        "yaxis": {"gridcolor": "#eceff2", "zeroline": False, "ticks": "", "automargin": True},
        "bargap": 0.3,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.22, "yanchor": "top"},
    }
)
"""The look that all figures share."""
