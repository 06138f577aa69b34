"""`fastrot page`: a checkpoint and a suite in; page.html, page.md and page.json out."""

import json
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastrot import terminal
from fastrot.config import Config
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.features.read import open_store
from fastrot.files import write_text
from fastrot.models.backbone import Origin, load_backbone, random_backbone, training_command
from fastrot.report import charts, html, markdown, pictures, published, rotation, suite, tables, whole_tables
from fastrot.report.charts import Chart
from fastrot.report.facts import facts, rotation_log, verdict, warnings
from fastrot.report.pictures import Neighbours
from fastrot.report.predicted import Predicted
from fastrot.report.probe_sets import BACKBONES, SEED, Outcome, adopt, probe_sets
from fastrot.report.tables import Apart, Table
from fastrot.report.train_runs import Trained, train_runs

_QUERIES = 8
_PUBLISHED = {
    "svm": published.SVM,
    "lowshot": published.LOW_SHOT,
    "knn": published.KNN,
    "linear": published.LINEAR,
    "finetune": published.SEMI,
    "detect": published.DETECT,
    "segment": published.SEGMENT,
}
_MAKE: dict[str, Callable[..., Table | list[Table]]] = {
    "svm": tables.svm,
    "lowshot": tables.low_shot,
    "knn": tables.knn,
    "linear": tables.linear,
}
_TUNED = {"finetune": tables.fine_tuned, "detect": whole_tables.detected, "segment": whole_tables.segmented}
_TRAINED = {"linear": "Linear heads", "finetune": "Fine-tuned", "detect": "Detection", "segment": "Segmentation"}
_NAMES = {"svm": "SVM", "lowshot": "Low-shot SVM", "knn": "k-NN", "linear": "Linear classifiers"}


@dataclass
class Page:
    """All that is shown, before any layout."""

    title: str
    made: str
    origin: Origin
    verdict: str
    facts: list[tuple[str, str]]
    warnings: list[str]
    told: rotation.Told | None
    pretraining: list[Chart]
    filters: dict[str, str]
    train: str | None  # the command that makes such weights
    again: str  # and this page
    commands: list[str]  # and each part of it
    tables: list[Table] = field(default_factory=list)
    apart: list[Apart] = field(default_factory=list)
    neighbours: list[Neighbours] = field(default_factory=list)
    predicted: list[Predicted] = field(default_factory=list)
    fingerprints: list[tuple[str, str]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: everything but the pictures."""
        over = [chart for table in self.tables if (chart := charts.of_table(table))]
        return {
            "title": self.title,
            "made": self.made,
            "verdict": self.verdict,
            "backbone": self.origin.facts(),
            "control": {"arch": self.origin.arch, "seed": SEED},
            "facts": dict(self.facts),
            "warnings": self.warnings,
            "tables": [table.plain() for table in self.tables],
            "published_apart": [vars(one) for one in self.apart],
            "charts": [chart.plain() for chart in (*self.pretraining, *over)],
            "rotation_confusion": self.told and self.told.shares,
            "rotation_accuracy": self.told and self.told.overall.plain(),
            "commands": [command for command in (self.train, self.again, *self.commands) if command],
            "fingerprints": dict(self.fingerprints),
        }


def build(checkpoint: str, suite_file: str, out: str, config: Config, ranks: Ranks) -> dict[str, Any]:
    """Run the suite and write the page. Returns what --json prints. Raises UserError."""
    if ranks.world > 1:
        raise UserError(
            "fastrot page runs in one process; start fastrot features on many ranks before, it goes on there"
        )
    console = terminal.console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    chosen, folder = suite.load(suite_file), Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    adopt(folder)
    origin, outcomes, commands = probe_sets(checkpoint, chosen, folder, config, ranks, say)
    trained, more = train_runs(checkpoint, origin, chosen, folder, config, ranks, say)
    again = shlex.join(["fastrot", "page", "--checkpoint", checkpoint, "--suite", suite_file, "--out", out])
    page = _page(origin, outcomes, trained, again, [*commands, *more], ranks)
    files = {name: folder / f"page.{name}" for name in ("html", "md", "json")}
    write_text(files["html"], html.render(page))
    write_text(files["md"], markdown.render(page))
    write_text(files["json"], json.dumps(page.plain(), indent=1) + "\n")
    terminal.table(
        "page",
        [
            ("verdict", page.verdict),
            ("tables", f"{len(page.tables)} measured; published figures alone: {len(page.apart)}"),
            ("outputs", ", ".join(str(path) for path in files.values())),
        ],
    )
    return {name: str(path) for name, path in files.items()} | {"gaps": [one.title for one in page.apart]}


def _page(
    origin: Origin, outcomes: list[Outcome], trained: list[Trained], again: str, commands: list[str], ranks: Ranks
) -> Page:
    log = rotation_log(origin)
    weights = {
        "pretrained": load_backbone(str(origin.path))[0].conv1.weight,
        "random": random_backbone(origin.arch, SEED)[0].conv1.weight,
    }
    page = Page(
        title=f"{origin.arch.replace('resnet', 'ResNet-')}, pretrained by predicting rotations",
        made=time.strftime("%Y-%m-%d"),
        origin=origin,
        verdict="",
        facts=facts(origin, log),
        warnings=warnings(origin),
        told=rotation.told(origin, ranks),
        pretraining=charts.of_pretraining(log),
        filters={name: pictures.filters(weight) for name, weight in weights.items()},
        train=training_command(origin),
        again=again,
        commands=commands,
        fingerprints=[("checkpoint", str(origin.sha256))],
    )
    for outcome in outcomes:
        _add_outcome(page, outcome)
    for one in trained:
        _add_trained(page, one)
    page.verdict = verdict(page.tables, page.told)
    return page


def _add_outcome(page: Page, outcome: Outcome) -> None:
    one = outcome.set
    notes = [one.note] if one.note else []
    for name in one.probes:
        title = f"{_NAMES[name]}, {one.title}"
        if outcome.data is None:
            page.apart.append(_apart(title, str(outcome.gap), one.published, name))
            continue
        theirs, why = outcome.data.beside(one.published, _PUBLISHED[name])
        if why:
            page.apart.append(_apart(title, why, one.published, name))
        pair = (outcome.results[name, "pretrained"], outcome.results[name, "random"])
        made = _MAKE[name](one.title, theirs, pair, outcome.data, notes)
        page.tables += [table for table in (made if isinstance(made, list) else [made]) if table.rows]
    page.fingerprints += _fingerprints(outcome)
    if outcome.stores and "knn" in one.probes and "avg" in one.taps:
        page.neighbours.append(_neighbours(outcome))


def _fingerprints(outcome: Outcome) -> Iterable[tuple[str, str]]:
    for (backbone, split), folder in outcome.stores.items():
        made, name = json.loads((folder / "manifest.json").read_text()), f"{outcome.set.name} {split}"
        if backbone == "pretrained":
            yield f"{name}, content", made["content"]
        for file, digests in made["files"].items():
            yield f"{name}, {backbone}, {file}", digests["sha256"]


def _add_trained(page: Page, trained: Trained) -> None:
    run = trained.run
    kind = _TRAINED[run.task]
    if trained.data is None:
        page.apart.append(_apart(f"{kind}, {run.title}", str(trained.gap), run.published, run.task))
        return
    theirs, why = trained.data.beside(run.published, _PUBLISHED[run.task])
    if why:
        page.apart.append(_apart(f"{kind}, {run.title}", why, run.published, run.task))
    pair = (trained.results["pretrained"], trained.results["random"])
    notes = [run.note] if run.note else []
    if run.task == "linear":
        page.tables.append(tables.heads(run.title, theirs, trained.taps, pair, trained.data, notes))
    else:
        page.tables.append(_TUNED[run.task](run.title, theirs, pair, trained.data, notes))
    page.predicted += [trained.predicted] if trained.predicted else []
    page.fingerprints += [(f"{run.name}, {b}, weights", result["model"]) for b, result in trained.results.items()]


def _apart(title: str, why: str, of: str | None, probe: str) -> Apart:
    source = published.OPENSELFSUP if probe == "finetune" else published.SOURCE
    return Apart(title, why, source, _PUBLISHED[probe].get(of or "", {}))


def _neighbours(outcome: Outcome) -> Neighbours:
    """Queries of the test images with their nearest training images, by each backbone."""
    stores = {key: open_store(folder) for key, folder in outcome.stores.items()}
    rows = pictures.queries(np.asarray(stores["pretrained", "test"].labels), _QUERIES)
    asked = pictures.shown(stores["pretrained", "test"], rows)
    nearest = {}
    for backbone in BACKBONES:
        bank = stores[backbone, "train"]
        found = pictures.neighbour_rows(bank, stores[backbone, "test"], rows, "avg")
        flat = pictures.shown(bank, [row for of_one in found for row in of_one])
        k = pictures.NEIGHBOURS
        nearest[backbone] = [flat[i * k : (i + 1) * k] for i in range(len(rows))]
    return Neighbours(outcome.set.title, asked, nearest)
