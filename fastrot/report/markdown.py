"""The page as Markdown: its verdict, facts, tables, commands and fingerprints."""

from typing import TYPE_CHECKING

from fastrot.models.resnet import TURNS
from fastrot.report import published
from fastrot.report.significance import Figure
from fastrot.report.tables import Table

if TYPE_CHECKING:
    from fastrot.report.page import Page

NOTHING = "\N{EN DASH}"
DIFFERENCE = "pretrained \N{MINUS SIGN} random"


def number(value: float | None, sign: bool = False) -> str:
    """Two digits; a dash for nothing."""
    if value is None:
        return NOTHING
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if sign else f"{value:.2f}"


def between(figure: Figure | None) -> str:
    """A figure's interval."""
    return f"{figure.low:.1f} to {figure.high:.1f}" if figure and figure.low is not None else ""


def probability(p: float | None) -> str:
    """As a reader writes it: one digit that counts."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.01 else f"p = {p:.2f}"


def turns() -> list[str]:
    """The turns' names, by label."""
    return [f"{90 * turn}°" for turn in range(TURNS)]


def _table(table: Table) -> list[str]:
    theirs = ["published"] if table.published else []
    heads = [table.unit, *theirs, "pretrained", "random", DIFFERENCE]
    lines = [f"### {table.title}", "", table.asks, "", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in table.rows:
        cells = [number(row.published)] if theirs else []
        cells += [
            f"{number(f.value)} ({between(f)})".replace(" ()", "") if f else NOTHING
            for f in (row.pretrained, row.random)
        ]
        cells.append(f"{number(row.difference, sign=True)} {probability(row.p)}".strip())
        lines.append(f"| {' | '.join([row.label, *cells])} |")
    said = [table.counted, *([f"chance {table.chance:.2f}"] if table.chance is not None else [])]
    source = [f"Published: {table.published}."] if theirs else []
    return [*lines, "", "; ".join(said) + ". " + " ".join([*source, *table.notes]), ""]


def _rotation(page: "Page") -> list[str]:
    if page.told is None:
        return []
    lines = ["## Turns told apart", "", f"| true \\ predicted | {' | '.join(turns())} | right |", "|---|" + "---:|" * 5]
    for name, row, figure in zip(turns(), page.told.shares, page.told.by_turn, strict=True):
        shares = " | ".join(f"{100 * share:.1f}" for share in row)
        lines.append(f"| {name} | {shares} | {number(figure.value)} ({between(figure)}) |")
    return [*lines, "", f"% of {page.told.overall.n:,} held-out images; chance {100 / TURNS:.0f} %.", ""]


def render(page: "Page") -> str:
    """The whole page but its pictures."""
    lines = [f"# {page.title}", "", f"Made {page.made} by fastrot.", "", f"**{page.verdict}**", ""]
    lines += [f"> {warning}" for warning in page.warnings] + [""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in page.facts), ""]
    lines += [*_rotation(page), "## Probes", "", published.MIXED, ""]
    lines += [line for table in page.tables for line in _table(table)]
    lines += ["## Published figures apart", ""]
    for one in page.apart:
        figures = "; ".join(f"{label}: {value:.2f}" for label, value in one.rows.items()) or "none published"
        lines.append(f"- **{one.title}**: {figures} ({one.source}). Why: {one.why}.")
    commands = [command for command in (page.train, page.again, *page.commands) if command]
    lines += ["", "## To repeat it", "", "```bash", *commands, "```", "", "| what | sha256 |", "|---|---|"]
    lines += [f"| {name} | `{sha}` |" for name, sha in page.fingerprints]
    return "\n".join(lines) + "\n"
