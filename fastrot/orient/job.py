"""`fastrot orient`: a source looked through, its answers written and counted, a contact sheet made."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from fastrot import terminal
from fastrot.errors import UserError
from fastrot.files import replacing
from fastrot.orient.answers import Answer, Unread, lines_path
from fastrot.orient.looking import Source, answers, opened
from fastrot.orient.network import open_network
from fastrot.orient.tally import HEADER, Tally


def orient(
    source: str, checkpoint: str, out: str | None, least: float | None, show: bool, kept: list[Answer] | None = None
) -> dict[str, Any]:
    """Find which way is up in every image. Returns what --json prints.

    out    a .jsonl for the answers; the contact sheet goes beside it, as .html. None: nothing is written.
    least  probability from which an answer counts; None: the network's own.
    kept   gets the answers. show: whether the tables are printed. Raises UserError; Fault where nothing can be read any more.
    """
    path = lines_path(out)
    if least is not None and not 0 <= least <= 1:
        raise UserError(f"--min-confidence {least:g}: must be 0 to 1")
    say = terminal.console().print
    network = open_network(checkpoint)
    say(network.says, soft_wrap=True, markup=False)
    if network.trust.measured is None and least is None:
        say(f"nobody calibrated it: what is less sure than {network.trust.threshold:g} stays undecided", soft_wrap=True)
    images = opened(source)
    tally = Tally()
    total = len(images.manifest) + len(images.manifest.quarantined)
    with closing(answers(images, network, least)) as flow:
        shown = terminal.track(
            flow if kept is None else _keeping(flow, kept),
            total,
            f"looking at {images.manifest.source.removeprefix('images:')}",
        )
        if path is None:
            for one in shown:
                tally.add(one)
        else:
            _write(shown, path, images, tally, network.says)
    if show:
        terminal.listing("clockwise turns that put images upright", HEADER, tally.rows())
        terminal.listing("EXIF tags of decided images", tuple(tally.tags), [[f"{n:,}" for n in tally.tags.values()]])
    sheet = None if path is None else str(path.with_suffix(".html"))
    return {"checkpoint": checkpoint, "out": out, "sheet": sheet} | tally.plain()


def _keeping(flow: Iterable[Answer | Unread], kept: list[Answer]) -> Iterator[Answer | Unread]:
    for one in flow:
        if isinstance(one, Answer):
            kept.append(one)
        yield one


def _write(flow: Iterable[Answer | Unread], path: Path, images: Source, tally: Tally, network: str) -> None:
    """The answers to `path`, a line each, and their contact sheet beside it."""
    from fastrot.orient.sheet import Sheet  # with Jinja, which answers alone do not need

    sheet = Sheet(images)
    try:
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as file:
            for one in flow:
                file.write(one.line() + "\n")
                tally.add(one)
                sheet.add(one)
        sheet.save(path.with_suffix(".html"), tally, network)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None
