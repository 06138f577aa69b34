"""Line charts as inline SVG, for a screen of any width and for print. Colours come from the page's CSS."""

import math
import zlib
from collections.abc import Callable, Iterator

from markupsafe import Markup

from fastrot.report.charts import Chart, Line, Point

_W, _H = 400, 250  # as wide as a telephone shows it, so that labels keep their size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 34, 12, 42
_MARKS = {"pretrained": "circle", "random": "square", "published": "triangle"}  # colour alone tells no line
_FEW = 40  # points that are worth a mark each


def draw(chart: Chart) -> Markup:
    """A figure: caption, legend, chart with a title and a description."""
    low, y_ticks, at = _axes(chart)
    name = f"chart-{zlib.crc32(chart.title.encode()):08x}"
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d">').format(_W, _H, name, name),
        Markup('<title id="{}-t">{}</title><desc id="{}-d">{}</desc>').format(name, chart.title, name, _said(chart)),
        *_grid(chart, low, y_ticks, at),
        *(part for line in chart.lines for part in _line(line, at)),
        Markup("</svg>"),
    ]
    legend = Markup("").join(
        Markup('<span><svg class="key" viewBox="0 0 34 12" aria-hidden="true">{}</svg>{}</span>').format(
            _key(line), line.name
        )
        for line in chart.lines
    )
    return Markup(
        '<figure class="chart"><figcaption>{}, over the {}</figcaption><div class="legend">{}</div>{}</figure>'
    ).format(f"{chart.title}: {chart.y}", chart.x, legend, Markup("").join(parts))


def _said(chart: Chart) -> str:
    """The chart in words, for who cannot see it."""
    names = dict(chart.ticks or [])
    ends = [
        line.points if len(line.points) <= len(names) else [line.points[0], line.points[-1]] for line in chart.lines
    ]
    return "; ".join(
        f"{line.name}: " + ", ".join(f"{y:.4g} at {names.get(x, f'{x:.3g}')}" for x, y in points)
        for line, points in zip(chart.lines, ends, strict=True)
    )


def _axes(chart: Chart) -> tuple[float, list[float], Callable[[float, float], Point]]:
    """The least height, the ticks, and where a point lies."""
    heights = [y for line in chart.lines for pair in (line.band or []) for y in pair]
    heights += [y for line in chart.lines for _, y in line.points]
    low, high, ticks = nice(0 if chart.from_zero else min(heights), max(heights))
    xs = [x for line in chart.lines for x, _ in line.points]
    first, last = min(xs), max(xs)

    def at(x: float, y: float) -> Point:
        across, up = (x - first) / (last - first or 1), (y - low) / (high - low)
        return _LEFT + across * (_W - _LEFT - _RIGHT), _H - _BOTTOM - up * (_H - _TOP - _BOTTOM)

    return low, ticks, at


def _grid(chart: Chart, low: float, y_ticks: list[float], at: Callable[[float, float], Point]) -> Iterator[Markup]:
    xs = [x for line in chart.lines for x, _ in line.points]
    first, last = min(xs), max(xs)
    for tick in y_ticks:
        x, y = at(first, tick)
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, _W - _RIGHT, y, y)
        yield Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{:g}</text>').format(x - 7, y + 4, tick)
    for tick, label in chart.ticks or [(t, f"{t:g}") for t in nice(first, last, 4)[2] if first <= t <= last]:
        x, y = at(tick, low)
        yield Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(x, y + 17, label)
    bottom = _H - _BOTTOM
    yield Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _W - _RIGHT, bottom, bottom)
    yield Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (_LEFT + _W - _RIGHT) / 2, _H - 6, chart.x
    )


def _line(line: Line, at: Callable[[float, float], Point]) -> Iterator[Markup]:
    if line.band:
        edge = [at(x, high) for (x, _), (_, high) in zip(line.points, line.band, strict=True)]
        back = [at(x, low) for (x, _), (low, _) in zip(line.points, line.band, strict=True)]
        yield Markup('<polygon class="band {}" points="{}"/>').format(line.kind, _path(edge + back[::-1]))
    yield Markup('<polyline class="line {}" points="{}"/>').format(line.kind, _path([at(x, y) for x, y in line.points]))
    if line.kind in _MARKS and len(line.points) <= _FEW:
        for x, y in line.points:
            yield _mark(line.kind, *at(x, y))


def _mark(kind: str, x: float, y: float) -> Markup:
    match _MARKS[kind]:
        case "circle":
            return Markup('<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(kind, x, y)
        case "square":
            return Markup('<rect class="mark {}" x="{:.1f}" y="{:.1f}" width="7" height="7"/>').format(
                kind, x - 3.5, y - 3.5
            )
    points = _path([(x, y - 4.5), (x + 4.5, y + 3.5), (x - 4.5, y + 3.5)])
    return Markup('<polygon class="mark {}" points="{}"/>').format(kind, points)


def _key(line: Line) -> Markup:
    stroke = Markup('<line class="line {}" x1="0" x2="34" y1="6" y2="6"/>').format(line.kind)
    return stroke + _mark(line.kind, 17, 6) if line.kind in _MARKS else stroke


def _path(spots: list[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)


def nice(low: float, high: float, count: int = 5) -> tuple[float, float, list[float]]:
    """A round range around low .. high, and its ticks."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= span)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    end = max(end, start + 1)
    ticks = [round(i * step, 10) for i in range(start, end + 1)]
    return ticks[0], ticks[-1], ticks
