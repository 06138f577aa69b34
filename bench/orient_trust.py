"""What an orientation model trained on a CPU is worth: alone, with four turns combined, and by which cues it goes."""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import harness
import numpy as np
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score

from fastrot import config as configs
from fastrot import terminal
from fastrot.demo import no_up
from fastrot.orient import answers, looking
from fastrot.orient.network import RunNetwork
from fastrot.orient.odd import anomaly
from fastrot.orient.shortcuts import interval

QUESTION = __doc__
TURNED = 1000  # photographs of the person's line
LEVELS = (0.95, 0.9, 0.8, 0)  # of --min-confidence, beside the calibrated one
NO_UP = 400  # pictures, drawn, that have no up
QUARTERS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def fastrot(*words: object) -> dict:
    """What a command's --json prints, without this machine's paths."""
    code = "import sys; from fastrot.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, words), "--json"]
    done = subprocess.run(command, cwd=harness.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return _unplaced(json.loads(done.stdout))


def _unplaced(value: object) -> object:
    if isinstance(value, dict):
        return {key: _unplaced(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_unplaced(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def trained(run: Path) -> dict:
    """How a network came to be."""
    config = configs.load(str(run / "config.yaml"), [])[0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = max(line["step"] for line in lines) + 1
    views = 4 * steps * config.optim.images_per_step
    pace = min(line["step_s"] for line in lines if "step_s" in line)  # the machine had other work too
    keys = ("crop", "resize", "fit", "scale", "jpeg", "jpeg_quality", "chroma_shift", "border", "blur")
    return {
        "arch": config.model.arch,
        "data": {key: getattr(config.data, key) for key in keys},
        "epochs": config.optim.epochs,
        "steps": steps,
        "views": views,
        "least_step_s": pace,
        "minutes_on_one_core_at_that": steps * pace / 60,
        "held_out_by_epoch": [
            (line["epoch"], line["held_out_accuracy"]) for line in lines if "held_out_accuracy" in line
        ],
    }


def logits_of(network: RunNetwork, source: str) -> np.ndarray:
    images = looking.Source.open(source, terminal.track)
    with closing(looking.looked(images.manifest, network)) as batches:
        return np.concatenate([batch.logits for batch in batches])


def fits(cropped: Path, squashed: Path, source: str) -> dict:
    """Two networks, alike but in data.fit, on the same images: combined accuracies and their paired difference."""
    hits = {
        run.name: (answers.combined(logits_of(RunNetwork(str(run)), source)).argmax(1) == 0).astype(float)
        for run in (cropped, squashed)
    }
    first, second = hits.values()
    means = {name: one.mean() for name, one in hits.items()}
    return {
        "images": len(first),
        **means,
        "second_less_first": (second - first).mean(),
        "second_less_first_95": interval(second - first),
        "training": trained(cropped),
    }


def told(network: RunNetwork, source: Path) -> dict:
    """Accuracy on upright images: of single views, and of four turns combined."""
    logits = logits_of(network, str(source))
    single = (logits.argmax(2) == np.arange(4)).mean(1)
    scores = answers.combined(logits)
    right = scores.argmax(1) == 0
    return {
        "images": len(right),
        "single_view": single.mean(),
        "single_view_95": interval(single),
        "combined": right.mean(),
        "combined_95": list(stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")),
        "gain": (right - single).mean(),
        "gain_95": interval(right - single),
    }


def separation(network: RunNetwork, usual: Path, odd: str) -> float:
    """The area under the ROC curve of the score of fastrot odd, odd images against the usual."""
    scores = [anomaly(logits_of(network, source)) for source in (str(usual), odd)]
    return roc_auc_score(np.repeat([0, 1], [len(one) for one in scores]), np.concatenate(scores))


def put_upright(run: Path, source: Path) -> dict:
    """A person's line: photographs turned at random, written as files, given to fastrot orient."""
    files = sorted(source.rglob("*.jpg")) or sorted(source.rglob("*.JPEG"))
    rng = np.random.default_rng(0)
    files = [files[at] for at in np.sort(rng.permutation(len(files))[:TURNED])]
    turns = rng.integers(0, 4, len(files))
    with tempfile.TemporaryDirectory() as folder:
        for at, (file, turn) in enumerate(zip(files, turns.tolist(), strict=True)):
            image = Image.open(file).convert("RGB")
            image = image.transpose(QUARTERS[turn]) if turn else image
            image.save(Path(folder) / f"{at:04}.png", compress_level=1)
        out = Path(folder) / "found.jsonl"
        fastrot("orient", folder, "--checkpoint", run, "--out", out)
        found = {int(Path(one.file).stem): one for one in answers.read(out)}
    right = np.array([found[at].clockwise // 90 == turn for at, turn in enumerate(turns.tolist())])
    sure = np.array([found[at].confidence for at in range(len(files))])
    decided = np.array([found[at].decided for at in range(len(files))])
    levels = {"calibrated": decided} | {f"{level:g}": sure >= level for level in LEVELS}
    counts = {
        name: {
            "upright": int((counted & right).sum()),
            "wrong": int((counted & ~right).sum()),
            "left_for_the_eye": int((~counted).sum()),
        }
        for name, counted in levels.items()
    }
    return {"photographs": len(files), "turned": int((turns > 0).sum()), "by_least_confidence": counts}


def main() -> None:
    options = argparse.ArgumentParser(description=QUESTION)
    options.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="runs, or checkpoints; they are calibrated"
    )
    options.add_argument("--near", type=Path, required=True, help="held-out images of the set trained on")
    options.add_argument("--far", type=Path, required=True, help="images of another set")
    options.add_argument("--odd", help="images of another kind, which fastrot odd should rank before --near's")
    options.add_argument("--fits", type=Path, nargs=2, help="two runs that differ in data.fit: crop, squash")
    options.add_argument("--fits-on", help="images of any shape for these")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    result = harness.facts() | {"chance": 0.25, "networks": {}}
    if args.fits:
        result["fits"] = fits(*args.fits, args.fits_on)
    for run in args.runs:
        network = RunNetwork(str(run))
        with tempfile.TemporaryDirectory() as folder:
            no_up.write(folder, NO_UP, seed=0)
            words = ["--calibrate", "--without-up", folder, "--also", args.far]
            calibrated = fastrot("orient", args.near, "--checkpoint", run, *words)
            odd = {"drawn, without an up": separation(network, args.near, folder)}
        if args.odd:
            odd[args.odd.rpartition("/")[2]] = separation(network, args.near, args.odd)
        result["networks"][network.run.name] = {
            "checkpoint": network.path.name,
            "training": trained(network.run),
            "parameters": sum(p.numel() for p in network.model.parameters()),
            "calibrated": calibrated,
            args.near.parent.name: told(network, args.near),
            args.far.parent.name: told(network, args.far),
            "odd_area_under_roc": odd,
            "shortcuts": {
                source.parent.name: fastrot("shortcuts", "--checkpoint", run, "--data", source)
                for source in (args.near, args.far)
            },
            "a_person": {source.parent.name: put_upright(run, source) for source in (args.near, args.far)},
        }
        harness.keep(args.out, QUESTION, result)
    harness.write(args.out, QUESTION, result)


if __name__ == "__main__":
    main()
