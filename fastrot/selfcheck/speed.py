"""Parts that ask what is fast: the benches of bench/, and a training's wait for data."""

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch

from fastrot.probes.knn import knn
from fastrot.probes.svm import voc_svm
from fastrot.selfcheck import verdict
from fastrot.selfcheck.images import drawn
from fastrot.selfcheck.place import CHECKOUT, Found, Place

WAIT = 0.01  # of a training's time, at most, for data on a GPU
_IMAGES = 4096  # drawn for a GPU's loader
ARMS = (
    "base", "cuda_graphs=true", "norm=fused", "norm=fused_conv", "norm=fused_conv stem_channels=4 cuda_graphs=true",
    "norm=fused stem_channels=4 cuda_graphs=true", "stem_channels=4", "channels_last=false", "compile=true",
    "norm=fused_conv compile=true", "norm=fused compile=true", "compile=reduce-overhead",
)  # fmt: skip
_RANKS_ARMS = ("base", "sync_batchnorm=false", "bucket_mb=0", "bucket_mb=5")


def rotation(place: Place) -> Found:
    """bench/rotate.py: equal to the reference, or it has no figure."""
    size = ["--sides", 160, 224] if place.gpu else ["--sides", 32, "--mib", 1, "--rounds", 1, "--device", "cpu"]
    found = place.bench("rotate", *size)
    for side, at in found.raw.get("sides", {}).items():
        ours = {name: line for name, line in at["versions"].items() if name.startswith("fastrot")}
        name, best = max(ours.items(), key=lambda entry: entry[1]["fraction_of_copy"])
        peers = [line["median_s"] for peer, line in at["versions"].items() if peer not in ours]
        says = (
            f"{best['fraction_of_copy']:.0%} of a copy's speed, {min(peers) / best['median_s']:.1f} times the best peer"
        )
        found.figures.append((f"side {side}, {name}", says))
    found.skipped += [f"{peer}: {why}" for peer, why in found.raw.get("missing", {}).items()]
    return found


def step(place: Place) -> Found:
    """bench/step.py: the config's switches and plain PyTorch, in turns with base."""
    arms = [arm for arm in ARMS if place.gpu or "compile" not in arm]
    size = ["--rounds", 3] if place.gpu else ["--quick"]
    stand_in = () if place.gpu else ("-m", "fastrot.selfcheck.stand_in")
    found = place.bench("step", *size, "--only", *arms, before=(sys.executable, *stand_in))
    if len(arms) < len(ARMS):
        found.skipped.append(f"{len(ARMS) - len(arms)} compiled arms: minutes on a CPU")
    found.failures += [f"{arm}: {why}" for arm, why in found.raw.get("missing", {}).items()]
    if found.raw:
        chosen = verdict.choose(verdict.arms_of(found.raw))
        line = found.raw["switches"][chosen.name]
        found.figures.append((f"fastest: {chosen.name}", f"{line['views_per_s']:,.0f} views/s"))
        for name, what in (("times_plain", "times plain PyTorch"), ("times_base", "times base")):
            if name in line:
                found.figures.append((what, f"{line[name]:.2f}"))
        roof = found.raw["roof"]
        rates = f"{roof['device_flops_per_s'] / 1e12:,.1f} TFLOP/s, {roof['device_bytes_per_s'] / 1e9:,.0f} GB/s"
        found.figures.append(("the device's products and copies", rates))
    return found


def loader(place: Place) -> Found:
    """bench/loader.py, which decodes on the CPU; and the loader that feeds this device, by `fastrot tune`."""
    folder = drawn(place.work, _IMAGES if place.gpu else 16)
    size = ["--seconds", 2, "--rounds", 3] if place.gpu else ["--seconds", 0.1, "--rounds", 1, "--threads", 1]
    arms = ["ours: turbo, folder", *(["ours: dali, folder", "DALI reader", "DataLoader, decode"] if place.gpu else [])]
    sheets = place.work / "sheets"
    found = place.bench("loader", "--data", folder, "--arms", *arms, "--sheets", sheets, *size)
    for row in found.raw.get("rows", []):
        found.figures.append((f"{row['arm']} (CPU)", f"{row['images_per_s']['median']:,.0f} images/s"))
    for arm, why in found.raw.get("missing", {}).items():
        (found.failures if arm.startswith("ours") else found.skipped).append(f"{arm}: {why}")
    paces = _fed(place, folder)
    found.raw["device"] = paces
    found.figures += [(says, f"{pace:,.0f} images/s") for says, pace in paces.items()]
    return found


def _fed(place: Place, folder: Any) -> dict[str, float]:
    """{how it decodes: images/s that reach the device}, at each share for the hardware decoder."""
    from fastrot import config as configs
    from fastrot import distributed
    from fastrot.data.build import make_loader, open_manifest

    images, side = (128, 224) if place.gpu else (4, 64)
    ranks, paces = distributed.start(), {}
    for share in ("0", "0.65", "0.9", "1") if place.gpu else ("null",):
        words = [f"data.train={folder}", f"data.crop={side}", f"data.hw_decoder_load={share}"]
        config, _ = configs.load(None, words)
        loader, says = make_loader(config, open_manifest(str(folder), config, ranks, "data.train"), ranks, images, None)
        batches = loader.train(range(10**9), 0, images, 1, 0, 1, lambda epoch: side)
        for _ in range(8):
            next(batches)
        clock, count = time.perf_counter(), 0
        while time.perf_counter() - clock < (4 if place.gpu else 0.5):
            for micro in next(batches).micro_steps:
                micro.to(ranks.device)
            count += images
        if place.gpu:
            torch.cuda.synchronize()
        paces[says + (f", hardware share {share}" if place.gpu else "")] = count / (time.perf_counter() - clock)
        batches.close()
    distributed.end()
    return paces


def end_to_end(place: Place) -> Found:
    """A training with the switches that the step's part chose, and its share of waiting for data."""
    many, images, side, arch, steps = (_IMAGES, 128, 224, "resnet50", 400) if place.gpu else (16, 4, 32, "resnet18", 8)
    chosen = verdict.choose(verdict.arms_of(place.earlier("step")))
    keys = verdict.engine_keys(chosen) | {"precision": "bf16" if place.gpu else "fp32"}
    lines, failure = place.train(
        "end-to-end", f"data.train={drawn(place.work, many)}", f"data.crop={side}", f"model.arch={arch}",
        f"optim.images_per_step={images}", "optim.epochs=1000", f"run.max_steps={steps}", f"run.log_every={steps // 4}",
        "optim.lr=0.01", *(f"engine.{key}={str(value).lower()}" for key, value in keys.items()),
    )  # fmt: skip
    steady = [line for line in lines if "wait_share" in line][1:]  # the first compiles, captures, fills its buffers
    if failure or not steady:
        return Found(failures=[failure or "metrics.jsonl holds no steady lines"])
    wait, views = (float(np.mean([line[key] for line in steady])) for key in ("wait_share", "views_per_s"))
    found = Found(raw={"wait_share": wait, "views_per_s": views, "engine": keys, "lines": lines})
    found.figures = [
        ("engine", chosen.name), ("trained", f"{views:,.0f} views/s"), ("waiting for data", f"{wait:.2%}"),
    ]  # fmt: skip
    if place.gpu and wait > WAIT:
        found.failures.append(f"waits for data {wait:.2%} of its time, more than {WAIT:.0%}")
    return found


def probes(place: Place) -> Found:
    """Features of drawn images; the SVM and k-NN of bench/probes_arms.py's features, here and on the CPU."""
    sys.path.insert(0, str(CHECKOUT / "bench"))
    draw = import_module("probes_arms").features
    device, found = "cuda" if place.gpu else "cpu", Found()
    rows, dims, classes, bank, wide = (5011, 9216, 20, 50_000, 2048) if place.gpu else (200, 96, 3, 2000, 64)
    x, y = draw(2 * rows, dims, classes)
    near, labels = draw(bank + bank // 10, wide, 10)
    label = labels.argmax(1)

    def svm(where: str, some: int) -> Any:
        return voc_svm(x[:some], y[:some], x[rows : rows + some], y[rows : rows + some], device=where).error

    def neighbours(where: str, some: int) -> Any:
        return knn(near[:some], label[:some], near[bank:], label[bank:], ks=(20,), device=where)[20][0]

    for name, probe, few in (("SVM", svm, min(rows, 1000)), ("k-NN", neighbours, min(bank, 5000))):
        here, cpu = (np.asarray(probe(where, few), float) for where in (device, "cpu"))
        apart = float(np.abs(here - cpu).max())
        seconds = _seconds(partial(probe, device, rows if name == "SVM" else bank))
        size = f"{rows:,} rows of {dims:,}, {classes} classes" if name == "SVM" else f"{bank // 10:,} of {bank:,}"
        found.figures.append((f"{name}, {size}", f"{seconds:.2f} s"))
        found.raw[name] = {"seconds": seconds, "apart_from_cpu": apart}
        if not apart < 0.1:
            found.failures.append(f"{name}: {apart:.3f} points from the CPU's")
    _features(place, found)
    return found


def _seconds(work: Callable[[], object]) -> float:
    clock = time.perf_counter()
    work()
    return time.perf_counter() - clock


def _features(place: Place, found: Found) -> None:
    """`fastrot features` over drawn images."""
    from fastrot.features.read import open_store

    folder, out = drawn(place.work, _IMAGES if place.gpu else 16), place.work / "features"
    words = ["--random-init", "0", "--data", folder, "--out", out, "--taps", "1,5,avg"]
    words += ["model.arch=resnet50", "engine.precision=bf16"] if place.gpu else ["model.arch=resnet18"]
    seconds, failure = 0.0, None
    clock = time.perf_counter()
    failure = place.call([sys.executable, "-m", "fastrot.cli", "features", *words])
    seconds = time.perf_counter() - clock
    if failure:
        found.failures.append(failure)
        return
    count = len(open_store(str(out)).labels)
    found.raw["features"] = {"images": count, "seconds": seconds}
    found.figures.append(("features, start included", f"{count / seconds:,.1f} images/s"))


def ranks(place: Place) -> Found:
    """bench/step.py over all GPUs, and over two: scaling, synchronised norms, buckets."""
    gpus = torch.cuda.device_count() if place.gpu else 2
    if gpus < 2:
        return Found(skipped=["scaling, synchronised norms, buckets: need two GPUs, and there is one"])
    found = Found()
    size = ["--rounds", 3] if place.gpu else ["--quick"]
    for world in sorted({2, gpus}):
        launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}")
        result = place.bench("step", *size, "--only", *_RANKS_ARMS, before=launch)
        found.failures += [f"{world} ranks: {why}" for why in result.failures]
        found.failures += [f"{world} ranks, {arm}: {why}" for arm, why in result.raw.get("missing", {}).items()]
        found.raw[f"{world} ranks"] = result.raw
        for arm, line in result.raw.get("switches", {}).items():
            found.figures.append((f"{world} ranks, {arm}", f"{line['views_per_s']:,.0f} views/s"))
        base = result.raw.get("switches", {}).get("base")
        alone = place.earlier("step").get("switches", {}).get("base")
        if base and alone and place.gpu:
            share = base["views_per_s"] / (world * alone["views_per_s"])
            found.figures.append((f"{world} ranks, of {world} times one", f"{share:.0%}"))
    return found
