"""What a config says of data, built: manifests, the plan, a loader."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrot import distributed, machine, terminal
from fastrot.config import Config
from fastrot.data import loader_settings
from fastrot.data.bad_images import BadImages
from fastrot.data.decode import make_decoder
from fastrot.data.index import index
from fastrot.data.loader import DECODES_IN_FLIGHT, Loader
from fastrot.data.loader_settings import Tuned
from fastrot.data.manifest import Manifest, changed_files
from fastrot.data.order import FullOrder, WindowOrder
from fastrot.data.plan import Plan
from fastrot.data.sources import MASKED
from fastrot.data.storage import FileStorage
from fastrot.distributed import Ranks
from fastrot.errors import UserError

FILES = "data.files"  # what --resume-anyway calls files that changed since they were indexed
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_CHANGED_SHOWN = 10  # of them named when a resume is refused


def short_side(config: Config) -> int:
    """What evaluation resizes the short side to, pixels."""
    return config.data.resize or round(config.data.crop * 256 / 224)


def plan_of(config: Config, manifest: Manifest) -> Plan:
    data, n = config.data, len(manifest)
    order = (
        FullOrder(n, config.run.seed)
        if data.order == "full"
        else WindowOrder(n, config.run.seed, data.window_rows, data.window_chunks)
    )
    return Plan(
        config.run.seed,
        manifest.height,
        manifest.width,
        order,
        config.rotation.views,
        data.scale,
        data.ratio,
        data.flip,
        (short_side(config), data.crop) if data.window == "random" else None,
    )


def manifest_folder(source: str | None, config: Config, ranks: Ranks, key: str) -> Path:
    """Index a source on rank 0; the folder of its manifest in the cache."""
    if source is None:
        raise UserError(f"{key} is not set; name an image folder, as in {key}=/path, or list:FILE")
    cache = machine.cache_folder() / "manifests"
    return distributed.on_first(ranks, lambda: index(source, cache, config.data.max_pixels, terminal.track))


def open_manifest(source: str | None, config: Config, ranks: Ranks, key: str) -> Manifest:
    """Index a source on rank 0 and map the result on every rank."""
    return Manifest.load(manifest_folder(source, config, ranks, key))


def admit_changed_files(manifest: Manifest, allowed: bool, say: Callable[[str], None]) -> bool:
    """Whether files of a frozen manifest are not as they were when it was made, and that is `allowed`.

    Raises UserError with the first that differ where it is not.
    """
    changed, looked = changed_files(manifest)
    files = len(np.unique(manifest.file))
    if looked < files:
        say(f"{manifest.source}: {looked:,} of its {files:,} files, evenly spread, were compared with what was indexed")
    if not changed:
        return False
    line = f"{manifest.source}: {len(changed):,} of {looked:,} files are not as the run saw them"
    if not allowed:
        named = [f"{path}: {what}" for path, what in changed[:_CHANGED_SHOWN]]
        todo = f"restore them, choose another run.out, or --resume-anyway {FILES} (what no longer fits is replaced)"
        raise UserError("\n".join([f"{line}; {todo}", *named]))
    say(f"{line}, the first: {': '.join(changed[0])}; goes on with them as they are, by --resume-anyway {FILES}")
    return True


def describe(manifest: Manifest, say: Callable[[str], None]) -> None:
    """What an index left out, and what is odd about the rest: a line each kind."""
    if manifest.skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(manifest.skipped.items()))
        say(f"{manifest.source}: passed over {kinds}")
    if manifest.quarantined:
        path, reason = manifest.quarantined[0]
        what = "are listed with what is wrong with them; what is no sound image is left out"
        say(f"{manifest.source}: {len(manifest.quarantined)} files {what}, the first: {path}: {reason}")
    for line in remarks(manifest):
        say(f"{manifest.source}: {line}")


def remarks(manifest: Manifest) -> list[str]:
    """What a person may not expect of these rows, a line each."""
    lines = []
    none = unlabelled(manifest)
    if manifest.source.partition(":")[0] in ("coco", "images", *MASKED):
        pass  # no labels are meant
    elif len(none) == len(manifest):
        lines.append("no image has a label; rotation needs none, so this trains")
    elif len(none):
        lines.append(
            f"{len(none):,} of {len(manifest):,} images have no label, the first: {manifest.name(int(none[0]))}"
        )
    if len(manifest.classes) == 1:
        lines.append(f"one class ({manifest.classes[0]}); rotation needs no labels, so this trains")
    splits = [name for name in manifest.classes if name.lower() in _SPLITS]
    if len(splits) > 1:
        example = Path(manifest.source) / splits[0]
        lines.append(
            f"its folders {', '.join(splits)} look like splits, and are all in here; name one, as in {example}"
        )
    return lines


def unlabelled(manifest: Manifest) -> NDArray[np.int64]:
    """Rows without a label, ascending; none where images have many."""
    return np.flatnonzero(manifest.label < 0) if manifest.label.ndim == 1 else np.zeros(0, np.int64)


def settings_of(config: Config, ranks: Ranks) -> Tuned:
    """Threads, prefetch and the hardware decoder's share: the config's, else as tuned here, else the defaults."""
    data = config.data
    share = max(1, machine.cores() // ranks.local_world)
    kept = loader_settings.read(loader_settings.place(data, ranks)) or Tuned(share, loader_settings.PREFETCH, None, "")
    asked = {name: getattr(data, name) for name in ("threads", "prefetch", "hw_decoder_load")}
    asked = {name: value for name, value in asked.items() if value is not None}
    return replace(kept, **asked, found="" if {"threads", "prefetch"} <= asked.keys() else kept.found)


def make_loader(
    config: Config,
    manifest: Manifest,
    ranks: Ranks,
    batch: int,
    bad_path: Path | None,
    settings: Tuned | None = None,
) -> tuple[Loader, str]:
    """A loader over a manifest, and the line that says how it decodes. settings: default, those of settings_of."""
    data = config.data
    settings = settings or settings_of(config, ranks)
    decoder, line = make_decoder(
        data.decode,
        data.decode_on,
        ranks.device,
        settings.threads,
        batch,
        DECODES_IN_FLIGHT,
        settings.hw_decoder_load,
    )
    most = data.max_bad if data.max_bad is not None else max(10, len(manifest) // 1000)
    loader = Loader(
        manifest,
        plan_of(config, manifest),
        FileStorage(manifest),
        decoder,
        BadImages(bad_path, manifest.source, most),
        ranks.device,
        settings.prefetch,
        data.timeout,
    )
    return loader, line + (f", prefetch {settings.prefetch} ({settings.found})" if settings.found else "")


def crop_at(config: Config, epoch: float) -> int:
    """Side of the training crops at an epoch, pixels."""
    reached = [first for first in config.data.crop_by_epoch if first <= epoch]
    return config.data.crop_by_epoch[max(reached)] if reached else config.data.crop


def sides(config: Config) -> set[int]:
    """Every side that training crops have."""
    return {config.data.crop, *config.data.crop_by_epoch.values()}
