"""Where does a training step's time go, and which switch of the config pays?"""

import functools

import harness
import torch

from fastrot import distributed, optim
from fastrot.data.loader import MicroBatch
from fastrot.engine import AUTOCAST, StepSettings
from fastrot.engine.plain import PlainEngine
from fastrot.fusedconv import FUSED
from fastrot.graphs import WARM_UPS, Capture, Graphed
from fastrot.model import pad_stem, synchronise_batchnorm
from fastrot.profiling import roofline
from fastrot.recompute import recompute_blocks
from fastrot.tasks.rotation import RotationTask

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BASE = {
    "channels_last": True, "precision": "bf16", "compile": False, "sync_batchnorm": True, "optimizer": "fused",
    "norm": "torch", "stem_channels": 3, "cuda_graphs": False, "recompute": False,
}  # fmt: skip
# One switch turned at a time, from BASE.
SWITCHES = {
    "base": {},
    "channels_last=false": {"channels_last": False},
    "precision=fp32": {"precision": "fp32"},
    "compile=true": {"compile": True},
    "sync_batchnorm=false": {"sync_batchnorm": False},
    "norm=fused": {"norm": "fused"},
    "norm=fused compile=true": {"norm": "fused", "compile": True},
    "norm=fused_conv": {"norm": "fused_conv"},
    "norm=fused_conv compile=true": {"norm": "fused_conv", "compile": True},
    "stem_channels=4": {"stem_channels": 4},
    "recompute=true": {"recompute": True},
    "norm=fused recompute=true": {"norm": "fused", "recompute": True},
    "cuda_graphs=true": {"cuda_graphs": True},
    "norm=fused stem_channels=4 cuda_graphs=true": {"norm": "fused", "stem_channels": 4, "cuda_graphs": True},
    "norm=fused_conv stem_channels=4 cuda_graphs=true": {
        "norm": "fused_conv", "stem_channels": 4, "cuda_graphs": True,
    },
    "SGD unfused": {"optimizer": "unfused"},
    "LARS": {"optimizer": "lars"},
}
STAGES = ("rotate", "forward", "backward", "update")  # a graph's backward is part of its forward
GATED_STEPS = WARM_UPS + 2  # the last of them are replayed


class Step:
    """One way to train on a resident batch, a stage at a time. capture: graphs' own, so that they share memory."""

    def __init__(
        self, arch: str, images: int, side: int, ranks: distributed.Ranks, capture: Capture | None, **switches
    ):
        device, precision = ranks.device, switches["precision"]
        dtype = AUTOCAST.get(precision, torch.float32)
        self._task = RotationTask(MEAN, STD, dtype, device, channels=switches["stem_channels"])
        model = self._task.build_model(arch, 0)
        if switches["norm"] in FUSED:
            FUSED[switches["norm"]](model, switches["sync_batchnorm"])
        if switches["stem_channels"] > 3:
            pad_stem(model)
        if switches["recompute"]:
            recompute_blocks(model)
        if switches["sync_batchnorm"]:
            synchronise_batchnorm(model)
        model.to(device)
        kind = switches["optimizer"]
        optimizer = optim.build_optimizer(
            "lars" if kind == "lars" else "sgd", model, lr=0.01, momentum=0.9, nesterov=False, weight_decay=1e-4,
            decay_norms=True, trust=0.001, fused=kind == "fused",
        )  # fmt: skip
        graphs = switches["cuda_graphs"]
        settings = StepSettings(precision, 0, None, 0.9, switches["channels_last"], graphs)
        self._engine = PlainEngine(model, optimizer, settings, ranks)
        self._replay = Graphed(self._learn, device, capture) if graphs else None
        if switches["compile"]:
            model.compile(dynamic=False)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)
        flips = torch.zeros(images, dtype=torch.uint8)
        turns = torch.arange(4, dtype=torch.uint8).repeat(images, 1)
        self._batch = MicroBatch(pixels, flips, turns, None, None, 4 * images).to(device)
        self._views = self._loss = self._sums = None

    def rotate(self) -> None:
        self._views = self._task.views(self._batch)

    def forward(self) -> None:
        if self._replay:
            self._sums = self._replay(self._views, self._batch)
        else:
            self._loss, self._sums = self._task.loss(self._engine.module, self._views, self._batch)

    def backward(self) -> None:
        if not self._replay:
            self._engine.backward(self._loss, self._batch.views_of_step)

    def _learn(self, views, batch):
        loss, sums = self._task.loss(self._engine.module, views, batch)
        self._engine.backward(loss, batch.views_of_step)
        return sums

    def update(self) -> None:
        self._engine.step(measure=False)

    def losses(self) -> list[float]:
        """Mean loss over the views, step by step; the first steps compile and capture."""
        out = []
        for _ in range(GATED_STEPS):
            self.rotate()
            self.forward()
            out.append(self._sums[0].item() / self._batch.views_of_step)
            self.backward()
            self.update()
        return out

    def seconds(self, clock) -> dict[str, float]:
        return {stage: clock(getattr(self, stage)) for stage in STAGES}


def device_clock(work) -> float:
    """Seconds of a stage on the GPU, by events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def learnt(step: Step, device: torch.device) -> tuple[list[float], float | None]:
    """The first losses of a way to train, and the GPU memory it took at most beside what was there, GiB."""
    if device.type != "cuda":
        return step.losses(), None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return step.losses(), (torch.cuda.max_memory_allocated(device) - before) / 2**30


def measure(steps: dict[str, Step], rounds: int, clock) -> dict[str, dict]:
    """{switch: {stage: spread}}; each switch once a round, after a round that warms up."""
    taken = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            times = step.seconds(clock)
            if number:
                taken[name].append(times | {"step": sum(times.values())})
    return {
        name: {stage: harness.spread((times[stage] for times in each), "_s") for stage in (*STAGES, "step")}
        for name, each in taken.items()
    }


def main() -> None:
    parser = harness.parser(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--arch", default="resnet50" if cuda else "resnet18")
    parser.add_argument("--images", type=int, default=128 if cuda else 8, help="a step, before rotation")
    parser.add_argument("--side", type=int, default=224 if cuda else 64)
    able = [name for name in SWITCHES if cuda or "cuda_graphs" not in name]
    parser.add_argument("--only", nargs="+", choices=able, default=able, help="switches to measure")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one round of tiny steps, no compiling")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.arch, arguments.images, arguments.side, arguments.rounds = "resnet18", 2, 32, 1
        arguments.only = [name for name in arguments.only if "compile" not in name]
    ranks = distributed.start()
    try:
        capture = Capture(ranks.device) if cuda else None
        make = functools.partial(Step, arguments.arch, arguments.images, arguments.side, ranks, capture)
        steps = {name: make(**(BASE | SWITCHES[name])) for name in dict.fromkeys(["base", *arguments.only])}
        losses, memory = zip(*(learnt(step, ranks.device) for step in steps.values()), strict=True)
        for name, each in zip(steps, losses, strict=True):
            # LARS and other arithmetic part ways with base as they learn; before the first update nothing has
            many, share = (GATED_STEPS, 0.05) if "cuda_graphs" in name else (1, 0.02)
            near = all(abs(a - b) < share * b for a, b in zip(each[:many], losses[0][:many], strict=True))
            harness.gate(near, f"{name}: the loss of {many} steps is base's within {share:.0%}")
        stages = measure(steps, arguments.rounds, device_clock if ranks.device.type == "cuda" else harness.clock)
        build = functools.partial(RotationTask.build_model, arguments.arch, 0)
        dtype = AUTOCAST.get(BASE["precision"], torch.float32)
        rows = roofline.step_rows(build, 4 * arguments.images, arguments.images, arguments.side, dtype)
        rates = roofline.measure_rates(ranks.device, dtype)
    finally:
        distributed.end()
    base_s, least_s = stages["base"]["step"]["median_s"], rates.seconds(rows)
    result = {
        "machine": harness.facts(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "ranks": ranks.world,
        "base": BASE,
        "roof": {
            "step_flops": sum(row.flops for row in rows),
            "step_bytes": sum(row.bytes for row in rows),
            "device_flops_per_s": rates.flops,
            "device_bytes_per_s": rates.bytes,
            "least_s": least_s,
            "fraction": least_s / base_s,
        },
        "switches": {
            name: {
                **each,
                "views_per_s": 4 * arguments.images / each["step"]["median_s"],
                "times_base": base_s / each["step"]["median_s"],
                "memory_gib": held,
            }
            for (name, each), held in zip(stages.items(), memory, strict=True)
        },
    }
    if ranks.first:
        harness.write(arguments.out, __doc__, result)


if __name__ == "__main__":
    main()
