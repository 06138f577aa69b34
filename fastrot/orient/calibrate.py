"""`fastrot orient --calibrate`: how far a run's answers can be believed, found on images known to be upright."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot import terminal
from fastrot.errors import UserError
from fastrot.files import write_text
from fastrot.orient import trust
from fastrot.orient.answers import combined
from fastrot.orient.looking import looked, opened
from fastrot.orient.network import TRUST, Network, RunNetwork, Trust

_LEAST = 100  # images: of fewer none can show that one answer in a hundred is wrong
_EDGE = 1.001  # of the temperatures that are tried


def calibrate(
    source: str, checkpoint: str, without_up: str | None = None, elsewhere: str | None = None, show: bool = True
) -> dict[str, Any]:
    """Choose temperature and threshold and write them into the run's folder. Returns what --json prints.

    source      held-out images, all upright.  without_up: pictures that have no up.
    elsewhere   upright images of another kind, judged by what was chosen.
    show        whether the table is printed. Raises UserError, Fault.
    """
    if checkpoint.endswith(".onnx"):
        raise UserError(f"{checkpoint}: cannot be calibrated; calibrate the run, and export it again")
    network = RunNetwork(checkpoint)
    scores = _scores(source, network)
    others = None if without_up is None else _scores(without_up, network)
    chosen = trust.choose(scores, others)
    judged = trust.judge_by_tenths(scores, others)
    measured = {"held_out": {"source": source} | judged.figures}
    if without_up is not None:
        measured["held_out"]["without_up"]["source"] = without_up
    if elsewhere is not None:
        measured["elsewhere"] = {"source": elsewhere} | trust.judge(_scores(elsewhere, network), chosen).figures
    kept = Trust(chosen.temperature, chosen.threshold, measured, network.weights)
    path = network.run / TRUST
    try:
        write_text(path, kept.to_json() + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    if show:
        terminal.listing(f"answers of {network.path}", *table(measured))
    for line in remarks(chosen):
        terminal.console().print(line, soft_wrap=True, markup=False)
    drawn = {name: [asdict(one) for one in getattr(judged, name)] for name in ("before", "after")}
    return {"out": str(path), "checkpoint": str(network.path), "temperature": chosen.temperature,
            "threshold": chosen.threshold, "measured": measured, **drawn, "curve": judged.curve}  # fmt: skip


def _scores(source: str, network: Network) -> NDArray[np.float64]:
    """float64 [n, 4] of all images that can be read."""
    images = opened(source)
    if len(images.manifest) < _LEAST:
        raise UserError(f"{source}: {len(images.manifest)} images are too few to calibrate on; name at least {_LEAST}")
    with closing(looked(images.manifest, network)) as batches:
        flow = (row for batch in batches for row in combined(batch.logits))
        found = list(terminal.track(flow, len(images.manifest), f"looking at {source}"))
    if len(found) < _LEAST:
        raise UserError(f"{source}: only {len(found)} images can be read, too few to calibrate on")
    return np.stack(found)


_MEASURES = (
    "", "images", "right", "calibration error: before", "after", "decided", "wrong of these",
    *(f"wrong of the surest {100 * coverage:g}%" for coverage in trust.COVERAGES),
)  # fmt: skip


def table(measured: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: a column a source; of pictures without an up, how many got an answer."""
    columns = [_MEASURES, *(tuple(_column(figures)) for figures in measured.values())]
    if others := measured["held_out"].get("without_up"):
        answered = _share(others["answered"], others["answered_interval"])
        told = ("without an up: " + others["source"], f"{others['pictures']:,}", "", "", "", answered)
        columns.append(told + ("",) * (len(_MEASURES) - len(told)))
    header, *rows = zip(*columns, strict=True)
    return header, rows


def _column(figures: dict[str, Any]) -> Iterator[str]:
    before, after = figures["calibration_error"]
    yield from (figures["source"], f"{figures['images']:,}", _share(figures["accuracy"], figures["accuracy_interval"]))
    yield from (f"{before:.3f}", f"{after:.3f}", _share(figures["decided"]))
    wrong = figures["wrong_of_decided"]
    yield "-" if wrong is None else _share(wrong, figures["wrong_of_decided_interval"])
    yield from map(_share, figures["risk"].values())


def _share(share: float, interval: list[float] | None = None) -> str:
    around = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"{100 * share:.1f}%{around}"


def remarks(chosen: trust.Chosen) -> list[str]:
    """What a person should know of what was chosen."""
    most = float(np.exp(trust.WIDEST)) / _EDGE
    lines = [f"temperature {chosen.temperature:.4g}; from a probability of {chosen.threshold:.4g} on an answer counts"]
    if not 1 / most < chosen.temperature < most:
        lines.append(
            "the temperature is at the end of what is tried: nearly all answers are right, or nearly all wrong"
        )
    if chosen.threshold == 1:
        lines.append(
            "at no confidence are so few answers wrong: all images stay undecided; train a better network, or take more images"
        )
    return lines
