"""Where does a training step's time go, which switch of the config pays, and what does plain PyTorch take?"""

import functools
import gc
import os

import harness
import torch
import torch.distributed as dist
from step_arms import batches_of, communicated, fed, plain_pytorch

from fastrot import distributed
from fastrot.config import GRAPHING_MODES
from fastrot.data.loader import MicroBatch
from fastrot.engine import AUTOCAST, StepSettings
from fastrot.engine.graphs import WARM_UPS, Graphed
from fastrot.engine.optimizers import build_optimizer
from fastrot.engine.plain import PlainEngine
from fastrot.errors import UserError
from fastrot.models.fused_conv import FUSED
from fastrot.models.in_node import InNode
from fastrot.models.over_ranks import neighbours
from fastrot.models.recompute import recompute_blocks
from fastrot.models.resnet import pad_stem
from fastrot.models.sync_batchnorm import synchronise_batchnorm
from fastrot.profiling import roofline
from fastrot.profiling.memory import peak_of_step
from fastrot.tasks.rotation import RotationTask
from fastrot.terminal import track

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BASE = {
    "channels_last": True, "precision": "bf16", "compile": False, "sync_batchnorm": True, "optimizer": "fused",
    "norm": "torch", "stem_channels": 3, "cuda_graphs": False, "recompute": False, "bucket_mb": 25.0,
    "norm_ranks": None, "symmetric_memory": False, "batch": 1.0, "crop": 1.0,
}  # fmt: skip
# One switch turned at a time, from BASE; batch and crop are shares of --images and --side; norm_ranks: of the groups
# of ranks whose norms are synchronised (None: all).
SWITCHES = {
    "base": {},
    "channels_last=false": {"channels_last": False},
    "precision=fp32": {"precision": "fp32"},
    "compile=true": {"compile": True},
    "compile=max-autotune-no-cudagraphs": {"compile": "max-autotune-no-cudagraphs"},
    "compile=reduce-overhead": {"compile": "reduce-overhead"},
    "compile=max-autotune": {"compile": "max-autotune"},
    "sync_batchnorm=false": {"sync_batchnorm": False},
    "norm_ranks=2": {"norm_ranks": 2},
    "norm=fused": {"norm": "fused"},
    "norm=fused compile=true": {"norm": "fused", "compile": True},
    "norm=fused_conv": {"norm": "fused_conv"},
    "norm=fused_conv compile=true": {"norm": "fused_conv", "compile": True},
    "norm=fused_chain": {"norm": "fused_chain"},
    "stem_channels=4": {"stem_channels": 4},
    "recompute=true": {"recompute": True},
    "norm=fused recompute=true": {"norm": "fused", "recompute": True},
    "cuda_graphs=true": {"cuda_graphs": True},
    "norm=fused stem_channels=4 cuda_graphs=true": {"norm": "fused", "stem_channels": 4, "cuda_graphs": True},
    "norm=fused_conv stem_channels=4 cuda_graphs=true": {
        "norm": "fused_conv",
        "stem_channels": 4,
        "cuda_graphs": True,
    },
    "norm=fused_chain stem_channels=4 cuda_graphs=true": {
        "norm": "fused_chain",
        "stem_channels": 4,
        "cuda_graphs": True,
    },
    "norm=fused_conv stem_channels=4 cuda_graphs=collectives": {
        "norm": "fused_conv",
        "stem_channels": 4,
        "cuda_graphs": "collectives",
    },
    "norm=fused_conv symmetric_memory=true": {"norm": "fused_conv", "symmetric_memory": True},
    "norm=fused_conv stem_channels=4 cuda_graphs=collectives symmetric_memory=true": {
        "norm": "fused_conv",
        "stem_channels": 4,
        "cuda_graphs": "collectives",
        "symmetric_memory": True,
    },
    "SGD unfused": {"optimizer": "unfused"},
    "LARS": {"optimizer": "lars"},
    "bucket_mb=0": {"bucket_mb": 0.0},
    "bucket_mb=5": {"bucket_mb": 5.0},
    "half the images": {"batch": 1 / 2},
    "a quarter of the images": {"batch": 1 / 4},
    "crop 160/224": {"crop": 160 / 224},
    "crop 192/224": {"crop": 192 / 224},
}
# a graph's backward is part of its forward; what the backward pass hides of the communication is part of that
STAGES = ("rotate", "forward", "backward", "communicate", "update")
TIMEOUT_S = 600.0  # that ranks wait for one another
GATED_STEPS = WARM_UPS + 2  # the last of them are replayed
NORM_SHARE = 0.05  # of a gradient's norm, that bf16 and its order of additions may move


class Step:
    """One way to train on a resident batch, a stage at a time."""

    def __init__(self, arch: str, images: int, side: int, ranks: distributed.Ranks, **switches):
        device, precision = ranks.device, switches["precision"]
        self.images, self.side = max(1, round(images * switches["batch"])), round(side * switches["crop"])
        self.views, self._world = 4 * self.images * ranks.world, ranks.world
        dtype = AUTOCAST.get(precision, torch.float32)
        self._task = RotationTask(MEAN, STD, dtype, device, channels=switches["stem_channels"])
        model = self._task.build_model(arch, 0)
        over_ranks = neighbours(norm_groups(switches, ranks.world), TIMEOUT_S)
        if switches["symmetric_memory"]:
            over_ranks = InNode.of(over_ranks, device, TIMEOUT_S)
        if switches["norm"] in FUSED:
            FUSED[switches["norm"]](model, over_ranks)
        if switches["stem_channels"] > 3:
            pad_stem(model)
        if switches["recompute"]:
            recompute_blocks(model)
        if over_ranks:
            synchronise_batchnorm(model, over_ranks)
        model.to(device)
        kind = switches["optimizer"]
        optimizer = build_optimizer(
            "lars" if kind == "lars" else "sgd", model, lr=0.01, momentum=0.9, nesterov=False, weight_decay=1e-4,
            decay_norms=True, trust=0.001, fused=kind == "fused",
        )  # fmt: skip
        graphs = bool(switches["cuda_graphs"])
        settings = StepSettings(precision, 0, None, 0.9, switches["channels_last"], graphs, switches["bucket_mb"])
        self._engine = PlainEngine(model, optimizer, settings, ranks)
        self._replay = Graphed(self._learn, device) if graphs else None
        if mode := switches["compile"]:
            model.compile(dynamic=False, mode="default" if mode is True else mode)
        pixels = resident(self.images, self.side, ranks)
        flips = torch.zeros(self.images, dtype=torch.uint8)
        turns = torch.arange(4, dtype=torch.uint8).repeat(self.images, 1)
        self._resident = self._batch = MicroBatch(pixels, flips, turns, None, None, self.views, last=True).to(device)
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
            self._engine.backward(self._loss, self._batch.views_of_step, self._batch.last)

    def _learn(self, views, batch):
        loss, sums = self._task.loss(self._engine.module, views, batch)
        self._engine.backward(loss, batch.views_of_step, batch.last)
        return sums

    def communicate(self) -> None:
        self._engine._average()

    def update(self) -> None:
        self._engine._step()

    def whole(self, batch: MicroBatch | None = None) -> None:
        """A step on a batch, else on the resident one."""
        self._batch = batch or self._resident
        for stage in STAGES:
            getattr(self, stage)()

    def learnt(self, steps: int) -> tuple[list[float], float]:
        """(mean loss over the views, step by step; the first gradient's norm). The first steps compile and capture."""
        losses, norms = [], []
        for _ in range(steps):
            self.whole()
            losses.append(over_ranks(self._sums[0] * self._world / self.views, self._world))
            norms.append(float(self._engine.grad_norm))
        self._engine._measure = False
        return losses, norms[0]

    def seconds(self, clock) -> dict[str, float]:
        return {stage: clock(getattr(self, stage)) for stage in STAGES}


def over_ranks(mean: torch.Tensor, world: int) -> float:
    """The mean of the ranks' means."""
    total = mean.detach().double().clone()
    dist.all_reduce(total)
    return total.item() / world


def resident(images: int, side: int, ranks: distributed.Ranks) -> torch.Tensor:
    """Upright crops, uint8 [n, S, S, 3], on the device: smooth, so that a wrong turn moves the gradient."""
    generator = torch.Generator().manual_seed(ranks.rank)
    coarse = torch.rand(images, 3, 5, 5, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return (255 * pixels).byte().permute(0, 2, 3, 1).contiguous().to(ranks.device)


def device_clock(work) -> float:
    """Seconds of a stage on the GPU, by events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def progress(items, title: str):
    return track(items, len(items), title) if dist.get_rank() == 0 else items


def with_memory(work, device: torch.device):
    """(its result, the GPU memory it took at most beside what was there, GiB)."""
    if device.type != "cuda":
        return work(), None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return work(), (torch.cuda.max_memory_allocated(device) - before) / 2**30


def norm_groups(switches: dict, world: int) -> int:
    """Of ranks whose norms are synchronised."""
    return world // (switches["norm_ranks"] or world) if switches["sync_batchnorm"] else world


def able(switches: dict, world: int, cuda: bool) -> bool:
    """Whether it can be measured here: graphs hold norms that talk to other ranks only where that is asked for, GPUs alone
    read one another's memory, and one rank has no buckets and no groups."""
    graphs = switches["cuda_graphs"] or switches["compile"] in GRAPHING_MODES
    talk = norm_groups(switches, world) < world
    holds = cuda and talk == (switches["cuda_graphs"] == "collectives")
    of_ranks = switches["bucket_mb"] != BASE["bucket_mb"] or switches["norm_ranks"]
    fits = not switches["norm_ranks"] or world % switches["norm_ranks"] == 0
    reads = (cuda and talk) or not switches["symmetric_memory"]
    return (holds or not graphs) and (world > 1 or not of_ranks) and fits and reads


def same_views(switches: dict) -> bool:
    return switches["batch"] == switches["crop"] == 1


def trains_alike(name: str) -> bool:
    """Whether by base's recipe: what is fast by another is no faster step."""
    switches = BASE | SWITCHES[name]
    same = all(switches[key] == BASE[key] for key in ("precision", "sync_batchnorm", "norm_ranks"))
    return same and same_views(switches) and switches["optimizer"] != "lars"


def same_norms(switches: dict, ranks: distributed.Ranks) -> bool:
    """As plain PyTorch's, which synchronises them on GPUs alone."""
    return norm_groups(switches, ranks.world) == (1 if ranks.device.type == "cuda" else ranks.world)


def gate(name: str, learnt: tuple, base: tuple, switches: dict, ranks: distributed.Ranks) -> None:
    """The losses and the first gradient are base's, where views and arithmetic must give the same."""
    if not same_views(switches):
        return
    (losses, norm), (base_losses, base_norm) = learnt, base
    # LARS and other arithmetic part ways with base as they learn; before the first update nothing has
    many, share = (GATED_STEPS, 0.05) if switches["cuda_graphs"] else (1, 0.02)
    near = all(abs(a - b) < share * b for a, b in zip(losses[:many], base_losses[:many], strict=True))
    harness.gate(near, f"{name}: the losses {losses[:many]} are base's {base_losses[:many]} within {share:.0%}")
    if norm_groups(switches, ranks.world) == 1:
        near = abs(norm - base_norm) < NORM_SHARE * base_norm
        harness.gate(
            near, f"{name}: the first gradient's norm {norm:.4g} is base's {base_norm:.4g} within {NORM_SHARE:.0%}"
        )


def measure(arms: dict, rounds: int, lap: int, clock) -> dict[str, dict]:
    """{arm: {stage: spread, "step": spread}}; each arm once a round, after a round that warms up. A stage is timed by
    itself, and a step over a lap of them in which the host may run ahead."""
    taken = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            work, times = (arm.whole, arm.seconds(clock)) if isinstance(arm, Step) else (arm, {})
            times["step"] = clock(lambda work=work: [work() for _ in range(lap)]) / lap
            if number:
                taken[name].append(times)
    return {
        name: {stage: harness.spread((times[stage] for times in each), "_s") for stage in each[0]}
        for name, each in taken.items()
    }


def main() -> None:
    parser = harness.parser(__doc__)
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    parser.add_argument("--arch", default="resnet50" if cuda else "resnet18")
    parser.add_argument("--images", type=int, default=128 if cuda else 8, help="a step and rank, before rotation")
    parser.add_argument("--side", type=int, default=224 if cuda else 64)
    names = [name for name, switches in SWITCHES.items() if able(BASE | switches, world, cuda)]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="SWITCH", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--lap", type=int, default=10 if cuda else 2, help="steps timed at a time")
    parser.add_argument(
        "--data", metavar="FOLDER", help="also train the fastest switch on these images as they are loaded"
    )
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one round of tiny steps, no compiling")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.arch, arguments.images, arguments.side = "resnet18", 2, 32
        arguments.rounds = arguments.lap = 1
        arguments.only = [name for name in arguments.only if "compile" not in name]
    # as a run sets them: every algorithm for a convolution measured, and fp32 that is fp32
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32 = True, 0, False
    ranks = distributed.start()
    try:
        keep = functools.partial(harness.keep, arguments.out if ranks.first else None, __doc__)
        result = race(arguments, ranks, harness.clock if not cuda else device_clock, keep)
    except UserError as error:
        raise SystemExit(str(error)) from None
    finally:
        distributed.end()
    if ranks.first:
        harness.write(arguments.out, __doc__, result)


def race(arguments, ranks: distributed.Ranks, clock, keep) -> dict:
    """The result, whole; keep(what there is of it) is called after each arm.

    Arms come one by one, each in the same rounds as base: together they would not fit a GPU. One that raises or fails
    its gate is missing, with its reason, and the others go on.
    """
    device, machine = ranks.device, harness.facts()
    make = functools.partial(Step, arguments.arch, arguments.images, arguments.side, ranks)
    time = functools.partial(measure, rounds=arguments.rounds, lap=arguments.lap, clock=clock)
    base = make(**BASE)
    learnt, memory = with_memory(functools.partial(base.learnt, steps_gated(device)), device)
    gate("base", learnt, learnt, BASE, ranks)  # no NaN
    times = time({"base": base})["base"]
    step_s = times["step"]["median_s"]
    line = times | {"views_per_s": base.views / step_s, "times_base": 1.0, "memory_gib": memory}
    line["collectives"] = communicated(base.whole, ranks)
    result = {
        "machine": machine,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "ranks": ranks.world,
        "base": BASE,
        "roof": roof(arguments, device, step_s),
        "estimated_gib": estimated_gib(arguments),
        "switches": {"base": line},
        "plain": {},
        "missing": {},
    }

    def timed(arm, views: int) -> dict:
        pair = time({"base": base.whole, "arm": arm})
        speed, base_step = views / pair["arm"]["step"]["median_s"], pair["base"]["step"]
        times_base = speed * base_step["median_s"] / base.views
        return pair["arm"] | {"base_step": base_step, "views_per_s": speed, "times_base": times_base}

    def plain(name: str) -> None:
        step, one = gated_peer(arguments, "compiled" in name, ranks)
        gate(name, one, learnt, BASE | {"sync_batchnorm": device.type == "cuda"}, ranks)
        result["plain"][name] = timed(step, base.views)

    def switched(name: str) -> None:
        switches = BASE | SWITCHES[name]
        step = make(**switches)
        its, memory = with_memory(functools.partial(step.learnt, steps_gated(device)), device)
        gate(name, its, learnt, switches, ranks)
        told = communicated(step.whole, ranks)
        result["switches"][name] = timed(step, step.views) | {"memory_gib": memory, "collectives": told}

    arms = {"plain PyTorch": plain, "plain PyTorch, compiled": plain} | dict.fromkeys(arguments.only, switched)
    arms.pop("base", None)
    if not any(SWITCHES[name].get("compile") for name in arguments.only):
        arms.pop("plain PyTorch, compiled")
    for name, arm in progress(arms.items(), "arms"):
        try:
            arm(name)
        except (Exception, harness.Unequal) as error:  # compilers raise what they like
            if ranks.world > 1 and not isinstance(error, harness.Unequal | UserError):
                raise  # the other ranks are waiting for this one
            result["missing"][name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        let_go(device)
        against_plain(result, ranks)
        keep(result)
    speed = {name: line["times_base"] for name, line in result["switches"].items() if trains_alike(name)}
    result["fastest"] = distributed.on_first(ranks, lambda: max(speed, key=speed.get))  # clocks differ
    if arguments.data:
        keep(result)
        step = make(**BASE | SWITCHES[result["fastest"]])
        step.learnt(steps_gated(device))
        batches, says = batches_of(arguments.data, arguments.images, arguments.side, ranks)
        spent = fed(step, batches, 4 * arguments.lap, arguments.rounds, device)
        rates = {name: base.views / spent[name]["median_s"] for name in ("data_alone", "step_alone", "both")}
        result["data"] = {"loader": says, **spent, "views_per_s": rates}
    return result


def steps_gated(device: torch.device) -> int:
    return GATED_STEPS if device.type == "cuda" else 1


def let_go(device: torch.device) -> None:
    """Free what an arm held: its modules refer to themselves, and compilers keep code and graphs."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def against_plain(result: dict, ranks: distributed.Ranks) -> None:
    """Add each switch's speed in terms of the faster plain PyTorch's, both measured beside base."""
    plain = max((line["times_base"] for line in result["plain"].values()), default=None)
    for name, line in result["switches"].items():
        switches = BASE | SWITCHES[name]
        if plain and same_views(switches) and same_norms(switches, ranks):
            line["times_plain"] = line["times_base"] / plain


def gated_peer(arguments, compiled: bool, ranks: distributed.Ranks) -> tuple:
    """(a step in plain PyTorch, what its first one learnt)."""
    weights = RotationTask.build_model(arguments.arch, 0).state_dict()
    pixels = resident(arguments.images, arguments.side, ranks)
    step, model = plain_pytorch(arguments.arch, weights, pixels, ranks, compiled)
    loss = over_ranks(step(), ranks.world)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    return step, ([loss], norm)


def estimated_gib(arguments) -> float:
    """What fastrot says before a run that base's step holds at its height, beside the weights: its memory_gib."""
    model, dtype = RotationTask.build_model(arguments.arch, 0), AUTOCAST[BASE["precision"]]
    return peak_of_step(model, 4 * arguments.images, 3, arguments.side, dtype) / 2**30


def roof(arguments, device: torch.device, step_s: float) -> dict:
    """What base's step asks of the device at least, and how near it comes."""
    build = functools.partial(RotationTask.build_model, arguments.arch, 0)
    dtype = AUTOCAST.get(BASE["precision"], torch.float32)
    rows = roofline.step_rows(build, 4 * arguments.images, arguments.images, arguments.side, dtype)
    rates = roofline.measure_rates(device, dtype)
    least_s = rates.seconds(rows)
    return {
        "step_flops": sum(row.flops for row in rows),
        "step_bytes": sum(row.bytes for row in rows),
        "device_flops_per_s": rates.flops,
        "device_bytes_per_s": rates.bytes,
        "least_s": least_s,
        "fraction": least_s / step_s,
    }


if __name__ == "__main__":
    main()
