"""Parts that ask what is fast: the benches of bench/, and a training's wait for data."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrot import config as configs
from fastrot import distributed
from fastrot.data.build import make_loader, open_manifest
from fastrot.data.loader import StepBatch
from fastrot.errors import Fault, UserError
from fastrot.probes import knn, voc_svm
from fastrot.profiling.stages import ceiling
from fastrot.runs.arithmetic import RECIPE_VIEWS
from fastrot.selfcheck import verdict
from fastrot.selfcheck.correctness import SAME, small
from fastrot.selfcheck.images import drawn
from fastrot.selfcheck.place import CHECKOUT, Found, Place, launcher

POINTS = 0.1  # of a percentage, that a probe may be from the CPU's
WAIT = 0.01  # of a training's time, at most, for data on a GPU
_DRAWN = 4096  # for a GPU's loader
_DRAWN_FOR_PEERS = 512  # bench/loader.py writes them in every form
_AT_ONCE = 128  # images of in1k_fast
_IMAGES_A_GIB = 1.8  # ResNet-50 at 224 in bf16 by torch's modules holds 100 MB a view
ARMS = (
    "base", "cuda_graphs=true", "norm=fused", "norm=fused_conv", "norm=fused_conv stem_channels=4 cuda_graphs=true",
    "norm=fused stem_channels=4 cuda_graphs=true", "stem_channels=4", "channels_last=false", "compile=true",
    "norm=fused_chain", "norm=fused_chain stem_channels=4 cuda_graphs=true", "norm=fused_conv compile=true", "norm=fused compile=true", "compile=reduce-overhead",
)  # fmt: skip
_IN_GRAPHS = "norm=fused_conv stem_channels=4 cuda_graphs=collectives"
_RANKS_ARMS = (  # those that were never seen to work come last: one that raises ends the others
    "base", "sync_batchnorm=false", "norm_ranks=2", "norm=fused_conv", "bucket_mb=0", "bucket_mb=5", _IN_GRAPHS,
    "norm=fused_conv symmetric_memory=true", f"{_IN_GRAPHS} symmetric_memory=true",
)  # fmt: skip
_RANKS_WAYS = {  # over ranks, each to learn as without
    "engine.cuda_graphs=collectives": ["cuda_graphs=collectives"],
    "engine.symmetric_memory=true": ["symmetric_memory=true"],
    "both": ["cuda_graphs=collectives", "symmetric_memory=true"],
}


def at_once(place: Place) -> int:
    """Images that this card holds in a step, a power of two, at most in1k_fast's."""
    if not place.gpu:
        return 4
    room = torch.cuda.get_device_properties(0).total_memory / 2**30 * _IMAGES_A_GIB
    return int(min(_AT_ONCE, max(2, 2 ** int(np.log2(room)))))


def rotation(place: Place, found: Found) -> None:
    """bench/rotate.py: equal to the reference, or it has no figure."""
    size = ["--sides", 160, 224] if place.gpu else ["--sides", 32, "--mib", 1, "--rounds", 1, "--device", "cpu"]
    found.raw |= place.bench(found, "rotate", *size)
    for side, at in found.raw.get("sides", {}).items():
        ours = {name: line for name, line in at["versions"].items() if name.startswith("fastrot")}
        name, best = max(ours.items(), key=lambda entry: entry[1]["fraction_of_copy"])
        peer = min(line["median_s"] for other, line in at["versions"].items() if other not in ours)
        share, times = best["fraction_of_copy"], peer / best["median_s"]
        says = f"{share:.0%} of a copy's speed, {times:.1f} times the best peer"
        found.figures.append((f"side {side}, {name}", says))
    found.skipped += [f"{peer}: {why}" for peer, why in found.raw.get("missing", {}).items()]


def kernels(place: Place, found: Found) -> None:
    """bench/kernels.py: the four norm kernels and the six products, beside kernels/traffic.py's prediction."""
    size = ["--rounds", 5] if place.gpu else ["--rounds", 1, "--stages", 4]
    found.raw |= place.bench(found, "kernels", *size)
    found.failures += [f"{kernel}: {why}" for kernel, why in found.raw.get("missing", {}).items()]
    rows = found.raw.get("rows", [])
    for kind, key, unit in (("norm", "gb_per_s", "GB/s"), ("product", "tflop_per_s", "TFLOP/s")):
        if paces := sorted(row[key] for row in rows if row["kernel"].startswith(kind)):
            predicted = found.raw["predicted_by"]["memory" if kind == "norm" else "ours"]
            says = f"{paces[0]:,.1f} to {paces[-1]:,.1f} {unit}; {predicted:,.0f} were predicted"
            found.figures.append((f"{kind} kernels", says))
    for arm, pace in found.raw.get("views_per_s", {}).items():
        found.figures.append((f"the step by these rates, norm={arm}", f"{pace:,.0f} views/s"))


def step(place: Place, found: Found) -> None:
    """bench/step.py: the config's switches and plain PyTorch, in turns with base."""
    arms = [arm for arm in ARMS if place.gpu or "compile" not in arm]
    size = ["--rounds", 3, "--images", at_once(place)] if place.gpu else ["--quick"]
    stand_in = () if place.gpu else ("-m", "fastrot.selfcheck.stand_in")
    if len(arms) < len(ARMS):
        found.skipped.append(f"{len(ARMS) - len(arms)} compiled arms: minutes on a CPU")
    found.raw |= place.bench(found, "step", *size, "--only", *arms, before=(sys.executable, *stand_in))
    found.failures += [f"{arm}: {why}" for arm, why in found.raw.get("missing", {}).items()]
    if "switches" not in found.raw:
        return
    found.raw["images"] = at_once(place)
    chosen = verdict.choose(verdict.arms_of(found.raw))
    line, roof = found.raw["switches"][chosen.name], found.raw["roof"]
    found.figures.append((f"pays: {chosen.name}", f"{line['views_per_s']:,.0f} views/s"))
    for name, what in (("times_plain", "times plain PyTorch"), ("times_base", "times base")):
        if name in line:
            found.figures.append((what, f"{line[name]:.2f}"))
    if took := found.raw["switches"]["base"]["memory_gib"]:
        found.figures.append(("memory of base's step", f"{took:.1f} GiB; {found.raw['estimated_gib']:.1f} by estimate"))
    rates = f"{roof['device_flops_per_s'] / 1e12:,.1f} TFLOP/s, {roof['device_bytes_per_s'] / 1e9:,.0f} GB/s"
    found.figures.append(("the device's products and copies", rates))


def loader(place: Place, found: Found) -> None:
    """bench/loader.py, which decodes on the CPU; and the loader that feeds this device."""
    size = ["--seconds", 2, "--rounds", 3] if place.gpu else ["--seconds", 0.1, "--rounds", 1, "--threads", 1]
    arms = ["ours: turbo, folder", *(["ours: dali, folder", "DALI reader", "DataLoader, decode"] if place.gpu else [])]
    folder, sheets = drawn(place.work, _DRAWN if place.gpu else 16), place.work / "sheets"
    shares = [("auto", "0"), ("auto", "0.65"), ("auto", "0.9"), ("auto", "1"), ("nvimgcodec", "0"), ("nvimgcodec", "1")]
    for decode, share in shares if place.gpu else [("auto", "null"), ("nvimgcodec", "null")]:
        try:
            says, pace = _fed(place, folder, decode, share)
        except (UserError, Fault, RuntimeError) as error:
            found.failures.append(f"data.decode={decode}, hardware share {share}: {error}".partition("\n")[0])
            continue
        found.raw[says] = pace
        found.figures.append((says, f"{pace:,.0f} images/s"))
    few = drawn(place.work, _DRAWN_FOR_PEERS) if place.gpu else folder
    found.raw |= place.bench(found, "loader", "--data", few, "--arms", *arms, "--sheets", sheets, *size)
    for row in found.raw.get("rows", []):
        found.figures.append((f"{row['arm']} (on the CPU)", f"{row['images_per_s']['median']:,.0f} images/s"))
    for arm, why in found.raw.get("missing", {}).items():
        (found.failures if arm.startswith("ours") else found.skipped).append(f"{arm}: {why}")


def _fed(place: Place, folder: Path, decode: str, share: str) -> tuple[str, float]:
    """(how it decodes, images/s that reach the device), at a share for the hardware decoder."""
    images, side = (128, 224) if place.gpu else (4, 64)
    ranks = distributed.start()
    try:
        words = [f"data.train={folder}", f"data.crop={side}", f"data.decode={decode}", f"data.hw_decoder_load={share}"]
        config, _ = configs.load(None, words)
        loader, says = make_loader(config, open_manifest(str(folder), config, ranks, "data.train"), ranks, images, None)
        with closing(loader.train(range(10**9), 0, images, 1, 0, 1, lambda epoch: side)) as batches:
            work = partial(_taken, batches, ranks.device)
            for _ in range(8):
                work()
            pace = ceiling(work, 4 if place.gpu else 0.5).pace
    finally:
        distributed.end()
    return says + (f", hardware share {share}" if place.gpu else ""), pace


def _taken(batches: Iterator[StepBatch], device: torch.device) -> int:
    """Images of the next step, on the device."""
    return sum(len(micro.to(device).sample) for micro in next(batches).micro_steps)


def end_to_end(place: Place, found: Found) -> None:
    """A training with the switches that the step's part chose, and its share of waiting for data."""
    many, side, arch, steps = (_DRAWN, 224, "resnet50", 400) if place.gpu else (16, 32, "resnet18", 8)
    chosen = verdict.choose(verdict.arms_of(place.earlier("step")))
    keys = verdict.engine_keys(chosen) | {"precision": "bf16" if place.gpu else "fp32"}
    lines, failure = place.train(
        "end-to-end", f"data.train={drawn(place.work, many)}", f"data.crop={side}", f"model.arch={arch}",
        f"optim.images_per_step={at_once(place)}", "optim.epochs=1000", f"run.max_steps={steps}",
        f"run.log_every={steps // 4}", "optim.lr=0.01",
        *(f"engine.{key}={str(value).lower()}" for key, value in keys.items()), most=1.0,
    )  # fmt: skip
    steady = [line for line in lines if "wait_share" in line][1:]  # the first compiles, captures, fills its buffers
    found.failures += [failure] if failure else []
    if not steady:
        return
    wait, views = (float(np.mean([line[key] for line in steady])) for key in ("wait_share", "views_per_s"))
    found.raw |= {"wait_share": wait, "views_per_s": views, "engine": keys, "lines": lines}
    found.figures += [
        ("switches", chosen.name), ("trained", f"{views:,.0f} views/s"), ("waiting for data", f"{wait:.2%}"),
    ]  # fmt: skip
    if place.gpu and wait > WAIT:
        found.failures.append(f"waits for data {wait:.2%} of its time, more than {WAIT:.0%}")


def probes(place: Place, found: Found) -> None:
    """Features of drawn images; the SVM and k-NN of bench/probes_arms.py's features, here and on the CPU."""
    sys.path.insert(0, str(CHECKOUT / "bench"))
    draw = import_module("probes_arms").features
    rows, dims, classes, bank, wide = (5011, 9216, 20, 50_000, 2048) if place.gpu else (200, 96, 3, 2000, 64)
    x, y = draw(2 * rows, dims, classes)
    near, labels = draw(bank + bank // 10, wide, 10)
    label = labels.argmax(1)

    def svm(device: str, some: int) -> Any:
        """Percent."""
        return 100 * voc_svm(x[:some], y[:some], x[rows : rows + some], y[rows : rows + some], device=device).per_class

    def neighbours(device: str, some: int) -> Any:
        """Percent."""
        return knn(near[:some], label[:some], near[bank:], label[bank:], ks=(20,), device=device)[20][0]

    device = "cuda" if place.gpu else "cpu"
    for name, probe, few, all_rows, size in (
        ("SVM", svm, min(rows, 1000), rows, f"{rows:,} rows of {dims:,}, {classes} classes"),
        ("k-NN", neighbours, min(bank, 5000), bank, f"{bank // 10:,} rows of {wide:,} in {bank:,}"),
    ):
        here, cpu = (np.asarray(probe(where, few), float) for where in (device, "cpu"))
        apart = float(np.nanmax(np.abs(here - cpu)))
        seconds = _seconds(partial(probe, device, all_rows))
        found.figures.append((f"{name}, {size}", f"{seconds:.2f} s, {apart:.2g} points from the CPU's"))
        found.raw[name] = {"seconds": seconds, "apart_from_cpu": apart}
        if not apart < POINTS:
            found.failures.append(f"{name}: {apart:.3f} points from the CPU's, more than {POINTS}")
    _features(place, found)


def _seconds(work: Callable[[], object]) -> float:
    clock = time.perf_counter()
    work()
    return time.perf_counter() - clock


def _features(place: Place, found: Found) -> None:
    """`fastrot features` over drawn images."""
    count = _DRAWN if place.gpu else 16
    words = ["--random-init", "0", "--data", drawn(place.work, count), "--out", place.work / "features"]
    words += ["model.arch=resnet50", "engine.precision=bf16"] if place.gpu else ["model.arch=resnet18"]
    clock = time.perf_counter()
    failure = place.call([sys.executable, "-m", "fastrot.cli", "features", "--taps", "1,5,avg", *words])
    seconds = time.perf_counter() - clock
    if failure:
        found.failures.append(failure)
        return
    found.raw["features"] = {"images": count, "seconds": seconds}
    found.figures.append((f"features of {count:,} images, the start included", f"{seconds:.1f} s"))


def ranks(place: Place, found: Found) -> None:
    """bench/step.py over all GPUs, and over two: scaling, synchronised norms, buckets, NCCL's time, with all the images
    that a card holds and with its share of the recipe's; and whether graphs that capture the norms' messages, and norms
    that read memory, learn as steps without."""
    gpus = torch.cuda.device_count() if place.gpu else 2
    if gpus < 2:
        found.skipped.append("scaling, synchronised norms, buckets: need two GPUs, and there is one")
        return
    for world in sorted({2, gpus}, reverse=True):
        arms = _RANKS_ARMS if world == gpus else ("base", "norm=fused_conv")
        for images in sorted({at_once(place), RECIPE_VIEWS // 4 // world}) if place.gpu else (2,):  # as --quick takes
            _scaling(place, found, world, images, arms)
        if world == gpus:
            _as_without(place, found, world)


def _scaling(place: Place, found: Found, world: int, images: int, arms: Sequence[str]) -> None:
    """bench/step.py's arms over `world` ranks of so many images each."""
    size = ["--rounds", 3, "--images", images] if place.gpu else ["--quick"]
    arms = [arm for arm in arms if world > 2 or arm != "norm_ranks=2"]  # of two ranks that is both
    arms = arms if place.gpu else ["base", "bucket_mb=5", *_RANKS_ARMS[-2:]]
    stand_in = () if place.gpu else ("-m", "fastrot.selfcheck.stand_in")
    result = place.bench(found, "step", *size, "--only", *arms, before=(*launcher(world), *stand_in))
    says = f"{world} ranks of {images} images"
    for arm, why in result.get("missing", {}).items():
        (found.skipped if why.startswith("UserError") else found.failures).append(f"{says}, {arm}: {why}")
    if "switches" in result:
        found.raw.setdefault("measured", []).append(result | {"images": images})
    for arm, line in result.get("switches", {}).items():
        talk = line["collectives"]
        told = f"{talk['messages']} messages a step, {1000 * talk['seconds']:.2f} ms in them"
        found.figures.append((f"{says}, {arm}", f"{line['views_per_s']:,.0f} views/s, {told}"))
    alone, base = place.earlier("step"), result.get("switches", {}).get("base")
    if not base:
        return
    found.figures.append(
        (f"{says}, averaging after the backward pass", f"{1000 * base['communicate']['median_s']:.2f} ms")
    )
    if "switches" in alone and alone.get("images") == images:
        share = base["views_per_s"] / (world * alone["switches"]["base"]["views_per_s"])
        found.figures.append((f"{says}, of {world} times one's speed", f"{share:.0%}"))


def _as_without(place: Place, found: Found, world: int) -> None:
    words = [*small(place), "run.max_steps=5", "run.timeout=60", "engine.kind=deepspeed"]
    words += ["engine.norm=fused_conv"] if place.gpu else []
    want: list[float] = []
    for number, (way, keys) in enumerate({"": [], **_RANKS_WAYS}.items()):
        says = f"{world} ranks{', ' * bool(way)}{way}"
        lines, failure = place.train(f"{world}-ranks-{number}", *words, *(f"engine.{key}" for key in keys), ranks=world)
        losses = [line["loss"] for line in lines]
        want = want or losses
        if failure or len(losses) != len(want):
            found.failures.append(f"{says}: {failure or f'{len(losses)} losses for {len(want)}'}")
            if not way:
                return
        elif way:
            apart = max(abs(loss - without) / without for loss, without in zip(losses, want, strict=True))
            line = f"losses {apart:.2%} from those without"
            found.figures.append((says, line))
            if apart < SAME:
                found.raw.setdefault("proven", []).append(keys)
            else:
                found.failures.append(f"{says}: {line}, more than {SAME:.1%}")
