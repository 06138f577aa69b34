"""The page as Markdown: its facts, tables, gaps, commands and fingerprints."""

from fastrot.report.tables import Figure, Row, Table

NOTHING = "\N{EN DASH}"
DIFFERENCE = "ours \N{MINUS SIGN} random"


def figure(value: Figure | float | None, sign: bool = False) -> str:
    """Two digits, with the spread where there is one; a dash for nothing."""
    if value is None:
        return NOTHING
    if isinstance(value, Figure):
        spread = f" ± {value.spread:.2f}" if value.spread is not None else ""
        return f"{value.value:.2f}{spread}"
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def cells(row: Row) -> list[str]:
    """published, ours, random, difference."""
    return [figure(row.published), figure(row.ours), figure(row.random), figure(row.difference, sign=True)]


def _table(table: Table) -> list[str]:
    lines = [f"### {table.title}", ""]
    if table.gap:
        lines += [f"**Gap:** {table.gap}", ""]
    lines += [f"| {table.unit} | published | ours | random | {DIFFERENCE} |", "|---|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join([row.label, *cells(row)]) + " |" for row in table.rows]
    return [*lines, "", f"Published: {table.source}. " + " ".join(table.notes), ""]


def render(page) -> str:
    """The whole page but its pictures."""
    lines = [f"# {page.title}", "", f"Made {page.made} by fastrot.", ""]
    lines += [f"> {warning}" for warning in page.warnings] + [""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in page.facts), ""]
    for title, missing in (("Tables", False), ("Gaps", True)):
        lines += [f"## {title}", ""]
        for table in page.tables:
            if bool(table.gap) == missing:
                lines += _table(table)
    if page.confusion:
        names = ["0°", "90°", "180°", "270°"]
        lines += ["## Turns told apart", "", "| true \\ said | " + " | ".join(names) + " |", "|---|" + "---:|" * 4]
        lines += [
            f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in row) + " |"
            for name, row in zip(names, page.confusion, strict=True)
        ]
        lines += [""]
    lines += ["## To repeat it", "", "```bash", *page.commands, "```", "", "| what | sha256 |", "|---|---|"]
    lines += [f"| {name} | `{sha}` |" for name, sha in page.fingerprints]
    return "\n".join(lines) + "\n"
