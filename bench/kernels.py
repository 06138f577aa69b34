"""How fast do the norm's four kernels move bytes and the six products multiply, beside what kernels/traffic.py predicts?"""

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import harness
import torch
from torch import Tensor

import traffic
from fastrot.profiling import roofline
from fastrot_kernels.norm import op as norm
from fastrot_kernels.norm import reference as norm_reference
from fastrot_kernels.norm.interface import Norm
from fastrot_kernels.pointwise import op as pointwise
from fastrot_kernels.pointwise import reference as pointwise_reference

EPS, DTYPE = 1e-5, torch.bfloat16
NEAR = 2**-8  # each side rounds a value to 8 bits, which is off by 2**-9 of it at most; sums average that
_FEW = 4096  # rows that are compared with the reference


@dataclass(frozen=True)
class Case:
    """A kernel on one stage's maps. values: of 2 bytes that it reads and writes; flops; check: its results and the
    reference's."""

    layer: str
    kernel: str
    values: int
    flops: float
    work: Callable[[], object]
    check: Callable[[], tuple[object, object]]


def cases(views: int, stages: list[int], device: torch.device) -> Iterator[Case]:
    """Of each stage: bn1's kernels on its inner maps, bn3's on its outer ones, conv3's products between, conv1's into the block before."""
    for stage in stages:
        within, side, _ = traffic.STAGES[stage - 1]
        rows, outer, layer = views * side**2, traffic.WIDER * within, f"layer{stage}"
        yield from norms(layer, "", rows, within, device, added=False)
        yield from norms(layer, ", added", rows, outer, device, added=True)
        yield from products(layer, rows, within, outer, device)


def drawn(rows: int, channels: int, device: torch.device) -> Tensor:
    return torch.randn(rows, channels, device=device, dtype=DTYPE)


def norms(layer: str, says: str, rows: int, channels: int, device: torch.device, added: bool) -> Iterator[Case]:
    x, dy, other = (drawn(rows, channels, device) for _ in range(3))
    weight, bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)

    def of(x: Tensor, dy: Tensor, other: Tensor, ours: bool) -> dict[str, Callable[[], object]]:
        """The four by name, ours or the reference's."""
        moments = norm_reference.moments(x)
        at = (moments, weight, bias, EPS, True)
        y = norm.apply(x, other, *at) if added else None
        sums = norm_reference.gradient_sums(dy, x, y, Norm(*at))
        extra = other if added else None
        if ours:
            return {
                "moments": lambda: norm.moments(x),
                "apply": lambda: norm.apply(x, extra, *at),
                "sums": lambda: norm.gradient_sums(dy, x, y, *at),
                "gradients": lambda: norm.gradients(dy, x, y, moments, weight, bias, sums, EPS, True),
            }
        return {
            "moments": lambda: norm_reference.moments(x),
            "apply": lambda: norm_reference.apply(x, extra, Norm(*at)),
            "sums": lambda: norm_reference.gradient_sums(dy, x, y, Norm(*at)),
            "gradients": lambda: norm_reference.gradients(dy, x, y, Norm(*at), sums),
        }

    few = tuple(one[:_FEW] for one in (x, dy, other))
    passes = {"moments": 1, "apply": 3 if added else 2, "sums": 3 if added else 2, "gradients": 5 if added else 3}
    work, ours, theirs = of(x, dy, other, True), of(*few, True), of(*few, False)
    for name, many in passes.items():
        check = functools.partial(lambda name: (ours[name](), theirs[name]()), name)
        yield Case(layer, f"norm: {name}{says}", many * x.numel(), 0.0, work[name], check)


def unmasked(z: Tensor, _mask: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """A bit of the mask tells a value just above 0 from one just below."""
    return z, *more


def products(layer: str, rows: int, within: int, outer: int, device: torch.device) -> Iterator[Case]:
    x, dy, weight = drawn(rows, within, device), drawn(rows, outer, device), drawn(outer, within, device)
    affine = pointwise.affine(norm_reference.moments(x), torch.ones_like(weight[0]), torch.zeros_like(weight[0]), EPS)
    affine, back, added = affine.float(), weight.t().contiguous(), drawn(rows, outer, device)
    ones, zeros = torch.ones(outer, device=device), torch.zeros(outer, device=device)

    def of(x: Tensor, dy: Tensor, added: Tensor, module) -> dict[str, Callable[[], object]]:
        moments = norm_reference.moments(dy)
        outer = pointwise.affine(moments, ones, zeros, EPS)
        sums = norm_reference.gradient_sums(added, dy, None, Norm(moments, ones, zeros, EPS, False))
        backward = pointwise.backward_affine(sums, moments, ones, EPS)
        made = (dy, back, outer, added, None)
        _, mask, *_ = pointwise.joined_forward(*made)
        joined = (x, back, [dy], [outer], mask, added, 1, 1, 1)
        return {
            "forward of a norm, moments": lambda: module.forward(x, weight, affine),
            "joined forward, moments": lambda: unmasked(*module.joined_forward(*made)),
            "data gradient, sums": lambda: module.data_gradient(dy, weight, x, affine),
            "joined gradient, sums": lambda: module.joined_gradient(*joined),
            "through a norm, data gradient": lambda: module.normed_gradient(added, weight, dy, backward, x, affine),
            "weight gradient": lambda: module.weight_gradient(dy, x, affine),
        }

    low, high, flops = x.numel(), dy.numel(), 2.0 * rows * within * outer
    few = tuple(one[:_FEW] for one in (x, dy, added))
    work, ours, theirs = of(x, dy, added, pointwise), of(*few, pointwise), of(*few, pointwise_reference)
    bits = high // 16
    moved = (
        low + high,
        3 * high + bits + low,
        high + 2 * low,
        low + 3 * high + bits,
        3 * high + 2 * low,
        high + low,
    )
    for name, values in zip(work, moved, strict=True):
        check = functools.partial(lambda name: (ours[name](), theirs[name]()), name)
        yield Case(layer, f"product: {name}", values, flops, work[name], check)


def apart(got: object, want: object) -> float:
    """By their norms, the difference's share of what is wanted: of a map as a whole, since a value on the ReLU's edge
    may fall to either side; of statistics row by row, since a count outweighs a mean."""
    whole = list(zip(got, want, strict=True)) if isinstance(got, tuple) else [(got, want)]
    pairs = [pair for a, b in whole if b.numel() for pair in (zip(a, b, strict=True) if len(b) <= 3 else [(a, b)])]
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def seconds(work: Callable[[], object], lap: int, device: torch.device) -> float:
    """Of one, in a lap in which the host may run ahead."""
    if device.type != "cuda":
        return harness.clock(work)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(lap):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / lap


def measured(case: Case, rounds: int, lap: int, device: torch.device) -> dict:
    """A row: microseconds, GB/s and TFLOP/s, and the microseconds that traffic.py's rates predict."""
    far = apart(*case.check())
    harness.gate(far < NEAR, f"{case.layer} {case.kernel}: within {far:.2g} of the reference, at most {NEAR:.2g}")
    case.work()  # compiles
    taken = statistics.median(seconds(case.work, lap, device) for _ in range(rounds))
    ours = case.kernel.startswith("product")
    moved = traffic.BF16 * case.values
    predicted = traffic.Kernel(case.layer, case.kernel, moved, case.flops, ours).seconds(traffic.Rates())
    return {
        "layer": case.layer, "kernel": case.kernel, "us": 1e6 * taken, "predicted_us": 1e6 * predicted,
        "gb_per_s": moved / taken / 1e9, "tflop_per_s": case.flops / taken / 1e12,
    }  # fmt: skip


def implied(rows: list[dict], device: torch.device) -> dict:
    """The rates that these rows and a plain product show, and the step's views/s by traffic.py at them."""
    norms = [row["gb_per_s"] for row in rows if not row["tflop_per_s"]]
    heavy = [row["tflop_per_s"] for row in rows if row["tflop_per_s"] and row["layer"] in ("layer3", "layer4")]
    library = roofline.measure_rates(device, DTYPE).flops / 1e12
    rates = traffic.Rates(statistics.median(norms), library, statistics.median(heavy or [library]))
    paces = {arm: 1 / sum(kernel.seconds(rates) for kernel in traffic.kernels(arm)) for arm in traffic.ARMS}
    return {"rates": rates._asdict(), "predicted_by": traffic.Rates()._asdict(), "views_per_s": paces}


def main() -> None:
    parser, cuda = harness.parser(__doc__), torch.cuda.is_available()
    parser.add_argument("--views", type=int, default=512 if cuda else 1)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4] if cuda else [3, 4], choices=range(1, 5))
    parser.add_argument("--lap", type=int, default=20, help="kernels timed at a time")
    arguments = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    result = {
        "machine": harness.facts(), "device": torch.cuda.get_device_name() if cuda else "CPU", "rows": [], "missing": {},
    }  # fmt: skip
    for case in cases(arguments.views, arguments.stages, device):
        try:
            result["rows"].append(measured(case, arguments.rounds, arguments.lap, device))
        except (Exception, harness.Unequal) as error:  # compilers raise what they like
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            result["missing"][f"{case.layer} {case.kernel}"] = why
        harness.keep(arguments.out, __doc__, result)
    if result["rows"]:
        result |= implied(result["rows"], device)
    harness.write(arguments.out, __doc__, result)


if __name__ == "__main__":
    main()
