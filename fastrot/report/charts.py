"""Which charts the page draws, and of what: probes over the layers or over k, the pretraining over its epochs."""

import math
from dataclasses import dataclass
from typing import Any

from fastrot.models.resnet import TURNS
from fastrot.report.significance import Figure
from fastrot.report.tables import LAYERS, Row, Table

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """points (x, y), ascending in x; kind: how it is drawn (see svg.py); band: the interval (low, high) at each point."""

    name: str
    kind: str
    points: list[Point]
    band: list[Point] | None = None


@dataclass(frozen=True)
class Chart:
    """One line chart. ticks: (x, label), or None for round numbers; from_zero: shares are compared by their height."""

    title: str
    x: str
    y: str
    lines: list[Line]
    ticks: list[tuple[float, str]] | None = None
    from_zero: bool = True

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"title": self.title, "x": self.x, "y": self.y, "lines": {line.name: line.points for line in self.lines}}


def of_table(table: Table) -> Chart | None:
    """Low-shot over k, other probes over the layers; None where fewer than two points would be drawn."""
    if table.rows[0].label.startswith("k = "):
        at = {i: row for i, row in enumerate(table.rows)}
        return _chart(table, "images a class (k)", at, [row.label.removeprefix("k = ") for row in table.rows])
    by_layer = {row.label.removesuffix(", k = 20"): row for row in table.rows}
    return _chart(table, "layer", {i: by_layer[tap] for i, tap in enumerate(LAYERS) if tap in by_layer}, list(LAYERS))


def _chart(table: Table, x: str, rows: dict[int, Row], labels: list[str]) -> Chart | None:
    if len(rows) < 2:
        return None
    published = [(float(i), row.published) for i, row in rows.items() if row.published is not None]
    lines = [
        _line("pretrained", {i: row.pretrained for i, row in rows.items()}),
        _line("random", {i: row.random for i, row in rows.items()}),
        Line(f"published ({table.published})", "published", published),
    ]
    if table.chance is not None:
        lines.append(Line("chance", "chance", [(float(min(rows)), table.chance), (float(max(rows)), table.chance)]))
    ticks = [(float(i), labels[i]) for i in rows]
    return Chart(table.title, x, table.unit, [line for line in lines if line.points], ticks)


def _line(kind: str, figures: dict[int, Figure | None]) -> Line:
    known = [(float(i), figure) for i, figure in figures.items() if figure]
    return Line(kind, kind, [(i, f.value) for i, f in known], [f.band for _, f in known])


def of_pretraining(log: list[dict[str, Any]]) -> list[Chart]:
    """Accuracy and loss over the epochs, on training views and held-out images."""
    trained = [line for line in log if "loss" in line]
    held_out = [line for line in log if "held_out_accuracy" in line]
    if len(trained) < 2:
        return []

    def lines(key: str, scale: float, chance: float) -> list[Line]:
        ends = trained[0]["epoch"], trained[-1]["epoch"]
        out = [
            Line("training views", "train", [(line["epoch"], scale * line[key]) for line in trained]),
            Line(
                "held-out images", "pretrained", [(line["epoch"], scale * line[f"held_out_{key}"]) for line in held_out]
            ),
            Line("chance", "chance", [(end, chance) for end in ends]),
        ]
        return [line for line in out if line.points]

    return [
        Chart("Rotation accuracy", "epoch", "%", lines("accuracy", 100, 100 / TURNS)),
        Chart("Rotation loss", "epoch", "cross-entropy", lines("loss", 1, math.log(TURNS)), from_zero=False),
    ]
