"""The page as one self-contained HTML file: the template beside it, filled by Jinja, which escapes what it is given."""

from typing import TYPE_CHECKING

from fastrot.report import charts, published, svg
from fastrot.report.markdown import between, number, probability, turns
from fastrot.report.significance import ALPHA
from fastrot.templates import template

if TYPE_CHECKING:
    from fastrot.report.page import Page


def render(page: "Page") -> str:
    """HTML that needs nothing else: styles, charts and pictures are inside."""
    drawn = [chart and svg.draw(chart) for chart in map(charts.of_table, page.tables)]
    filled = template("fastrot.report", "template.html", number=number, between=between, probability=probability)
    return filled.render(
        page=page,
        probes=list(zip(page.tables, drawn, strict=True)),
        curves=[svg.draw(chart) for chart in page.pretraining],
        turns=turns(),
        mixed=published.MIXED,
        alpha=ALPHA,
    )
