"""A suite's sets: features of both backbones, probes on them, and what was not run and why."""

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastrot.config import Config, load
from fastrot.data.build import open_manifest
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.features import extract
from fastrot.features.read import open_store
from fastrot.models.backbone import Origin, load_backbone
from fastrot.probes import linear, lowshot, neighbours
from fastrot.report import probing
from fastrot.report.suite import Set, Suite
from fastrot.report.tables import Data

BACKBONES = ("pretrained", "random")
SEED = 0  # of the random backbone


@dataclass
class Outcome:
    """What one set gave. results: (probe, backbone) -> its JSON; stores: (backbone, split) -> folder."""

    set: Set
    gap: str | None = None
    data: Data | None = None
    results: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    stores: dict[tuple[str, str], Path] = field(default_factory=dict)


def probe_sets(
    checkpoint: str, suite: Suite, out: Path, config: Config, ranks: Ranks, say: Callable[[str], None]
) -> tuple[Origin, list[Outcome], list[str]]:
    """Everything the suite's sets ask for and the data allows; what is done already is not done again.

    Returns whose weights they are, an outcome a set, and the commands that repeat it. Raises UserError.
    """
    origin = load_backbone(checkpoint)[1]
    outcomes: list[Outcome] = []
    commands: list[str] = []
    for one in suite.sets:
        outcome = Outcome(one, missing(one.name, one.train, one.test, config, ranks))
        outcomes.append(outcome)
        if outcome.gap:
            say(f"{one.name}: left out: {outcome.gap}")
            continue
        settings = load(None, [f"model.arch={origin.arch}", *one.overrides])[0]
        for backbone in BACKBONES:
            weights = {"checkpoint": checkpoint} if backbone == "pretrained" else {"seed": SEED}
            for split in ("train", "test"):
                say(f"{one.name}, {split}, {backbone} backbone")
                request = _request(one, split, out / "features" / backbone / f"{one.name}-{split}", weights)
                extract.dump(request, settings, ranks)
                outcome.stores[backbone, split] = Path(request.out)
                commands.append(_features_command(request, one, origin.arch))
            for name in one.probes:
                outcome.results[name, backbone] = _probed(name, outcome, backbone, out, commands)
        outcome.data = _data(outcome.stores, settings.data.crop)
    return origin, outcomes, commands


def _request(one: Set, split: str, folder: Path, weights: dict[str, Any]) -> extract.Request:
    source = one.train if split == "train" else one.test
    return extract.Request(
        source, str(folder), taps=one.taps, pool=one.pool, transform=one.transform, dtype=one.dtype, **weights
    )


def _data(stores: dict[tuple[str, str], Path], side: int) -> Data:
    train, test = (np.asarray(open_store(stores["pretrained", split]).labels) for split in ("train", "test"))
    if test.ndim == 2:
        chance = 100 * float(((test == 1).sum(0) / np.maximum(1, (test != -1).sum(0))).mean())
        return Data(test.shape[1], len(train), len(test), side, chance)
    classes = int(max(train.max(), test.max())) + 1
    return Data(classes, len(train), len(test), side, 100 / classes)


def adopt(out: Path) -> None:
    """Go on with what an older page left here: it called the pretrained backbone's folders `ours`."""
    for room in ("features", "results", "runs"):
        old, new = out / room / "ours", out / room / "pretrained"
        if old.is_dir() and not new.exists():
            old.rename(new)


def missing(name: str, train: str, test: str, config: Config, ranks: Ranks) -> str | None:
    """Why these images cannot be had, or None."""
    try:
        for source in (train, test):
            open_manifest(source, config, ranks, name)
    except UserError as error:
        return str(error).splitlines()[0]
    return None


def _options(name: str, one: Set, rows: int) -> dict[str, Any]:
    """A probe's options on a set of `rows` images to fit: the protocol's."""
    if name == "lowshot":
        return {"ks": list(lowshot.KS), "seed": 0, "draws": one.draws}
    if name == "knn":
        return {"ks": [k for k in neighbours.KS if k <= rows]}
    return {"epochs": linear.EPOCHS} if name == "linear" else {}


def _probed(name: str, outcome: Outcome, backbone: str, out: Path, commands: list[str]) -> dict[str, Any]:
    """A probe's result: as it lies there where the features and options are the same, else new."""
    stores = [outcome.stores[backbone, split] for split in ("train", "test")]
    options = _options(name, outcome.set, json.loads((stores[0] / "manifest.json").read_text())["rows"])
    key = hashlib.sha256(json.dumps(options).encode())
    for store in stores:
        key.update((store / "manifest.json").read_bytes())
    folder = out / "results" / backbone
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{outcome.set.name}-{name}-{key.hexdigest()[:12]}.json"
    fit = "--features" if name == "linear" else "--train"
    words = ["fastrot", name, fit, str(stores[0]), "--test", str(stores[1]), "--out", str(path)]
    commands.append(shlex.join([*words, *(["--draws", options["draws"]] if options.get("draws") else [])]))
    if not path.exists():
        train, test = map(str, stores)
        probing.run(probing.PROBES[name], train, test, None, str(path), "auto", **options)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _features_command(request: extract.Request, one: Set, arch: str) -> str:
    """The command that makes a store."""
    words = ["fastrot", "features", "--data", request.source, "--taps", ",".join(request.taps)]
    words += ["--pool", request.pool, "--transform", request.transform, "--dtype", request.dtype]
    if request.checkpoint is not None:
        words += ["--checkpoint", request.checkpoint]
    else:
        words += ["--random-init", str(request.seed)]
    return shlex.join([*words, "--out", request.out, f"model.arch={arch}", *one.overrides])
