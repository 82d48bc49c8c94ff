"""report.html: one page that needs nothing but itself, made from the content of results.json.

The prose is in `templates/`, what it is filled with comes from `story`, `mechanism`, `circuits`,
`groups` and `gain`.
"""

from tl_entity.study.report.command import command, summary
from tl_entity.study.report.page import figure_page, render_report

__all__ = ["command", "figure_page", "render_report", "summary"]
