"""What a person reads and what a program reads: progress, metrics, status, environment."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from fastrot import terminal
from fastrot.files import write_text


def cut_back(path: Path, steps: int) -> None:
    """Keep the lines of metrics.jsonl of steps below `steps`: a resume writes the others anew."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < steps:
                kept.append(line)
        except (ValueError, KeyError):
            break  # the half line that a kill left
    write_text(path, "".join(line + "\n" for line in kept))


def write_status(folder: Path, state: str, **facts) -> None:
    """Replace STATUS.json: state is running, done or failed. The authority on how a run ended."""
    content = {
        "state": state,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        **facts,
    }
    write_text(folder / "STATUS.json", json.dumps(content, indent=1) + "\n")


class RunLog:
    """One run's metrics.jsonl, TensorBoard, STATUS.json and progress; silent on ranks above 0."""

    def __init__(self, folder: Path | None, total_steps: int, first_step: int, tensorboard: bool):
        self._folder, self._total = folder, total_steps
        self._out = terminal.console()
        self._bar = self._task = self._board = None
        self._metrics = None
        self._warned = False
        self._bad = 0
        if folder is None:
            return
        cut_back(folder / "metrics.jsonl", first_step)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if self._out.is_terminal:
            self._bar = terminal.progress_bar(self._out)
            self._task = self._bar.add_task("training", total=total_steps, completed=first_step, note="")
            self._bar.start()

    def say(self, line: str) -> None:
        """One fact a line, for a person."""
        if self._folder is not None:
            (self._bar.console if self._bar else self._out).print(line, soft_wrap=True, markup=False)

    def tick(self) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def write(self, values: dict[str, float]) -> None:
        """One line of metrics.jsonl (floats that read back exactly), TensorBoard, and a person's line."""
        if self._metrics is None:
            return
        self._try(lambda: self._record(values))
        if (bad := values.get("bad_images", 0)) > self._bad:
            self._bad = bad
            self.say(
                f"images that cannot be read or decoded are replaced: {bad:,} so far, in {self._folder}/bad_images.jsonl"
            )
        line = _line(values, self._total)
        if self._bar is not None and "loss" in values:
            note = f"loss {values['loss']:.3f}  accuracy {values['accuracy']:.1%}{_bad(values)}"
            self._bar.update(self._task, note=note)
        else:
            self.say(line)

    def _record(self, values: dict[str, float]) -> None:
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                if name not in ("step", "epoch") and isinstance(value, int | float):
                    self._board.add_scalar(name, value, values["step"] + 1)

    def status(self, state: str, **facts) -> None:
        """Replace STATUS.json where this rank keeps it."""
        if self._folder is not None:
            self._try(lambda: write_status(self._folder, state, **facts))

    def _try(self, write: Callable[[], None]) -> None:
        """A disk that is full or away does not end the training: it is said once."""
        try:
            write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.say(f"{self._folder}: cannot be written ({error.strerror}); training goes on")

    def close(self) -> None:
        """End the bar and the files; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.close()


def _line(values: dict, total: int) -> str:
    head = f"step {values['step'] + 1:,}/{total:,}  epoch {values['epoch']:.2f}"
    if "held_out_accuracy" in values:
        return f"{head}  held-out accuracy {values['held_out_accuracy']:.1%}  loss {values['held_out_loss']:.3f}"
    mfu = f"  MFU {values['mfu']:.1%}  roof {values['roof_fraction']:.1%}" if "mfu" in values else ""
    return (
        f"{head}  loss {values['loss']:.3f}  accuracy {values['accuracy']:.1%}  lr {values['lr']:.4g}  "
        f"{values['views_per_s']:,.0f} views/s  wait {values['wait_share']:.1%}{mfu}{_bad(values)}  ETA {terminal.duration(values['eta_s'])}"
    )


def _bad(values: dict) -> str:
    return f"  bad images {values['bad_images']:,}" if values.get("bad_images") else ""
