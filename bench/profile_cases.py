"""Are the verdicts of `fastrot profile` and `fastrot.profiling.watch` right, and do their predictions come true?

A bound is planted, the profile asked, its cure applied, and the training run again, in turns with the uncured one: pace
over pace beside the prediction, both with their intervals. Six cases of `fastrot profile`, of which `consumer` is a loop
of one's own over fastrot.Loader, and two of a plain torchvision DataLoader watched from outside. ResNet-18 on images of
--data; a prediction that fails is said to have failed. Each case is written to --out as it ends, beside those that are
there: run them one by one where time is short.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import numpy as np
import torch
import torchvision
from PIL import Image

import fastrot
from fastrot import config as configs
from fastrot import distributed
from fastrot.data.storage import FileStorage
from fastrot.distributed import Ranks
from fastrot.profiling.verdict import held, ratio
from fastrot.runs import profile as profiles

QUESTION = "Does the profile name a planted bound, and does its predicted gain come true?"
ROUNDS = 2
BASE = {
    "model.arch": "resnet18", "engine.kind": "plain", "engine.precision": "fp32", "rotation.views": "one",
    "data.crop": 64, "optim.images_per_step": 16, "model.sync_batchnorm": False,
}  # fmt: skip
Plant = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def slow_reads(mib_per_s: float = 4.0) -> Iterator[None]:
    """All readers together get so many bytes a second: a token bucket."""
    start, lock, free = FileStorage.start, threading.Lock(), [0.0]

    def throttled(storage, rows):
        finish = start(storage, rows)
        with lock:
            free[0] = max(free[0], time.perf_counter()) + storage._manifest.length[rows].sum() / (mib_per_s * 2**20)
            until = free[0]
        return lambda: (time.sleep(max(0.0, until - time.perf_counter())), finish())[1]

    FileStorage.start = throttled
    try:
        yield
    finally:
        FileStorage.start = start


@contextlib.contextmanager
def stalling_reads(every: int, seconds: float) -> Iterator[None]:
    """One batch in so many comes late, as from a disk that others use."""
    start, count = FileStorage.start, [0]

    def stalled(storage, rows):
        finish = start(storage, rows)
        count[0] += 1
        late = count[0] % every == 0
        return lambda: (time.sleep(seconds * late), finish())[1]

    FileStorage.start = stalled
    try:
        yield
    finally:
        FileStorage.start = start


def config_of(data: str, **more: object) -> configs.Config:
    changed = {key.replace("__", "."): value for key, value in more.items()}
    return configs.from_values(None, BASE | {"data.train": data} | changed)


@functools.cache
def alone() -> Ranks:
    ranks = distributed.start()
    torch.set_num_threads(1)  # a core for the step, one for its data: threads of both on a core wait for one another
    return ranks


def busy_share(seconds: float = 1.0) -> float:
    """Of the machine's cores, by others: this process sleeps."""

    def spent() -> tuple[int, int]:
        times = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(times), times[3] + times[4]

    (all_before, idle_before), _, (all_after, idle_after) = spent(), time.sleep(seconds), spent()
    return 1 - (idle_after - idle_before) / (all_after - all_before)


def calm(most: float = 0.15, patience_s: float = 60) -> float:
    """Wait until others leave the machine alone; how busy they are then."""
    until = time.monotonic() + patience_s
    while (busy := busy_share()) > most and time.monotonic() < until:
        continue
    return busy


def profiled(config: configs.Config, seconds: float) -> dict:
    return profiles.profile(config, alone(), seconds, False, None, profiles.Profiled())


def both_paces(config: configs.Config, seconds: float) -> list[float]:
    """images/s of training, a lap each."""
    ranks = alone()
    manifest = profiles.open_manifest(config.data.train, config, ranks, "data.train")
    return profiles.Training(profiles.Job, config, ranks, manifest).both(seconds)[0].paces


def in_turns(now: Callable[[], list[float]], cured: Callable[[], list[float]]) -> tuple[float, float, float]:
    """Cured over uncured, lap by lap."""
    rounds = [(now(), cured()) for _ in range(ROUNDS)]
    return ratio([pace for _, laps in rounds for pace in laps], [pace for laps, _ in rounds for pace in laps])


def told(expected: str, stage: str, says: str, cure: str, predicted, achieved) -> dict:
    right = stage in expected.split("|")
    return {
        "planted": expected, "verdict": stage, "right": right, "says": says, "cure": cure, "predicted": predicted,
        "achieved": achieved, "prediction": "held" if held(predicted, achieved) else "failed",
    }  # fmt: skip


def by_setting(config: configs.Config, expected: str, key: str, seconds: float) -> dict:
    """The profile's best proposal of a key, tried as --try does."""
    found = profiled(config, seconds)
    stage, says = found["verdict"]["stage"], found["says"]
    cures = [cure for cure in found["cures"] if cure["setting"].startswith(key)]
    if not cures:
        nothing = (float("nan"),) * 3
        return told(expected, stage, says, f"{key} was not proposed", nothing, nothing)
    setting, _, value = cures[0]["setting"].partition("=")
    cured = configs.from_values(None, configs.flat(config) | {setting: value})
    achieved = in_turns(lambda: both_paces(config, seconds / 6), lambda: both_paces(cured, seconds / 6))
    return told(expected, stage, says, cures[0]["setting"], cures[0]["predicted"], achieved)


def storage(data: Path, seconds: float) -> dict:
    config = config_of(str(data), data__crop=32)
    with slow_reads():
        found = profiled(config, seconds)

    def throttled() -> list[float]:
        with slow_reads():
            return both_paces(config, seconds / 6)

    achieved = in_turns(throttled, lambda: both_paces(config, seconds / 6))
    verdict = found["verdict"]
    return told(
        "cold|reads", verdict["stage"], found["says"], "reads that are not throttled", verdict["gain"], achieved
    )


def threads(data: Path, seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        large(data, Path(folder))
        config = config_of(
            folder,
            data__crop=32,
            data__scale=[0.6, 1.0],
            data__threads=1,
            data__decode="turbo",
            optim__images_per_step=32,
        )
        return by_setting(config, "decode", "data.threads", seconds)


def large(data: Path, folder: Path, images: int = 64, side: int = 2400) -> None:
    """Photographs that take long to decode."""
    for at, path in enumerate(sorted(data.rglob("*.JP*G"))[:images]):
        where = folder / f"class{at % 4}"
        where.mkdir(exist_ok=True)
        Image.open(path).convert("RGB").resize((side, side)).save(where / f"{at}.jpg", quality=92)


def step(data: Path, seconds: float) -> dict:
    config = config_of(str(data), rotation__views="all", data__crop=96, optim__images_per_step=8)
    return by_setting(config, "step", "engine.precision", seconds)


def prefetch(data: Path, seconds: float) -> dict:
    """A stall as long as seven steps in each fourteen batches."""
    config = config_of(str(data), optim__images_per_step=8, data__prefetch=1)
    manifest = profiles.open_manifest(config.data.train, config, alone(), "data.train")
    step_s = profiles.Training(profiles.Job, config, alone(), manifest).step(1.0)[1]["step_s"]
    with stalling_reads(14, 7 * step_s):
        return by_setting(config, "ahead", "data.prefetch", 3 * seconds)


def rank(data: Path, seconds: float) -> dict:
    """Two ranks, a core each; two busy processes share one of them. The cure is that these end."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
        words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, "--data", str(data)]
        words += ["--seconds", str(seconds), "--of-a-rank", folder]
        subprocess.run(words, check=True)
        result = json.loads((Path(folder) / "result.json").read_text())
    found, verdict = result["found"], result["found"]["verdict"]
    out = told("rank", verdict["stage"], found["says"], "the busy process ends", verdict["gain"], result["achieved"])
    return out | {"slow_rank": found["slow_rank"], "right": out["right"] and found["slow_rank"]["rank"] == 1}


def of_a_rank(data: Path, seconds: float, folder: Path) -> None:
    number = int(os.environ["LOCAL_RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    config = config_of(str(data))
    ranks = alone()

    @contextlib.contextmanager
    def busy() -> Iterator[None]:
        loop = [subprocess.Popen([sys.executable, "-c", "while True: pass"])] if number == 1 else []
        try:
            yield
        finally:
            for one in loop:
                one.kill()
                one.wait()

    manifest = profiles.open_manifest(config.data.train, config, ranks, "data.train")

    def paces() -> list[float]:
        return profiles.Training(profiles.Job, config, ranks, manifest).both(seconds / 6)[0].paces

    def slowed() -> list[float]:
        with busy():
            return paces()

    with busy():
        found = profiles.profile(config, ranks, seconds, False, None, profiles.Profiled())
    achieved = in_turns(slowed, paces)
    if number == 0:
        (folder / "result.json").write_text(json.dumps({"found": found, "achieved": achieved}))


def network(side: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torchvision.models.resnet18(num_classes=100)
    model(torch.zeros(2, 3, side, side))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def learn(model, optimizer, images, labels) -> None:
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def looped(batches, body: Callable, skip: int = 4) -> list[float]:
    """batches/s of a plain loop, in five laps."""
    ends = []
    for batch in batches:
        body(batch)
        ends.append(time.perf_counter())
    marks = np.linspace(skip, len(ends) - 1, 6).astype(int)
    return [(b - a) / (ends[b] - ends[a]) for a, b in itertools.pairwise(marks)]


def endless(loader, batches: int) -> Iterator:
    while True:
        for batch in loader:
            yield batch
            batches -= 1
            if not batches:
                return


class Some:
    """A number of batches of a loader, over the ends of its epochs; with what watch asks of a DataLoader."""

    def __init__(self, loader, batches: int):
        self._loader, self._batches = loader, batches
        if isinstance(loader, torch.utils.data.DataLoader):
            self.num_workers, self.prefetch_factor = loader.num_workers, loader.prefetch_factor

    def __iter__(self) -> Iterator:
        return endless(self._loader, self._batches)


def watched(batches, body: Callable):
    with fastrot.profiling.watch(batches) as found:
        for batch in found:
            body(batch)
    print(found)
    return found


def said(found) -> str:
    return str(found).partition("verdict")[2].splitlines()[0].strip()


def consumer(data: Path, seconds: float) -> dict:
    """Every step is followed by work of the loop's: arrays are sorted for 0.2 s."""
    alone()
    manifest, (model, optimizer) = fastrot.open(data), network(32)
    rng = np.random.default_rng(0)

    def body(batch, besides: bool = True) -> None:
        learn(model, optimizer, batch.normalised(), batch.labels % 100)
        if besides:
            until = time.perf_counter() + 0.2
            while time.perf_counter() < until:
                np.sort(rng.random(100_000))

    with fastrot.Loader(manifest, images=8, crop=32) as loader:
        found = watched(Some(loader, 130), body)
        achieved = in_turns(
            lambda: looped(Some(loader, 25), body), lambda: looped(Some(loader, 25), lambda batch: body(batch, False))
        )
    return told("between", found.verdict.stage, said(found), "no work between steps", found.verdict.gain, achieved)


def torchvision_loader(data: Path, side: int, workers: int, batches: int) -> Some:
    t = torchvision.transforms
    seen = t.Compose([t.RandomResizedCrop(side), t.RandomHorizontalFlip(), t.ToTensor()])
    source = torchvision.datasets.ImageFolder(str(data), seen)
    return Some(torch.utils.data.DataLoader(source, 8, shuffle=True, num_workers=workers, drop_last=True), batches)


def few_workers(data: Path, seconds: float) -> dict:
    """torchvision's loader, without a worker; the cure is one."""
    alone()
    model, optimizer = network(32)

    def body(batch) -> None:
        learn(model, optimizer, batch[0], batch[1] % 100)

    found = watched(torchvision_loader(data, 32, 0, 90), body)
    achieved = in_turns(
        lambda: looped(torchvision_loader(data, 32, 0, 30), body),
        lambda: looped(torchvision_loader(data, 32, 1, 30), body),
    )
    predicted = found.gains.get("num_workers=1", (float("nan"),) * 3)
    return told("ahead|data", found.verdict.stage, said(found), "num_workers=1", predicted, achieved)


def slow_step(data: Path, seconds: float) -> dict:
    """torchvision's loader with a worker, and a network that is too slow for it; the cure is a smaller one."""
    alone()
    model, optimizer = network(96)

    def body(batch) -> None:
        learn(model, optimizer, batch[0], batch[1] % 100)

    found = watched(torchvision_loader(data, 96, 1, 130), body)
    achieved = in_turns(
        lambda: looped(torchvision_loader(data, 96, 1, 40), body),
        lambda: looped(torchvision_loader(data, 96, 1, 40), lambda batch: None),
    )
    return told("step", found.verdict.stage, said(found), "a free step", found.gains["a free step"], achieved)


CASES = {
    "storage": storage, "threads": threads, "step": step, "rank": rank, "consumer": consumer, "prefetch": prefetch,
    "dataloader, too few workers": few_workers, "dataloader, slow step": slow_step,
}  # fmt: skip


def main() -> None:
    options = harness.parser(QUESTION)
    options.add_argument("--data", type=Path, required=True, help="a folder of class folders of photographs")
    options.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    options.add_argument("--seconds", type=float, default=15, help="of a profile (default: 15)")
    options.add_argument("--of-a-rank", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.of_a_rank:
        of_a_rank(args.data, args.seconds, args.of_a_rank)
        return
    kept = json.loads(args.out.read_text())["cases"] if args.out and args.out.exists() else {}
    for number, name in enumerate(args.cases, 1):
        print(f"{number} of {len(args.cases)}: {name}", file=sys.stderr, flush=True)
        busy, began = calm(), time.perf_counter()
        case = CASES[name](args.data, args.seconds)
        kept[name] = case | {"others_busy": busy, "seconds": time.perf_counter() - began} | harness.facts()
        harness.write(args.out, QUESTION, {"cases": {name: kept[name] for name in CASES if name in kept}})


if __name__ == "__main__":
    main()
