"""`fastrot page`: a checkpoint and a suite in; page.html, page.md and page.json out."""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastrot import terminal
from fastrot.config import Config
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.features.read import open_store
from fastrot.files import write_text
from fastrot.models.backbone import Origin, load_backbone, pretraining, random_backbone
from fastrot.report import markdown, pictures, published, rotation, suite, tables
from fastrot.report.html import render
from fastrot.report.suite_run import SEED, Outcome, run_suite
from fastrot.report.svg import Line
from fastrot.report.trained import Trained, train_suite

_QUERIES = 8
_PUBLISHED_ARCH = "resnet50"


@dataclass
class Chart:
    """One line chart. ticks: (x, label), or None for round numbers."""

    title: str
    x: str
    y: str
    lines: list[Line]
    ticks: list[tuple[float, str]] | None = None


@dataclass
class Page:
    """All that is shown, before any layout."""

    title: str
    made: str
    origin: Origin
    facts: list[tuple[str, str]]
    warnings: list[str]
    tiles: list[tuple[str, str, str]]  # name, figure, what it stands beside
    tables: list[tables.Table]
    charts: list[Chart]
    confusion: list[list[float]] | None
    filters: dict[str, str]
    neighbours: list[dict] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    fingerprints: list[tuple[str, str]] = field(default_factory=list)

    def plain(self) -> dict:
        """As JSON holds it: everything but the pictures."""
        return {
            "title": self.title,
            "made": self.made,
            "backbone": self.origin.facts(),
            "control": {"arch": self.origin.arch, "seed": SEED},
            "facts": dict(self.facts),
            "warnings": self.warnings,
            "tables": [table.plain() for table in self.tables],
            "charts": [
                {"title": c.title, "x": c.x, "y": c.y, "lines": {line.name: line.points for line in c.lines}}
                for c in self.charts
            ],
            "rotation_confusion": self.confusion,
            "commands": self.commands,
            "fingerprints": dict(self.fingerprints),
        }


def build(checkpoint: str, suite_file: str, out: str, config: Config, ranks: Ranks) -> dict:
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
    origin, outcomes, commands = run_suite(checkpoint, chosen, folder, config, ranks, say)
    trained, more = train_suite(checkpoint, origin, chosen, folder, config, ranks, say)
    page = _page(origin, outcomes, trained, [*commands, *more], ranks)
    again = f"fastrot page --checkpoint {checkpoint} --suite {suite_file} --out {out}"
    page.commands = [*_pretraining_command(origin), again, *page.commands]
    files = {name: folder / f"page.{name}" for name in ("html", "md", "json")}
    write_text(files["html"], render(page))
    write_text(files["md"], markdown.render(page))
    write_text(files["json"], json.dumps(page.plain(), indent=1) + "\n")
    gaps = [table.title for table in page.tables if table.gap]
    terminal.table(
        "page",
        [
            ("tables", f"{len(page.tables) - len(gaps)} with our figures, {len(gaps)} gaps"),
            ("outputs", ", ".join(str(path) for path in files.values())),
        ],
    )
    return {name: str(path) for name, path in files.items()} | {"gaps": gaps}


def _page(origin: Origin, outcomes: list[Outcome], trained: list[Trained], commands: list[str], ranks: Ranks) -> Page:
    log = rotation.metrics(origin)
    weights = {
        "pretrained": load_backbone(origin.path)[0].conv1.weight,
        "random": random_backbone(origin.arch, SEED)[0].conv1.weight,
    }
    page = Page(
        title=f"{origin.arch.replace('resnet', 'ResNet-')}, pretrained by predicting rotations",
        made=time.strftime("%Y-%m-%d"),
        origin=origin,
        facts=_facts(origin, log),
        warnings=_warnings(origin),
        tiles=[],
        tables=[],
        charts=[],
        confusion=rotation.confusion(origin, ranks),
        filters={name: pictures.filters(w) for name, w in weights.items()},
        commands=commands,
        fingerprints=[("checkpoint", origin.sha256)],
    )
    page.charts += _pretraining_charts(log)
    for outcome in outcomes:
        _add_outcome(page, outcome)
    for one in trained:
        _add_trained(page, one)
    page.charts = drawable(page.charts)
    page.tables += tables.elsewhere()
    return page


def _add_outcome(page: Page, outcome: Outcome) -> None:
    one = outcome.set
    notes = [one.note] if one.note else []
    for name in one.probes:
        pair = [outcome.results.get((name, backbone)) for backbone in ("ours", "random")]
        make = {"svm": tables.svm, "lowshot": tables.low_shot, "knn": tables.knn, "linear": tables.linear}[name]
        made = make(one.title, one.published, *pair, notes, outcome.gap)
        made = made if isinstance(made, list) else [made]
        page.tables += made
        if outcome.gap is None:
            page.charts += _charts(name, one, pair, made[0])
            page.tiles.append(_tile(made[0]))
    for (backbone, split), folder in outcome.stores.items():
        facts = json.loads((folder / "manifest.json").read_text())
        if backbone == "ours":
            page.fingerprints.append((f"{one.name} {split}, content", facts["content"]))
        for name, file in facts["files"].items():
            page.fingerprints.append((f"{one.name} {split}, {backbone}, {name}", file["sha256"]))
    if outcome.stores and "knn" in one.probes and "avg" in one.taps:
        page.neighbours.append(_neighbours(outcome))


def _add_trained(page: Page, trained: Trained) -> None:
    run = trained.run
    pair = [trained.results.get(backbone) for backbone in ("ours", "random")]
    notes = [run.note] if run.note else []
    if run.task == "linear":
        table = tables.heads(run.title, run.published, trained.taps, *pair, notes, trained.gap)
    else:
        table = tables.fine_tuned(run.title, run.published, *pair, notes, trained.gap)
    page.tables.append(table)
    if trained.gap is None:
        page.tiles.append(_tile(table if run.task == "linear" else replace(table, rows=table.rows[:1])))
        if run.task == "linear":
            page.charts.append(_over_layers(table.title, table))
    for backbone, result in trained.results.items():
        page.fingerprints.append((f"{run.name}, {backbone}, weights", result["model"]))


def _tile(table: tables.Table) -> tuple[str, str, str]:
    """A table's best figure, and the random backbone's in the same row."""
    row = max((row for row in table.rows if row.difference is not None), key=lambda row: row.ours.value)
    return f"{table.title}: {row.label}", f"{row.ours.value:.1f}", f"random {row.random.value:.1f} · {table.unit}"


def _charts(name: str, one: suite.Set, pair: list[dict | None], table: tables.Table) -> list[Chart]:
    """Low-shot over k; every other probe over the layers."""
    if name == "lowshot":
        rows = [(row, i) for i, row in enumerate(table.rows) if row.ours]
        lines = [
            Line("pretrained", "ours", [(i, r.ours.value) for r, i in rows], [r.ours.spread for r, _ in rows]),
            Line(
                "random",
                "random",
                [(i, r.random.value) for r, i in rows if r.random],
                [r.random.spread for r, _ in rows if r.random],
            ),
            Line(published.SOURCE, "published", [(i, r.published) for i, r in enumerate(table.rows) if r.published]),
        ]
        ticks = [(i, r.label.removeprefix("k = ")) for i, r in enumerate(table.rows)]
        return [Chart(table.title, "images a class (k)", table.unit, lines, ticks)]
    return [_over_layers(f"{table.title}" + (", k = 20" if name == "knn" else ""), table)]


def _over_layers(title: str, table: tables.Table) -> Chart:
    by_layer = {row.label.removesuffix(", k = 20"): row for row in table.rows}
    shown = [(i, by_layer[layer]) for i, layer in enumerate(tables.LAYERS) if layer in by_layer]
    lines = [
        Line("pretrained", "ours", [(i, r.ours.value) for i, r in shown if r.ours]),
        Line("random", "random", [(i, r.random.value) for i, r in shown if r.random]),
        Line(published.SOURCE, "published", [(i, r.published) for i, r in shown if r.published]),
    ]
    return Chart(title, "layer", table.unit, lines, [(i, layer) for i, layer in enumerate(tables.LAYERS)])


def drawable(charts: list[Chart]) -> list[Chart]:
    """Those with a point; a set of which the global average alone was read has no layers to go over."""
    return [chart for chart in charts if any(line.points for line in chart.lines)]


def _pretraining_charts(log: list[dict]) -> list[Chart]:
    trained = [v for v in log if "loss" in v]
    held_out = [v for v in log if "held_out_accuracy" in v]
    if len(trained) < 2:
        return []
    ends = [trained[0]["epoch"], trained[-1]["epoch"]]
    accuracy = [
        Line("training views", "train", [(v["epoch"], 100 * v["accuracy"]) for v in trained], marks=False),
        Line("held-out images", "ours", [(v["epoch"], 100 * v["held_out_accuracy"]) for v in held_out]),
        Line("chance", "random", [(e, 25.0) for e in ends], marks=False),
    ]
    loss = [
        Line("training views", "train", [(v["epoch"], v["loss"]) for v in trained], marks=False),
        Line("held-out images", "ours", [(v["epoch"], v["held_out_loss"]) for v in held_out]),
    ]
    return [
        Chart("Rotation accuracy", "epoch", "%", accuracy),
        Chart("Rotation loss", "epoch", "cross-entropy", loss),
    ]


def _facts(origin: Origin, log: list[dict]) -> list[tuple[str, str]]:
    """What the weights are and how they came about, for the head of the page."""
    known = pretraining(origin)
    rows = [("architecture", origin.arch), ("checkpoint", origin.path), ("control", f"the same network, seed {SEED}")]
    if "environment" in known:
        env = known["environment"]
        rows += [("trained on", f"{env['data']['rows']:,} images, content {env['data']['content'][:12]}")]
        rows += [("machine", f"{', '.join(env['gpus']) or str(env['cores']) + ' CPU cores'}, ranks: {env['ranks']}")]
    if "state" in known:
        rows += [("seen", f"{known['state']['step']:,} steps, {known['state']['position']:,} images")]
    rates = [v["views_per_s"] for v in log if "views_per_s" in v]
    if rates:
        images, waits = np.median(rates) / 4, [v["wait_share"] for v in log if "wait_share" in v]
        rows += [
            (
                "throughput",
                f"{np.median(rates):,.1f} views/s ({images:,.1f} images/s at four views), median of the log",
            ),
            ("waiting for data", f"{100 * np.median(waits):.2f} % of a step, median of the log"),
        ]
    held_out = [v["held_out_accuracy"] for v in log if "held_out_accuracy" in v]
    if held_out:
        rows += [("held-out rotation accuracy", f"{100 * held_out[-1]:.1f} % (chance 25 %)")]
    return rows


def _warnings(origin: Origin) -> list[str]:
    """What keeps a reader from comparing with the published figures."""
    out = []
    if origin.arch != _PUBLISHED_ARCH:
        out.append(
            f"The published figures are ResNet-50's; this backbone is {origin.arch.replace('resnet', 'ResNet-')}."
        )
    if origin.run is None:
        out.append("The weights come from a file without its run: how they were trained is not known.")
    return out


def _pretraining_command(origin: Origin) -> list[str]:
    command = pretraining(origin).get("environment", {}).get("command")
    return [" ".join(command)] if command else []


def _neighbours(outcome: Outcome) -> dict:
    """Queries of the test images with their nearest training images, by each backbone."""
    rows: list[int] = []
    out = {"title": outcome.set.title, "backbones": {}}
    for backbone in ("ours", "random"):
        folders = [outcome.stores[backbone, split] for split in ("train", "test")]
        bank, asked = map(open_store, folders)
        rows = rows or pictures.queries(np.asarray(asked.labels), _QUERIES)
        nearest = pictures.neighbour_rows(bank, asked, rows, "avg")
        shown = pictures.thumbnails(folders[0], [row for found in nearest for row in found])
        out["queries"] = pictures.thumbnails(folders[1], rows)
        out["labels"] = [_class(bank.classes, asked.labels[row]) for row in rows]
        out["backbones"][backbone] = [
            [
                (shown[i * pictures.NEIGHBOURS + j], _class(bank.classes, bank.labels[row]))
                for j, row in enumerate(found)
            ]
            for i, found in enumerate(nearest)
        ]
    return out


def _class(names: list[str], label: int) -> str:
    """A class's name; a list of files has none."""
    return names[int(label)] if names else str(int(label))
