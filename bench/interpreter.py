"""What does an image cost the interpreter on its way to DALI: planned, read, its kind known, fed to the pipeline?"""

import os
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from fastrot.data.bad_images import BadImages
from fastrot.data.decode.dali import DaliDecoder, _work_of
from fastrot.data.index import index
from fastrot.data.loader import Loader
from fastrot.data.manifest import Manifest
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.data.storage import FileStorage
from fastrot.selfcheck.images import drawn

IMAGES, BATCH, LAP = 8192, 256, 16  # files; images a batch; batches a lap


def files(home: Path) -> Path:
    """Drawn photographs, each under many names."""
    folder = home / "files"
    for number, path in enumerate(sorted(drawn(home, 64).rglob("*.jpg"))):
        for copy in range(IMAGES // 64):
            name = folder / path.parent.name / f"{number:03d}-{copy:04d}.jpg"
            name.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, name)
    return folder


class Clock:
    """Processor seconds of the threads that want the interpreter, by stage; those of C's threads are not among them."""

    def __init__(self):
        self.spent = {}

    def __call__(self, stage: str, work):
        def timed(*words):
            began = time.thread_time()
            try:
                return work(*words)
            finally:
                self.spent[stage] = self.spent.get(stage, 0.0) + time.thread_time() - began

        return timed


@pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=3, exec_dynamic=True)
def nothing():
    """A pipeline that is fed as DaliDecoder's, and decodes nothing."""
    names = {"data": types.UINT8, "start": types.INT32, "shape": types.INT32}
    return tuple(fn.external_source(name=n, dtype=t, ndim=1, no_copy=n == "data") for n, t in names.items())


class Fed(DaliDecoder):
    """Does what a batch costs before DALI has it."""

    def __init__(self, clock: Clock):
        super().__init__(None, 1, BATCH, 2, resampler=object())
        self._kind, self._feed = clock("kind", _work_of), clock("feed", self._feed)
        self._pixels = torch.zeros(BATCH, 8, 8, 3, dtype=torch.uint8)
        self._pipes[False] = nothing()
        self._warm_up(self._pipes[False], boxes=False)

    def submit(self, batch):
        work = self._kind(batch)
        self._flying.append(work)
        self._feed(work)

    def result(self):
        self._flying.popleft()
        self._pipes[False].share_outputs()
        self._pipes[False].release_outputs()
        return self._pixels, {}

    def close(self):
        pass


def lap(manifest: Manifest) -> dict[str, float]:
    """Microseconds an image, by stage."""
    clock = Clock()
    plan = Plan(0, manifest.height, manifest.width, FullOrder(len(manifest), 0))
    storage, decoder = FileStorage(manifest), Fed(clock)
    storage.start = _timed_reads(clock, storage)
    loader = Loader(manifest, plan, storage, decoder, BadImages(None, "", 0), torch.device("cpu"), 2, 60.0)
    object.__setattr__(plan, "at_all", clock("plan", plan.at_all))
    loader._choose_device = lambda: clock.spent.update(began=time.thread_time())
    moved, count = loader._moved, iter(range(10**9))

    def last(pixels):
        if next(count) == LAP - 1:
            clock.spent["all"] = time.thread_time() - clock.spent["began"]
        return moved(pixels)

    loader._moved = last
    with_batches = loader.train(range(LAP), 0, BATCH, 1, 0, 1, lambda epoch: 8)
    for step in with_batches:
        list(step.micro_steps)
    loader.close()
    return clock.spent


def _timed_reads(clock: Clock, storage: FileStorage):
    start, submit = clock("read", storage.start), storage._pool.submit
    storage._pool.submit = lambda work, *words: submit(clock("readers", work), *words)

    def started(rows):
        finish = start(rows)
        return clock("read", finish)

    return started


def main() -> None:
    arguments = harness.parser(__doc__).parse_args()
    taken = []
    with tempfile.TemporaryDirectory() as home:
        manifest = Manifest.load(index(str(files(Path(home))), Path(home) / "cache", 10**9, lambda items, *_: items))
        for number in range(arguments.rounds + 1):
            spent = lap(manifest)
            if number:
                taken.append({stage: 1e6 * seconds / (LAP * BATCH) for stage, seconds in spent.items()})
    stages = {
        stage: [lap.get(stage, 0.0) for lap in taken] for stage in ("plan", "read", "readers", "kind", "feed", "all")
    }
    stages["rest"] = list(np.array(stages["all"]) - sum(np.array(stages[s]) for s in ("plan", "read", "kind", "feed")))
    us = {stage: harness.spread(values, "_us") for stage, values in stages.items()}
    harness.write(arguments.out, __doc__, {"machine": harness.facts(), "batch": BATCH, "us_an_image": us})


if __name__ == "__main__":
    main()
