"""Does pretraining on rotations help a small segmenter? A checkpoint of photos10 against random weights, three seeds.

A ResNet-18 learns the rotations of photos10 by configs/photos10.yaml, shortened to two epochs, or
--checkpoint names one that has. From it and from random weights `fastrot segment` learns camvid_sample's 24 training
images by one recipe, that of configs/segment_voc12aug_fcn_20k.yaml at a smaller size, and is judged on its 12 others at
the end, nothing chosen on them. A seed sets the heads' first weights, the order, the crops, the flips, and, without a
checkpoint, the backbone. Twelve images are few: the spread says how far the means can be told apart.
Runs are written to --out as they end; those that are there are not run again.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import harness
import transfer_arms as arms

QUESTION = "Does pretraining on the rotations of photos10 help segmentation of camvid_sample?"
EPOCHS = 2
PRETRAIN = [
    "train", "--config", str(harness.ROOT / "configs/photos10.yaml"), f"optim.epochs={EPOCHS}", "optim.warmup_epochs=0.5",
    "engine.kind=plain", "run.tensorboard=false", "data.threads=1",
]  # fmt: skip
SEGMENT = [
    "segment", "--config", str(harness.ROOT / "configs/segment_voc12aug_fcn_20k.yaml"), "segment.classes=11",
    "segment.base=[240,180]", "segment.crop=160", "model.arch=resnet18", "engine.kind=plain", "engine.precision=bf16",
    "optim.images_per_step=4", "optim.steps=160", "run.log_every=40", "run.evaluate_every_steps=160",
    "run.tensorboard=false",
]  # fmt: skip
FIGURES = ("mean_iou", "mean_accuracy", "all_accuracy")


def pretrained(args: argparse.Namespace, home: Path) -> tuple[str, dict]:
    """The checkpoint, and what the run that made it says."""
    out = Path(args.checkpoint) if args.checkpoint else home / "photos10"
    if not args.checkpoint:
        folder = args.data / "photos10"
        arms.run([*PRETRAIN, f"data.train={folder / 'train'}", f"data.val={folder / 'val'}", f"run.out={out}"])
    held_out = [line for line in arms.lines(out) if "held_out_accuracy" in line][-1]
    status = json.loads((out / "STATUS.json").read_text())
    return str(out), {key: status[key] for key in ("steps", "seconds")} | held_out


def summed_up(runs: dict[str, dict]) -> dict:
    """Mean and spread (standard deviation over seeds, n - 1) of each figure by what it began from, and the difference."""
    out = {}
    for name in FIGURES:
        of = {
            start: [run[name] for key, run in runs.items() if key.startswith(start)]
            for start in ("pretrained", "random")
        }
        pairs = [a - b for a, b in zip(*of.values(), strict=True)]
        out[name] = {
            start: {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
            for start, values in (of | {"difference_of_a_seed": pairs}).items()
        }
    return out


def main() -> None:
    parser = harness.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="the folder of photos10 and camvid_sample")
    parser.add_argument("--checkpoint", help="a run folder of `fastrot train` on photos10; default: train one")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.data = args.data.absolute()
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    result.pop("question", None)
    result = {"machine": harness.facts(), "runs": {}} | result
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        checkpoint, result["pretraining"] = pretrained(args, home)
        sources = [
            f"data.{split}={arms.camvid(args.data / 'camvid_sample', home / split, split)}"
            for split in ("train", "val")
        ]
        for seed in range(args.seeds):
            starts = {"pretrained": ["--checkpoint", checkpoint], "random": ["--random-init", str(seed)]}
            for start, begin in starts.items():
                key = f"{start} {seed}"
                if key in result["runs"]:
                    continue
                clock, cpu = time.perf_counter(), time.process_time()
                done = arms.run([*SEGMENT, *begin, *sources, f"run.seed={seed}", f"run.out={home / key}"])
                lines = [line["loss"] for line in arms.lines(home / key) if "loss" in line]
                result["runs"][key] = {
                    **{name: done[f"held_out_{name}"] for name in FIGURES},
                    "loss": lines, "iou": [done[f"held_out_iou_{number}"] for number in range(arms.CAMVID)],
                    "seconds": time.perf_counter() - clock, "processor_s": time.process_time() - cpu,
                }  # fmt: skip
                harness.keep(args.out, QUESTION, result)
    result["summary"] = summed_up(result["runs"])
    result["machine"]["load_average_after"] = os.getloadavg()[0]
    harness.write(args.out, QUESTION, result)


if __name__ == "__main__":
    main()
