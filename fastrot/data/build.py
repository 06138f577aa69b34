"""What a config says of data, built: manifests, the plan, a loader."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastrot import distributed
from fastrot.config import Config
from fastrot.data import loader_settings
from fastrot.data.bad_images import BadImages
from fastrot.data.corruptions import Corruptions, Corruptor
from fastrot.data.decode import Decoder, make_decoder
from fastrot.data.decode.nvjpeg import Hardware
from fastrot.data.index import in_cache
from fastrot.data.loader import DECODES_IN_FLIGHT, Loader
from fastrot.data.loader_settings import Tuned
from fastrot.data.manifest import Manifest, changed_files, difference, place
from fastrot.data.order import FullOrder, WindowOrder
from fastrot.data.plan import Plan
from fastrot.data.ranges import fit
from fastrot.data.reading import states
from fastrot.data.stage import of_config
from fastrot.data.storage import FileStorage
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.remote import is_remote
from fastrot.sending import read_by_all

FILES = "data.files"  # what --resume-anyway calls files that changed since they were indexed
_CHANGED_SHOWN = 10  # of them named when a resume is refused
_COMPARED = 1000  # files of a node with rank 0's


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
        data.fit == "squash",
    )


def corruptor_of(config: Config, threads: int) -> Corruptor | None:
    """What damages training's crops, where the config wants that."""
    data = config.data
    shares = data.jpeg, data.jpeg_quality, data.chroma_shift, data.border, data.blur
    corruptions = Corruptions(config.run.seed, *shares)
    return Corruptor(corruptions, threads) if corruptions else None


def at_hand(source: str | None, config: Config, ranks: Ranks, key: str) -> str | None:
    """A source as it is, or, where it is at a distance, its copy below data.stage, made by the first rank of each machine.
    Raises, on all ranks, what one raised. Collective."""
    if not is_remote(source):
        return source

    def here() -> str | None:
        return of_config(source, config.data.stage, key)

    made = distributed.on_all(ranks, lambda: here() if ranks.local_rank == 0 else None)
    return distributed.on_all(ranks, lambda: made or here())


def open_manifest(source: str | None, config: Config, ranks: Ranks, key: str) -> Manifest:
    """Index a source on rank 0 and map the result on every rank."""
    source = at_hand(source, config, ranks, key)
    return manifest_of_first(lambda: in_cache(source, config.data.max_pixels, key), str(source), ranks, key)


def manifest_of_first(find: Callable[[], Path], source: str, ranks: Ranks, key: str) -> Manifest:
    """The manifest that `find` names on rank 0: its rows, in this node's files. Collective.

    Raises UserError on every rank where a node's files are not those of rank 0.
    """
    with read_by_all(ranks, find) as folder:
        manifest = Manifest.load(folder)
    return _on_this_node(manifest, source, ranks, key) if ranks.world > 1 else manifest


def _on_this_node(manifest: Manifest, source: str, ranks: Ranks, key: str) -> Manifest:
    """The same rows, where this node has the source, with the times of its files if they are copies.

    A thousand files, evenly spread, are held against rank 0's; all are held against the manifest when they are read.
    """
    some = np.unique(np.linspace(0, len(manifest.name_ends) - 1, _COMPARED).astype(np.int64))
    here, wrong = os.path.abspath(source), ""
    there, theirs = distributed.on_first(ranks, lambda: (here, states(manifest.file_paths(some))))
    if not ranks.first:
        manifest = manifest.moved(there, here)
        paths = manifest.file_paths(some)
        ours = states(paths)
        odd = np.flatnonzero(ours[:, 0] != theirs[:, 0])
        if len(odd):
            what = difference(ours[odd[0]].tolist(), theirs[odd[0]].tolist())
            wrong = (
                f"{key}: {len(odd):,} of {len(some):,} files are not those of rank 0; {place(paths[odd[0]], 0)}: {what}"
            )
        elif (ours != theirs).any():
            manifest = manifest.with_times_of_now()
    distributed.agree(ranks, wrong)
    return manifest


def admit_changed_files(manifest: Manifest, allowed: bool, say: Callable[[str], None]) -> bool:
    """Whether files of a frozen manifest are not as they were when it was made, and that is `allowed`.

    Raises UserError with the first that differ where it is not.
    """
    changed, looked = changed_files(manifest)
    files = len(manifest.files_used())
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


def settings_of(config: Config, ranks: Ranks) -> Tuned:
    """Threads, prefetch and the hardware decoder's share: the config's, else as tuned here, else the defaults."""
    data = config.data
    share = ranks.cores
    kept = loader_settings.read(loader_settings.place(data, ranks)) or Tuned(share, loader_settings.PREFETCH, None, "")
    asked = {name: getattr(data, name) for name in ("threads", "prefetch", "hw_decoder_load")}
    asked = {name: value for name, value in asked.items() if value is not None}
    return replace(kept, **asked, found="" if {"threads", "prefetch"} <= asked.keys() else kept.found)


def storage_of(config: Config, manifest: Manifest, ranks: Ranks) -> FileStorage:
    """What reads these images, for a GPU's decoder into pinned memory."""
    data = config.data
    pinned = ranks.device.type == "cuda" and data.decode_on != "cpu"
    blocks = data.order == "window" and fit(manifest, data.window_rows * data.window_chunks)
    return FileStorage(manifest, data.readers, pinned, blocks)


def decoder_of(config: Config, manifest: Manifest, ranks: Ranks, batch: int, settings: Tuned) -> tuple[Decoder, str]:
    """The config's decoder of these images, and the line that says what was taken. batch: most images a submit."""
    data, hardware = config.data, Hardware(settings.hw_decoder_load, *manifest.largest)
    where = data.decode, data.decode_on, ranks.device, settings.threads
    return make_decoder(*where, batch, DECODES_IN_FLIGHT, hardware)


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
    decoder, line = decoder_of(config, manifest, ranks, batch, settings)
    most = data.max_bad if data.max_bad is not None else max(10, len(manifest) // 1000)
    loader = Loader(
        manifest,
        plan_of(config, manifest),
        storage_of(config, manifest, ranks),
        decoder,
        BadImages(bad_path, manifest.source, most),
        ranks.device,
        settings.prefetch,
        data.timeout,
        corruptor_of(config, settings.threads),
    )
    return loader, line + (f", prefetch {settings.prefetch} ({settings.found})" if settings.found else "")


def crop_at(config: Config, epoch: float) -> int:
    """Side of the training crops at an epoch, pixels."""
    reached = [first for first in config.data.crop_by_epoch if first <= epoch]
    return config.data.crop_by_epoch[max(reached)] if reached else config.data.crop


def sides(config: Config) -> set[int]:
    """Every side that training crops have."""
    return {config.data.crop, *config.data.crop_by_epoch.values()}
