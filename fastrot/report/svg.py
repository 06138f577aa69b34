"""Charts as inline SVG: lines over a few positions, and a square of percentages. Colours come from the page's CSS."""

import math
from dataclasses import dataclass
from html import escape

_W, _H = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 32, 16, 40


@dataclass(frozen=True)
class Line:
    """points (x, y), ascending in x; kind: a CSS class (ours, random, published); spread: half-width of a band."""

    name: str
    kind: str
    points: list[tuple[float, float]]
    spread: list[float] | None = None
    marks: bool = True


def lines(
    title: str, series: list[Line], x_label: str, y_label: str, ticks: list[tuple[float, str]] | None = None
) -> str:
    """A line chart with its legend, as HTML.

    ticks  (x, label) of the horizontal axis; by default round numbers.
    """
    series = [line for line in series if line.points]
    xs = [x for line in series for x, _ in line.points]
    bands = [
        y + sign * s
        for line in series
        for (_, y), s in zip(line.points, line.spread or [0] * len(line.points), strict=True)
        for sign in (-1, 1)
    ]
    low, high, y_ticks = _nice(min(bands), max(bands))
    first, last = min(xs), max(xs)
    x_ticks = ticks or [(t, f"{t:g}") for t in _nice(first, last)[2] if first <= t <= last]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first or 1)
        return _LEFT + across * (_W - _LEFT - _RIGHT), _H - _BOTTOM - (y - low) / (high - low) * (_H - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        x, y = at(first, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick, label in x_ticks:
        x, y = at(tick, low)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{_H - _BOTTOM}" y2="{_H - _BOTTOM}"/>')
    middle = (_LEFT + _W - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{_H - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for line in series:
        parts += _drawn(line, at)
    parts.append("</svg>")
    legend = "".join(f'<span class="key {line.kind}">{escape(line.name)}</span>' for line in series)
    caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(y_label)}</span></figcaption>"
    return f'<figure>{caption}<div class="legend">{legend}</div>{"".join(parts)}</figure>'


def _drawn(line: Line, at):
    spots = [at(x, y) for x, y in line.points]
    if line.spread and any(line.spread):
        upper = [at(x, y + s) for (x, y), s in zip(line.points, line.spread, strict=True)]
        lower = [at(x, y - s) for (x, y), s in zip(line.points, line.spread, strict=True)]
        yield f'<polygon class="band {line.kind}" points="{_path(upper + lower[::-1])}"/>'
    yield f'<polyline class="line {line.kind}" points="{_path(spots)}"/>'
    for (x, y), (_, value) in zip(spots, line.points, strict=True) if line.marks else ():
        yield (
            f'<circle class="mark {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{escape(line.name)}: {value:.2f}</title></circle>"
        )


def _path(spots) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)


def _nice(low: float, high: float, count: int = 5) -> tuple[float, float, list[float]]:
    """A round range around low .. high, and its ticks."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= span)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    end = max(end, start + 1)
    ticks = [round(i * step, 10) for i in range(start, end + 1)]
    return ticks[0], ticks[-1], ticks


def confusion(title: str, matrix: list[list[float]], names: list[str], note: str) -> str:
    """A square of shares, rows true and columns predicted, each row summing to 1; as HTML."""
    cell, edge = 62, 54
    side = edge + cell * len(names) + 4
    parts = [f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title)}" class="square">']
    for i, name in enumerate(names):
        middle = edge + cell * (i + 0.5)
        parts.append(f'<text class="tick" x="{middle}" y="{edge - 8}" text-anchor="middle">{escape(name)}</text>')
        parts.append(f'<text class="tick" x="{edge - 8}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>')
    for i, row in enumerate(matrix):
        for j, share in enumerate(row):
            x, y, kind = edge + cell * j, edge + cell * i, "strong" if share > 0.55 else "weak"
            parts.append(
                f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="4" '
                f'style="fill-opacity:{0.06 + 0.94 * share:.3f}"/>'
                f'<text class="share {kind}" x="{x + cell / 2}" y="{y + cell / 2 + 5}" text-anchor="middle">'
                f"{100 * share:.0f}</text>"
            )
    parts.append("</svg>")
    caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>"
    return f"<figure>{caption}{''.join(parts)}</figure>"
