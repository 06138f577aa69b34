"""What a training would take on machines that nobody has queued for: arithmetic over a hardware file.

A pace is evaluated three times: with every number at its worst, at its value, at its best. Sources: ring and tree
all-reduce by alpha and beta (Thakur et al. 2005), the checkpoint interval by Young (1974) and Daly (2006).
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

from fastrot.profiling.hardware import Hardware, Known
from fastrot.profiling.roofline import Row

Corner = Literal["worst", "value", "best"]
_BACKWARD = 2 / 3  # of a step's work: two products for each of the forward pass
_MIB = 2**20
_LESS_IS_BETTER = ("link_latency_s", "net_latency_s", "launch_s", "restart_s")


@dataclass(frozen=True)
class Demand:
    """What a training asks. images, views: a step over all ranks; gradient_bytes: of all weights in fp32; norms: messages
    of synchronised norms in the forward pass, and as many in the backward pass (0: none is); norm_waits: of either those
    that a step waits for, the others being on their way during a product; norm_channels: of all; bucket_mb: 0 averages in one piece after the
    backward pass; image_bytes: of a file, in the mean; memory_bytes: of one GPU; checkpoint_bytes: written at once; steps: of the schedule.
    launches: of kernels by the host, 0 where CUDA graphs replay them.  norm_ranks: that a norm synchronises; None: all.
    measured: a step where one was profiled; None takes the roofline of `rows`."""

    images: int
    views: int
    steps: int
    gradient_bytes: int
    norms: int
    norm_waits: tuple[int, int]
    norm_channels: int
    bucket_mb: float
    image_bytes: float
    memory_bytes: float
    checkpoint_bytes: float
    rows: tuple[Row, ...]
    launches: int = 0
    norm_ranks: int | None = None
    measured: "Measured | None" = None


@dataclass(frozen=True)
class Measured:
    """One rank's step, profiled at two sizes, without communication: `fixed_s` and `image_s` more for each image; spread:
    its least and most over it. On the host's cores the step takes host_fixed_s and host_image_s, an image's data path
    data_s besides; a rank that communicates keeps comm_cores busy. decode: images/s of a rank's data path alone; crowding:
    how many times as long the cores take when all are busy."""

    fixed_s: float
    image_s: float
    spread: tuple[float, float]
    host_fixed_s: float
    host_image_s: float
    data_s: float
    decode: float
    comm_cores: float
    crowding: float = 1.0

    def seconds(self, images: float, corner: Corner) -> float:
        factor = {"worst": self.spread[1], "value": 1.0, "best": self.spread[0]}[corner]
        return factor * (self.fixed_s + self.image_s * images)

    def host_s(self, images: float) -> float:
        """Core-seconds of a step, without the data path."""
        return self.host_fixed_s + self.host_image_s * images


@dataclass(frozen=True)
class Numbers:
    """A hardware file at one corner."""

    values: dict[str, float]

    @classmethod
    def of(cls, hardware: Hardware, corner: Corner) -> "Numbers":
        def pick(name: str, known: Known) -> float:
            if corner == "value":
                return known.value
            low_is_best = name in _LESS_IS_BETTER
            return known.low if (corner == "best") == low_is_best else known.high

        fields = {name: getattr(hardware, name) for name in Hardware.model_fields}
        return cls({name: pick(name, value) for name, value in fields.items() if isinstance(value, Known)})

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def all_reduce_s(numbers: Numbers, size: float, nodes: int, gpus: int) -> float:
    """Seconds to sum `size` bytes over nodes x gpus: scattered and gathered within a node by rings, between nodes each
    GPU its part by a ring or a tree, whichever is faster."""
    within = 2 * (gpus - 1) * (numbers["link_latency_s"] + size / gpus / numbers["link_bytes"])
    if nodes == 1:
        return within
    part = size / gpus
    ring = 2 * (nodes - 1) * (numbers["net_latency_s"] + part / nodes / numbers["net_bytes"])
    tree = 2 * math.ceil(math.log2(nodes)) * numbers["net_latency_s"] + 2 * part / numbers["net_bytes"]
    return within + min(ring, tree)


def norm_s(numbers: Numbers, channels: float, nodes: int, gpus: int, rings: bool) -> tuple[float, float]:
    """Seconds of a synchronised norm's messages, which latency rules: (statistics gathered in the forward pass, sums in
    the backward pass). By trees within and between nodes, or by rings, which sums go around twice."""
    gathered, summed = 4 * (2 * channels + 1) * nodes * gpus, 4 * 2 * channels
    wire = numbers["net_bytes"] if nodes > 1 else numbers["link_bytes"]
    if rings:
        hops = (gpus - 1) * numbers["link_latency_s"] + (nodes - 1) * numbers["net_latency_s"]
        return hops + gathered / wire, 2 * hops + 2 * summed / wire
    within, between = math.ceil(math.log2(gpus)), math.ceil(math.log2(nodes))
    hops = within * numbers["link_latency_s"] + between * numbers["net_latency_s"]
    return hops + gathered / wire, hops + 2 * summed / wire


@dataclass(frozen=True)
class Step:
    """Seconds of a step and of its parts. compute: a GPU's own; norms: waiting for synchronised norms; gradients: what
    averaging them adds to the backward pass; data_s: what the slowest of storage, decoders and, where the step was
    profiled, the node's cores needs for it."""

    compute_s: float
    norms_s: float
    gradients_s: float
    data_s: float
    bound: str

    @property
    def seconds(self) -> float:
        return max(self.compute_s + self.norms_s + self.gradients_s, self.data_s)


def step_of(demand: Demand, hardware: Hardware, nodes: int, gpus: int, corner: Corner = "value") -> Step:
    """One step. gpus: a node's. demand.rows: of one GPU's share."""
    n, ranks = Numbers.of(hardware, corner), nodes * gpus
    images, m, what = math.ceil(demand.images / ranks), demand.measured, "compute"
    turns = 1.0
    if m:
        alone = m.seconds(images, corner)
        ranks_a_core = (
            gpus * m.crowding / m.seconds(images, "value") / hardware.cores
        )  # for each second of a rank's work on the host
        compute = alone * max(1.0, ranks_a_core * (m.host_s(images) + m.data_s * images))
        if corner != "best":  # who gets a message must have a core to go on
            turns = max(1.0, ranks_a_core * m.host_s(images))
    else:
        compute = sum(max(row.flops / n["matmul_flops"], row.bytes / n["memory_bytes"]) for row in demand.rows)
        launched = demand.launches * n["launch_s"]
        what, compute = ("the host's launches", launched) if launched > compute else (what, compute)
    norms = gradients = 0.0
    if ranks > 1:
        if demand.norms:
            channels = demand.norm_channels / demand.norms
            among = demand.norm_ranks or ranks
            each = norm_s(n, channels, math.ceil(among / gpus), min(gpus, among), hardware.fabric == "gloo")
            waits = demand.norm_waits if corner != "worst" else (demand.norms, demand.norms)  # products hide none
            norms = turns * sum(seconds * times for seconds, times in zip(each, waits, strict=True))
        gradients = _exposed_s(demand, n, nodes, gpus, compute)
    data = _data_s(demand, hardware, n, nodes, gpus, norms + gradients)
    slowest = max(data, key=lambda name: data[name])
    computing = {what: compute, "synchronised norms": norms, "gradients": gradients}
    bound = slowest if data[slowest] > sum(computing.values()) else max(computing, key=lambda name: computing[name])
    return Step(compute, norms, gradients, data[slowest], bound)


def _data_s(
    demand: Demand, hardware: Hardware, n: Numbers, nodes: int, gpus: int, communicating: float
) -> dict[str, float]:
    """Seconds that each part of the way to a step's images needs, and the node's cores for all that they do."""
    share, m = demand.images / nodes, demand.measured
    storage = share * demand.image_bytes / n["storage_bytes"]
    if not m:
        return {
            "storage": storage,
            "decoding": share / max(gpus * n["gpu_decode"], hardware.cores * n["core_decode"]),
        }
    busy = gpus * (m.host_s(share / gpus) + m.comm_cores * communicating) + m.data_s * share
    return {
        "storage": storage,
        "decoding": share / gpus / m.decode,
        "the node's cores": m.crowding * busy / hardware.cores,
    }


def _exposed_s(demand: Demand, n: Numbers, nodes: int, gpus: int, compute: float) -> float:
    """What averaging adds: buckets fill evenly over the backward pass, each goes off when it is full and the one before
    it is through."""
    if not demand.bucket_mb:
        return all_reduce_s(n, demand.gradient_bytes, nodes, gpus)
    buckets = max(1, math.ceil(demand.gradient_bytes / (demand.bucket_mb * _MIB)))
    each, backward, free = demand.gradient_bytes / buckets, _BACKWARD * compute, 0.0
    for number in range(1, buckets + 1):
        free = max(free, backward * number / buckets) + all_reduce_s(n, each, nodes, gpus)
    return free - backward


def checkpoint_interval_s(write_s: float, to_failure_s: float) -> float:
    """Daly's: between checkpoints that hold the training up for write_s, where failures come each to_failure_s."""
    if write_s >= 2 * to_failure_s:
        return to_failure_s
    root = math.sqrt(2 * write_s * to_failure_s)
    return root * (1 + math.sqrt(write_s / (2 * to_failure_s)) / 3 + write_s / (18 * to_failure_s)) - write_s


def goodput(
    hours: float,
    interval_s: float,
    write_s: float,
    to_failure_s: float,
    restart_s: float,
    seed: int = 0,
    runs: int = 20,
) -> float:
    """Share of the time that is training which stays, by simulated runs: failures come at random (exponentially), cost
    what was done since the last checkpoint, and a restart."""
    chance, wanted = Random(seed), hours * 3600
    if wanted <= 0:
        return 1.0
    spent = 0.0
    for _ in range(runs):
        kept = 0.0
        while kept < wanted:
            until = chance.expovariate(1 / to_failure_s)
            left = wanted - kept
            whole = left + write_s * math.ceil(left / interval_s)
            if until >= whole:
                spent, kept = spent + whole, wanted
            else:
                spent, kept = spent + until + restart_s, kept + interval_s * (until // (interval_s + write_s))
    return runs * wanted / spent


@dataclass(frozen=True)
class Plan:
    """A training on nodes x gpus. Each of the triples: worst, value, best. efficiency: of views/s a GPU, over one GPU's."""

    nodes: int
    gpus: int
    views_per_s: tuple[float, float, float]
    hours: tuple[float, float, float]
    gpu_hours: float
    step: Step
    efficiency: float
    images_per_s_a_node: float
    bytes_per_s_a_node: float
    cores_to_decode: float
    memory_share: float
    checkpoint_s: float
    checkpoint_every_s: float
    goodput: float


def plan(demand: Demand, alone: Demand, hardware: Hardware, nodes: int, gpus: int) -> Plan:
    """demand: of one GPU's share on these; alone: of the same step on a single GPU."""
    steps = [step_of(demand, hardware, nodes, gpus, corner) for corner in ("worst", "value", "best")]
    worst, middle, best = (demand.views / step.seconds for step in steps)
    n, ranks = Numbers.of(hardware, "value"), nodes * gpus
    one = alone.views / step_of(alone, hardware, 1, 1).seconds
    images = demand.images / steps[1].seconds / nodes
    write = demand.checkpoint_bytes / n["storage_bytes"]
    to_failure = n["gpu_hours_to_failure"] * 3600 / ranks
    every = checkpoint_interval_s(write, to_failure)
    hours = [demand.steps * step.seconds / 3600 for step in steps]
    good = goodput(hours[1], every, write, to_failure, n["restart_s"])
    return Plan(
        nodes,
        gpus,
        (worst, middle, best),
        (hours[0] / good, hours[1] / good, hours[2] / good),
        hours[1] / good * ranks,
        steps[1],
        middle / ranks / one,
        images,
        images * demand.image_bytes,
        images / n["core_decode"],
        demand.memory_bytes / (hardware.gpu_memory_gib * 2**30),
        write,
        every,
        good,
    )
