"""What a person reads and what a program reads: progress, metrics, status."""

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from fastrot import terminal
from fastrot.config import Config
from fastrot.files import Damaged, as_json, finite, read_json, write_text
from fastrot.profiling.pace import in_words
from fastrot.runs import loggers, trainjob


@dataclass(frozen=True)
class _Line:
    step: int


def cut_back(path: Path, steps: int) -> None:
    """Keep the lines of metrics.jsonl of steps below `steps`: a resume writes the others anew."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if as_json(line.encode(), _Line).step < steps:
                kept.append(line)
        except Damaged:
            break  # the half line that a kill left
    write_text(path, "".join(line + "\n" for line in kept))


def write_status(folder: Path, state: str, **facts: Any) -> None:
    """Replace STATUS.json: state is running, done or failed. The authority on how a run ended. Raises OSError."""
    _put_status(folder, {"state": state, **_here(), **facts})


def write_refusal(folder: Path, **facts: Any) -> None:
    """A start was refused: how the run stood stays, `refused` says the rest. Raises OSError."""
    refused = {"refused": {**_here(), **facts}}
    _put_status(folder, (read_status(folder) or {"state": "failed", **_here(), **facts}) | refused)


def read_status(folder: Path) -> dict[str, Any]:
    """STATUS.json; empty where there is none, or a damaged one, which says nothing."""
    try:
        return read_json(folder / "STATUS.json", dict[str, Any])
    except (OSError, ValueError):
        return {}


def _here() -> dict[str, Any]:
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(), "host": socket.gethostname()}


def _put_status(folder: Path, content: dict[str, Any]) -> None:
    path, text = folder / "STATUS.json", json.dumps(finite(content), indent=1) + "\n"
    try:
        write_text(path, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with path.open("r+", encoding="utf-8") as file:  # a full disk has no room for a second file beside it
            file.write(text)
            file.truncate()


class RunLog:
    """One run's metrics.jsonl, loggers, STATUS.json and progress; silent on ranks above 0.

    A step's number counts from 0 in metrics.jsonl and for loggers; a person reads how many steps are done.
    Before `begin` it can only speak.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._total, self._figure = folder, 0, ""
        self._out = terminal.console()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._loggers: list[loggers.Logger] = []
        self._warned: set[str] = set()
        self._bad = 0
        self._straggler: Any = None

    def begin(self, steps: range, config: Config, figure: str) -> None:
        """Take up the files from the first of `steps` on, and show progress. figure: name of the held-out one that a
        person reads. Raises OSError, UserError."""
        first_step, self._total, self._figure = steps.start, steps.stop, figure
        if self._folder is None:
            return
        cut_back(self._folder / "metrics.jsonl", first_step)
        (self._folder / "metrics.jsonl").touch()
        self._loggers = loggers.opened(config.run.loggers, self._folder, first_step, config, self.say)
        self._loggers += trainjob.opened(self._total)
        if self._out.is_terminal:
            self._bar = terminal.progress_bar(self._out)
            self._task = self._bar.add_task("training", total=self._total, completed=first_step, note="")
            self._bar.start()

    def say(self, line: str) -> None:
        """One fact a line, for a person."""
        if self._folder is not None:
            (self._bar.console if self._bar else self._out).print(line, soft_wrap=True, markup=False)

    def tick(self) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def write(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl (floats that read back exactly), the loggers', and a person's line."""
        if (folder := self._folder) is None:
            return
        self._try(lambda: self._record(folder, values))
        for logger in self._loggers:
            self._try(partial(logger.write, values), logger.name)
        if (bad := values.get("bad_images", 0)) > self._bad:
            self._bad = bad
            self.say(
                f"images that cannot be read or decoded are replaced: {bad:,} so far, in {folder}/bad_images.jsonl"
            )
        for said in in_words(self._news(values)):
            self.say(said)
        line = _line(values, self._total, self._figure)
        if self._bar is not None and "loss" in values:
            self._bar.update(self._task, note=f"{_learnt(values)}  {_waits(values)}{_bad(values)}")
        else:
            self.say(line)

    def _news(self, values: dict[str, Any]) -> dict[str, Any]:
        """Without the straggler that was named at the last line too."""
        straggler = values.get("straggler") or {}
        who = straggler.get("rank"), straggler.get("stage")
        if "loss" not in values or who == self._straggler:
            return values | {"straggler": None}
        self._straggler = who
        return values

    def _record(self, folder: Path, values: dict[str, Any]) -> None:
        line = json.dumps(finite(values)).encode() + b"\n"
        with (folder / "metrics.jsonl").open("r+b", buffering=0) as file:  # not made anew where it is gone
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def status(self, state: str, **facts: Any) -> None:
        """Replace STATUS.json where this rank keeps it."""
        if (folder := self._folder) is not None:
            self._try(lambda: write_status(folder, state, **facts))

    def _try(self, write: Callable[[], None], who: str = "") -> None:
        """A disk that is full or away, or a logger that takes nothing, does not end the training: it is said once."""
        try:
            write()
        except (OSError, loggers.Trouble) as error:
            if who not in self._warned:
                self._warned.add(who)
                why = getattr(error, "strerror", None) or error
                self.say(f"{who or self._folder}: cannot be written ({why}); training goes on")

    def close(self) -> None:
        """End the bar and the loggers; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
        state = read_status(self._folder).get("state", "") if self._folder else ""
        for logger in self._loggers:
            self._try(partial(logger.close, state), logger.name)
        self._loggers = []


def _line(values: dict[str, Any], total: int, figure: str) -> str:
    head = f"step {values['step'] + 1:,}/{total:,}  epoch {values['epoch']:.2f}"
    if (held_out := values.get(f"held_out_{figure}")) is not None:
        loss = f"  loss {values['held_out_loss']:.3f}" if "held_out_loss" in values else ""
        return f"{head}  held-out {figure.replace('_', ' ')} {held_out:.1%}{loss}"
    mfu = f"  MFU {values['mfu']:.1%}  roof {values['roof_fraction']:.1%}" if "mfu" in values else ""
    return (
        f"{head}  {_learnt(values)}  lr {values['lr']:.4g}  "
        f"{values['views_per_s']:,.0f} views/s  {_waits(values)}{mfu}{_bad(values)}  ETA {terminal.duration(values['eta_s'])}"
    )


def _learnt(values: dict[str, Any]) -> str:
    accuracy = f"  accuracy {values['accuracy']:.1%}" if "accuracy" in values else ""
    return f"loss {values['loss']:.3f}{accuracy}"


def _waits(values: dict[str, Any]) -> str:
    return f"wait {values['wait_share']:.1%}  bound by {values['bound']}"


def _bad(values: dict[str, Any]) -> str:
    return f"  bad images {values['bad_images']:,}" if values.get("bad_images") else ""
