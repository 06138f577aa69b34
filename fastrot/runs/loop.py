"""The training loop: a batch's way from the loader to the next checkpoint, on a page."""

import math
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fastrot.data.loader import MicroBatch, StepBatch
from fastrot.engine.base import Engine
from fastrot.engine.graphs import Graphed
from fastrot.engine.optimizers import set_lr
from fastrot.errors import Fault
from fastrot.profiling.clock import STAGES, Clock
from fastrot.profiling.roofline import Work


@dataclass(frozen=True)
class Course:
    """Where a run goes: all counts are of the whole run, over all ranks.

    last_step  steps in all; rows of the training set; images a step; views an image.
    """

    last_step: int
    rows: int
    images_per_step: int
    views_per_image: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int
    seed: int
    rank: int

    def epoch_ends(self, position: int) -> bool:
        """Whether the step that ends at stream position `position` completes an epoch to evaluate."""
        before, after = (position - self.images_per_step) // self.rows, position // self.rows
        return after > before and after % self.evaluate_every == 0


def run(
    course: Course,
    batches: Iterable[StepBatch],
    task,
    engine: Engine,
    lr_of: Callable[[float], float],
    work_of: Callable[[float], Work],
    evaluate: Callable[[], dict[str, float]] | None,
    save: Callable[[int, int, float | None, bool], None],
    log,
    clock: Clock,
    bad_images: Callable[[], int],
) -> dict[str, float]:
    """Train over `batches`; returns the last logged values with the whole run's rates.

    lr_of(epoch) -> rate.  work_of(epoch) -> what a step asks of this rank's device.
    evaluate() -> held-out metrics, or None.  bad_images() -> how many were replaced so far.
    save(steps completed, next stream position, held-out accuracy or None, whether one is due).
    Raises Fault when the loss or (but for fp16, which skips such steps) its gradient is not finite.
    """
    device = task.device

    def learn(views: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        loss, metrics = task.loss(engine.module, views, micro)
        engine.backward(loss, micro.views_of_step, micro.last)
        return metrics

    if engine.cuda_graphs:
        learn = Graphed(learn, device)
    sums = torch.zeros(len(task.metrics), dtype=torch.float64, device=device)
    steps, spent, latest = 0, dict.fromkeys((*STAGES, "total"), 0.0), {}
    since, asked, asked_in_all = 0, Work(), Work()
    for batch in batches:
        rate = lr_of(batch.epoch)
        set_lr(engine.optimizer, rate)
        for number, host in enumerate(clock.waiting(batch.micro_steps)):
            # whatever draws by itself draws the same after a resume; a tuple of ints hashes alike everywhere
            torch.manual_seed(hash((course.seed, batch.step, number, course.rank)) % 2**63)
            with clock.stage("copy"):
                micro = host.to(device)
            with clock.stage("rotate"):
                views = task.views(micro)
            with clock.stage("compute"):
                metrics = learn(views, micro)
            sums += metrics
        asked += work_of(batch.epoch)
        done, position = batch.step + 1, batch.position + course.images_per_step
        steps, since, last = steps + 1, since + 1, done == course.last_step
        saving = last or done % course.checkpoint_every == 0
        evaluating = evaluate is not None and (last or course.epoch_ends(position))
        due = saving or evaluating or done % course.log_every == 0
        with clock.stage("update"):
            engine.step(measure=due)
        log.tick()
        if due:
            times = clock.read()
            spent = {name: spent[name] + times[name] for name in spent}
            latest = {
                "step": batch.step,
                "epoch": position / course.rows,
                **task.summary(engine.reduce(sums)),
                "lr": rate,
                **_norm(engine),
                **_rates(course, times, since),
                **asked.reached(times["total"]),
                **_memory(device),
                "bad_images": bad_images(),
            }
            latest["eta_s"] = times["total"] / since * (course.last_step - done)
            diverged = latest["grad_norm"] is None and not engine.scales_loss
            if diverged or not math.isfinite(latest["loss"]):
                raise Fault(
                    f"the loss is {latest['loss']}, its gradient's norm {float(engine.grad_norm)} at step {batch.step}; "
                    "the last checkpoint stands: "
                    "lower optim.lr or set optim.clip"
                )
            log.write(latest)
            sums.zero_()
            since, asked, asked_in_all = 0, Work(), asked_in_all + asked
            accuracy = None
            if evaluating:
                held_out = evaluate()
                accuracy = held_out["held_out_accuracy"]
                log.write({"step": batch.step, "epoch": position / course.rows, **held_out})
                latest |= held_out
            if saving or evaluating:
                save(done, position, accuracy, saving)
            clock.skip()
    if not steps:
        return {}
    return {**latest, **_rates(course, spent, steps), **asked_in_all.reached(spent["total"])}


def _norm(engine: Engine) -> dict[str, float | None]:
    norm = float(engine.grad_norm)
    return {"grad_norm": norm if math.isfinite(norm) else None}


def _rates(course: Course, times: dict[str, float], steps: int) -> dict[str, float]:
    """Images and views a second over all ranks, and each stage's share of the time on this rank."""
    images = steps * course.images_per_step / times["total"]
    shares = {f"{name}_share": times[name] / times["total"] for name in STAGES}
    return {
        "images_per_s": images,
        "views_per_s": images * course.views_per_image,
        "step_s": times["total"] / steps,
        **shares,
    }


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
