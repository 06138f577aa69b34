"""Two runs on one page that needs nothing else: how they differ, how they stand, their curves."""

import time
from pathlib import Path
from statistics import fmean

from fastrot.errors import UserError
from fastrot.files import write_text
from fastrot.report import svg
from fastrot.report.charts import Chart, Line
from fastrot.runs.overview import HEADER, Overview, compared, row
from fastrot.templates import template

_POINTS = 150  # of a curve; more lines than that are drawn by their means and ranges


def charts_of(a: Overview, b: Overview) -> list[Chart]:
    """Loss, accuracy, the held-out figures and pace over the epochs: of what either run has two points of."""
    titles = {"loss": "Training loss", "accuracy": "Training accuracy"}
    titles |= {f"held_out_{name}": f"Held-out {name.replace('_', ' ')}" for one in (a, b) for name in one.held_out}
    titles |= {"views_per_s": "Pace", "wait_share": "Time waiting for data"}
    charts = []
    for key, title in titles.items():
        unit = "mean" if key.endswith("loss") else "views/s" if key == "views_per_s" else "%"
        lines = [_line(one, kind, key, 100 if unit == "%" else 1) for one, kind in ((a, "pretrained"), (b, "random"))]
        lines = [line for line in lines if len(line.points) > 1]
        if lines:
            charts.append(Chart(title, "epoch", unit, lines, from_zero=key in ("views_per_s", "wait_share")))
    return charts


def _line(one: Overview, kind: str, key: str, scale: float) -> Line:
    points = [(line["epoch"], scale * line[key]) for line in one.lines if line.get(key) is not None]
    together = -(-len(points) // _POINTS)
    if together <= 1:
        return Line(one.name, kind, points)
    parts = [points[at : at + together] for at in range(0, len(points), together)]
    means = [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]
    return Line(one.name, kind, means, [(min(y for _, y in part), max(y for _, y in part)) for part in parts])


def write(path: Path, a: Overview, b: Overview) -> None:
    """Raises UserError where the file cannot be written."""
    result = compared(a, b)
    html = template("fastrot.report", "compared.html").render(
        names=[a.name, b.name],
        header=HEADER,
        runs=[row(one) for one in (a, b)],
        config=result["config"],
        made_by=result["made_by"],
        charts=[svg.draw(chart) for chart in charts_of(a, b)],
        made=time.strftime("%Y-%m-%d"),
    )
    try:
        write_text(path, html)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror})") from None
