"""`fastrot features`: one pass of a frozen backbone over a source, every tap into a store."""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import ResNet

from fastrot import distributed, terminal
from fastrot.config import Config
from fastrot.data.bad_images import BadImages
from fastrot.data.build import corruptor_of, decoder_of, open_manifest, plan_of, settings_of, short_side, storage_of
from fastrot.data.decode import Decoder, squash
from fastrot.data.loader import Loader
from fastrot.data.manifest import Manifest
from fastrot.data.plan import slice_of
from fastrot.data.remarks import describe
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST
from fastrot.errors import UserError
from fastrot.features import write
from fastrot.models.backbone import Origin, backbone_of
from fastrot.models.taps import AVERAGE, TAPS, flat_features
from fastrot_kernels import rotate_views

T = TypeVar("T")
Say = Callable[[str], None]
BLOCK = 64  # rows computed together, whatever the ranks, so that the numbers do not depend on them
_FORMAT = 1


@dataclass(frozen=True)
class Request:
    """What to compute.

    checkpoint  a path, or None for the control drawn from `seed`.
    taps        of TAPS or AVERAGE; pool: a name of POOLS; transform: test or svm; dtype: a name of featurestore.DTYPES.
    passes      as training shows the images, epoch = pass; None: one, as evaluation does.
    """

    source: str
    out: str
    checkpoint: str | None = None
    seed: int | None = None
    taps: tuple[str, ...] = TAPS
    pool: str = "specified"
    transform: str = "test"
    dtype: str = "float32"
    passes: int | None = None


def parse_taps(text: str) -> tuple[str, ...]:
    """ "1,4,avg" -> ("feature1", "feature4", "avg"). Raises UserError."""
    names = {str(i): tap for i, tap in enumerate(TAPS, 1)} | {tap: tap for tap in (*TAPS, AVERAGE)}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in names or words.count(word) > 1:
            raise UserError(f"--taps {text}: {word!r} is none, or twice; expected some of 1,2,3,4,5,avg")
    return tuple(names[word] for word in words)


class Extractor:
    """Upright crops in, taps out: normalise, forward in eval mode, pool."""

    def __init__(self, model: ResNet, config: Config, device: torch.device, taps: tuple[str, ...], pool: str):
        self._model, self._device, self._taps, self._pool = model.to(device), device, taps, pool
        self._autocast = AUTOCAST.get(config.engine.precision)
        self._mean = torch.tensor(config.data.mean, dtype=torch.float32, device=device) * 255
        self._std = torch.tensor(config.data.std, dtype=torch.float32, device=device) * 255

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, flips: Tensor) -> dict[str, Tensor]:
        """pixels uint8 [n, S, S, 3], flips uint8 [n] -> {tap: float32 [n, D]} on the device."""
        pixels, flips = (x.to(self._device, non_blocking=True) for x in (pixels, flips))
        images = rotate_views(pixels, flips, torch.zeros_like(flips)[:, None], self._mean, self._std, torch.float32)
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            taps = flat_features(self._model, images, self._taps, self._pool)
        return {name: x.float() for name, x in taps.items()}


def dump(request: Request, config: Config, ranks: Ranks) -> dict[str, Any]:
    """Compute a store, or what a kill left of it. Returns what --json prints. Raises UserError, Fault."""
    if request.passes is not None and request.passes < 1:
        raise UserError(f"--passes {request.passes}: must be 1 or more")
    if request.passes and request.transform == "svm":
        raise UserError("--passes: --transform svm shows every image whole; use --transform test")
    say = _sayer(ranks)
    model, origin = backbone_of(request.checkpoint, request.seed, config.model.arch)
    say(origin.says())
    manifest = open_manifest(request.source, config, ranks, "--data")
    describe(manifest, say)
    _set_torch_flags(config.engine.precision)
    extract = Extractor(model, config, ranks.device, request.taps, request.pool)
    folder = Path(request.out)
    block = config.engine.images_per_micro_step or BLOCK
    loader, decoder = _loader(request.transform, config, manifest, ranks, block)
    say(decoder)
    facts = _facts(request, config, manifest, origin, extract, block, decoder.partition(",")[0])
    finished = distributed.on_first(ranks, lambda: write.prepare(folder, facts, manifest))
    began, computed = time.monotonic(), 0
    try:
        if finished:
            say(f"{folder}: all there already")
        else:
            computed = _compute(folder, request, config, ranks, loader, extract, block, say)
            dist.barrier()
            distributed.on_first(ranks, lambda: write.finish(folder, facts))
    finally:
        loader.close()
    seconds = time.monotonic() - began
    result = {
        "out": str(folder),
        "rows": len(manifest),
        "passes": request.passes,
        "taps": {name: tap["width"] for name, tap in facts["taps"].items()},
        "computed": computed,
        "seconds": seconds,
        "images_per_s": computed * ranks.world / seconds,
        "arch": origin.arch,
        "skipped": list(origin.skipped),
    }
    if ranks.first:
        _show(result)
    return result


def _set_torch_flags(precision: str) -> None:
    """For the whole process, which the command owns: the same numbers at every start."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def in_memory(
    model: ResNet, manifest: Manifest, taps: tuple[str, ...], pool: str, transform: str, config: Config, ranks: Ranks
) -> dict[str, NDArray[np.float32]]:
    """float32 [N, D] for each tap, of every row of the manifest. Raises UserError, Fault."""
    extract = Extractor(model, config, ranks.device, taps, pool)
    parts = [np.arange(at, min(at + BLOCK, len(manifest))) for at in range(0, len(manifest), BLOCK)]
    loader, _ = _loader(transform, config, manifest, ranks, BLOCK)
    with closing(loader), closing(loader.shown(parts, short_side(config), config.data.crop)) as shown:
        found = [_on_host(extract(batch.pixels, batch.flips))() for batch in shown]
    return {tap: np.concatenate([block[tap] for block in found]) for tap in taps}


def _sayer(ranks: Ranks) -> Say:
    out = terminal.console()
    return (lambda line: out.print(line, soft_wrap=True, markup=False)) if ranks.first else (lambda line: None)


def _compute(
    folder: Path,
    request: Request,
    config: Config,
    ranks: Ranks,
    loader: Loader,
    extract: Extractor,
    block: int,
    say: Say,
) -> int:
    """Compute this rank's contiguous share of the blocks that are not on disk; how many rows those were."""
    rows = len(loader.manifest)
    n = rows * (request.passes or 1)
    done = distributed.on_first(ranks, lambda: write.finished_blocks(folder, block))
    todo = [number for number in range(-(-n // block)) if number not in done]
    if done:
        say(f"{folder}: goes on after {len(done):,} of {-(-n // block):,} blocks")
    first, last = slice_of(len(todo), ranks.world, 1, 0, ranks.rank)
    mine = todo[first:last]
    parts = [np.arange(number * block, min((number + 1) * block, n)) for number in mine]
    if request.passes:
        batches = loader.augmented(((part % rows, part // rows) for part in parts), config.data.crop)
    else:
        batches = loader.shown(parts, short_side(config), config.data.crop)
    title = f"features of {request.source}, blocks of {block}"
    with (
        closing(write.BlockWriter(folder, list(request.taps), block, ranks.rank)) as writer,
        closing(batches),  # which ends the thread that runs ahead
    ):
        for number, batch in zip(mine, _tracked(batches, len(mine), title, ranks), strict=True):
            writer.put(number, _on_host(extract(batch.pixels, batch.flips)))
    return sum(map(len, parts))


def _tracked(items: Iterable[T], total: int, title: str, ranks: Ranks) -> Iterable[T]:
    return terminal.track(items, total, title) if ranks.first else items


def _on_host(taps: dict[str, Tensor]) -> Callable[[], dict[str, NDArray[np.float32]]]:
    """A function that gives the taps as arrays; the copy from a GPU runs beside the next forward pass."""
    if not next(iter(taps.values())).is_cuda:
        return lambda: {name: x.numpy() for name, x in taps.items()}
    copies = {name: torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for name, x in taps.items()}
    for name, x in taps.items():
        copies[name].copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrays() -> dict[str, NDArray[np.float32]]:
        copied.synchronize()
        return {name: x.numpy() for name, x in copies.items()}

    return arrays


def _loader(transform: str, config: Config, manifest: Manifest, ranks: Ranks, block: int) -> tuple[Loader, str]:
    """The engine's loader under the transform asked for, and the line that says how it decodes."""
    data, settings = config.data, settings_of(config, ranks)
    if transform == "svm":
        decoder: Decoder = squash.make(settings.threads, short_side(config))
        line = f"decoding with {decoder.name}, {settings.threads} threads"
    else:
        decoder, line = decoder_of(config, manifest, ranks, block, settings)
    bad = BadImages(None, manifest.source, data.max_bad or 0)  # another image's features are no row's own
    plan, storage = plan_of(config, manifest), storage_of(config, manifest, ranks)
    damage = corruptor_of(config, settings.threads)
    return Loader(manifest, plan, storage, decoder, bad, ranks.device, settings.prefetch, data.timeout, damage), line


def _facts(
    request: Request,
    config: Config,
    manifest: Manifest,
    origin: Origin,
    extract: Extractor,
    block: int,
    decoder: str,
) -> dict[str, Any]:
    """What decides the numbers of a store, JSON values alone."""
    side = config.data.crop
    black = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    widths = {name: x.shape[1] for name, x in extract(black, black[:, 0, 0, 0]).items()}
    facts = {
        "format": _FORMAT,
        "content": manifest.content,
        "source": manifest.source,
        "rows": len(manifest),
        "passes": _passes(request, config),
        "classes": manifest.classes,
        "checkpoint": origin.facts(),
        "taps": {name: {"file": f"{name}.npy", "width": width} for name, width in widths.items()},
        "pool": request.pool,
        "transform": request.transform,
        "side": side,
        "short": short_side(config),
        "mean": config.data.mean,
        "std": config.data.std,
        "dtype": request.dtype,
        "precision": config.engine.precision,
        "block": block,
        "decoder": decoder,
        "versions": {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")},
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def _passes(request: Request, config: Config) -> dict[str, Any] | None:
    """What decides how augmented passes show the images; row p * rows + r is image r in pass p."""
    if not request.passes:
        return None
    data = config.data
    return {"count": request.passes, "seed": config.run.seed} | {
        name: getattr(data, name) for name in ("window", "scale", "ratio", "flip")
    }


def _show(result: dict[str, Any]) -> None:
    taps = ", ".join(f"{name} {width:,}" for name, width in result["taps"].items())
    passes = f" in {result['passes']} augmented passes" if result["passes"] else ""
    rows = [("rows", f"{result['rows']:,}{passes}"), ("numbers a row", taps)]
    if result["computed"]:
        rows.append(("throughput", f"{result['images_per_s']:,.1f} images/s in {terminal.duration(result['seconds'])}"))
    terminal.table("features", [*rows, ("outputs", result["out"])])
