"""The page of `fastrot profile`: verdict, stages, some steps in time, the roofline; one self-contained HTML file."""

import math
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastrot.errors import UserError
from fastrot.files import write_text
from fastrot.profiling.clock import STAGES
from fastrot.profiling.verdict import NAMES, held
from fastrot.templates import template

_W = 400  # as wide as a telephone shows it, so that labels keep their size there
_LEFT, _RIGHT, _ROW = 100, 12, 20
_HIGH, _BOTTOM, _TOP = 260, 40, 14  # of the roofline
_GAP = 12  # between labels
_LEAST = 0.0005  # share of a step that is shown


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page of what `profile` returned. Raises UserError."""
    parts = result["parts_of_a_step"]
    shares = {key: [parts[what][key] for what in ("step", "both")] for key in _ordered(parts["both"])}
    html = template("fastrot.report", "profile.html", number=_number, interval=_interval).render(
        result=result,
        names=NAMES | {"both": "training, both together"},
        shares=[(key.removesuffix("_share"), *pair) for key, pair in shares.items() if max(pair) >= _LEAST],
        cures=[one | {"held": one["achieved"] and held(one["predicted"], one["achieved"])} for one in result["cures"]],
        timeline=_timeline(parts["both"].get("timeline", [])),
        roofline=_roofline(result["roofline"]) if result["roofline"] else None,
        command=" ".join(["fastrot", *sys.argv[1:]]),
        made=time.strftime("%Y-%m-%d"),
    )
    try:
        write_text(path, html)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror})") from None


def _ordered(part: dict[str, Any]) -> list[str]:
    """Shares as they follow one another in a step; the parts of `compute` behind it."""
    inner = [key for key in ("forward_share", "backward_share") if key in part]
    keys = [key for key in part if key.endswith("_share") and key not in inner]
    at = keys.index("compute_share") + 1 if inner else 0
    return [*keys[:at], *inner, *keys[at:]]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _interval(values: list[float]) -> str:
    return f"{values[0]:.2f} to {values[2]:.2f}"


def _timeline(spans: list[tuple[str, float, float]]) -> Markup | None:
    """A row a stage, a bar each time that it ran, over milliseconds."""
    if not spans:
        return None
    rows = [name for name in STAGES if any(one == name for one, _, _ in spans)]
    last, height = max(end for _, _, end in spans), len(rows) * _ROW

    def bars() -> Iterator[Markup]:
        for at, name in enumerate(rows):
            y = at * _ROW
            yield Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(_LEFT - 8, y + 14, name)
            yield Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _W, y + _ROW, y + _ROW)
            for begin, end in ((b, e) for one, b, e in spans if one == name):
                x, width = _LEFT + begin / last * _room(), max(0.8, (end - begin) / last * _room())
                yield Markup('<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="12"/>').format(
                    name, x, y + 4, width
                )
        for share in (0.0, 0.5, 1.0):
            yield Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{:,.0f} ms</text>').format(
                _LEFT + share * _room(),
                height + 18,
                {0.0: "start", 0.5: "middle", 1.0: "end"}[share],
                1e3 * share * last,
            )

    return _svg(height + 26, "Some steps: when each of their stages ran", bars())


def _room() -> int:
    return _W - _LEFT - _RIGHT


def _roofline(roof: dict[str, Any]) -> Markup:
    """FLOP/s over FLOPs a byte, both by powers of ten; the roof of this device, a mark a group of layers."""
    computing = [one for one in roof["groups"] if one["flops"]]
    points = [(one["flops"] / one["bytes"], one["flops"] / one["seconds"], one["name"]) for one in computing]
    ridge = roof["flops"] / roof["bytes"]
    low_x, high_x = _decades([ridge, *(x for x, _, _ in points)])
    low_y, high_y = _decades([roof["flops"], *(y for _, y, _ in points)])

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (math.log10(x) - low_x) / (high_x - low_x), (math.log10(y) - low_y) / (high_y - low_y)
        return 46 + across * (_W - 46 - 60), _HIGH - _BOTTOM - up * (_HIGH - _BOTTOM - _TOP)

    def drawn() -> Iterator[Markup]:
        for power in range(low_x, high_x + 1):
            x, y = at(10.0**power, 10.0**low_y)
            yield Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{:g}</text>').format(x, y + 17, 10.0**power)
        for power in range(low_y, high_y + 1):
            x, y = at(10.0**low_x, 10.0**power)
            yield Markup('<line class="grid" x1="{:.1f}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(x, _W - 60, y, y)
            yield Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{:g}</text>').format(
                x - 6, y + 4, 10.0 ** (power - 9)
            )
        yield Markup('<text x="{}" y="{}" text-anchor="middle">FLOPs a byte</text>').format(_W / 2, _HIGH - 6)
        start = max(10.0**low_x, 10.0**low_y / roof["bytes"])
        corners = [at(start, start * roof["bytes"]), at(ridge, roof["flops"]), at(10.0**high_x, roof["flops"])]
        for (x1, y1), (x2, y2) in pairwise(corners):
            yield Markup('<line class="roof" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(x1, y1, x2, y2)
        lowest = 0.0
        for x, y, name in sorted(((*at(x, y), name) for x, y, name in points), key=lambda one: one[1]):
            lowest = max(y, lowest + _GAP)
            yield Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x, y)
            yield Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(x + 8, lowest + 4, name)

    return _svg(
        _HIGH, "GFLOP/s of each group of layers, over its FLOPs a byte, under the roof of this machine", drawn()
    )


def _decades(values: list[float]) -> tuple[int, int]:
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))


def _svg(height: int, says: str, parts: Iterator[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _W, height, says, Markup("").join(parts)
    )
