"""`fastrot odd`: the images of a source, the oddest first: those whose four turns a rotation network tells apart worst."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot import terminal
from fastrot.data.storage import FileStorage
from fastrot.errors import UserError
from fastrot.files import as_words, replacing, write_text
from fastrot.orient.answers import lines_path
from fastrot.orient.looking import Source, looked, opened
from fastrot.orient.network import open_network

_SHOWN = 60  # pictures of the sheet
_LISTED = 20  # rows of the table


def anomaly(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logits [n, 4 shown, 4] -> [n]: the mean cross-entropy of the four turns, in nats; log 4 is chance.

    Source: Hendrycks et al. 2019, arXiv:1906.12340 (sum over the rotations of the log-probability of the one made);
    Golan & El-Yaniv 2018, arXiv:1805.10917.
    """
    made = np.diagonal(logits, axis1=1, axis2=2).astype(np.float64)
    score: NDArray[np.float64] = (np.logaddexp.reduce(logits.astype(np.float64), 2) - made).mean(1)
    return score


@dataclass(frozen=True)
class _Odd:
    """score [n], descending; rows [n] of the source's manifest."""

    score: NDArray[np.float64]
    rows: NDArray[np.int64]


def odd(source: str, checkpoint: str, out: str | None, show: bool) -> dict[str, Any]:
    """Rank the images of a source. Returns what --json prints.

    out   a .jsonl for the ranking; a contact sheet goes beside it, as .html. None: nothing is written.
    show  whether the table is printed. Raises UserError, Fault.
    """
    path = lines_path(out)
    network, images = open_network(checkpoint), opened(source)
    scores, rows = list[float](), list[int]()
    with closing(looked(images.manifest, network)) as batches:
        flow = (
            one for batch in batches for one in zip(batch.rows.tolist(), anomaly(batch.logits).tolist(), strict=True)
        )
        for at, one in terminal.track(flow, len(images.manifest), f"looking at {source}"):
            rows.append(at)
            scores.append(one)
    score, row = np.array(scores), np.array(rows, np.int64)
    order = np.argsort(-score, kind="stable")
    found = _Odd(score[order], row[order])
    if path is not None:
        _write(path, found, images, network.says)
    if show:
        listed = zip(found.score[:_LISTED].tolist(), found.rows[:_LISTED].tolist(), strict=True)
        terminal.listing(
            "the oddest first", ("score", "file"), [[f"{s:.3f}", as_words(images.file(r))] for s, r in listed]
        )
    bad = len(images.manifest) - len(score) + len(images.manifest.quarantined)
    return {"out": out, "sheet": path and str(path.with_suffix(".html")), "images": len(score), "unreadable": bad,
            "median_score": float(np.median(score)) if len(score) else None}  # fmt: skip


def _write(path: Path, found: _Odd, images: Source, network: str) -> None:
    try:
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as file:
            for score, row in zip(found.score.tolist(), found.rows.tolist(), strict=True):
                line = {"file": images.file(row), "row": row, "class": images.group(row), "score": score}
                file.write(json.dumps(line) + "\n")
        write_text(path.with_suffix(".html"), _sheet(found, images, network))
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None


def _sheet(found: _Odd, images: Source, network: str) -> str:
    from fastrot.templates import template  # with Jinja, which a ranking alone does not need

    with closing(FileStorage(images.manifest)) as storage:
        pictures = list(_pictures(found, images, storage))
    return template("fastrot.orient", "odd.html").render(
        source=as_words(images.manifest.source.removeprefix("images:")),
        network=as_words(network),
        pictures=pictures,
        of=len(found.rows),
    )


def _pictures(found: _Odd, images: Source, storage: FileStorage) -> Iterator[tuple[str, str, float]]:
    from fastrot.orient.sheet import thumbnail
    from fastrot.templates import data_uri

    for score, row in zip(found.score[:_SHOWN].tolist(), found.rows[:_SHOWN].tolist(), strict=True):
        image = thumbnail(images.manifest, storage, row)
        if image:
            yield as_words(images.file(row)), data_uri(image, "JPEG"), score
