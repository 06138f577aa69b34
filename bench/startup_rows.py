"""What does a start cost where the data set is large: seconds to its first step and memory a rank, by rows and ranks?

The rows are a manifest's in the cache, as of a tar shard that holds a thousand small images: each stands there many times. A
start is a whole command, of a small network; begun: in a new folder; resumed: from a checkpoint there.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
from manifest import tiny

from fastrot.data.index import index
from fastrot.data.manifest import COLUMNS, Manifest

LOOKS_S = 0.02
IMAGES, LIMIT_S = 1000, 900
WORDS = [
    "model.arch=resnet18", "data.crop=32", "data.threads=1", "engine.kind=plain", "optim.images_per_step=8",
    "optim.epochs=10", "run.log_every=1", "run.tensorboard=false",
]  # fmt: skip


def shard(home: Path) -> Path:
    path = home / "images.tar"
    with tarfile.open(path, "w") as tar:
        for at in range(IMAGES):
            for kind, data in (("jpg", tiny()), ("cls", str(at % 10).encode())):
                member = tarfile.TarInfo(f"{at:04}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def make_rows(source: Path, cache: Path, rows: int) -> int:
    """Put so many rows into the cached manifest of a source; its bytes."""
    folder = index(str(source), cache / "manifests", 178_000_000, lambda items, total, title: items)
    small = Manifest.load(folder)
    at = np.arange(rows) % IMAGES
    big = replace(small, **{name: np.array(getattr(small, name)[:IMAGES])[at] for name in COLUMNS})
    shutil.rmtree(folder)
    big.save(folder)
    return sum(path.stat().st_size for path in folder.iterdir())


def ranks_of(out: Path) -> Iterator[str]:
    """Processes of a start's ranks: those whose command names the run's folder, but for the launcher."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"run.out=" + os.fsencode(out) in words and not any(b"torchrun" in word for word in words):
                yield pid


def started(ranks: int, source: Path, out: Path, steps: int) -> dict[str, float]:
    """One start until metrics hold its step: seconds, and the greatest own and mapped memory of any rank, MiB."""
    launcher = ["torchrun", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else [sys.executable]
    if ranks > 1:
        launcher[0] = str(Path(sys.executable).with_name("torchrun"))
    words = [*launcher, str(harness.ROOT / "fastrot/train.py"), *WORDS, f"data.train={source}", f"run.out={out}"]
    begun, most = time.perf_counter(), {"own": 0.0, "mapped": 0.0}
    process = subprocess.Popen([*words, f"run.max_steps={steps}", "--resume", "auto"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    first, lines = 0.0, out / "metrics.jsonl"
    while process.poll() is None and time.perf_counter() - begun < LIMIT_S:
        for pid in ranks_of(out):
            with suppress(OSError, KeyError, ValueError):
                for name, value in harness.memory_mib(pid).items():
                    most[name] = max(most[name], value)
        if not first and lines.exists() and lines.read_bytes().count(b"\n") >= steps:
            first = time.perf_counter() - begun
        time.sleep(LOOKS_S)
    said = process.communicate()[0]
    harness.gate(process.returncode == 0 and first > 0, f"a start of {ranks} ranks: {said[-2000:]}")
    return {"first_step_s": first} | {f"{name}_mib": value for name, value in most.items()}


def measure(ranks: int, source: Path, home: Path, rounds: int) -> dict:
    """Starts in new folders, each then resumed."""
    found: dict[str, list[dict[str, float]]] = {"begun": [], "resumed": []}
    for _ in range(rounds):
        out = home / "run"
        for steps, kind in enumerate(found, 1):
            found[kind].append(started(ranks, source, out, steps))
        shutil.rmtree(out)
    return {
        kind: {name: harness.spread(one[name] for one in all_of) for name in all_of[0]}
        for kind, all_of in found.items()
    }


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[1000, 1_281_167, 100_000_000])
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    args = options.parse_args()
    result: dict = {"facts": harness.facts(), "starts": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["FASTROT_CACHE"] = str(home / "cache")
        source = shard(home)
        index(str(source), home / "cache" / "manifests", 178_000_000, lambda items, total, title: items)
        started(1, source, home / "warm", 1)  # what is compiled once a machine
        for rows in args.rows:
            size = make_rows(source, home / "cache", rows)
            for ranks in args.ranks:
                one = {"rows": rows, "manifest_bytes": size, "ranks": ranks} | measure(ranks, source, home, args.rounds)
                result["starts"].append(one)
                harness.keep(args.out, __doc__, result)  # a cut bench keeps what it has
                print(one, flush=True)
    harness.write(args.out, __doc__, result)


if __name__ == "__main__":
    main()
