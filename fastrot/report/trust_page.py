"""What `fastrot orient --calibrate` found, as one HTML file that needs no other."""

from pathlib import Path
from typing import Any

from fastrot.errors import UserError
from fastrot.files import as_words, write_text
from fastrot.orient.calibrate import table
from fastrot.orient.trust import MISTAKEN, RISK
from fastrot.report import svg
from fastrot.report.charts import Chart, Line
from fastrot.templates import template


def write(result: dict[str, Any]) -> str:
    """Write calibration.html beside the orientation.json of a result of `calibrate`; its path. Raises UserError."""
    path = Path(result["out"]).with_name("calibration.html")
    header, rows = table(result["measured"])
    page = template("fastrot.report", "trust.html").render(
        checkpoint=as_words(result["checkpoint"]),
        temperature=result["temperature"],
        threshold=result["threshold"],
        risk=RISK,
        mistaken=MISTAKEN,
        header=[as_words(cell) for cell in header],
        rows=rows,
        charts=[svg.draw(chart) for chart in charts_of(result)],
    )
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return str(path)


def charts_of(result: dict[str, Any]) -> list[Chart]:
    """The reliability diagram, and the risk over the coverage; percent."""

    def of_bins(name: str, kind: str) -> Line:
        title = f"{name} the temperature"
        return Line(title, kind, [(100 * one["confidence"], 100 * one["accuracy"]) for one in result[name]])

    sure = Line("confidence and accuracy alike", "chance", [(0, 0), (100, 100)])
    curve = [(100 * coverage, 100 * risk) for coverage, risk in result["curve"]]
    risk = [Line("held-out images", "train", curve)]
    if elsewhere := result["measured"].get("elsewhere"):
        points = [(100 * float(coverage), 100 * risk) for coverage, risk in elsewhere["risk"].items()]
        risk.append(Line("other images", "random", points))
    return [
        Chart("Reliability", "confidence, %", "answers that are right, %",
              [of_bins("before", "random"), of_bins("after", "pretrained"), sure]),
        Chart("Risk", "coverage: the surest answers, %", "of them wrong, %", risk),
    ]  # fmt: skip
