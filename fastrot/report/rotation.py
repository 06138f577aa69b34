"""What the page says of the pretraining itself: curves of its log, and which turns are told apart."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from fastrot import config as configs
from fastrot.data.build import make_loader, open_manifest, short_side
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.models.backbone import Origin
from fastrot.models.resnet import TURNS
from fastrot.tasks.rotation import RotationTask

_IMAGES = 64  # a batch


def metrics(origin: Origin) -> list[dict]:
    """The lines of the run's metrics.jsonl up to the checkpoint's step; none for foreign weights, and for fine-tuned."""
    if origin.run is None:
        return []
    path = Path(origin.path).with_name("state.json")
    state = json.loads(path.read_text()) if path.exists() else {}
    if "backbone" in state.get("defining", {}):
        return []  # it began from a backbone, and learnt something else
    last = state.get("step")
    lines = (Path(origin.run) / "metrics.jsonl").read_text().splitlines()
    out = []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the half line of a run that goes on
        if last is None or values["step"] < last:
            out.append(values)
    return out


def confusion(origin: Origin, ranks: Ranks) -> list[list[float]] | None:
    """Shares [true turn][predicted turn] on the run's held-out images; None where there are none or no head."""
    weights = Path(origin.path).with_name("model.safetensors")
    if origin.run is None or not weights.exists():
        return None
    config = configs.load(str(Path(origin.run) / "config.yaml"), [])[0]
    try:
        manifest = open_manifest(config.data.val, config, ranks, "data.val")
    except UserError:
        return None  # trained without held-out images, or they are gone
    task = RotationTask(
        [255 * v for v in config.data.mean], [255 * v for v in config.data.std], torch.float32, ranks.device
    )
    model = task.build_model(config.model.arch, 0)
    state = load_file(weights)
    if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in model.state_dict().items()}:
        return None  # a run that learnt other classes
    model.load_state_dict(state)
    model.to(ranks.device, memory_format=torch.channels_last).eval()
    loader, _ = make_loader(config, manifest, ranks, _IMAGES, None)
    short = short_side(config)
    counts = np.zeros((TURNS, TURNS))
    with torch.inference_mode():
        for batch in loader.held_out(1, 0, _IMAGES, short, config.data.crop):
            said = model(task.views(batch.to(ranks.device))).argmax(1).cpu().numpy()
            np.add.at(counts, (batch.turns.flatten().numpy(), said), 1)
    loader.close()
    return (counts / counts.sum(1, keepdims=True)).tolist()
