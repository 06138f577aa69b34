"""The ways from JPEG bytes on a disk to crops in memory that bench/loader.py races: ours, and the peers.

An arm's `make(files, threads)` yields batches of crops, uint8 [n, S, S, 3] or [n, 3, S, S], without end.
A peer is set up as its documentation does, at its fastest; it imports its library when it is made.
"""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

BATCH, SIDE = 64, 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_EPOCH = 4096  # peers that end an epoch see every image this often: none pays for a small data set


@dataclass(frozen=True)
class Files:
    """One set of images in every form: `forms` maps folder, shards, litdata and the .beton files to their place."""

    paths: list[str]
    forms: dict[str, str]
    cache: str


@dataclass(frozen=True)
class Arm:
    """form: which of Files it reads; decoder: ours, whose pixels are checked; cropped: False for a bare decode."""

    make: Callable[[Files, int], Iterator]
    form: str
    package: str
    decoder: str | None = None
    cropped: bool = True


def loader(files: Files, form: str, decoder: str, threads: int):
    """Our Loader over a form of the files, as training makes it."""
    from fastrot.data.bad_images import BadImages
    from fastrot.data.decode import make_decoder
    from fastrot.data.index import index
    from fastrot.data.loader import DECODES_IN_FLIGHT, Loader
    from fastrot.data.manifest import Manifest
    from fastrot.data.order import FullOrder
    from fastrot.data.plan import Plan
    from fastrot.data.storage import FileStorage

    manifest = Manifest.load(index(files.forms[form], Path(files.cache), 10**9, lambda items, total, title: items))
    plan = Plan(0, manifest.height, manifest.width, FullOrder(len(manifest), 0), "all", SCALE, RATIO)
    storage = FileStorage(manifest)
    made, _ = make_decoder(decoder, "cpu", torch.device("cpu"), threads, BATCH, DECODES_IN_FLIGHT)
    return Loader(manifest, plan, storage, made, BadImages(None, "bench", 10), torch.device("cpu"), 3, 60.0)


def _ours(form: str, decoder: str, files: Files, threads: int, ahead: bool = True) -> Iterator:
    made = loader(files, form, decoder, threads)
    if not ahead:  # each batch is read when the decoder wants it
        start, made._storage.start = made._storage.start, lambda rows: lambda: start(rows)()
    steps = made.train(range(10**6), 0, BATCH, 1, 0, 1, lambda epoch: SIDE)
    for step in steps:
        for micro in step.micro_steps:
            yield micro.pixels


def _library(files: Files, threads: int) -> Iterator:
    """What `import fastrot` offers, in a loop over epochs; with labels on the device."""
    import fastrot
    from fastrot.data.index import index
    from fastrot.data.manifest import Manifest

    manifest = Manifest.load(index(files.forms["folder"], Path(files.cache), 10**9, lambda items, total, title: items))
    with fastrot.Loader(manifest, BATCH, SIDE, device="cpu", decode="turbo", threads=threads, prefetch=3) as loader:
        while True:
            for batch in loader:
                yield batch.pixels


def _crop():
    from torchvision.transforms import v2

    return v2.RandomResizedCrop(SIDE, SCALE, RATIO, antialias=True)


class _Images(torch.utils.data.Dataset):
    """Crops of files, uint8 [3, S, S], by Pillow or by torchvision's decoder."""

    def __init__(self, paths: list[str], pillow: bool):
        self._paths, self._get, self._crop = paths, self._pillow if pillow else self._jpeg, _crop()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, at: int) -> torch.Tensor:
        return self._get(self._paths[at])

    def _pillow(self, path: str) -> torch.Tensor:
        from PIL import Image
        from torchvision.transforms.v2 import functional as F

        with Image.open(path) as image:
            return F.pil_to_tensor(self._crop(image.convert("RGB")))

    def _jpeg(self, path: str) -> torch.Tensor:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        return self._crop(decode_jpeg(read_file(path), ImageReadMode.RGB))


def _dataloader(pillow: bool, files: Files, threads: int) -> Iterator:
    images = _Images(files.paths, pillow)
    endless = torch.utils.data.RandomSampler(images, replacement=True, num_samples=10**8)
    return iter(torch.utils.data.DataLoader(images, BATCH, sampler=endless, num_workers=threads))


def _decoded_bytes(crop, data: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return crop(decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))


def _webdataset(files: Files, threads: int) -> Iterator:
    import webdataset

    shards = sorted(map(str, Path(files.forms["shards"]).glob("*.tar")))
    images = webdataset.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(256)
    crops = images.to_tuple("jpg").map_tuple(partial(_decoded_bytes, _crop())).batched(BATCH)
    for (batch,) in webdataset.WebLoader(crops, batch_size=None, num_workers=threads):
        yield batch


def _dali(files: Files, threads: int) -> Iterator:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, seed=0)
    def crops():
        data, _ = fn.readers.file(files=files.paths, random_shuffle=True)
        area = {"random_area": list(SCALE), "random_aspect_ratio": list(RATIO), "num_attempts": 10}
        pixels = fn.decoders.image_random_crop(data, output_type=types.RGB, **area)
        return fn.resize(pixels, size=[SIDE, SIDE])

    pipe = crops()
    pipe.build()
    while True:
        yield np.asarray(pipe.run()[0].as_tensor())


def _ffcv(form: str, files: Files, threads: int) -> Iterator:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor

    rows = int(Reader(files.forms[form]).num_samples)
    pipeline = [RandomResizedCropRGBImageDecoder((SIDE, SIDE), SCALE, RATIO), ToTensor()]
    loader = Loader(
        files.forms[form],
        BATCH,
        num_workers=threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(rows), -(-_EPOCH // rows)),
        drop_last=True,
        pipelines={"image": pipeline, "label": None},
    )
    while True:
        for (batch,) in loader:
            yield batch


def _litdata(files: Files, threads: int) -> Iterator:
    from litdata import StreamingDataLoader, StreamingDataset

    decoded = partial(_decoded_bytes, _crop())
    images = StreamingDataset(files.forms["litdata"], shuffle=True, drop_last=True, transform=decoded)
    while True:
        yield from StreamingDataLoader(images, batch_size=BATCH, num_workers=threads)


def _spdl(files: Files, threads: int) -> Iterator:
    from spdl.pipeline import PipelineBuilder
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    crop, draw = _crop(), np.random.default_rng(0)

    def one(path: str) -> torch.Tensor:
        return crop(decode_jpeg(read_file(path), ImageReadMode.RGB))

    endless = (files.paths[row] for _ in count() for row in draw.permutation(len(files.paths)))
    stages = PipelineBuilder().add_source(endless).pipe(one, concurrency=threads).aggregate(BATCH).pipe(torch.stack)
    pipeline = stages.add_sink(3).build(num_threads=threads + 1)
    with pipeline.auto_stop():
        yield from pipeline.get_iterator()


def _bare(library: str, files: Files, threads: int) -> Iterator:
    """Whole images decoded from bytes that lie in memory: no reading, no crop, no resize."""
    if library == "simplejpeg":
        import simplejpeg

        held, decode = [Path(path).read_bytes() for path in files.paths], simplejpeg.decode_jpeg
    else:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        held, decode = [read_file(path) for path in files.paths], partial(decode_jpeg, mode=ImageReadMode.RGB)
    draw = np.random.default_rng(0)
    with ThreadPoolExecutor(threads) as pool:
        ahead = []
        while True:
            ahead += [pool.submit(decode, held[at]) for at in draw.integers(0, len(held), BATCH)]
            if len(ahead) > 2 * BATCH:
                yield [image.result() for image in ahead[:BATCH]]
                ahead = ahead[BATCH:]


def _all() -> dict[str, Arm]:
    arms = {
        f"ours: {decoder}, {form}": Arm(partial(_ours, form, decoder), form, "fastrot", decoder)
        for decoder, forms in {
            "turbo": ("folder", "keep.beton", "raw256.beton"),
            "turbo_fast": ("folder", "keep.beton"),
            "dali": ("folder", "keep.beton"),
            "ffcv": ("folder", "keep.beton", "side500.beton", "mixed500.beton"),
        }.items()
        for form in forms
    }
    arms |= {
        "ours: fastrot.Loader in a plain loop": Arm(_library, "folder", "fastrot", "turbo"),
        "DataLoader, Pillow": Arm(partial(_dataloader, True), "folder", "torch"),
        "DataLoader, decode_jpeg": Arm(partial(_dataloader, False), "folder", "torch"),
        "WebDataset, decode_jpeg": Arm(_webdataset, "shards", "webdataset"),
        "LitData, decode_jpeg": Arm(_litdata, "litdata", "litdata"),
        "SPDL, decode_jpeg": Arm(_spdl, "folder", "spdl-core"),
        "DALI reader": Arm(_dali, "folder", "nvidia-dali-cuda130"),
    }
    for form in ("keep.beton", "side500.beton", "mixed500.beton", "raw256.beton"):
        arms[f"FFCV, {form}"] = Arm(partial(_ffcv, form), form, "ffcv")
    for library, package in (("simplejpeg", "simplejpeg"), ("decode_jpeg", "torchvision")):
        arms[f"bare decode, {library}"] = Arm(partial(_bare, library), "folder", package, cropped=False)
    return arms


ARMS = _all()
COLD = {
    "ours: turbo, folder": ARMS["ours: turbo, folder"],
    "ours: turbo, folder, no reading ahead": Arm(
        partial(_ours, "folder", "turbo", ahead=False), "folder", "fastrot", "turbo"
    ),
    "DALI reader": ARMS["DALI reader"],
    "DataLoader, decode_jpeg": ARMS["DataLoader, decode_jpeg"],
}


def make(name: str, cold: bool, files: Files, threads: int) -> Iterator:
    """The batches of an arm."""
    return (COLD if cold else ARMS)[name].make(files, threads)


def prepare(paths: list[str], home: Path, all_forms: bool) -> Files:
    """Write these JPEGs under `home` in every form, or list them alone."""
    import tarfile

    from fastrot.config import Data
    from fastrot.data.encode import Encoding
    from fastrot.data.pack import pack

    home.mkdir(parents=True)
    listing = home / "files.txt"
    listing.write_text("".join(f"{path}\t0\n" for path in paths))
    forms = {"folder": f"list:{listing}"}
    if not all_forms:
        return Files(paths, forms, str(home / "cache"))
    for form, encoding in {
        "keep.beton": Encoding("keep"),
        "side500.beton": Encoding("jpeg", 90, 500),
        "mixed500.beton": Encoding("mix", 90, 500, 0.5),
        "raw256.beton": Encoding("raw", 90, 256),
    }.items():
        forms[form] = str(home / form)
        pack(forms["folder"], forms[form], encoding, None, Data())
    forms["shards"] = str(home / "shards")
    os.mkdir(forms["shards"])
    for shard in range(8):
        with tarfile.open(f"{forms['shards']}/{shard}.tar", "w") as tar:
            for at in range(shard, len(paths), 8):
                data = Path(paths[at]).read_bytes()
                member = tarfile.TarInfo(f"{at:06d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    forms["litdata"] = str(home / "litdata")
    return Files(paths, forms, str(home / "cache"))


def write_litdata(files: Files) -> None:
    """LitData's chunks, each image often enough for an epoch. In a process of its own: it starts others."""
    from litdata import optimize

    paths = files.paths * -(-_EPOCH // len(files.paths))
    optimize(_bytes_of, paths, files.forms["litdata"], chunk_bytes="64MB", num_workers=1)


def _bytes_of(path: str) -> bytes:
    return Path(path).read_bytes()
