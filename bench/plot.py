"""Bars with their spread, as SVG: text that a repository keeps well and a browser shows."""

from html import escape
from pathlib import Path

_LABEL, _BAR, _LINE = 330, 460, 22


def bars(out: Path, title: str, unit: str, groups: dict[str, dict[str, tuple[float, float, float]]]) -> None:
    """Horizontal bars: {group: {label: (median, least, most)}}, a scale a group, whiskers from least to most.

    Ours, whose labels begin with `ours` or `fastrot`, are blue, the others gray.
    """
    at, parts = 30, []

    def text(x: float, words: str, style: str = "") -> None:
        parts.append(f'<text x="{x:.0f}" y="{at + 13}" {style}>{escape(words)}</text>')

    for group, rows in groups.items():
        longest = max(most for _, _, most in rows.values())
        text(8, group, 'font-weight="bold"')
        at += _LINE
        for label, (median, least, most) in rows.items():
            text(_LABEL - 8, label, 'text-anchor="end"')
            left, low, high = (_LABEL + _BAR * value / longest for value in (median, least, most))
            fill = "#3f74b0" if label.startswith(("ours", "fastrot")) else "#b4b4b4"
            parts.append(f'<rect x="{_LABEL}" y="{at + 2}" width="{left - _LABEL:.1f}" height="14" fill="{fill}"/>')
            parts.append(f'<path d="M{low:.1f} {at + 9}H{high:.1f}" stroke="#202020" stroke-width="1.5"/>')
            text(_LABEL + _BAR + 10, f"{median:,.0f} {unit}" if median >= 100 else f"{median:.3g} {unit}")
            at += _LINE
        at += 6
    width = _LABEL + _BAR + 130
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{at + 8}" font-family="sans-serif" font-size="13">'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    caption = f'<text x="8" y="20" font-size="15">{escape(title)}</text>'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([head, ground, caption, *parts, "</svg>"]) + "\n")
