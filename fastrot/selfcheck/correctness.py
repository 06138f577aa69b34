"""Parts that ask what is right: tests, decoders' pixels and memory, losses beside the CPU's, a resume's bits."""

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastrot.data.augment import crop_windows
from fastrot.data.decode import Decoder, make_decoder
from fastrot.data.decode.batch import Batch
from fastrot.data.decode.nvjpeg import Hardware
from fastrot.data.images import decode_upright
from fastrot.errors import UserError
from fastrot.files import sha256_of
from fastrot.selfcheck.images import drawn, photograph
from fastrot.selfcheck.place import CHECKOUT, Found, Place

_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu")
_SIDE = 224
IN1K = ["precision=bf16", "norm=fused_conv", "stem_channels=4", "cuda_graphs=true", "kind=deepspeed"]
SAME, SAME_NORM = 0.005, 0.01  # of a loss, in fp32 over some steps; of the first gradient's norm, before weights part
_SURE = 3 * 2**0.5  # standard errors between the means of two runs that round each in its own way


def tests(place: Place, found: Found) -> None:
    """Every test marked gpu, each file in a process of its own: after an illegal access nothing else would run there."""
    marked = sorted(path for path in (CHECKOUT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    listed = subprocess.run(
        [*_PYTEST, "--collect-only", *marked], cwd=CHECKOUT, capture_output=True, text=True, timeout=place.left
    )
    print(listed.stdout, listed.stderr)
    ids = [line for line in listed.stdout.splitlines() if "::" in line]
    found.figures.append(("tests marked gpu, collected", f"{len(ids)}"))
    found.raw["collected"] = ids
    if listed.returncode:
        found.failures.append(f"the tests cannot be collected: pytest ended with code {listed.returncode}")
    if not place.gpu:
        found.skipped.append(f"{len(ids)} tests: need CUDA")
        return
    for file in dict.fromkeys(line.partition("::")[0] for line in ids):
        xml = place.work / f"{re.sub('[^a-z_]', '-', file)}.xml"
        stopped = place.call([*_PYTEST, "-vv", "--junitxml", xml, file], most=0.5)
        cases = list(ElementTree.parse(xml).iter("testcase")) if xml.exists() else []
        bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        skips = [(case, skip.get("message")) for case in cases if (skip := case.find("skipped")) is not None]
        found.failures += [f"{file}::{case.get('name')}" for case in bad]
        found.failures += [stopped] if stopped and not bad else []
        found.skipped += [f"{file}::{case.get('name')}: {why}" for case, why in skips]
        passed = len(cases) - len(bad) - len(skips)
        found.figures.append((file, f"{passed} passed, {len(bad)} failed, {len(skips)} skipped"))


class Canaries:
    """Tensors of a known pattern beside a decoder's outputs: torchcodec#1634 saw a hardware decoder write into others'."""

    def __init__(self, device: torch.device, many: int, size: int):
        self._device, self._size = device, size
        self._pattern = torch.arange(size, device=device).remainder(251).byte()
        self._held = [self._pattern.clone() for _ in range(many)]

    def add(self) -> None:
        """One more, where the memory of what came before ends."""
        self._held.append(self._pattern.clone())

    def overwritten(self) -> int:
        expected = torch.arange(self._size).remainder(251).byte()
        return sum(not torch.equal(one.cpu(), expected) for one in (self._pattern, *self._held))


def encoded(count: int) -> Iterator[NDArray[np.uint8]]:
    """JPEGs of drawn photographs, of every coding that a camera or a web page makes."""
    codings = (
        {"subsampling": 2}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_rows": 1},
        {"quality": 30},
    )  # fmt: skip
    for at in range(count):
        image, out = photograph(at)[0], io.BytesIO()
        image = image.convert("L") if at % 13 == 7 else image
        image.save(out, "JPEG", **{"quality": 90} | codings[at % len(codings)])
        yield np.frombuffer(out.getvalue(), np.uint8).copy()


# Levels of 255 from Pillow: the worst image's mean, the mean of all.
_NEAR = {"mixed": (2.0, 0.25)} | dict.fromkeys(("turbo", "dali", "nvimgcodec", "torch"), (0.25, 0.02))


def decoders(place: Place, found: Found) -> None:
    """Every decoder that training may take, and DALI's mixed at each share for the hardware decoder."""
    device, many = torch.device("cuda", 0) if place.gpu else torch.device("cpu"), 256 if place.gpu else 12
    buffers = list(encoded(many))
    images = [decode_upright(buffer) for buffer in buffers]
    height, width = (np.array([getattr(image, side) for image in images], np.int32) for side in ("height", "width"))
    rows = np.arange(many)
    windows = crop_windows(0, rows, np.zeros(many, np.int64), height, width)
    oracle = np.stack([_pillow(image, window) for image, window in zip(images, windows, strict=True)])
    shares = [("dali", None), ("dali", 0.0), ("dali", 1.0), ("nvimgcodec", None), ("nvimgcodec", 0.0)]
    arms = [(name, "gpu", share) for name, share in shares] if place.gpu else [("nvimgcodec", "cpu", None)]
    if not place.gpu:
        found.skipped.append("dali mixed, nvimgcodec and the hardware decoder on a GPU: need CUDA")
    for name, where, share in [*arms, ("turbo", "cpu", None), ("dali", "cpu", None), ("torch", "cpu", None)]:
        says = f"{name}, {where}" + ("" if share is None else f", hardware share {share:g}")
        try:
            decoder, line = make_decoder(name, where, device, 4, 64, 2, Hardware(share))
        except UserError as error:
            (found.failures if where == "gpu" else found.skipped).append(f"{says}: {error}")
            continue
        print(line, flush=True)
        canaries = Canaries(device, 64 if place.gpu else 4, 2**24 if place.gpu else 2**18)
        try:
            pixels = _decode(decoder, buffers, windows, canaries)
            spoilt = canaries.overwritten()
        except (RuntimeError, AssertionError) as error:
            found.failures.append(f"{says}: {type(error).__name__}: {error}".partition("\n")[0])
            continue
        _judge(found, says, "mixed" if where == "gpu" else name, np.abs(pixels - oracle).mean((1, 2, 3)))
        if spoilt:
            found.failures.append(f"{says}: {spoilt} tensors beside the decoder's were overwritten")


def _judge(found: Found, says: str, kind: str, apart: NDArray[np.float32]) -> None:
    worst, mean = _NEAR[kind]
    found.figures.append((says, f"{apart.mean():.3f} levels from Pillow, the worst image {apart.max():.2f}"))
    found.raw[says] = apart.tolist()
    if apart.max() > worst or apart.mean() > mean:
        found.failures.append(
            f"{says}: {apart.mean():.3f} levels from Pillow, image {apart.argmax()} {apart.max():.2f}; "
            f"more than {mean:g} or {worst:g}"
        )


def _pillow(image: Image.Image, window: NDArray[np.int32]) -> NDArray[np.float32]:
    top, left, height, width = window.tolist()
    crop = image.convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), np.float32)


def _decode(
    decoder: Decoder, buffers: list[NDArray[np.uint8]], windows: NDArray[np.int32], canaries: Canaries
) -> NDArray[np.float32]:
    """All images in batches of up to 64, two in flight. Raises AssertionError for a bad one, or where pixels change
    after they were given."""
    given, copies = [], []
    batches = [slice(at, at + 64) for at in range(0, len(buffers), 64)] * 3
    try:
        for number, some in enumerate([*batches, None]):
            if some is not None:
                few = buffers[some]
                decoder.submit(Batch(few, np.ones(len(few), np.uint8), windows[some], _SIDE))
            if number:
                pixels, bad = decoder.result()
                if bad:
                    raise AssertionError(f"images {sorted(bad)} are bad: {next(iter(bad.values()))}")
                given.append(pixels)
                copies.append(pixels.cpu().clone())
                canaries.add()
        changed = sum(not torch.equal(pixels.cpu(), copy) for pixels, copy in zip(given, copies, strict=True))
        if changed:
            raise AssertionError(f"{changed} batches changed after they were given")
    finally:
        decoder.close()
    third = len(copies) // 3
    return torch.cat(copies[:third]).float().numpy()


def small(place: Place) -> list[str]:
    """A training of some steps."""
    many, images, side, arch = (64, 16, 96, "resnet50") if place.gpu else (16, 4, 64, "resnet18")
    return [
        f"data.train={drawn(place.work, many)}", f"data.crop={side}", "data.decode=turbo", "data.decode_on=cpu",
        f"model.arch={arch}", f"optim.images_per_step={images}", "optim.epochs=1000", "optim.lr=0.001",
        "optim.warmup_epochs=0", "run.log_every=1", "engine.kind=plain",
    ]  # fmt: skip


def losses(place: Place, found: Found) -> None:
    """The same steps on the same pixels, in fp32 by torch's modules on the CPU, and by each way of the engine here.
    A low rate: at the recipe's, rounding grows from step to step. What bf16 may move the means over the steps is
    measured: the shift that it makes on the CPU and, since each step is rounded anew, that shift's error."""
    steps = 12 if place.gpu else 5
    words = [*small(place), f"run.max_steps={steps}"]
    want, failure = place.train("losses-cpu", *words, "engine.channels_last=false", hide_gpu=True)
    if not failure:
        rounded, failure = place.train("losses-cpu-bf16", *words, "engine.precision=bf16", hide_gpu=True)
    if failure:
        found.failures.append(f"the reference on the CPU: {failure}")
        return
    found.raw |= {"cpu": want, "cpu, bf16": rounded}
    shifts = [_shifts(rounded, want, key) for key in ("loss", "grad_norm")]
    allowed = [abs(one.mean()) + _SURE * one.std() / len(one) ** 0.5 for one in shifts]
    near, bf16 = (SAME, SAME_NORM), (max(SAME, allowed[0]), max(SAME_NORM, allowed[1]))
    words_of = "bf16 may move the mean loss {:.2%}, the mean of the gradients' norms {:.2%}"
    found.figures.append(("by its roundings on the CPU", words_of.format(*bf16)))
    ways = {"fp32, fused, CUDA graphs": (near, ["norm=fused", "cuda_graphs=true"]), "bf16": (bf16, ["precision=bf16"])}
    if place.gpu:
        ways |= {
            "fp32": (near, []),
            "bf16, deepspeed": (bf16, ["precision=bf16", "kind=deepspeed"]),
            "in1k's": (bf16, IN1K),
            "bf16, compiled": (bf16, ["precision=bf16", "compile=true"]),
        }
    else:
        found.skipped.append("deepspeed, fused_conv and compile on the GPU: need CUDA")
    for number, (says, (most, keys)) in enumerate(ways.items()):
        got, failure = place.train(f"losses-{number}", *words, *(f"engine.{key}" for key in keys))
        found.raw[says] = got
        if failure or len(got) != len(want):
            found.failures.append(f"{says}: {failure or f'{len(got)} losses for {len(want)}'}")
            continue
        loss, norm = (_shifts(got, want, key) for key in ("loss", "grad_norm"))
        if most is bf16:
            apart, what = (abs(loss.mean()), abs(norm.mean())), ("the mean loss", "the mean of the gradients' norms")
        else:
            apart, what = (abs(loss).max(), abs(norm[0])), ("losses", "the first gradient's norm")
        line = f"{what[0]} {apart[0]:.2%} from the CPU's over {steps} steps, {what[1]} {apart[1]:.2%}"
        found.figures.append((says, line))
        if not (apart[0] < most[0] and apart[1] < most[1]):
            found.failures.append(f"{says}: {line}; more than {most[0]:.1%} and {most[1]:.1%}")


def _shifts(got: list[dict[str, Any]], want: list[dict[str, Any]], key: str) -> NDArray[np.float64]:
    """By what share of it a figure differs, line by line."""
    return np.array([got_line[key] / line[key] - 1 for got_line, line in zip(got, want, strict=True)])


def resume(place: Place, found: Found) -> None:
    """Stopped half-way and gone on with, against the same steps in one go: weights, momentum and losses."""
    half, whole = (6, 12) if place.gpu else (4, 8)
    ways = {"fp32, fused, CUDA graphs": ["norm=fused", "cuda_graphs=true"]}
    if place.gpu:
        ways = {"bf16, deepspeed": ["precision=bf16", "kind=deepspeed"], "in1k's": IN1K} | ways
    else:
        found.skipped.append("bf16 deepspeed and fused_conv: need CUDA")
    for number, (says, keys) in enumerate(ways.items()):
        words = [*small(place), "engine.deterministic=true", *(f"engine.{key}" for key in keys)]
        if place.gpu:
            words += ["data.decode=auto", "data.decode_on=auto"]
        once, again = f"resume-{number}-once", f"resume-{number}-again"
        runs = ((once, whole), (again, half), (again, whole))
        failed = [
            failure for name, steps in runs if (failure := place.train(name, *words, f"run.max_steps={steps}")[1])
        ]
        if failed:
            found.failures.append(f"{says}: {failed[0]}")
            continue
        unlike = _unlike(place, once, again, whole)
        found.figures.append(
            (says, f"{'other bits' if unlike else 'the same bits'} after {half} + {whole - half} steps")
        )
        found.failures += [f"{says}: {what} of the resumed run differ" for what in unlike]


def _unlike(place: Place, once: str, again: str, steps: int) -> list[str]:
    """Which files of two runs' last checkpoints are not equal byte for byte."""
    folders = [place.work / name / "checkpoints" / f"step-{steps:08d}" for name in (once, again)]
    names = ("model.safetensors", "optimizer.safetensors")
    return [name for name in names if len({sha256_of(folder / name) for folder in folders}) > 1]
