"""A suite's runs: heads or whole networks, trained from both backbones in run folders like any other."""

import hashlib
import itertools
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastrot.config import Config, flat, load
from fastrot.data.build import open_manifest
from fastrot.data.objects import read_objects
from fastrot.distributed import Ranks
from fastrot.files import write_text
from fastrot.models.backbone import Origin
from fastrot.report.predicted import Predicted, beside_truth
from fastrot.report.probe_sets import BACKBONES, SEED, missing
from fastrot.report.suite import Run, Suite
from fastrot.report.tables import Data
from fastrot.runs import detect, segment
from fastrot.runs.finetune import fine_tune, subset
from fastrot.runs.heads import train_heads
from fastrot.runs.transfer import Learning


def _learn(prepared: Callable[..., Learning]) -> Callable[..., dict[str, Any]]:
    """A training like train_heads, of what a module of runs prepares."""
    return lambda checkpoint, seed, config, ranks, resume: prepared(checkpoint, seed, config, ranks).train(
        ranks, resume
    )


_TRAIN: dict[str, Callable[..., dict[str, Any]]] = {
    "linear": train_heads,
    "finetune": fine_tune,
    "detect": _learn(detect.prepared),
    "segment": _learn(segment.prepared),
}
_WHOLE = ("detect", "segment")  # their images keep their shapes, and each has figures of its own


@dataclass
class Trained:
    """What one run of a suite gave. results: backbone -> the best of its grid, as `--json` prints it, with its choice."""

    run: Run
    taps: tuple[str, ...]
    gap: str | None = None
    data: Data | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    predicted: Predicted | None = None


def train_runs(
    checkpoint: str, origin: Origin, suite: Suite, out: Path, config: Config, ranks: Ranks, say: Callable[[str], None]
) -> tuple[list[Trained], list[str]]:
    """Every run the suite asks for and the data allows; what is done already is not done again.

    Returns an outcome a run, and the commands that repeat them. Raises UserError.
    """
    outcomes: list[Trained] = []
    commands: list[str] = []
    for run in suite.runs:
        settings = load(run.config, list(run.overrides))[0]
        trained = Trained(run, settings.linear.taps, missing(run.name, run.train, run.test, config, ranks))
        outcomes.append(trained)
        if trained.gap:
            say(f"{run.name}: left out: {trained.gap}")
            continue
        trained.data = _data(run, settings, ranks)
        for backbone in BACKBONES:
            weights = ["--checkpoint", checkpoint] if backbone == "pretrained" else ["--random-init", str(SEED)]
            tried = []
            for choice in _choices(run):
                say(f"{run.name}, {backbone} backbone{''.join(f', {key} {value:g}' for key, value in choice.items())}")
                words = [*run.overrides, *(f"{key}={value}" for key, value in choice.items())]
                words += [f"model.arch={origin.arch}", f"data.train={run.train}", f"data.val={run.test}"]
                words += ["engine.kind=plain", "run.keep_last=2"]
                result, command = _done(run, words, weights, backbone, origin, out, ranks)
                tried.append(result | {"choice": choice})
                commands.append(command)
            trained.results[backbone] = max(tried, key=lambda result: result[_judge(run, settings)])
        folders = {backbone: Path(result["folder"]) for backbone, result in trained.results.items()}
        if run.task in _WHOLE and all(folder.is_dir() for folder in folders.values()):
            trained.predicted = beside_truth(run.title, run.test, folders, ranks)
    return outcomes, commands


def _judge(run: Run, settings: Config) -> str:
    """The held-out figure by which the best of a grid is chosen."""
    if run.task == "detect":
        return "held_out_" + next(iter(detect.figures_of(settings.detect.model, settings.detect.figures)))
    return "held_out_mean_iou" if run.task == "segment" else "held_out_accuracy"


def _data(run: Run, settings: Config, ranks: Ranks) -> Data:
    train, test = (open_manifest(source, settings, ranks, run.name) for source in (run.train, run.test))
    if run.task == "segment":
        return Data(settings.segment.classes, len(train), len(test), settings.segment.crop, None)
    if run.task == "detect":
        return Data(len(read_objects(test).classes), len(train), len(test), settings.detect.test_short, None)
    if run.task == "finetune":
        train = subset(train, settings)
    classes = len(train.classes) or int(np.max(train.label)) + 1
    return Data(classes, len(train), len(test), settings.data.crop, 100 / classes)


def _choices(run: Run) -> list[dict[str, float]]:
    """Every combination of a run's grid."""
    return [dict(zip(run.grid, values, strict=True)) for values in itertools.product(*run.grid.values())]


def _done(
    run: Run, words: list[str], weights: list[str], backbone: str, origin: Origin, out: Path, ranks: Ranks
) -> tuple[dict[str, Any], str]:
    """A run's result, as it lies there where weights, settings and data are the same, else new; and its command."""
    settings = load(run.config, words)[0]
    contents = [open_manifest(source, settings, ranks, run.name).content for source in (run.train, run.test)]
    digest = origin.sha256 if backbone == "pretrained" else SEED
    known = {key: value for key, value in flat(settings).items() if not key.startswith("run.") or key == "run.seed"}
    key = hashlib.sha256(json.dumps([run.task, known, contents, digest]).encode()).hexdigest()[:12]
    folder, path = out / "runs" / backbone / f"{run.name}-{key}", out / "results" / backbone / f"{run.name}-{key}.json"
    words = [*words, f"run.out={folder}"]
    if not path.exists():
        begin = (weights[1], None) if backbone == "pretrained" else (None, SEED)
        result = _TRAIN[run.task](*begin, load(run.config, words)[0], ranks, "auto")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result | {"model": _model_hash(folder)}, indent=1) + "\n")
    command = shlex.join(["fastrot", run.task, *weights, "--config", run.config, *words])
    return json.loads(path.read_text()) | {"best": _best(folder), "folder": str(folder)}, command


def _best(folder: Path) -> dict[str, float]:
    """The highest of each held-out figure over all epochs, from the run's log; none where the log is gone."""
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    held_out = [line for line in lines if "held_out_accuracy" in line]
    finite = (
        {key: [line[key] for line in held_out if line.get(key) is not None] for key in held_out[0]} if held_out else {}
    )
    return {key: max(values) for key, values in finite.items() if values}


def _model_hash(folder: Path) -> str:
    """sha256 of the weights that a run ended with."""
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    return str(json.loads((newest / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"])
