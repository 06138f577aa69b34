"""`fastrot estimate`'s plans as one HTML file that needs nothing else."""

import math
from pathlib import Path
from typing import Any

from fastrot.errors import UserError
from fastrot.files import write_text
from fastrot.report import svg
from fastrot.report.charts import Chart, Line
from fastrot.templates import template


def write(path: Path, result: dict[str, Any]) -> None:
    """result: what `estimate` returns. Raises UserError where the file cannot be written."""
    plans, hardware = result["plans"], result["hardware"]
    html = template("fastrot.report", "plans.html").render(
        title=f"A training on {hardware['name']}: {result['steps']:,} steps of {result['images_per_step']:,} images",
        verdict=f"Stops scaling at {stops}" if (stops := result["stops_scaling"]) else _pays(plans),
        charts=[svg.draw(chart) for chart in charts_of(plans)] if len(plans) > 1 else [],
        plans=plans,
        refused=result["refused"],
        profile=result["profile"],
        known=[(name, one) for name, one in hardware.items() if isinstance(one, dict)],
    )
    try:
        write_text(path, html)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror})") from None


def _pays(plans: list[dict[str, Any]]) -> str:
    last = plans[-1]
    return f"Up to {last['nodes']:,} nodes each more pays; there a GPU has {last['efficiency']:.0%} of one GPU's pace."


def charts_of(plans: list[dict[str, Any]]) -> list[Chart]:
    """Views/s, hours and efficiency over the nodes, which lie by their logarithm."""
    ticks = [(math.log2(one["nodes"]), f"{one['nodes']:,}") for one in plans]

    def chart(title: str, unit: str, values: list[tuple[float, float, float]]) -> Chart:
        points = [(x, middle) for (x, _), (_, middle, _) in zip(ticks, values, strict=True)]
        band = [(min(value), max(value)) for value in values]
        return Chart(title, "nodes", unit, [Line(title, "pretrained", points, band)], ticks)

    efficiency = [(100 * one["efficiency"],) * 3 for one in plans]
    return [
        chart("Pace", "thousand views/s", [tuple(v / 1e3 for v in one["views_per_s"]) for one in plans]),
        chart("Time", "hours", [tuple(one["hours"]) for one in plans]),
        chart("Efficiency", "% of one GPU's pace, a GPU", efficiency),
    ]
