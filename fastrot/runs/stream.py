"""`fastrot stream`: the steps of the exact stream, as the loader delivers them, printed and hashed without training."""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot.config import Config
from fastrot.data.build import crop_at, make_loader, open_manifest, plan_of
from fastrot.data.loader import MicroBatch
from fastrot.data.manifest import Manifest
from fastrot.data.plan import Sample, StreamHash
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs.arithmetic import Arithmetic, arithmetic
from fastrot.runs.folder import read_lines

Labels = NDArray[np.int64] | NDArray[np.int8]


@dataclass(frozen=True)
class _Step:
    """What came out of the loaders of all ranks, in the order of the step. crops: the pixels' bytes, share by share."""

    position: int
    sample: Sample
    labels: Labels
    crops: list[bytes]


def stream(config: Config, ranks: Ranks, first_step: int, steps: int, as_ranks: int, pixels: bool) -> dict[str, Any]:
    """Run the loaders of `as_ranks` ranks, print a line a step, and hash what they deliver.

    sha256            of the stream: an image that could not be read or decoded enters as it was planned, since faults
                      found while running do not change the stream; all else enters as delivered.
    delivered_sha256  of what was delivered, replaced images included: the same where `replaced` is empty.
    replaced          [stream position, row planned, row delivered] of each such image.
    pixels_sha256     of the crops, with `pixels`; it depends on the decoder, and on the others it does not.
    """
    if first_step < 0 or steps < 1 or as_ranks < 1:
        raise UserError("--first-step must be 0 or more, --steps and --ranks 1 or more")
    manifest = open_manifest(config.data.train, config, ranks, "data.train")
    numbers = arithmetic(config, as_ranks, len(manifest))
    plan = plan_of(config, manifest)
    official, delivered, pixel_hash = StreamHash(), StreamHash(), hashlib.sha256()
    replaced: list[list[int]] = []
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad_images.jsonl"
        for number, step in enumerate(_steps(config, manifest, ranks, numbers, first_step, steps, bad), first_step):
            planned = plan.at(step.position, step.position + numbers.images)
            where = _replaced(step.sample, planned, bad)
            sample, labels = step.sample, step.labels
            delivered.add(sample, labels)
            if len(where):
                sample, labels = _with(sample, planned, where), labels.copy()
                labels[where] = manifest.label[planned.rows[where]]
            official.add(sample, labels)
            line = f"step {number}  position {step.position}  epoch {step.position / len(manifest):.3f}"
            line += f"  rows {_first(sample.rows)}"
            for crops in step.crops if pixels else ():
                pixel_hash.update(crops)
            print(line + (f"  pixels {pixel_hash.hexdigest()[:16]}" if pixels else ""), flush=True)
            for at in where.tolist():
                replaced.append([step.position + at, int(planned.rows[at]), int(step.sample.rows[at])])
                print("  position {}: row {} cannot be read; row {} is shown for it".format(*replaced[-1]), flush=True)
    if replaced:
        print(f"{len(replaced)} images were replaced; with them delivered_sha256 {delivered.hexdigest()}")
    result = {
        "first_step": first_step,
        "steps": steps,
        "images_per_step": numbers.images,
        "ranks": as_ranks,
        "sha256": official.hexdigest(),
        "delivered_sha256": delivered.hexdigest(),
        "replaced": replaced,
    }
    return result | ({"pixels_sha256": pixel_hash.hexdigest()} if pixels else {})


def _first(rows: NDArray[np.int64], count: int = 6) -> str:
    return " ".join(map(str, rows[:count].tolist())) + (" ..." if len(rows) > count else "")


def _replaced(delivered: Sample, planned: Sample, bad: Path) -> NDArray[np.int64]:
    """Where the loaders listed the planned row as bad and delivered another; any other difference is no replacement."""
    differ = np.flatnonzero(delivered.rows != planned.rows)
    if not len(differ):
        return differ
    listed = {line.get("row") for line in read_lines(bad).lines} if bad.exists() else set()
    return differ[[row in listed for row in planned.rows[differ].tolist()]]


def _with(sample: Sample, other: Sample, where: NDArray[np.int64]) -> Sample:
    """A copy of `sample` whose images at `where` are those of `other`."""
    fields = {name: array.copy() for name, array in vars(sample).items()}
    for name, array in fields.items():
        array[where] = getattr(other, name)[where]
    return Sample(**fields)


def _steps(
    config: Config, manifest: Manifest, ranks: Ranks, numbers: Arithmetic, first_step: int, steps: int, bad: Path
) -> Iterator[_Step]:
    """The steps as training gets them: every simulated rank has its own loader, all list what is bad in one file."""
    span, start = range(first_step, first_step + steps), first_step * numbers.images
    made = [make_loader(config, manifest, ranks, numbers.largest, bad)[0] for _ in range(numbers.ranks)]
    flows = [
        loader.train(span, start, numbers.images, numbers.ranks, rank, numbers.micro_steps, partial(crop_at, config))
        for rank, loader in enumerate(made)
    ]
    try:
        for batches in zip(*flows, strict=True):
            shares = [next(batch.micro_steps) for _ in range(numbers.micro_steps) for batch in batches]
            parts = [_as_fed(share) for share in shares]
            yield _Step(
                batches[0].position,
                Sample(*(np.concatenate(arrays) for arrays in zip(*(vars(p).values() for p in parts), strict=True))),
                np.concatenate([share.labels for share in shares]),
                [share.pixels.cpu().numpy().tobytes() for share in shares],
            )
    finally:
        for flow, loader in zip(flows, made, strict=True):
            flow.close()
            loader.close()


def _as_fed(share: MicroBatch) -> Sample:
    """A share's sample with the flips and turns that the network's views are made by."""
    sample = share.sample
    return Sample(sample.rows, sample.epochs, sample.windows, share.flips.cpu().numpy(), share.turns.cpu().numpy())
