"""What a training step must compute and move, and how fast this device could: the roof over its speed."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.module_tracker import ModuleTracker

_MESSAGES = ("all_gather_into_tensor", "all_reduce")  # of norms: forward, backward
_RAMP_S = 0.3  # of work before a GPU is timed: the clocks of an idle one are low
_RAMP_GROUPS = 30  # groups of runs in that time: of 10 ms each

# torch counts the one that is not in place
register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(flop_registry[torch.ops.aten.addmm])


@dataclass(frozen=True)
class Row:
    """One operation of a step. flops: a multiplication and an addition are two; bytes: arguments and results,
    each once, as torch runs it unfused."""

    layer: str
    operation: str
    backward: bool
    flops: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """What steps ask of one rank, and the time it takes its device at best.

    matmul_s  the FLOPs alone, at the rate of matrix products; least_s  each operation bound by the slower of
    FLOPs and bytes.
    """

    flops: int = 0
    bytes: int = 0
    matmul_s: float = 0.0
    least_s: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def reached(self, seconds: float) -> dict[str, float]:
        """How near steps that took `seconds` came to the rate of matrix products (MFU) and to the roof over
        their operations; empty where nothing was counted."""
        return {"mfu": self.matmul_s / seconds, "roof_fraction": self.least_s / seconds} if self.flops else {}


@dataclass(frozen=True)
class Rates:
    """What a device does: FLOP/s of large matrix products, bytes/s that a large copy reads and writes."""

    flops: float
    bytes: float

    def seconds(self, rows: list[Row]) -> float:
        """Least time of these operations, one after the other: each bound by the slower of the two."""
        return sum(max(row.flops / self.flops, row.bytes / self.bytes) for row in rows)

    def work(self, rows: list[Row]) -> Work:
        """These operations, summed up."""
        flops = sum(row.flops for row in rows)
        return Work(flops, sum(row.bytes for row in rows), flops / self.flops, self.seconds(rows))


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.rows: list[Row] = []
        self._modules = ModuleTracker()

    def __enter__(self) -> Self:
        self._modules.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's
        self._modules.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        packet = function.overloadpacket
        if packet in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            out = tree_map_only(Tensor, _channels_last, out)  # as on a device; the meta device forgets it
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        names = sorted(self._modules.parents - {"Global"}, key=len)
        moved = 0 if function.is_view else _bytes((args, kwargs)) + _bytes(out)
        if flops or moved:
            # a module's name begins with its class: ResNet.layer1.0.conv1
            layer = names[-1].partition(".")[2] if names else ""
            operation = packet._qualified_op_name.removeprefix("aten::")
            self.rows.append(Row(layer or "step", operation, self._modules.is_bw, flops, moved))
        return out


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def step_rows(build: Callable[[], nn.Module], views: int, images: int, side: int, dtype: torch.dtype) -> list[Row]:
    """The operations of one training step on `views` views [3, side, side] of `images` crops.

    Forward, loss, backward, SGD with momentum on float32 weights, and the making of the views. The model is
    built and traced on the meta device: nothing is computed. Weights and maps are taken to be dtype.
    """
    with torch.device("meta"):
        model = build().to(dtype).train()
        x = torch.empty(views, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        target = torch.empty(views, dtype=torch.long)
    with _Trace() as trace:
        F.cross_entropy(model(x).float(), target).backward()
    parameters = sum(p.numel() for p in model.parameters())
    made = images * 3 * side * side + _bytes(x)
    # the update reads weight, gradient and momentum and writes two of them back
    return [
        Row("views", "rotate_views", False, 0, made),
        *trace.rows,
        Row("update", "sgd", False, 4 * parameters, 5 * 4 * parameters),
    ]


def norm_messages(rows: list[Row]) -> tuple[int, tuple[int, int]]:
    """What synchronised norms say to other ranks in a step of these operations: (messages of the forward pass, of which
    the backward pass has as many; those of each that are waited for with no product computed since)."""
    sent, waited, flying = Counter[str](), Counter[str](), ""
    for row in rows:
        operation = row.operation.removeprefix("_c10d_functional::")
        if operation in _MESSAGES:
            sent[operation], flying = sent[operation] + 1, operation
        elif operation == "wait_tensor":
            waited[flying] += 1
        elif row.flops:
            flying = ""
    forward, backward = (waited[operation] for operation in _MESSAGES)
    return sent[_MESSAGES[0]], (forward, backward)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few runs of one matrix product and one copy; under a second, and 1 GiB of a GPU."""
    cuda = device.type == "cuda"
    n, numbers = (8192, 2**28) if cuda else (1024, 2**24)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source, target = torch.zeros(2, numbers // 2, device=device)
    product = _least_seconds(lambda: a @ b, device)
    copy = _least_seconds(lambda: target.copy_(source), device)
    if cuda:  # its own memory is not the run's peak
        torch.cuda.reset_peak_memory_stats(device)
    return Rates(2 * n**3 / product, 2 * _bytes(source) / copy)


def _least_seconds(work: Callable[[], object], device: torch.device, times: int = 8) -> float:
    """Of one run. On a GPU, of groups of runs between events: the host's clock would add the wait for each."""
    if device.type != "cuda":
        return min(_seconds(work) for _ in range(times))
    runs, until = 0, time.perf_counter() + _RAMP_S
    while time.perf_counter() < until:
        work()
        torch.cuda.synchronize(device)
        runs += 1
    group, spans = max(1, runs // _RAMP_GROUPS), []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(group):
            work()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize(device)
    least_ms: float = min(begin.elapsed_time(end) for begin, end in spans)
    return least_ms / 1e3 / group


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
