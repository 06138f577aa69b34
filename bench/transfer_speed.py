"""How fast are `fastrot detect` and `fastrot segment` beside torchvision's reference training loop?

The same network (fastrot's own: ResNet-18, FPN with masks on coco_sample; FCN on camvid_sample), images, sizes, images a
step, regions, optimiser and precision; the two take turns in rounds of some steps, after a round that warms up. Theirs is
the plain loop of torchvision's references/detection and references/segmentation: a Dataset that reads by Pillow,
transforms v2, a DataLoader with as many workers as ours has threads, SGD. What is compared is thus all but the network:
reading, preparing, moving, the optimiser, the loop. A step's seconds are those between steps, its wait what the loop waited
for the next batch; a round's first step is left out. Above 1 in `ratio`, ours is faster.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import torch
import transfer_arms as arms
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models import resnet18
from torchvision.transforms import v2

from fastrot.models.detector import mask_rcnn_fpn
from fastrot.models.segmenter import Segmenter, segmentation_loss

QUESTION = "How fast are fastrot detect and fastrot segment beside torchvision's reference training loop?"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT, LONGEST, REGIONS, CROP = 192, 256, 64, 160
COMMON = [
    "--random-init", "0", "model.arch=resnet18", "rotation.views=one", "engine.kind=plain", "optim.lr=0.001",
    "optim.warmup_steps=0", "run.log_every=1", "run.tensorboard=false",
]  # fmt: skip
Batches = Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]


class CocoImages(Dataset):
    """As references/detection/coco_utils.py: an image and its boxes, labels and masks."""

    def __init__(self, root: Path):
        self.folder, self.coco = root / "train2017", COCO(str(root / "annotations/instances_train2017.json"))
        self.ids = [one for one in self.coco.getImgIds() if self.coco.getAnnIds(one, iscrowd=False)]
        self.labels = {category: at + 1 for at, category in enumerate(sorted(self.coco.getCatIds()))}
        kept = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.transform = v2.Compose([
            v2.ToImage(), v2.RandomHorizontalFlip(), v2.Resize(SHORT, max_size=LONGEST), *kept, v2.ToPureTensor(),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        entry = self.coco.loadImgs(self.ids[row])[0]
        image = Image.open(self.folder / entry["file_name"]).convert("RGB")
        objects = self.coco.loadAnns(self.coco.getAnnIds(self.ids[row], iscrowd=False))
        size = (entry["height"], entry["width"])
        boxes = torch.tensor([one["bbox"] for one in objects])
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.stack([torch.from_numpy(self.coco.annToMask(one)) for one in objects])
        return self.transform(image, {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size), "masks": tv_tensors.Mask(masks),
            "labels": torch.tensor([self.labels[one["category_id"]] for one in objects]),
        })  # fmt: skip


class MaskImages(Dataset):
    """As references/segmentation/presets.py: a random resize, a flip, a random crop."""

    def __init__(self, root: Path):
        self.images, self.masks = (sorted((root / name).iterdir()) for name in ("images", "masks"))
        kept = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(MEAN, STD)]
        self.transform = v2.Compose([
            v2.ToImage(), v2.RandomResize(90, 360), v2.RandomHorizontalFlip(),
            v2.RandomCrop(CROP, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}), *kept,
            v2.ToPureTensor(),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        mask = tv_tensors.Mask(v2.functional.pil_to_tensor(Image.open(self.masks[row])))
        image, mask = self.transform(Image.open(self.images[row]).convert("RGB"), mask)
        return image, mask[0].long()


def theirs(network: nn.Module, loss_of: Callable, data: Dataset, images: int, threads: int, steps: int) -> list[dict]:
    """Seconds and wait of each step of the plain loop."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    batches = DataLoader(
        data,
        images,
        shuffle=True,
        num_workers=threads,
        drop_last=True,
        collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
    )
    out: list[dict] = []
    while len(out) < steps:
        flow = iter(batches)
        for _ in range(min(len(batches), steps - len(out))):
            start = time.perf_counter()
            batch = next(flow)
            waited = time.perf_counter() - start
            loss = loss_of(network, *batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seconds = time.perf_counter() - start
            out.append({"step_s": seconds, "wait_s": waited})
    return out


def detection_loss(network: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([*network(list(images), list(targets)).values()]).sum()


def mask_loss(network: nn.Module, images: list[Tensor], masks: list[Tensor]) -> Tensor:
    return segmentation_loss(network(torch.stack(images)), torch.stack(masks))


def measured(words: list[str], reference: Callable[[int], list[dict]], rounds: int, steps: int) -> dict:
    """Both in turns."""
    taken: dict[str, list[dict]] = {"ours": [], "torchvision": []}
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as out:
            arms.run([*words, f"optim.steps={steps}", f"run.out={out}/run"])
            ours = [line for line in arms.lines(Path(out) / "run") if "step_s" in line]
        mine = [{"step_s": line["step_s"], "wait_s": line["step_s"] * line["wait_share"]} for line in ours]
        for name, lines in (("ours", mine), ("torchvision", reference(steps))):
            if number:
                mean = {key: statistics.mean(line[key] for line in lines[1:]) for key in lines[0]}
                taken[name].append(mean)
    ratios = [theirs["step_s"] / ours["step_s"] for ours, theirs in zip(*taken.values(), strict=True)]
    return {
        name: harness.spread([one["step_s"] for one in lines], "_step_s")
        | {"wait_share": sum(one["wait_s"] for one in lines) / sum(one["step_s"] for one in lines)}
        for name, lines in taken.items()
    } | {"rounds": rounds, "steps_a_round": steps - 1, "ratio": harness.spread(ratios)}


def detection(args: argparse.Namespace, home: Path) -> dict:
    root = args.data / "coco_sample"
    source = f"coco:{root}/annotations/instances_train2017.json?images={root}/train2017"
    network = mask_rcnn_fpn(resnet18(), 80, REGIONS).train()
    words = [
        "detect", *COMMON, "detect.model=fpn", f"detect.shorts=[{SHORT}]", f"detect.longest={LONGEST}",
        f"detect.regions={REGIONS}", "optim.images_per_step=2", f"data.threads={args.threads}", f"data.train={source}",
    ]  # fmt: skip
    data = CocoImages(root)
    return measured(
        words, lambda steps: theirs(network, detection_loss, data, 2, args.threads, steps), args.rounds, args.steps
    )


def segmentation(args: argparse.Namespace, home: Path) -> dict:
    source = arms.camvid(args.data / "camvid_sample", home, "train")
    network = Segmenter(resnet18(), arms.CAMVID, False).train()
    words = [
        "segment", *COMMON, f"segment.classes={arms.CAMVID}", "segment.base=[240,180]", "segment.scales=[0.5,2]",
        f"segment.crop={CROP}", "segment.distort=false", "optim.images_per_step=4", f"data.threads={args.threads}",
        f"data.train={source}",
    ]  # fmt: skip
    data = MaskImages(home)
    return measured(
        words, lambda steps: theirs(network, mask_loss, data, 4, args.threads, steps), args.rounds, args.steps
    )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="the folder of coco_sample and camvid_sample")
    parser.add_argument("--steps", type=int, default=7, help="steps a round, the first of which is left out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads, and workers")
    args = parser.parse_args()
    args.data = args.data.absolute()
    result = {"machine": harness.facts()}
    for name, part in (("segment", segmentation), ("fpn", detection)):
        with tempfile.TemporaryDirectory() as home:
            result[name] = part(args, Path(home))
        harness.write(args.out, QUESTION, result)


if __name__ == "__main__":
    main()
