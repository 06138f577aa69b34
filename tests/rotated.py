"""Runs of small rotation networks, as training leaves them."""

import json

import torch

from fastrot.config import load, to_yaml
from fastrot.models.resnet import build_model
from fastrot.runs.checkpoint import Saver, State
from workers.narrow import NarrowResNet

WORDS = ["model.arch=resnet18", "data.train=photographs", "data.threads=1", "data.crop=32", "data.fit=squash"]


def network(classes=4, seed=1):
    """Narrow, with norms that have seen something."""
    model = build_model("resnet18", classes, seed)
    assert isinstance(model, NarrowResNet)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    model.fc.weight.data.normal_(0, 1, generator=generator)
    return model.eval()


def write_run(root, model, more=(), defining=None):
    """A run folder with one checkpoint, two steps old."""
    root.mkdir()
    (root / "config.yaml").write_text(to_yaml(load(None, [*WORDS, *more])[0]))
    (root / "metrics.jsonl").write_text(json.dumps({"step": 1, "held_out_accuracy": 0.75}) + "\n")
    (root / "environment.json").write_text(json.dumps({"command": ["fastrot", "train"], "versions": {}}))
    (root / "checkpoints").mkdir()
    saver = Saver(root, 3, print)
    saver.save(model.state_dict(), {}, State(2, 256, {}, {"data": "c0ffee"} | (defining or {})), 0.75)
    saver.finish()
    return root
