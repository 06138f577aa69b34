"""One stream: the same for every storage of the same images, every decoder, any ranks, and after a resume."""

import hashlib
from functools import partial

import numpy as np
import pytest
import torch

from conftest import runnable_decoders, write_folder, write_shards
from fastrot import config as configs
from fastrot.data.build import crop_at, make_loader
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.plan import Sample, StreamHash
from fastrot.distributed import Ranks

STEPS, RESUMED_AT, IMAGES = 20, 9, 7
STORAGES = ("folder", "tar", "beton")
HERE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    from fastrot.cli import main

    root = tmp_path_factory.mktemp("one")
    folder = write_folder(root / "folder", per_class=5)
    write_shards(folder, root)
    assert main(["pack", str(folder), str(root / "images.beton")]) == 0
    names = (str(folder), str(root / "shard-{0..1}.tar"), str(root / "images.beton"))
    manifests = [Manifest.load(index(n, root / "cache", 178_000_000, lambda i, total, title: i)) for n in names]
    assert len({manifest.content for manifest in manifests}) == 1
    return dict(zip(STORAGES, manifests, strict=True))


def walk(manifest, decode: str, ranks: int, starts: tuple[int, ...] = (0,)) -> tuple[str, str]:
    """Hashes of the stream and of the pixels of all steps, begun anew at each of `starts`."""
    config, _ = configs.load(None, [f"data.decode={decode}", "data.decode_on=cpu", "data.crop=16", "data.threads=2"])
    plan, pixels = StreamHash(), hashlib.sha256()
    for first, last in zip(starts, (*starts[1:], STEPS), strict=True):
        made = [make_loader(config, manifest, HERE, IMAGES, None)[0] for _ in range(ranks)]
        flows = [
            loader.train(range(first, last), first * IMAGES, IMAGES, ranks, rank, 1, partial(crop_at, config))
            for rank, loader in enumerate(made)
        ]
        for batches in zip(*flows, strict=True):
            shares = [micro for batch in batches for micro in batch.micro_steps]
            fields = zip(*(vars(share.sample).values() for share in shares), strict=True)
            plan.add(Sample(*map(np.concatenate, fields)), np.concatenate([share.labels for share in shares]))
            for share in shares:
                pixels.update(share.pixels.numpy().tobytes())
        for loader in made:
            loader.close()
    return plan.hexdigest(), pixels.hexdigest()


@pytest.fixture(scope="module")
def whole(sources):
    """The uninterrupted stream of one rank from the folder, by decoder."""
    return {decode: walk(sources["folder"], decode, 1) for decode in runnable_decoders()}


def test_no_decoder_changes_the_stream(whole):
    assert len({plan for plan, _ in whole.values()}) == 1


@pytest.mark.parametrize("decode", runnable_decoders())
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("storage", STORAGES)
def test_storage_ranks_and_a_resume_change_neither_stream_nor_pixels(sources, whole, storage, ranks, decode):
    assert walk(sources[storage], decode, ranks, (0, RESUMED_AT)) == whole[decode]
