"""`fastrot stream`: the steps of the exact stream, printed and hashed without training."""

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np

from fastrot.config import Config
from fastrot.data.build import crop_at, make_loader, open_manifest, plan_of
from fastrot.data.manifest import Manifest
from fastrot.data.plan import Sample, StreamHash, slice_of
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs.arithmetic import Arithmetic, arithmetic


def stream(config: Config, ranks: Ranks, first_step: int, steps: int, as_ranks: int, pixels: bool) -> dict:
    """Print a line a step, as if `as_ranks` ranks shared it, and the hash of all steps.

    Each simulated rank plans its own shares, as in training; the shares are put together again in
    the order of the step. With `pixels` they are decoded too, and the crops hashed.
    """
    if first_step < 0 or steps < 1 or as_ranks < 1:
        raise UserError("--first-step must be 0 or more, --steps and --ranks 1 or more")
    manifest = open_manifest(config.data.train, config, ranks, "data.train")
    numbers = arithmetic(config, as_ranks, len(manifest))
    span = range(first_step, first_step + steps)
    plan = plan_of(config, manifest)
    shares = [
        slice_of(numbers.images, as_ranks, numbers.micro_steps, a, r)
        for a in range(numbers.micro_steps)
        for r in range(as_ranks)
    ]
    decoded = _crops(config, manifest, ranks, numbers, span) if pixels else None
    plan_hash, pixel_hash = StreamHash(), hashlib.sha256()
    for step in span:
        start = step * numbers.images
        parts = [plan.at(start + first, start + last) for first, last in shares]
        whole = Sample(*(np.concatenate(arrays) for arrays in zip(*(vars(p).values() for p in parts), strict=True)))
        plan_hash.add(whole, manifest.label[whole.rows])
        line = f"step {step}  position {start}  epoch {start / len(manifest):.3f}  rows {_first(whole.rows)}"
        if decoded:
            for crops in next(decoded):
                pixel_hash.update(crops)
            line += f"  pixels {pixel_hash.hexdigest()[:16]}"
        print(line, flush=True)
    if decoded:
        decoded.close()
    result = {
        "first_step": first_step,
        "steps": steps,
        "images_per_step": numbers.images,
        "ranks": as_ranks,
        "sha256": plan_hash.hexdigest(),
    }
    return result | ({"pixels_sha256": pixel_hash.hexdigest()} if pixels else {})


def _first(rows: np.ndarray, count: int = 6) -> str:
    return " ".join(map(str, rows[:count].tolist())) + (" ..." if len(rows) > count else "")


def _crops(config: Config, manifest: Manifest, ranks: Ranks, numbers: Arithmetic, span: range) -> Iterator[list[bytes]]:
    """The crops of each step, as bytes in the order of the step; every simulated rank has its own loader."""
    made = [make_loader(config, manifest, ranks, numbers.largest, None)[0] for _ in range(numbers.ranks)]
    flows = [
        loader.train(
            span,
            span.start * numbers.images,
            numbers.images,
            numbers.ranks,
            rank,
            numbers.micro_steps,
            partial(crop_at, config),
        )
        for rank, loader in enumerate(made)
    ]
    try:
        for batches in zip(*flows, strict=True):
            yield [
                next(batch.micro_steps).pixels.cpu().numpy().tobytes()
                for _ in range(numbers.micro_steps)
                for batch in batches
            ]
    finally:
        for flow, loader in zip(flows, made, strict=True):
            flow.close()
            loader.close()
