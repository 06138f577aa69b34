"""The parts of the selfcheck in order of value; and one of them, run in a process of its own."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from fastrot.files import write_text
from fastrot.selfcheck.place import Found, Place


@dataclass(frozen=True)
class Part:
    """says: what it asks. gpu_s, cpu_s: the seconds it may take there. check: its function, module:name."""

    name: str
    says: str
    gpu_s: float
    cpu_s: float
    check: str


PARTS = (
    Part("tests", "do the tests that need CUDA pass?", 600, 120, "correctness:tests"),
    Part("decoders", "do decoders show Pillow's pixels, and write nowhere else?", 120, 120, "correctness:decoders"),
    Part("rotation", "is the views' kernel right, and how near a copy's speed?", 240, 120, "speed:rotation"),
    Part("kernels", "do the step's kernels reach the speed that was predicted?", 120, 180, "speed:kernels"),
    Part("losses", "does a short training learn as on the CPU?", 300, 300, "correctness:losses"),
    Part("resume", "is a resumed run the whole one, bit for bit?", 300, 180, "correctness:resume"),
    Part("step", "which switches make the step faster than plain PyTorch's?", 1080, 180, "speed:step"),
    Part("loader", "how many images a second does the loader give?", 240, 180, "speed:loader"),
    Part("end_to_end", "does a training wait for data?", 180, 120, "speed:end_to_end"),
    Part("probes", "how fast are features, SVM and k-NN, and are they the CPU's?", 180, 120, "speed:probes"),
    Part("ranks", "what do several GPUs give, and what do norms and buckets cost?", 240, 480, "speed:ranks"),
)


def command(part: Part, gpu: bool, bundle: Path, work: Path, seconds: float, out: Path) -> list[str]:
    """What runs a part in a process of its own and writes what it found to `out`."""
    until = time.monotonic() + seconds  # the part's own clock would begin once torch is imported
    words = ["--bundle", bundle, "--work", work, "--until", until, "--out", out, *(["--gpu"] if gpu else [])]
    return [sys.executable, "-m", "fastrot.selfcheck.parts", part.name, *map(str, words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("--gpu", action="store_true")
    for name, kind in (("bundle", Path), ("work", Path), ("until", float), ("out", Path)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    args = parser.parse_args()
    if not args.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    module, _, name = next(part.check for part in PARTS if part.name == args.part).partition(":")
    check: Callable[[Place, Found], None] = getattr(import_module(f"fastrot.selfcheck.{module}"), name)
    found = Found()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        check(Place(args.gpu, args.bundle, args.work, args.until), found)
    finally:
        write_text(args.out, json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
