"""How near does rotate_views come to the memory's speed, and how far from it is what people write by hand?"""

import functools

import harness
import plot
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as F

from fastrot_kernels import backends, rotate_views

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOST_ULPS = 2  # of the peers: DALI multiplies by 1 / std, torch.compile contracts


def usual(x: Tensor, flips: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn, stack, then the float pipeline over all views, as tutorials do."""
    upright = torch.where(flips.bool()[:, None, None, None], x.flip(2), x)
    views = torch.stack([upright.rot90(k, (1, 2)) for k in range(4)], 1).flatten(0, 1).permute(0, 3, 1, 2)
    views = (views.float() - mean[:, None, None]) / std[:, None, None]
    return views.to(dtype).contiguous(memory_format=torch.channels_last)


def careful(x: Tensor, flips: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise each source once and in place, turn in the small type, write each view where it belongs."""
    upright = torch.where(flips.bool()[:, None, None, None], x.flip(2), x)
    upright = upright.float().sub_(mean).div_(std).to(dtype)
    n, side = x.shape[:2]
    out = torch.empty((n, 4, side, side, x.shape[3]), dtype=dtype, device=x.device)
    for k in range(4):
        out[:, k] = upright.rot90(k, (1, 2))
    return out.flatten(0, 1).permute(0, 3, 1, 2)


def torchvision(x: Tensor, flips: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """torchvision's transforms v2 on the batch."""
    images = x.permute(0, 3, 1, 2)
    images = torch.where(flips.bool()[:, None, None, None], F.horizontal_flip(images), images)
    views = torch.stack([F.rotate(images, 90.0 * k) for k in range(4)], 1).flatten(0, 1)
    views = F.normalize(F.to_dtype(views, torch.float32, scale=False), MEAN, STD)
    return views.to(dtype).contiguous(memory_format=torch.channels_last)


class Dali:
    """DALI's operators, float16 (it has no bfloat16): flip, transpose, then crop_mirror_normalize a view."""

    def __init__(self, x: Tensor, flips: Tensor):
        from nvidia.dali import fn, pipeline_def, types

        place = "gpu" if x.is_cuda else "cpu"

        @pipeline_def(batch_size=len(x), num_threads=torch.get_num_threads(), device_id=0 if x.is_cuda else None)
        def views():
            images = fn.external_source(name="x", device=place, layout="HWC", no_copy=True)
            flips = fn.external_source(name="flips", device="cpu", no_copy=True)
            upright = fn.flip(images, horizontal=flips)
            turned = fn.transpose(upright, perm=[1, 0, 2], transpose_layout=False)
            ways = [upright, fn.flip(turned, vertical=1, horizontal=0)]
            ways += [fn.flip(upright, vertical=1), fn.flip(turned, vertical=0)]
            finish = functools.partial(
                fn.crop_mirror_normalize, mean=list(MEAN), std=list(STD), dtype=types.FLOAT16, output_layout="HWC"
            )
            return tuple(finish(way) for way in ways)

        self._pipe = views(exec_dynamic=False, prefetch_queue_depth=1)
        self._pipe.build()
        self._x = x if x.is_cuda else x.numpy()
        self._flips = flips.int().cpu().numpy()

    def __call__(self) -> tuple:
        self._pipe.feed_input("x", self._x)
        self._pipe.feed_input("flips", self._flips)
        return self._pipe.run()

    def tensor(self) -> Tensor:
        """The views in our order, for the gate."""
        outs = (out.as_cpu() if hasattr(out, "as_cpu") else out for out in self())
        views = [torch.from_numpy(out.as_array()) for out in outs]
        return torch.stack(views, 1).flatten(0, 1).permute(0, 3, 1, 2)


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each taken as one pass over its arguments and results."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if function is torch.ops.aten.copy_.default:
            read = read[1:]
        owned = {t.untyped_storage().data_ptr() for t in read}
        is_view = function.is_view or all(t.untyped_storage().data_ptr() in owned for t in written)
        in_place = function._schema.is_mutable
        if (not is_view or in_place) and function not in (torch.ops.aten.empty.memory_format,):
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return out


def ulps(got: Tensor, want: Tensor) -> int:
    """Largest distance in units of the last place."""
    if got.dtype != want.dtype:
        raise ValueError(f"{got.dtype} is compared with {want.dtype}")
    integer = torch.int32 if got.dtype == torch.float32 else torch.int16
    bits = [t.permute(0, 2, 3, 1).contiguous().view(integer).long() for t in (got, want)]
    got, want = (torch.where(b < 0, -(b & torch.iinfo(integer).max) - 1, b) for b in bits)
    return (got - want).abs().max().item()


def device_clock(work) -> float:
    """Seconds of a call on the GPU, by events around four of them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(4):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 4e3


def measure(side: int, mib: int, dtype: torch.dtype, device: torch.device, rounds: int, compiled: bool, dali: bool):
    """One size: what each version moves, how long it takes, and what a copy takes."""
    n = max(4, mib * 2**20 // (4 * side * side * 3 * dtype.itemsize))
    generator = torch.Generator().manual_seed(side)
    x = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator).to(device)
    flips = torch.randint(0, 2, (n,), dtype=torch.uint8, generator=generator).to(device)
    turns = torch.arange(4, dtype=torch.uint8, device=device).repeat(n, 1)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)

    ours = {f"fastrot {name}": functools.partial(rotate_views, x, flips, turns, mean, std, dtype, backend=name)
            for name in backends.runnable_backends(device) if name != "reference"}  # fmt: skip
    peers = {"usual torch": usual, "careful torch": careful, "torchvision v2": torchvision}
    if compiled:
        torch.compiler.reset()  # a size's own kernels: from the second on dynamo would make one for all
        names = ("usual torch", "careful torch")
        peers |= {f"{name}, compiled": torch.compile(peers[name], dynamic=False) for name in names}
    works = ours | {name: functools.partial(f, x, flips, mean, std, dtype) for name, f in peers.items()}

    want = rotate_views(x, flips, turns, mean, std, dtype, backend="reference")
    apart = {name: ulps(work(), want) for name, work in works.items()}
    if dali:
        works["DALI fp16"] = Dali(x, flips)
        halves = rotate_views(x, flips, turns, mean, std, torch.float16, backend="reference")
        apart["DALI fp16"] = ulps(works["DALI fp16"].tensor(), halves.cpu())
    wrong = {name: far for name, far in apart.items() if far > (1 if name in ours else MOST_ULPS)}
    if wrong:
        raise SystemExit(f"side {side}: not equal to the reference, so not timed (ulps): {wrong}")

    moved = {}
    for name, work in works.items():
        if not any(word in name for word in ("DALI", "compiled", "numpy")):  # what torch's dispatch does not see
            with Traffic() as traffic:
                work()
            moved[name] = traffic.bytes / x.numel()
    source, target = torch.zeros_like(want), torch.zeros_like(want)
    works["copy"] = lambda: target.copy_(source)
    seconds = harness.alternating(works, rounds, device_clock if device.type == "cuda" else harness.clock)
    least = x.numel() + want.numel() * want.element_size()
    copied = 2 * want.numel() * want.element_size() / seconds["copy"]["median_s"]
    usual_s = seconds["usual torch"]["median_s"]
    return {
        "images": n,
        "written_mib": want.numel() * want.element_size() / 2**20,
        "copy_gb_per_s": copied / 1e9,
        "versions": {
            name: {
                **time,
                "fraction_of_copy": least / time["median_s"] / copied,
                "times_usual_torch": usual_s / time["median_s"],
                "bytes_moved_per_source_byte": moved.get(name),
                "ulps": apart.get(name),
            }
            for name, time in seconds.items()
            if name != "copy"
        },
    }


def main() -> None:
    parser = harness.parser(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 128, 160, 192, 224, 256, 384, 512])
    parser.add_argument("--mib", type=int, default=1024 if cuda else 128, help="least written a call, above the caches")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--compile", action="store_true", default=cuda, help="torch.compile the peers, too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device(arguments.device)
    result = {"machine": harness.facts(), "device": torch.cuda.get_device_name() if cuda else "CPU",
              "threads": torch.get_num_threads(), "dtype": arguments.dtype, "missing": {}, "sides": {}}  # fmt: skip
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        result["missing"]["DALI fp16"] = str(error)
        print(f"no DALI: {error}")
    for side in arguments.sides:
        result["sides"][side] = measure(
            side,
            arguments.mib,
            DTYPES[arguments.dtype],
            device,
            arguments.rounds,
            arguments.compile,
            not result["missing"],
        )
    harness.write(arguments.out, __doc__, result)
    if arguments.out:
        groups = {}
        for side, at in result["sides"].items():
            rate = lambda s, n=at["images"]: 4 * n / s / 1e3  # noqa: E731
            groups[f"{side} x {side}"] = {
                name: (rate(v["median_s"]), rate(v["most_s"]), rate(v["least_s"])) for name, v in at["versions"].items()
            }
        title = f"Rotated views, {arguments.dtype}, {result['device']}: thousands a second"
        plot.bars(arguments.out.with_suffix(".svg"), title, "k/s", groups)


if __name__ == "__main__":
    main()
