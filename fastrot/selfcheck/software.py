"""What a machine has to run fastrot with: packages, GPUs, decoders, compilers."""

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import PIL.features
import torch

from fastrot import machine
from fastrot.config import Config
from fastrot.data.decode import DECODERS, make_decoder
from fastrot.distributed import Ranks
from fastrot.errors import EXTRAS, UserError
from fastrot.selfcheck.doctor import BROKEN, FINE, LOW, MISSING, SLOW, Check
from fastrot.selfcheck.run import said
from fastrot_kernels.backends import obstacle

_OF_DECODERS = ("ffcv", "nvidia")  # extras that the decoders' rows speak of
_TAKEN = 0.1  # of a GPU's memory


def packages(config: Config, ranks: Ranks) -> Iterator[Check]:
    known = machine.environment("")["versions"]
    there = ", ".join(f"{name} {number}" for name, number in known.items() if number)
    yield Check("packages", FINE, f"Python {platform.python_version()}, {there}; {platform.platform()}")
    named = {"deepspeed": config.engine.kind == "deepspeed"} | dict.fromkeys(config.run.loggers, True)
    for module, (name, extra) in EXTRAS.items():
        spec = importlib.util.find_spec(module) if module not in _OF_DECODERS else None
        if module in _OF_DECODERS or (spec and spec.origin):
            continue
        asked = named.get(module, False) and module != "tensorboard"
        why = f"{name} is not installed" + (", and the config asks for it" if asked else "")
        yield Check(module, BROKEN if asked else MISSING, why, f"pip install 'fastrot[{extra}]'")
    if os.environ.get("DS_ACCELERATOR") == "":
        yield Check("DS_ACCELERATOR", BROKEN, "is set to nothing, which DeepSpeed refuses", "unset DS_ACCELERATOR")


def gpus(config: Config, ranks: Ranks) -> Iterator[Check]:
    query = "index,name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    lines = (said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits") or "").splitlines()
    cards = [[cell.strip() for cell in line.split(",")] for line in lines if line.count(",") == query.count(",")]
    if ranks.device.type == "cpu":
        if cards:
            why = f"nvidia-smi shows {len(cards)} ({cards[0][1]}, driver {cards[0][2]}), and torch finds none"
            cure = f"update the driver for CUDA {torch.version.cuda}, or look at CUDA_VISIBLEranks.deviceS"
            yield Check("GPUs", BROKEN, why, cure)
        else:
            yield Check("GPUs", FINE, "none: fastrot computes on the CPU")
        return
    names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    driver = cards[0][2] if cards else "unknown"
    yield Check(
        "GPUs", FINE, f"{len(names)}: {names[0]}; driver {driver}, CUDA {torch.version.cuda}, NCCL {nccl}, "
        f"cuDNN {torch.backends.cudnn.version()}",
    )  # fmt: skip
    for at, name, _, total, used, errors in cards:
        if float(used) > _TAKEN * float(total):
            yield Check(f"GPU {at}", LOW, f"{name}: {used} of {total} MiB are taken", "nvidia-smi names the processes")
        if errors.isdigit() and int(errors):
            yield Check(f"GPU {at}", BROKEN, f"{name}: {errors} memory errors since its start", "have it replaced")


def decoders(config: Config, ranks: Ranks) -> Iterator[Check]:
    asked = config.data.decode
    for name in DECODERS:
        try:
            decoder, _ = make_decoder(name, "auto", ranks.device, 1, 1, 1)
        except UserError as error:
            best = name == ("dali" if ranks.device.type == "cuda" else "turbo") and asked == "auto"
            state = BROKEN if name == asked else SLOW if best else MISSING
            why, _, cure = str(error).removeprefix(f"data.decode {name}: ").partition("; ")
            yield Check(f"decoder {name}", state, why, cure.removesuffix("; use data.decode=torch"))
        else:
            decoder.close()
            yield Check(f"decoder {name}", FINE, decoder.name)
    linked = re.findall(r"\S*/(lib(?:turbo)?jpeg\S*)", Path("/proc/self/maps").read_text())
    ours = PIL.features.version("libjpeg_turbo") or PIL.features.version("jpg")
    yield Check("libjpeg", FINE, f"Pillow's {ours}; loaded: {', '.join(sorted(set(linked)))}")


def compilers(config: Config, ranks: Ranks) -> Iterator[Check]:
    wanted = {
        os.environ.get("CC") or "cc": "turbo, the reader of files and the views on a CPU are compiled by it",
        "g++": "DeepSpeed's collectives on a CPU and torch.compile want it",
        "ninja": "DeepSpeed's collectives on a CPU want it",
    }
    for name, why in wanted.items():
        there = shutil.which(name) or shutil.which(Path(sys.executable).parent / name)
        line = (said(there, "--version") or "").splitlines() if there else []
        needed = name not in ("g++", "ninja") or (ranks.device.type == "cpu" and config.engine.kind == "deepspeed")
        if line:
            yield Check(name, FINE, line[0])
        else:
            cure = "pip install ninja" if name == "ninja" else "apt-get install g++"
            yield Check(name, SLOW if needed else MISSING, f"not there: {why}", cure)
    if why := obstacle("cpu" if ranks.device.type == "cpu" else "cuda", ranks.device):
        yield Check("views' kernel", SLOW, why, "another, slower one is taken")


def compiled(config: Config, ranks: Ranks) -> Iterator[Check]:
    """What `fastrot warmup` makes, once a machine."""
    if ranks.device.type == "cuda" or config.engine.kind != "deepspeed":
        return
    try:
        name = f"deepspeed-{version('deepspeed')}"
    except PackageNotFoundError:
        return
    place = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or machine.compiled_folder("torch_extensions")) / name
    if any(place.glob("*/*.so")):
        yield Check("compiled", FINE, f"DeepSpeed's collectives for this CPU: {place}")
    else:
        yield Check("compiled", SLOW, "DeepSpeed's collectives are not compiled: the first run waits", "fastrot warmup")


LOOKS = (packages, gpus, decoders, compilers, compiled)
