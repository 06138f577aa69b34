"""`fastrot shortcuts`: which cues a rotation network goes by.

A cue is taken away from all images: how much of the accuracy stays? In a frame turned at random for each image, so that
what is done is no new cue. Or it is planted: images are first turned at random, so that nothing in them tells the turn
that is asked for but the cue; a network that does not go by it stays at chance.
Accuracies are of single views, four an image; intervals are 95%, by the percentile bootstrap over images, and changes are
paired: both accuracies of the same images.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrot import machine, terminal
from fastrot.config import Data
from fastrot.data import boxes
from fastrot.data.manifest import Manifest
from fastrot.data.randomness import TURN, philox
from fastrot.errors import UserError
from fastrot.files import write_text
from fastrot.orient.answers import TURNS, combined
from fastrot.orient.cues import AS_IT_IS, OFF_GRID, PLANTED, SQUARE, TAKEN, Crop, Cue
from fastrot.orient.looking import Source, boxes_shown
from fastrot.orient.network import Network, Shows, open_network
from fastrot.templates import data_uri, template

CHANCE = 1 / TURNS
_DRAWS, _PARTS = 2000, 20  # of the bootstrap, which needs memory for a part of them at once
_IMAGES = 32  # a batch
_SHIFT = 3  # pixels of the image: no multiple of a grid's 8
_TURNED = Cue("none", "nothing: turned at random alone", AS_IT_IS.act)
Hits = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """A cue: accuracy of the views with its interval, and the paired change with its own. kept: of what the accuracy is
    above chance, the share that stays; None of a planted cue. picture: a PNG as a data: URI, the first image."""

    cue: str
    does: str
    accuracy: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float
    kept: float | None
    picture: str


@dataclass(frozen=True)
class Shortcuts:
    """images, and what their accuracy is, of single views and of four turns combined; rows of cues, as found."""

    images: int
    accuracy: float
    combined: float
    taken: list[Row]
    planted: list[Row]


def shortcuts(checkpoint: str, source: str, most: int, out: str | None, show: bool) -> dict[str, Any]:
    """Measure, print where `show`, write the page to `out`. Returns what --json prints. Raises UserError, Fault."""
    if out is not None and not out.endswith(".html"):
        raise UserError(f"--out {out}: expected a name ending in .html")
    if most < 2:
        raise UserError(f"--images {most}: must be at least 2")
    network = open_network(checkpoint)
    manifest = Source.open(source, terminal.track).manifest
    rows = np.unique(np.linspace(0, len(manifest) - 1, min(most, len(manifest))).round().astype(np.int64))
    if len(rows) < 2:
        raise UserError(f"--data {source}: holds one image; intervals need two or more")
    found = measured(network, manifest, rows)
    if show:
        for title, header, table in tables(found):
            terminal.listing(title, header, table)
    if out is not None:
        page = template("fastrot.orient", "shortcuts.html", zip=zip).render(
            source=source, network=network.says, found=found, tables=list(tables(found)), chance=CHANCE
        )
        try:
            write_text(Path(out), page)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    plain = asdict(found)
    for row in plain["taken"] + plain["planted"]:
        del row["picture"]
    return {"checkpoint": checkpoint, "data": source, "chance": CHANCE, "out": out} | plain


def measured(network: Network, manifest: Manifest, rows: NDArray[np.int64]) -> Shortcuts:
    """Every cue, taken and planted, on these rows."""
    base, together, picture = _hits(network, manifest, rows, AS_IT_IS, planted=False)
    turned, _, _ = _hits(network, manifest, rows, _TURNED, planted=True)
    kinds = [(cue, False) for cue in TAKEN] + [(cue, True) for cue in PLANTED]
    found = {}
    for cue, planted in terminal.track(kinds, len(kinds), "cues"):
        found[cue, planted] = _hits(network, manifest, rows, cue, planted)
    taken = [_row(AS_IT_IS, base, base, picture, kept=True)]
    taken += [_row(cue, found[cue, False][0], base, found[cue, False][2], kept=True) for cue in TAKEN]
    planted_rows = [_row(cue, found[cue, True][0], turned, found[cue, True][2], kept=False) for cue in PLANTED]
    return Shortcuts(len(rows), float(base.mean()), float(together.mean()), taken, planted_rows)


def _row(cue: Cue, hits: Hits, without: Hits, picture: str, kept: bool) -> Row:
    low, high = interval(hits)
    change_low, change_high = interval(hits - without)
    above = float(without.mean()) - CHANCE
    share = (float(hits.mean()) - CHANCE) / above if kept and above > 0 else None
    change = float((hits - without).mean())
    return Row(cue.name, cue.does, float(hits.mean()), low, high, change, change_low, change_high, share, picture)


def interval(values: Hits) -> tuple[float, float]:
    """95% interval of the mean of values [n], by the percentile bootstrap."""
    n, rng = len(values), np.random.default_rng(0)
    shares = (rng.multinomial(n, np.full(n, 1 / n), _DRAWS // _PARTS) for _ in range(_PARTS))
    low, high = np.quantile(np.concatenate([counts @ values / n for counts in shares]), (0.025, 0.975))
    return float(low), float(high)


def _hits(
    network: Network, manifest: Manifest, rows: NDArray[np.int64], cue: Cue, planted: bool
) -> tuple[Hits, Hits, str]:
    """Of each image the share of its four views that are told rightly, and whether its combined answer is; and a picture
    of the first."""
    parts = [rows[at : at + _IMAGES] for at in range(0, len(rows), _IMAGES)]

    def boxes_of(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return _boxes(network.shows, manifest.height[rows], manifest.width[rows], cue.box)

    singles, together, picture = [], [], ""
    flow = boxes.shown(manifest, parts, boxes_of, network.shows.size, machine.cores(), Data().timeout)
    with closing(flow):
        for batch in flow:
            if batch.unread:
                row, reason = next(iter(batch.unread.items()))
                raise UserError(f"{manifest.name(row)}: cannot be read ({reason}); leave it out, or mend it")
            crops = np.stack(list(_changed(batch.pixels, batch.rows, cue, planted)))
            picture = picture or data_uri(Image.fromarray(crops[0]), "PNG")
            logits = network.logits(crops)
            singles.append((logits.argmax(2) == np.arange(TURNS)).mean(1))
            together.append((combined(logits).argmax(1) == 0).astype(np.float64))
    return np.concatenate(singles), np.concatenate(together), picture


def _changed(crops: Crop, rows: Iterable[int], cue: Cue, planted: bool) -> Iterator[Crop]:
    """Crops with a cue taken away in a frame of their own, or planted once they lie any way up."""
    quarters = philox(0, np.asarray(rows), 0, TURN)[:, 0] >> 30
    for crop, row, quarter in zip(crops, rows, quarters.tolist(), strict=True):
        rng = np.random.default_rng(int(row))
        changed = cue.act(np.ascontiguousarray(np.rot90(crop, quarter)), rng)
        yield changed if planted else np.rot90(changed, -quarter)


def _boxes(shows: Shows, heights: NDArray[np.int32], widths: NDArray[np.int32], which: str) -> NDArray[np.float64]:
    """What is read of images of these sizes."""
    if which == SQUARE:
        least = np.minimum(heights, widths).astype(np.float64)
        return np.stack([(heights - least) / 2, (widths - least) / 2, least, least], 1)
    found = boxes_shown(shows, heights, widths)
    if which == OFF_GRID:
        by = np.minimum(_SHIFT, np.minimum(heights, widths) - 1)
        found[:, :2] += by[:, None]
        found[:, 2:] = np.minimum(found[:, 2:], np.stack([heights, widths], 1) - found[:, :2])
    return found


def tables(found: Shortcuts) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, header, rows of words): cues taken away, and planted."""
    yield (
        f"cues taken away: rotation accuracy of single views, {found.images:,} images; combined {found.combined:.1%}",
        ("cue", "what is done", "accuracy", "95%", "change", "95%", "stays above chance"),
        [(*_words(row), "" if row.kept is None else f"{row.kept:.0%}") for row in found.taken],
    )
    yield (
        f"cues planted, and nothing else that tells the turn: chance {CHANCE:.0%}",
        ("cue", "what is done", "accuracy", "95%", "change", "95%"),
        [_words(row) for row in found.planted],
    )


def _words(row: Row) -> tuple[str, ...]:
    return (
        row.cue,
        row.does,
        f"{row.accuracy:.1%}",
        f"{row.low:.1%} to {row.high:.1%}",
        f"{100 * row.change:+.1f}",
        f"{100 * row.change_low:+.1f} to {100 * row.change_high:+.1f}",
    )
