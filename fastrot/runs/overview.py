"""Runs side by side: how each stands, and how they differ."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrot import terminal
from fastrot.config import command_of, flat, load
from fastrot.errors import UserError
from fastrot.files import read_json
from fastrot.runs.folder import is_run, read_lines, state
from fastrot.runs.log import read_status

_OWN = "run.out"  # differs always
HEADER = ["run", "state", "steps", "epochs", "held out", "views/s", "when"]


@dataclass(frozen=True)
class Overview:
    """A run's folder in short.

    learns    the command that trains so: train, linear, ...    of: its steps in all, None where STATUS.json does not say.
    held_out  figure -> the newest value; best: the most that the figure which judges has been, by the log.
    config    flat keys; empty, with the reason in `wrong`, where it cannot be read.
    lines     of metrics.jsonl.    made_by: environment.json.
    """

    name: str
    folder: Path
    learns: str
    state: str
    step: int
    of: int | None
    epoch: float
    held_out: dict[str, float]
    best: float | None
    views_per_s: float | None
    when: str
    config: dict[str, Any]
    wrong: str
    lines: list[dict[str, Any]] = field(repr=False)
    made_by: dict[str, Any] = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it, without config and lines."""
        left_out = ("config", "lines", "made_by")
        return {name: value for name, value in vars(self).items() if name not in left_out} | {
            "folder": str(self.folder)
        }


def find_runs(folder: Path) -> list[Overview]:
    """The runs in a folder, it itself or at any depth, in the order in which they last were written.

    Raises UserError where there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that holds runs, as in fastrot runs FOLDER")
    found: list[Path] = []
    for place, inner, _ in os.walk(folder):
        if is_run(Path(place)):
            found.append(Path(place))
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: holds no run; train one, or name another folder")
    names = {one: str(one.relative_to(folder)) if one != folder else one.resolve().name for one in found}
    return sorted((overview(one, name) for one, name in names.items()), key=lambda one: one.when)


def named(word: str, folder: Path) -> Overview:
    """A run by its path, or by its name in `folder`. Raises UserError."""
    for path in (Path(word), folder / word):
        if is_run(path):
            return overview(path, word)
    raise UserError(f"--compare {word}: no run's folder, nor a run's name in {folder}; expected two of them")


def overview(run: Path, name: str) -> Overview:
    """What can be read of a run's folder; what cannot is left empty."""
    config, learns, wrong = {}, "", ""
    try:
        config, learns = flat(load(str(run / "config.yaml"), [])[0]), command_of(str(run / "config.yaml"), [])
    except UserError as error:
        wrong = str(error).splitlines()[0].removeprefix("--config ")
    try:
        lines = [line for line in read_lines(run / "metrics.jsonl").lines if _plain(line)]
    except OSError:
        lines = []
    try:
        made_by = read_json(run / "environment.json", dict[str, Any])
    except (OSError, ValueError):
        made_by = {}
    status, newest = read_status(run), lines[-1] if lines else {}
    status = status if _plain(status) else {}
    trained = [one for one in lines if "loss" in one]
    held_out: dict[str, float] = {}
    for line in lines:
        held_out |= {name: value for name, value in line.items() if name.startswith("held_out_") and value is not None}
    figures = {name.removeprefix("held_out_"): value for name, value in held_out.items()}
    judge = judged_by(figures)
    values = [line.get(f"held_out_{judge}") for line in lines]
    step = newest.get("step", -1) + 1
    return Overview(
        name, run, learns, state(run), max(step, status.get("steps", 0)), status.get("of") or status.get("steps"),
        newest.get("epoch", 0.0), figures, max((v for v in values if v is not None), default=None),
        status.get("views_per_s") or (trained[-1].get("views_per_s") if trained else None), str(status.get("time", "")),
        config, wrong, lines, made_by,
    )  # fmt: skip


def _plain(said: dict[str, Any]) -> bool:
    """Whether the figures that are shown of a line, or of STATUS.json, are numbers."""
    named = {"step", "steps", "of", "epoch", "views_per_s"}
    shown = [value for name, value in said.items() if name in named or name.startswith("held_out_")]
    return all(value is None or (isinstance(value, int | float) and abs(value) < 2**63) for value in shown)


def judged_by(figures: dict[str, float]) -> str | None:
    """The held-out figure that judges: a task names it first, before or after its loss."""
    names = [name for name in figures if name != "loss"]
    return "accuracy" if "accuracy" in names else next(iter(names), None)


def differences(runs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys in which flat dictionaries differ: a value each, None where one lacks it."""
    keys = dict.fromkeys(key for one in runs for key in one)
    columns = {key: [one.get(key) for one in runs] for key in keys if key != _OWN}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def compared(a: Overview, b: Overview) -> dict[str, Any]:
    """Two runs in short, and where their configs, machines and versions differ."""
    return {
        "runs": [a.plain(), b.plain()],
        "config": differences([a.config, b.config]),
        "made_by": differences([_machine(a.made_by), _machine(b.made_by)]),
    }


def _machine(environment: dict[str, Any]) -> dict[str, Any]:
    """Machine and versions, without what is each start's own."""
    kept = {name: environment.get(name) for name in ("host", "python", "platform", "cores", "gpus", "ranks")}
    versions = environment.get("versions")
    return kept | (versions if isinstance(versions, dict) else {})


def row(one: Overview) -> list[str]:
    """A run's cells under HEADER."""
    judge = judged_by(one.held_out)
    figure = f"{judge.replace('_', ' ')} {one.held_out[judge]:.1%}" if judge else ""
    best = f", best {one.best:.1%}" if judge and one.best is not None and one.best > one.held_out[judge] else ""
    steps = f"{one.step:,}" + (f" of {one.of:,}" if one.of and one.of != one.step else "")
    pace = f"{one.views_per_s:,.0f}" if one.views_per_s else ""
    return [one.name, one.state, steps, f"{one.epoch:.2f}", figure + best, pace, one.when[:16].replace("T", " ")]


def show(runs: Sequence[Overview], differing: dict[str, list[Any]]) -> None:
    """The table, for a person. differing: keys whose values stand in a last column."""
    rows = []
    for at, one in enumerate(runs):
        own = [f"{key}={values[at]}" for key, values in differing.items() if values[at] is not None]
        rows.append([*row(one), one.wrong or " ".join(own)])
    last = any(cells[-1] for cells in rows)
    terminal.listing("", [*HEADER, "differs in"] if last else HEADER, [cells if last else cells[:-1] for cells in rows])
