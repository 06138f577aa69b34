"""Images a second of `fastrot orient` end to end on the CPU, beside the usual loop, with torch and with onnxruntime."""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastrot import terminal
from fastrot.config import load, to_yaml
from fastrot.models.resnet import build_model
from fastrot.orient.answers import Answer
from fastrot.orient.export import export
from fastrot.orient.looking import Source, answers, looked
from fastrot.orient.network import Network, open_network
from fastrot.probes.progress import silent
from fastrot.runs.checkpoint import Saver, State

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_APART = 0.02  # of two arms' probabilities: decoders differ by a level here and there
MOST_OF_ONNX = 1e-4


class Photos(Dataset):
    """A folder's images as torchvision shows them: upright, squashed, normalised."""

    def __init__(self, paths: list[str], size: int):
        self.paths = paths
        self.transform = v2.Compose(
            [v2.Resize((size, size)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> torch.Tensor:
        return self.transform(ImageOps.exif_transpose(Image.open(self.paths[at])).convert("RGB"))


@torch.inference_mode()
def usual(model: torch.nn.Module, paths: list[str], size: int, workers: int, bf16: bool = False) -> np.ndarray:
    """Probabilities [n, 4]: a DataLoader, four turns a batch, their logits rolled back and averaged."""
    found = []
    for images in DataLoader(Photos(paths, size), BATCH, num_workers=workers):
        total = torch.zeros(len(images), 4)
        for shown in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(images.rot90(shown, (2, 3)))
            total += logits.float().roll(-shown, 1)
        found.append((total / 4).softmax(1))
    return torch.cat(found).numpy()


def as_run(model: torch.nn.Module, arch: str, size: int, precision: str, folder: Path) -> str:
    """A run's folder with these weights, as training leaves it."""
    folder.mkdir()
    words = [f"model.arch={arch}", f"data.crop={size}", "data.fit=squash", f"engine.precision={precision}"]
    (folder / "config.yaml").write_text(to_yaml(load(None, words)[0]))
    (folder / "checkpoints").mkdir()
    saver = Saver(folder, 2, print)
    saver.save(model.state_dict(), {}, State(1, 0, {}, {}), None)
    saver.finish()
    return str(folder)


def probabilities(source: Source, network: Network) -> tuple[list[str], np.ndarray]:
    """Files and probabilities [n, 4] of what can be read."""
    found = [one for one in answers(source, network) if isinstance(one, Answer)]
    return [one.file for one in found], np.array([one.probabilities for one in found])


def decoded(source: Source, network: Network) -> None:
    """Everything but the network."""

    class Blind:
        shows, trust, says = network.shows, network.trust, ""

        def logits(self, pixels: np.ndarray) -> np.ndarray:
            return np.zeros((len(pixels), 4, 4), np.float32)

    for _ in looked(source.manifest, Blind()):
        pass


def resident(network: Network, n: int) -> None:
    """The network alone, on pixels that are there."""
    pixels = np.zeros((BATCH, network.shows.size, network.shows.size, 3), np.uint8)
    for _ in range(0, n, BATCH):
        network.logits(pixels)


def race(arguments, folder: Path) -> Iterator[tuple[str, object]]:
    """(what, figures) of the gate and of all arms."""
    torch.manual_seed(0)
    model = build_model(arguments.arch, 4, 0)
    torch.nn.init.normal_(model.fc.weight, 0, 0.3)  # sure of something, so that the gate can see a difference
    model = model.eval().to(memory_format=torch.channels_last)
    run, run_bf16 = (as_run(model, arguments.arch, arguments.size, p, folder / p) for p in ("fp32", "bf16"))
    by_torch = open_network(run)
    file = str(folder / "network.onnx")
    with terminal.speaking(False):
        export(run, "onnx", file, head=True)
    by_onnx = open_network(file)
    source = Source.open(str(arguments.data), silent)
    paths, ours = probabilities(source, by_torch)
    theirs, of_onnx = usual(model, paths, arguments.size, 0), probabilities(source, by_onnx)[1]
    by_bf16 = open_network(run_bf16)
    of_bf16 = probabilities(source, by_bf16)[1]
    same = {name: float((ours.argmax(1) == p.argmax(1)).mean()) for name, p in (("usual", theirs), ("bf16", of_bf16))}
    apart = {"usual": float(abs(ours - theirs).max()), "onnx": float(abs(ours - of_onnx).max())}
    harness.gate(apart["usual"] <= MOST_APART and apart["onnx"] <= MOST_OF_ONNX, f"all arms answer alike: {apart}")
    yield "images", len(paths)
    yield "gate", {"largest_difference": apart, "same_turn": same}
    workers = len(os.sched_getaffinity(0))
    works: dict[str, Callable] = {
        "fastrot orient, run folder": partial(probabilities, source, by_torch),
        "fastrot orient, ONNX": partial(probabilities, source, by_onnx),
        "fastrot orient, run folder in bf16": partial(probabilities, source, by_bf16),
        "usual loop": partial(usual, model, paths, arguments.size, 0),
        f"usual loop, {workers} workers": partial(usual, model, paths, arguments.size, workers),
        "usual loop in bf16": partial(usual, model, paths, arguments.size, 0, True),
        "part: reading and decoding": partial(decoded, source, by_torch),
        "part: torch's network": partial(resident, by_torch, len(paths)),
        "part: onnxruntime's network": partial(resident, by_onnx, len(paths)),
    }
    seconds = harness.alternating(works, arguments.rounds, harness.clock)
    rows = {
        name: {
            "median": len(paths) / s["median_s"],
            "least": len(paths) / s["most_s"],
            "most": len(paths) / s["least_s"],
        }
        for name, s in seconds.items()
    }
    yield "images_per_s", rows
    best = {
        p: max(row["median"] for name, row in rows.items() if "usual" in name and ("bf16" in name) == p)
        for p in (True, False)
    }
    times = {name: row["median"] / best["bf16" in name] for name, row in rows.items() if "fastrot" in name}
    yield "times_the_best_usual_in_its_precision", times
    opening = {"run folder": partial(open_network, run), "ONNX": partial(open_network, file)}
    yield "opening_s", {name: harness.timed(work, 3)["median_s"] for name, work in opening.items()}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = dict(race(arguments, Path(folder)))
    settings = {"arch": arguments.arch, "size": arguments.size, "views": 4}
    harness.write(arguments.out, __doc__, {"setting": settings, **result, "facts": harness.facts()})


if __name__ == "__main__":
    main()
