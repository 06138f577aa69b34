"""`fastrot predict`: a trained detector or segmenter over any images, into COCO's JSON or mask files."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from torch import nn

from fastrot import terminal
from fastrot.config import Config, load
from fastrot.data.bad_images import BadImages
from fastrot.data.build import open_manifest, settings_of
from fastrot.data.manifest import Manifest
from fastrot.data.masks import PALETTE, names_of
from fastrot.data.objects import Objects, read_objects
from fastrot.data.order import FullOrder
from fastrot.data.remarks import describe
from fastrot.data.sources import shards_of
from fastrot.data.whole import WholeLoader
from fastrot.data.whole_masks import ShownMask
from fastrot.data.whole_objects import ShownObjects
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST
from fastrot.errors import UserError
from fastrot.files import replacing
from fastrot.runs import checkpoint, detect, segment
from fastrot.runs.build import set_torch_flags
from fastrot.tasks.detect import DetectTask, Found
from fastrot.tasks.segment import SegmentTask

Mask = NDArray[np.uint8]  # [height, width], the class of each pixel of an image as it is
Shown = ShownObjects | ShownMask
_LEAST = 0.5  # score of a detection that is kept


@dataclass(frozen=True)
class Trained:
    """The model of a run, in eval mode. path: its checkpoint; classes: (COCO's number, name) of each label."""

    path: Path
    config: Config
    task: DetectTask | SegmentTask
    network: nn.Module
    classes: list[tuple[int, str]]

    @property
    def detects(self) -> bool:
        return isinstance(self.task, DetectTask)


class Sheet(Protocol):
    """Pictures of predictions, some of them."""

    def add(self, row: int, shown: "Shown", found: "Found | Mask") -> None:
        """One image's prediction."""

    def save(self, folder: Path) -> None:
        """Write it below `folder`."""


def open_trained(run: str, ranks: Ranks) -> Trained:
    """The model of a run of detect or segment, its best checkpoint's; or that of the checkpoint named.

    Raises UserError.
    """
    found, folder = checkpoint.trained(run, "fastrot detect or segment")
    known, config = found.state.defining, load(str(folder / "config.yaml"), [])[0]
    set_torch_flags(config)
    backbone = getattr(torchvision.models, config.model.arch)()
    backbone.fc = nn.Identity()
    task: DetectTask | SegmentTask
    if detect.CLASSES in known:
        classes = [(int(number), str(name)) for number, name in known[detect.CLASSES]]
        task = detect.task_of(config, backbone, len(classes), ranks.device)
    elif segment.MASKS in known:
        classes = list(enumerate(names_of(str(config.data.train), config.segment.classes)))
        task = segment.task_of(config, backbone, ranks.device)
    else:
        raise UserError(f"{run}: is no run of fastrot detect or segment, which alone predict boxes or masks")
    network = task.build_model(config.model.arch, config.run.seed)
    network.load_state_dict(found.model)
    return Trained(found.path, config, task, network.to(ranks.device).eval(), classes)


def predictions(
    trained: Trained, manifest: Manifest, bad: BadImages, ranks: Ranks
) -> Iterator[tuple[int, Shown, Found | Mask]]:
    """(row, the image as the model saw it, what was found) of each image that can be read, in order."""
    config, task, data = trained.config, trained.task, trained.config.data
    settings = settings_of(config, ranks)
    prepare: Callable[..., Any]
    if isinstance(task, DetectTask):
        prepare = detect.view_of(config, Objects.none(len(manifest)))
    else:
        prepare = segment.view_of(config, lambda row: np.zeros((0, 0), np.uint8))
    order = FullOrder(len(manifest), 0)
    loader = WholeLoader[Any](manifest, order, prepare, bad, settings.threads, settings.prefetch, data.timeout)
    precision, seen = AUTOCAST.get(config.engine.precision), set[int]()
    with closing(loader):
        for batch in loader.held_out(1, 0, 1):
            (row,), (shown,) = batch.rows.tolist(), batch.samples
            if row in seen:  # it stood in for one that cannot be read
                continue
            seen.add(row)
            with torch.autocast(ranks.device.type, precision, enabled=precision is not None):
                if isinstance(task, DetectTask):
                    found: Found | Mask = task.evaluate(trained.network, [batch])[0]
                else:
                    mask = task.classes_of(trained.network, shown.image, shown.size)
                    found = mask.to(torch.uint8).cpu().numpy()
            yield row, shown, found


def predict(
    run: str,
    source: str,
    out: str,
    least: float | None,
    ranks: Ranks,
    make_sheet: Callable[[list[str], list[str]], Sheet],
) -> dict[str, Any]:
    """Write what a run's model finds in the images of a source into `out`. Returns what --json prints.

    least       score of the objects that are kept; None: 0.5.
    make_sheet  (names of the images, names of the classes) -> where predictions are shown.
    Raises UserError.
    """
    if ranks.world > 1:
        raise UserError("fastrot predict: runs in one process; start it without a launcher")
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--out {out}: is there and not empty; name a new folder")
    trained = open_trained(run, ranks)
    if least is not None and not (trained.detects and 0 <= least <= 1):
        what = "must be 0 to 1" if trained.detects else f"is for detectors; {run} gives each pixel one class"
        raise UserError(f"--min-score {least:g}: {what}")
    say = terminal.console().print
    say(f"{'detector' if trained.detects else 'segmenter'} of {trained.path}, {len(trained.classes)} classes")
    spec = f"images:{source}" if os.path.isdir(source) else source
    manifest = open_manifest(spec, trained.config, ranks, "SOURCE")
    describe(manifest, lambda line: say(line, soft_wrap=True, markup=False))
    names = _names(manifest, source, distinct=not trained.detects)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _written(trained, manifest, names, folder, _LEAST if least is None else least, ranks, make_sheet)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def _written(
    trained: Trained,
    manifest: Manifest,
    names: list[str],
    folder: Path,
    least: float,
    ranks: Ranks,
    make_sheet: Callable[[list[str], list[str]], Sheet],
) -> dict[str, Any]:
    bad = BadImages(folder / "bad_images.jsonl", manifest.source, len(manifest) + len(manifest.quarantined))
    for name, reason in manifest.quarantined:
        bad.add(name, -1, reason)
    sheet, every = make_sheet(names, [name for _, name in trained.classes]), list[Found]()
    flow = predictions(trained, manifest, bad, ranks)
    images = 0
    for row, shown, found in terminal.track(flow, len(manifest), f"predicting {manifest.source}"):
        images += 1
        if isinstance(found, Found):
            found = sure(found, least)
            every.append(found)
        else:
            _save_mask(found, folder / "masks" / Path(names[row]).with_suffix(".png"))
        sheet.add(row, shown, found)
    result: dict[str, Any] = {
        "out": str(folder),
        "checkpoint": str(trained.path),
        "images": images,
        "bad_images": bad.count,
    }
    if trained.detects:
        dataset = _as_coco(every, manifest, names, trained.classes)
        with replacing(folder / "predictions.json") as scratch:
            scratch.write_text(json.dumps(dataset))
        result["objects"] = len(dataset["annotations"])
    sheet.save(folder)
    terminal.table("predictions", [(name.replace("_", " "), str(value)) for name, value in result.items()])
    return result


def _names(manifest: Manifest, source: str, distinct: bool) -> list[str]:
    """Each image's path below the source's folder. distinct: without their endings too.

    Raises UserError where an image is no file of its own, or two would share a mask."""
    if shards_of(manifest.source) is not None:
        raise UserError(f"{source}: its images are no files of their own; name a folder")
    paths = [os.fsdecode(manifest.path(row)) for row in range(len(manifest))]
    top = os.path.abspath(source) if os.path.isdir(source) else os.path.commonpath([os.path.dirname(p) for p in paths])
    names = [os.path.relpath(path, top) for path in paths]
    twice = [stem for stem, count in Counter(os.path.splitext(name)[0] for name in names).items() if count > 1]
    if distinct and twice:
        alike = [name for name in names if os.path.splitext(name)[0] == twice[0]]
        raise UserError(f"{source}: {alike[0]} and {alike[1]} differ in their ending alone; rename one")
    return names


def sure(found: Found, least: float) -> Found:
    """Those of a score of at least `least`."""
    keep = np.flatnonzero(found.score >= least)
    masks = [found.masks[at] for at in keep.tolist()] if found.masks else []
    return replace(found, box=found.box[keep], score=found.score[keep], label=found.label[keep], masks=masks)


def _as_coco(
    every: list[Found], manifest: Manifest, names: list[str], classes: list[tuple[int, str]]
) -> dict[str, Any]:
    """A file of COCO's format; an image's id is that of a coco: source, else its row, from 1."""
    of_coco = manifest.source.startswith("coco:")
    ids = (read_objects(manifest) if of_coco else Objects.none(len(manifest))).image_id.tolist()
    entries: list[dict[str, Any]] = []
    for found in every:
        for at, (x1, y1, x2, y2) in enumerate(found.box.tolist()):
            entry = {
                "id": len(entries) + 1,
                "image_id": ids[found.row],
                "category_id": classes[int(found.label[at])][0],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "score": float(found.score[at]),
            }
            if found.masks:
                mask = found.masks[at]
                entry |= {"area": float(rle.area(mask)), "segmentation": mask | {"counts": mask["counts"].decode()}}
            entries.append(entry)
    images = [
        {
            "id": ids[one.row],
            "file_name": names[one.row],
            "height": int(manifest.height[one.row]),
            "width": int(manifest.width[one.row]),
        }
        for one in every
    ]
    return {"images": images, "annotations": entries, "categories": [{"id": n, "name": c} for n, c in classes]}


def _save_mask(mask: Mask, path: Path) -> None:
    """A PNG whose values are the classes, in VOC's colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
    image.save(path)
