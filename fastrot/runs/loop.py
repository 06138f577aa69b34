"""The training loop: a batch's way from the loader to the next checkpoint, on a page."""

import math
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastrot.data.loader import MicroBatch, StepBatch
from fastrot.engine.base import Engine
from fastrot.engine.graphs import Graphed
from fastrot.engine.optimizers import set_lr
from fastrot.errors import Diverged
from fastrot.profiling.clock import SPANS, Clock, Spans
from fastrot.profiling.pace import Pace, Report, seen
from fastrot.profiling.roofline import Work
from fastrot.tasks import Task


@dataclass(frozen=True)
class Course:
    """Where a run goes: all counts are of the whole run, over all ranks.

    last_step  steps in all; rows of the training set; images a step; views an image.
    evaluate_every  epochs; evaluate_every_steps: steps instead.  hosts: by rank; none where it is alone.
    """

    last_step: int
    rows: int
    images_per_step: int
    views_per_image: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int
    evaluate_every_steps: int | None
    seed: int
    rank: int
    hosts: tuple[str, ...]
    max_bad_steps: int

    def evaluates(self, done: int, position: int) -> bool:
        """Whether to evaluate once `done` steps are done, the last of which ends at stream position `position`."""
        if self.evaluate_every_steps:
            return done % self.evaluate_every_steps == 0
        before, after = (position - self.images_per_step) // self.rows, position // self.rows
        return after > before and after % self.evaluate_every == 0


class Log(Protocol):
    """Where a run says how it goes."""

    def tick(self) -> None:
        """A step is done."""

    def write(self, values: dict[str, Any]) -> None:
        """A line's values, `step` and `epoch` among them."""


def run(
    course: Course,
    batches: Iterable[StepBatch],
    task: Task,
    engine: Engine,
    lr_of: Callable[[float], float],
    work_of: Callable[[float], Work],
    evaluate: Callable[[], dict[str, float]] | None,
    save: Callable[[int, int, float | None, bool], None],
    log: Log,
    clock: Clock,
    bad_images: Callable[[], int],
    heard: Callable[[], str] = str,
) -> dict[str, Any]:
    """Train over `batches`; returns the last logged values with the whole run's rates.

    lr_of(epoch) -> rate.  work_of(epoch) -> what a step asks of this rank's device.
    evaluate() -> held-out metrics, or None.  bad_images() -> how many were replaced so far.
    save(steps completed, next stream position, the held-out figure that judges or None, whether one is due).
    heard() -> why to stop early, or nothing, alike on all ranks: that step is saved, and `stopped` among the values.
    Raises Diverged where the loss was not finite for engine.max_bad_steps in a row, seen at the next line; what fp16
    skips has a finite loss.
    """
    learn = _learner(task, engine)
    tally = _Tally(course, task, engine, clock)
    for batch in batches:
        rate = lr_of(batch.epoch)
        set_lr(engine.optimizer, rate)
        done, position = batch.step + 1, batch.position + course.images_per_step
        last, stopped = done == course.last_step, heard()
        saving = last or bool(stopped) or done % course.checkpoint_every == 0
        evaluating = evaluate is not None and (last or course.evaluates(done, position))
        due = saving or evaluating or done % course.log_every == 0
        clock.watch(due)
        for number, host in enumerate(clock.waiting(batch.micro_steps)):
            # whatever draws by itself draws the same after a resume; a tuple of ints hashes alike everywhere
            torch.manual_seed(hash((course.seed, batch.step, number, course.rank)) % 2**63)
            with clock.stage("copy"):
                micro = host.to(task.device)
            with clock.stage("rotate"):
                views = task.views(micro)
            with clock.stage("compute"):
                tally.add(learn(views, micro))
        with clock.stage("update"):
            engine.step(measure=due)
        tally.end_step(work_of(batch.epoch))
        log.tick()
        clock.end_step()
        if not due:
            continue
        place = {"step": batch.step, "epoch": position / course.rows}
        log.write(tally.line(place, rate, bad_images()))
        bad = tally.bad_in_a_row(batch.step, last)
        figure = None
        if evaluate and evaluating:
            held_out = evaluate()
            figure = held_out[f"held_out_{next(iter(task.figures))}"]
            log.write(place | held_out)
            tally.latest |= held_out
        if (saving or evaluating) and not bad:  # the checkpoint before the first bad step stays
            save(done, position, figure, saving)
        clock.skip()
        if stopped and not last:
            return tally.whole() | {"stopped": stopped}
    return tally.whole()


def _learner(task: Task, engine: Engine) -> Callable[[torch.Tensor, MicroBatch], torch.Tensor]:
    """Forward and backward of a micro-step -> its summed metrics."""

    def learn(views: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        loss, metrics = task.loss(engine.module, views, micro)
        engine.backward(loss, micro.views_of_step, micro.last)
        return metrics

    return Graphed(learn, task.device) if engine.cuda_graphs else learn


class _Tally:
    """What is summed on the device from line to line, and read where one is due.

    latest  the newest line's values and, beside them, the newest held-out ones.
    """

    def __init__(self, course: Course, task: Task, engine: Engine, clock: Clock):
        self._course, self._task, self._engine, self._clock = course, task, engine, clock
        self._sums = torch.zeros(len(task.metrics), dtype=torch.float64, device=task.device)
        self._loss = task.metrics.index("loss")
        self._bad = torch.zeros((), dtype=torch.bool, device=task.device)  # whether this step's loss is not finite
        self._rows = torch.zeros(2, dtype=torch.int64, device=task.device)  # bad steps in a row: now, at most
        self._since, self._asked = 0, Work()
        self._steps, self._asked_in_all = 0, Work()
        self._pace, self._spent = Pace(), dict.fromkeys(SPANS, 0.0)
        self.latest: dict[str, Any] = {}

    def add(self, metrics: torch.Tensor) -> None:
        """A micro-step's sums."""
        self._sums += metrics
        self._bad |= ~metrics[self._loss].isfinite()

    def end_step(self, work: Work) -> None:
        row = (self._rows[0] + 1) * self._bad
        self._rows = torch.stack((row, torch.maximum(self._rows[1], row)))
        self._bad.zero_()
        self._since, self._asked = self._since + 1, self._asked + work

    def line(self, place: dict[str, float], rate: float, bad_images: int) -> dict[str, Any]:
        """The values of the steps since the last line; what comes is summed anew."""
        since, course, steps = self._since, self._course, self._clock.read()
        times = {name: sum(step[name] for step in steps) for name in SPANS}
        total = sum(times.values())
        self._spent = {name: self._spent[name] + times[name] for name in SPANS}
        report = self._pace.report(steps, int(place["step"]) + 1 - since)
        reports = [Report.of(one) for one in self._engine.gather(report.numbers())]
        self.latest = {
            **place,
            **self._task.summary(self._engine.reduce(self._sums)),
            "lr": rate,
            **_norm(self._engine),
            **_rates(course, times, since),
            **seen(reports, course.hosts),
            **self._asked.reached(total),
            **_memory(self._task.device),
            "bad_images": bad_images,
            "eta_s": total / since * (course.last_step - place["step"] - 1),
        }
        self._sums.zero_()
        self._steps, self._asked_in_all = self._steps + since, self._asked_in_all + self._asked
        self._since, self._asked = 0, Work()
        return self.latest

    def bad_in_a_row(self, step: int, last: bool) -> int:
        """Steps up to this one whose loss was not finite on some rank.

        Raises Diverged, on all ranks, where there were max_bad_steps in a row, or one at the end.
        """
        rows: list[int] = self._engine.reduce(self._rows.clone(), greatest=True).tolist()
        row, longest = rows
        if longest >= self._course.max_bad_steps or (row and last):
            raise Diverged(f"the loss was not finite in {longest:,} steps in a row, up to step {step}")
        return row

    def whole(self) -> dict[str, Any]:
        """The latest values, with the rates of all steps."""
        if not self._steps:
            return {}
        rates = _rates(self._course, self._spent, self._steps)
        return {**self.latest, **rates, **self._asked_in_all.reached(sum(self._spent.values()))}


def _norm(engine: Engine) -> dict[str, float | None]:
    norm = float(engine.grad_norm)
    return {"grad_norm": norm if math.isfinite(norm) else None}


def _rates(course: Course, times: Spans, steps: int) -> dict[str, float]:
    """Images and views a second over all ranks, and each span's share of the time on this rank."""
    total = sum(times.values())
    images = steps * course.images_per_step / total
    shares = {f"{name}_share": times[name] / total for name in SPANS}
    return {
        "images_per_s": images,
        "views_per_s": images * course.views_per_image,
        "step_s": total / steps,
        **shares,
    }


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
