"""Run folders of detectors and segmenters that nobody trained, as training leaves them."""

import torchvision
from torch import nn

from fastrot.config import load, to_yaml
from fastrot.runs.checkpoint import Saver, State

WORDS = ["model.arch=resnet18", "data.train=pairs:a,b", "data.threads=1", "detect.test_short=32", "detect.longest=48",
         "segment.base=[48,32]", "segment.classes=5"]  # fmt: skip


def backbone():
    resnet = torchvision.models.resnet18()
    resnet.fc = nn.Identity()
    return resnet


def write_run(root, network, defining, more=(), steps=(2,)):
    """A run's folder, as training leaves it; the last of its checkpoints was the worst of them on held-out images."""
    root.mkdir()
    (root / "config.yaml").write_text(to_yaml(load(None, [*WORDS, *more])[0]))
    (root / "checkpoints").mkdir()
    saver = Saver(root, 3, print)
    for step in steps:
        saver.save(network.state_dict(), {}, State(step, 0, {}, defining), 1 / step)
        saver.finish()
    return root
