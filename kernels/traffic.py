"""What a ResNet-50's training step moves and computes, kernel by kernel, on paper: a table, and a time.

    python kernels/traffic.py              the table of README.md
    python kernels/traffic.py --kernels    every kernel of it
    python kernels/traffic.py --write      the table into README.md

Of one view of 224 in bf16 as kernels run: what they read and what they write, each pass once. A kernel takes as long as
its bytes or its products, whichever is longer; launches, caches, partial sums and NCCL cost nothing here.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parent / "fastrot_kernels" / "README.md"
ARMS = ("torch", "fused", "fused_conv", "fused_chain")
STAGES = ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3))  # channels within, side, blocks
SIDE, WIDER, CLASSES = 224, 4, 4
PARAMETERS, VIEWS = 23_516_228, 512  # views that a step's weights are shared by
BF16, INT64 = 2, 8
BEGIN, END = "<!-- kernels/traffic.py --write -->", "<!-- end of traffic.py's -->"


class Rates(NamedTuple):
    """GB/s of memory; TFLOP/s of cuDNN's and cuBLAS's products, and of ours."""

    memory: float = 2300
    library: float = 400
    ours: float = 350


@dataclass(frozen=True)
class Kernel:
    layer: str
    what: str
    bytes: float
    flops: float = 0.0
    ours: bool = False

    def seconds(self, rates: Rates) -> float:
        products = (rates.ours if self.ours else rates.library) * 1e12
        return max(self.bytes / (rates.memory * 1e9), self.flops / products)


class Block(NamedTuple):
    """A Bottleneck by values a view: of its input, after conv1, after conv2, and after conv3 or the shortcut.

    inputs, within  channels of its input, and of its 3x3 convolution; stride; first: of its stage, so it has a shortcut.
    """

    layer: str
    x: int
    mid: int
    low: int
    out: int
    inputs: int
    within: int
    stride: int
    first: bool


def passes(layer: str, where: str, **maps: int) -> Iterator[Kernel]:
    """Kernels that compute little: by name, the values that each reads and writes."""
    for what, values in maps.items():
        yield Kernel(layer, f"{where}: {what.replace('_', ' ')}", BF16 * values)


def convolution(layer: str, where: str, x: int, y: int, inputs: int, read: int | None = None) -> Iterator[Kernel]:
    """cuDNN's: maps of x values in, of which `read` are read, y out, each of these a sum over `inputs`; x 0: the
    network's input, which has no gradient."""
    read, flops = x if read is None else read, 2.0 * y * inputs
    yield Kernel(layer, f"{where}: forward", BF16 * (read + y), flops)
    yield Kernel(layer, f"{where}: weight gradient", BF16 * (y + read), flops)
    if x:
        yield Kernel(layer, f"{where}: data gradient", BF16 * (y + x), flops)


def norm(arm: str, layer: str, where: str, n: int, relu: bool = True, added: bool = False) -> Iterator[Kernel]:
    """Batch norm of n values, an addition and a ReLU after it."""
    if arm == "torch":
        yield from passes(layer, where, statistics=n, normalise=2 * n, sums=2 * n, gradient=3 * n)
        yield from passes(layer, where, **({"addition": 3 * n} if added else {}))
        yield from passes(layer, where, **({"ReLU": 2 * n, "ReLU_backward": 3 * n} if relu else {}))
    else:
        yield from passes(layer, where, moments=n, apply=(3 if added else 2) * n)
        yield from passes(layer, where, sums=(3 if added else 2) * n, gradients=(5 if added else 3) * n)


def stem(arm: str, pixels: int, n: int) -> Iterator[Kernel]:
    """The network up to its first block; n values of its norm, a fourth as many windows of its max-pool."""
    yield from convolution("stem", "conv1", 0, n, 147, read=pixels)
    windows = n // 4
    if arm == "torch":
        yield from norm(arm, "stem", "bn1", n)
        pooled = windows * (BF16 + INT64)  # with where each maximum was
        yield Kernel("stem", "maxpool: forward", BF16 * n + pooled)
        yield Kernel("stem", "maxpool: backward", BF16 * n + pooled)
    else:
        yield from passes("stem", "bn1", moments=n)
        yield Kernel("stem", "bn1, maxpool: forward", BF16 * (n + 2 * windows) + windows)
        yield from passes("stem", "bn1, maxpool", sums=2 * windows)
        yield Kernel("stem", "bn1, maxpool: gradient", BF16 * (2 * n + windows) + windows)


def separate(arm: str, block: Block) -> Iterator[Kernel]:
    """Convolutions by cuDNN, norms between them."""
    layer, x, mid, low, out, inputs, within, stride, first = block
    yield from convolution(layer, "conv1", x, mid, inputs)
    yield from norm(arm, layer, "bn1", mid)
    yield from convolution(layer, "conv2", mid, low, 9 * within)
    yield from norm(arm, layer, "bn2", low)
    yield from convolution(layer, "conv3", low, out, within)
    if first:
        yield from convolution(layer, "shortcut", x, out, inputs, read=x // stride**2)
        yield from norm(arm, layer, "its norm", out, relu=False)
    yield from norm(arm, layer, "bn3", out, added=True)
    yield from passes(layer, "input", gradients_added=3 * x)


def together(block: Block, before: Block | None = None, after: Block | None = None) -> Iterator[Kernel]:
    """As fastrot/models/fused_conv.py runs it, between blocks that it is chained with."""
    layer, x, mid, low, out, inputs, within, stride, first = block

    def product(what: str, values: int, flops: float, ours: bool = True) -> Kernel:
        return Kernel(layer, what, BF16 * values, flops, ours)

    one, three = 2.0 * mid * inputs, 2.0 * out * within
    if before:
        yield product("conv1: forward of the block before, moments", 3 * x + x // 16 + mid, one)
    else:
        yield product("conv1: forward, moments", x + mid, one)
    yield from passes(layer, "bn1", apply=2 * mid, sums=2 * mid, gradients=3 * mid)
    yield from convolution(layer, "conv2", mid, low, 9 * within)
    yield from passes(layer, "bn2", moments=low, gradients=3 * low)
    yield product("conv3: forward of bn2, moments", low + out, three)
    yield product("conv3: weight gradient", out + low, three)
    if after:
        yield product("conv3: data gradient through bn3, bn2's sums", 3 * out + 2 * low, three)
    else:
        yield product("conv3: data gradient, bn2's sums", out + 2 * low, three)
        yield from passes(layer, "bn3", apply=3 * out, sums=3 * out, gradients=5 * out)
    yield product("conv1: weight gradient", mid + x, one, ours=False)
    thin, short = x // stride**2, 2.0 * out * inputs
    if before:
        seen = 2 * x if before.first else x  # what its norms took
        yield product("conv1: data gradient, joined", mid + thin + seen + x + x // 16, one)
    elif first:
        yield product("conv1: data gradient", mid + x, one, ours=False)
    else:
        yield product("conv1: data gradient, added", mid + 2 * x, one, ours=False)
    if not first:
        return
    yield from passes(layer, "shortcut", **({"rows_copied": 2 * thin} if stride > 1 else {}))
    yield product("shortcut: forward, moments", thin + out, short)
    if after:
        yield product("shortcut: data gradient through its norm", 3 * out + thin, short)
    else:
        yield from passes(layer, "its norm", apply=2 * out, sums=2 * out, gradients=3 * out)
        yield product("shortcut: data gradient", out + thin, short, ours=False)
    yield product("shortcut: weight gradient", out + thin, short, ours=False)
    yield from passes(layer, "input", **({} if before else {"gradients_added": 3 * thin}))


def blocks() -> Iterator[Block]:
    inputs, before = STAGES[0][0], STAGES[0][1]
    for stage, (within, side, count) in enumerate(STAGES, 1):
        for number in range(count):
            stride, outputs = before // side, WIDER * within
            maps = inputs * before**2, within * before**2, within * side**2, outputs * side**2
            yield Block(f"layer{stage}.{number}", *maps, inputs, within, stride, number == 0)
            inputs, before = outputs, side


def kernels(arm: str) -> Iterator[Kernel]:
    """Every kernel of a view's step."""
    pixels, last = 3 * SIDE**2, STAGES[-1][0] * WIDER
    yield Kernel("views", "rotate_views", pixels / 4 + BF16 * pixels)
    yield from stem(arm, pixels, STAGES[0][0] * (SIDE // 2) ** 2)
    every = [None, *blocks(), None]
    for before, block, after in zip(every, every[1:], every[2:], strict=False):
        if arm == "fused_chain":
            yield from together(block, before, after)
        else:
            yield from together(block) if arm == "fused_conv" else separate(arm, block)
    yield from passes("head", "avgpool", forward=50 * last, backward=50 * last)
    yield Kernel("head", "fc: forward and backward", 0.0, 3 * 2.0 * last * CLASSES)
    # cast 6, read by two products 4, gradient 4, SGD reads three and writes two of 4
    yield Kernel("weights", "cast, read, their gradients, SGD", PARAMETERS / VIEWS * (6 + 4 + 4 + 20))


def groups() -> dict[str, list[str]]:
    """Rows of the table: layers that are alike stand together."""
    rows = {"views": ["views"], "stem": ["stem"]}
    for stage, (_, _, count) in enumerate(STAGES, 1):
        rows[f"layer{stage}.0"] = [f"layer{stage}.0"]
        rows[f"layer{stage}.1 to {count - 1}"] = [f"layer{stage}.{n}" for n in range(1, count)]
    return rows | {"head": ["head"], "weights, a 512th": ["weights"]}


def table(rates: Rates = Rates()) -> str:  # noqa: B008  a tuple
    """Markdown: by layer, GFLOP, MB and microseconds of each arm."""
    arms = {arm: list(kernels(arm)) for arm in ARMS}
    lines = [
        "| a view | GFLOP | "
        + " | ".join(f"MB, {arm}" for arm in ARMS)
        + " | "
        + " | ".join(f"µs, {a}" for a in ARMS)
        + " |",
        "|" + "---|" * (2 + 2 * len(ARMS)),
    ]
    for row, layers in (groups() | {"**all**": list({k.layer: None for k in arms["torch"]})}).items():
        of = {arm: [k for k in every if k.layer in layers] for arm, every in arms.items()}
        cells = [f"{sum(k.flops for k in of['torch']) / 1e9:.2f}"]
        cells += [f"{sum(k.bytes for k in of[arm]) / 1e6:.1f}" for arm in ARMS]
        cells += [f"{sum(k.seconds(rates) for k in of[arm]) * 1e6:.1f}" for arm in ARMS]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    empty = " |" * (1 + len(ARMS))
    paces = [1 / sum(k.seconds(rates) for k in every) for every in arms.values()]
    lines.append(f"| views/s |{empty} " + " | ".join(f"{pace:,.0f}" for pace in paces) + " |")
    return "\n".join(lines)


def text() -> str:
    """What stands in the README between its markers."""
    rates = Rates()
    return (
        f"{BEGIN}\nAt {rates.memory:,.0f} GB/s, {rates.library:.0f} TFLOP/s of cuDNN's and cuBLAS's products and "
        f"{rates.ours:.0f} of ours (an H100, by calibration):\n\n{table(rates)}\n{END}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gbs", type=float, default=Rates().memory, help="GB/s of memory")
    parser.add_argument("--tflops", type=float, default=Rates().library, help="of cuDNN's and cuBLAS's products")
    parser.add_argument("--own-tflops", type=float, default=Rates().ours, help="of Triton's products")
    parser.add_argument("--kernels", choices=ARMS, help="every kernel of one of them")
    parser.add_argument("--write", action="store_true", help="the table into the README")
    args = parser.parse_args()
    rates = Rates(args.gbs, args.tflops, args.own_tflops)
    if args.write:
        README.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: text(), README.read_text(), flags=re.DOTALL))
    elif args.kernels:
        for k in kernels(args.kernels):
            print(
                f"{k.layer:10} {k.what:36} {k.bytes / 1e6:8.3f} MB {k.flops / 1e9:7.3f} GFLOP {k.seconds(rates) * 1e6:7.2f} µs"
            )
    else:
        print(table(rates))


if __name__ == "__main__":
    main()
