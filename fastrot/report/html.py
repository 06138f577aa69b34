"""The page as one self-contained HTML file: the template beside it, filled by Jinja, which escapes what it is given."""

from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from fastrot.report import charts, published, svg
from fastrot.report.markdown import between, number, probability, turns
from fastrot.report.significance import ALPHA

if TYPE_CHECKING:
    from fastrot.report.page import Page


def render(page: "Page") -> str:
    """HTML that needs nothing else: styles, charts and pictures are inside."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "between": between, "probability": probability}
    template = environment.from_string(files("fastrot.report").joinpath("template.html").read_text(encoding="utf-8"))
    drawn = [chart and svg.draw(chart) for chart in map(charts.of_table, page.tables)]
    return template.render(
        page=page,
        probes=list(zip(page.tables, drawn, strict=True)),
        curves=[svg.draw(chart) for chart in page.pretraining],
        turns=turns(),
        mixed=published.MIXED,
        alpha=ALPHA,
    )
