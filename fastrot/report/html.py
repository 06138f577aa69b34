"""The page as one self-contained HTML file: the template beside it, filled section by section."""

from html import escape
from importlib.resources import files
from string import Template

from fastrot.report import svg
from fastrot.report.markdown import DIFFERENCE, NOTHING, cells
from fastrot.report.tables import Table

_TURNS = ["0°", "90°", "180°", "270°"]
_NAMES = {"ours": "pretrained", "random": "random"}


def render(page) -> str:
    """HTML that needs nothing else: styles, charts and pictures are inside."""
    template = Template(files("fastrot.report").joinpath("template.html").read_text(encoding="utf-8"))
    charts = {chart.title: svg.lines(chart.title, chart.lines, chart.x, chart.y, chart.ticks) for chart in page.charts}
    pretraining = [html for title, html in charts.items() if title.startswith("Rotation")]
    probes = [html for title, html in charts.items() if not title.startswith("Rotation")]
    if page.confusion:
        note = "%, rows: true turn, columns: said, held-out images"
        pretraining.append(svg.confusion("Turns told apart", page.confusion, _TURNS, note))
    return template.substitute(
        title=escape(page.title),
        made=page.made,
        warnings="".join(f'<p class="warning">{escape(w)}</p>' for w in page.warnings),
        tiles="".join(_tile(*tile) for tile in page.tiles),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.facts),
        tables="".join(_table(t) for t in page.tables if not t.gap),
        gaps="".join(_table(t) for t in page.tables if t.gap),
        probes="".join(probes),
        pretraining="".join(pretraining) or "<p>No log of the pretraining lies beside these weights.</p>",
        filters="".join(_filters(name, uri) for name, uri in page.filters.items()),
        neighbours="".join(map(_neighbours, page.neighbours)),
        commands=escape("\n".join(page.commands)),
        fingerprints="".join(
            f"<tr><td>{escape(name)}</td><td><code>{sha}</code></td></tr>" for name, sha in page.fingerprints
        ),
    )


def _tile(name: str, figure: str, beside: str) -> str:
    return f'<div class="tile"><span>{escape(name)}</span><b>{figure}</b><small>{escape(beside)}</small></div>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("published", "ours", "random", DIFFERENCE))
    body = "".join(
        f"<tr><th>{escape(row.label)}</th>" + "".join(_cell(i, text) for i, text in enumerate(cells(row))) + "</tr>"
        for row in table.rows
    )
    gap = f'<p class="gap">{escape(table.gap)}</p>' if table.gap else ""
    notes = " ".join([f"Published: {table.source}.", *table.notes])
    return (
        f'<section class="card{" empty" if table.gap else ""}"><h3>{escape(table.title)}</h3>{gap}'
        f"<table><thead><tr><th>{escape(table.unit)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        f'<p class="note">{escape(notes)}</p></section>'
    )


def _cell(column: int, text: str) -> str:
    kind = "muted" if text == NOTHING else ("", "ours", "", "up" if text.startswith("+") else "down")[column]
    return f'<td class="{kind}">{text}</td>'


def _filters(name: str, uri: str) -> str:
    alt = f"first-layer filters, {name}"
    return (
        f'<figure><figcaption><b>{escape(name)}</b></figcaption><img class="filters" src="{uri}" alt="{alt}"></figure>'
    )


def _neighbours(shown: dict) -> str:
    head = "".join(f"<th>nearest, {_NAMES[backbone]}</th>" for backbone in shown["backbones"])
    rows = []
    for i, label in enumerate(shown["labels"]):
        columns = "".join(
            "<td>" + "".join(_thumb(uri, name, name == label) for uri, name in found[i]) + "</td>"
            for found in shown["backbones"].values()
        )
        rows.append(f"<tr><td>{_thumb(shown['queries'][i], label, None)}</td>{columns}</tr>")
    return (
        f'<section class="card wide"><h3>{escape(shown["title"])}</h3><table class="neighbours"><thead><tr><th>image</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        '<p class="note">By cosine of stage 4\'s global average. Framed: an image of the same class.</p></section>'
    )


def _thumb(uri: str, name: str, same: bool | None) -> str:
    kind = {True: "same", False: "other", None: "query"}[same]
    return f'<img class="thumb {kind}" src="{uri}" title="{escape(name)}" alt="{escape(name)}">'
