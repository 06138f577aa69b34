"""What a person reads on standard error: lines, bars with an ETA, small tables."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

T = TypeVar("T")
_QUIET_S = 10  # seconds between plain progress lines
_WIDE = 160  # letters of a line that goes into a file
_speaks = ContextVar("speaks", default=True)


@contextmanager
def speaking(aloud: bool) -> Iterator[None]:
    """Within, what is printed through a console is shown, or is not: a library's user has not asked for it."""
    before = _speaks.set(aloud)
    try:
        yield
    finally:
        _speaks.reset(before)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read is gone, as a launcher that was killed: what works on has its checkpoint to write."""
        self.quiet = True


def console() -> Console:
    """Standard error: standard output is for results."""
    return _Console(stderr=True, highlight=False, quiet=not _speaks.get())


def progress_bar(out: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=out,
    )


def duration(seconds: float) -> str:
    """As a person says it: 42 s, 3 min 20 s, 5 h 12 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def track(items: Iterable[T], total: int, title: str, note: Callable[[], str] = str) -> Iterator[T]:
    """The items, with a progress bar on a terminal and a line every ten seconds elsewhere.

    note  a word on the state of things, asked for when it is shown.
    """
    out = console()
    if out.is_terminal:
        with progress_bar(out) as bar:
            task = bar.add_task(escape(title), total=total, note="")
            for item in items:
                yield item
                bar.update(task, advance=1, note=note())
        return
    start = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said > _QUIET_S:
            said = now
            left = (now - start) / done * (total - done)
            out.print(
                f"{title}: {done:,} of {total:,}, {duration(left)} left  {note()}".rstrip(),
                soft_wrap=True,
                markup=False,
            )


def listing(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output: it is the result, and where no terminal bounds it its lines are wide."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    grid = Table(*header, title=escape(title), title_justify="left", show_header=any(header))
    for column in grid.columns:
        column.overflow = "fold"
    for row in rows:
        grid.add_row(*map(escape, row))
    out.print(grid)


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """A short two-column table on standard error."""
    grid = Table("", Column(overflow="fold"), title=title, show_header=False, title_justify="left")
    for name, value in rows:
        grid.add_row(escape(name), escape(value))
    console().print(grid)
