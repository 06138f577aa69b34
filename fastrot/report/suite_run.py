"""Running a suite: features of both backbones, probes on them, and what was not run and why."""

import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from fastrot.config import Config, load
from fastrot.data.build import open_manifest
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.features import extract
from fastrot.models.backbone import Origin, load_backbone
from fastrot.probes import knn, linear, lowshot
from fastrot.report import probing
from fastrot.report.suite import Set, Suite

BACKBONES = ("ours", "random")
SEED = 0  # of the random backbone


@dataclass
class Outcome:
    """What one set gave. results: (probe, backbone) -> its JSON; stores: (backbone, split) -> folder."""

    set: Set
    gap: str | None = None
    results: dict[tuple[str, str], dict] = field(default_factory=dict)
    stores: dict[tuple[str, str], Path] = field(default_factory=dict)


def run_suite(
    checkpoint: str, suite: Suite, out: Path, config: Config, ranks: Ranks, say
) -> tuple[Origin, list[Outcome], list[str]]:
    """Everything the suite asks for and the data allows; what is done already is not done again.

    Returns whose weights they are, an outcome a set, and the commands that repeat it.
    """
    origin = load_backbone(checkpoint)[1]
    outcomes, commands = [], []
    for one in suite.sets:
        outcome = Outcome(one)
        outcomes.append(outcome)
        outcome.gap = missing(one.name, one.train, one.test, config, ranks)
        if outcome.gap:
            say(f"{one.name}: left out: {outcome.gap}")
            continue
        settings = load(None, [f"model.arch={origin.arch}", *one.overrides])[0]
        for backbone in BACKBONES:
            for split, source in (("train", one.train), ("test", one.test)):
                folder = out / "features" / backbone / f"{one.name}-{split}"
                weights = {"checkpoint": checkpoint} if backbone == "ours" else {"seed": SEED}
                request = extract.Request(
                    source,
                    str(folder),
                    taps=one.taps,
                    pool=one.pool,
                    transform=one.transform,
                    dtype=one.dtype,
                    **weights,
                )
                say(f"{one.name}, {split}, {backbone} backbone")
                extract.dump(request, settings, ranks)
                outcome.stores[backbone, split] = folder
                commands.append(_features_command(request, one, origin.arch))
            for name in one.probes:
                outcome.results[name, backbone] = _probed(name, outcome, backbone, out, commands)
    return origin, outcomes, commands


def missing(name: str, train: str, test: str, config: Config, ranks: Ranks) -> str | None:
    """Why these images cannot be had, or None."""
    try:
        for source in (train, test):
            open_manifest(source, config, ranks, name)
    except UserError as error:
        return str(error).splitlines()[0]
    return None


def _options(name: str, rows: int) -> dict:
    """A probe's options on a set of `rows` images to fit: the protocol's."""
    if name == "lowshot":
        return {"ks": list(lowshot.KS), "seed": 0, "draws": None}
    if name == "knn":
        return {"ks": [k for k in knn.KS if k <= rows]}
    return {"epochs": linear.EPOCHS} if name == "linear" else {}


def _probed(name: str, outcome: Outcome, backbone: str, out: Path, commands: list[str]) -> dict:
    """A probe's result: as it lies there where the features and options are the same, else new."""
    stores = [outcome.stores[backbone, split] for split in ("train", "test")]
    options = _options(name, json.loads((stores[0] / "manifest.json").read_text())["rows"])
    key = hashlib.sha256(json.dumps(options).encode())
    for store in stores:
        key.update((store / "manifest.json").read_bytes())
    folder = out / "results" / backbone
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{outcome.set.name}-{name}-{key.hexdigest()[:12]}.json"
    fit = "--features" if name == "linear" else "--train"
    commands.append(shlex.join(["fastrot", name, fit, str(stores[0]), "--test", str(stores[1]), "--out", str(path)]))
    if not path.exists():
        train, test = map(str, stores)
        probing.run(probing.PROBES[name], train, test, None, str(path), "auto", **options)
    return json.loads(path.read_text())


def _features_command(request: extract.Request, one: Set, arch: str) -> str:
    """The command that makes a store."""
    words = ["fastrot", "features", "--data", request.source, "--taps", ",".join(request.taps)]
    words += ["--pool", request.pool, "--transform", request.transform, "--dtype", request.dtype]
    if request.checkpoint is not None:
        words += ["--checkpoint", request.checkpoint]
    else:
        words += ["--random-init", str(request.seed)]
    return shlex.join([*words, "--out", request.out, f"model.arch={arch}", *one.overrides])
