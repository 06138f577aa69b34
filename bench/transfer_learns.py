"""Does each kind of model learn? `fastrot detect` and `fastrot segment` on 16 images, judged on the same 16.

c4 on voc07, fpn with masks on coco_sample (images without a crowd and without an object under 28 pixels: anchors begin
at 32), segment on the middles of camvid_sample, enlarged (--data holds the three): ResNet-18 from random weights, no
mirroring, one scale. It learns where the figure passes 0.8: AP50 of boxes (11 points, as mmdetection; COCO's), of masks
too with fpn, or mean IoU of the classes there. It is training data: the figure says that a model can learn, no more.
Then a few steps of each, killed (SIGKILL) in the middle and begun again, are compared with those of a run that was not:
every logged value but the speeds, and every weight and momentum, bit for bit.
Each part is written to --out as it ends, beside the parts that are there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch
import transfer_arms as arms
from safetensors.torch import load_file

QUESTION = "Does each kind of model of fastrot detect and fastrot segment learn 16 images, and survive a kill?"
IMAGES, PASS = 16, 0.8
WINDOW = 128, 96  # of camvid's middles, shown three times as large: poles are narrower than the cells of logits
COMMON = [
    "--random-init", "0", "model.arch=resnet18", "rotation.views=one", "engine.kind=plain", "engine.precision=bf16",
    "data.flip=0", "run.tensorboard=false", "run.log_every=10", "run.keep_last=2",
]  # fmt: skip
BOXES = [
    "detect.shorts=[192]", "detect.test_short=192", "detect.longest=256", "detect.regions=32", "optim.lr=0.02",
    "optim.warmup_steps=20",
]  # fmt: skip
WORDS = {
    "segment": [
        "segment", "segment.classes=11", "segment.base=[384,288]", "segment.scales=[1,1]", "segment.crop=192",
        "segment.distort=false", "optim.images_per_step=2", "optim.lr=0.05", "optim.weight_decay=1e-4",
        "optim.schedule=poly", "optim.warmup_steps=20", "optim.steps=2400", "run.evaluate_every_steps=600",
    ],
    "c4": [
        "detect", *BOXES, "optim.images_per_step=4", "optim.steps=320", "optim.milestones=[260]",
        "run.evaluate_every_steps=320",
    ],
    "fpn": [
        "detect", *BOXES, "detect.model=fpn", "detect.figures=coco", "optim.images_per_step=2", "optim.steps=400",
        "optim.milestones=[330]", "run.evaluate_every_steps=400",
    ],
}  # fmt: skip
JUDGES = {"segment": ["mean_iou"], "c4": ["ap50"], "fpn": ["ap50", "mask_ap50"]}
SPEEDS = (
    "_share",
    "_per_s",
    "_s",
    "memory_gib",
    "bound",
    "slow_step",
    "straggler",
)  # endings of what two equal runs need not share
TINY = ["optim.steps=6", "optim.milestones=[4]", "optim.warmup_steps=1", "run.log_every=1", "run.checkpoint_every=2",
        "run.evaluate_every_steps=6", "engine.precision=fp32"]  # fmt: skip
TINY_DETECT = ["detect.shorts=[64]", "detect.test_short=64", "detect.longest=96", "detect.regions=16"]
TINY_SEGMENT = ["segment.base=[96,72]", "segment.crop=64"]


def source(kind: str, data: Path, out: Path) -> list[str]:
    """The 16 images, to learn from and to judge on."""
    match kind:
        case "segment":
            found = arms.camvid(data / "camvid_sample", out, "train", IMAGES, WINDOW)
        case "c4":
            found = arms.voc_subset(data / "voc07", out, IMAGES)
        case _:
            found = arms.coco_subset(data / "coco_sample", out, IMAGES)
    return [f"data.train={found}", f"data.val={found}"]


def learnt(out: Path) -> list[str]:
    """What a run logged, but for the speeds."""
    return [
        json.dumps({key: value for key, value in line.items() if not key.endswith(SPEEDS)}) for line in arms.lines(out)
    ]


def survives(words: list[str], home: Path) -> dict[str, bool]:
    """Whether a run that is killed and begun again is the run that was not."""
    arms.run([*words, f"run.out={home / 'whole'}"])
    killed = home / "killed"
    command = "import harness; from fastrot.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", command, *words, f"run.out={killed}"], cwd=Path(__file__).parent)
    while process.poll() is None and not (killed / "checkpoints/step-00000002/manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    steps = len(arms.lines(killed))
    harness.gate(2 <= steps < 6, f"killed in the middle: after {steps} of 6 steps")
    arms.run([*words, f"run.out={killed}"])
    equal = {"log": learnt(killed) == learnt(home / "whole")}
    for name in ("model", "optimizer"):
        ours, theirs = (
            load_file(home / run / f"checkpoints/step-00000006/{name}.safetensors") for run in ("whole", "killed")
        )
        equal[name] = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    harness.gate(all(equal.values()), f"killed and begun again is the run that was not: {equal}")
    return {"killed_after_steps": steps, "equal": equal}


def part(kind: str, data: Path, home: Path) -> dict:
    """One kind of model: its recipe, its curves, whether it passes and whether it survives."""
    words = [*WORDS[kind], *COMMON, *source(kind, data, home / "images")]
    clock, cpu = time.perf_counter(), time.process_time()
    last = arms.run([*words, f"run.out={home / 'run'}"])
    seconds = {"seconds": time.perf_counter() - clock, "processor_s": time.process_time() - cpu}
    figures = {name: last[f"held_out_{name}"] for name in JUDGES[kind]}
    lines, judged = arms.lines(home / "run"), f"held_out_{JUDGES[kind][0]}"
    tiny = [*words, *TINY, *(TINY_SEGMENT if kind == "segment" else TINY_DETECT)]
    return {
        "command": " ".join(["fastrot", *words[:-2]]), "images": IMAGES, "steps": last["steps"], **seconds,
        "figures": figures, "passes": min(figures.values()) > PASS,
        "all_figures": {key: value for key, value in last.items() if key.startswith("held_out_")},
        "loss": [[line["step"] + 1, line["loss"]] for line in lines if "loss" in line],
        JUDGES[kind][0]: [[line["step"] + 1, line[judged]] for line in lines if judged in line],
        "killed": survives(tiny, home),
    }  # fmt: skip


def main() -> None:
    parser = harness.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="the folder of voc07, coco_sample and camvid_sample")
    parser.add_argument("--only", choices=WORDS, nargs="+", default=list(WORDS))
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    result.pop("question", None)
    for kind in args.only:
        with tempfile.TemporaryDirectory() as home:
            result[kind] = {"machine": harness.facts(), **part(kind, args.data.absolute(), Path(home))}
        harness.write(args.out, QUESTION, result)
    failed = [kind for kind in args.only if not result[kind]["passes"]]
    for kind in args.only:
        print(f"{kind}: {result[kind]['figures']} after {result[kind]['steps']} steps, {result[kind]['seconds']:.0f} s")
    harness.gate(not failed, f"all learn; {', '.join(failed)}")


if __name__ == "__main__":
    main()
