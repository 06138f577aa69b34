"""Figures of a bench as SVG, without a library."""

from html import escape
from pathlib import Path

_LINE, _NAMES, _WIDE, _MARGIN = 22, 300, 520, 40


def bars(out: Path, title: str, rows: list[tuple[str, dict[str, float]]]) -> None:
    """Horizontal bars, the longest first: (name, harness.spread of its values), on a scale of roots (10 to 10,000 fit)."""
    rows = sorted(rows, key=lambda row: -row[1]["median"])
    most = max(values["most"] for _, values in rows)

    def at(value: float) -> float:
        return _NAMES + _WIDE * (value / most) ** 0.5

    lines = [f'<text x="{_NAMES}" y="20" font-weight="bold">{escape(title)} (scale: square root)</text>']
    for row, (name, values) in enumerate(rows):
        y = _MARGIN + row * _LINE
        colour = "#2a7" if name.startswith("ours") else "#999"
        lines += [
            f'<text x="{_NAMES - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_NAMES}" y="{y}" width="{at(values["median"]) - _NAMES:.1f}" height="14" fill="{colour}"/>',
            f'<path d="M{at(values["least"]):.1f} {y + 7}H{at(values["most"]):.1f}" stroke="#000"/>',
            f'<text x="{at(values["most"]) + 6:.1f}" y="{y + 11}">{values["median"]:,.0f}</text>',
        ]
    size = f'width="{_NAMES + _WIDE + 80}" height="{_MARGIN + len(rows) * _LINE + 10}"'
    style = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"'
    out.write_text(f"<svg {style} {size}>\n" + "\n".join(lines) + "\n</svg>\n")
