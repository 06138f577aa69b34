"""What every bench shares: its question, rounds with median and spread, and where a figure comes from."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # import this before fastrot, which need not be installed
_PACKAGES = (
    "numpy",
    "pillow",
    "torch",
    "torchvision",
    "triton",
    "nvidia-dali-cuda130",
    "ffcv",
    "webdataset",
    "simplejpeg",
    "litdata",
    "spdl-core",
    "scikit-learn",
)


def parser(question: str) -> argparse.ArgumentParser:
    """Options that every bench has; `question` is what its result answers."""
    out = argparse.ArgumentParser(description=question)
    out.add_argument("--rounds", type=int, default=5, help="repeats of each timing")
    out.add_argument("--out", type=Path, help="write the result there as JSON, too (bench/results/...)")
    return out


def timed(work: Callable, rounds: int) -> dict[str, float]:
    """Seconds of `work()` over some rounds: first, and the median, least and most of all."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"first_s": seconds[0]} | spread(seconds, "_s")


def spread(values: Iterable[float], unit: str = "") -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {f"median{unit}": statistics.median(values), f"least{unit}": min(values), f"most{unit}": max(values)}


def alternating(
    works: dict[str, Callable], rounds: int, seconds: Callable[[Callable], float]
) -> dict[str, dict[str, float]]:
    """Spread of `seconds(work)` for each work, all of them once a round, after a round that warms up."""
    taken = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if number:
                taken[name].append(spent)
    return {name: spread(values, "_s") for name, values in taken.items()}


def clock(work: Callable) -> float:
    """Seconds of one call on the host."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory_mib(process: int | str = "self") -> dict[str, float]:
    """Resident memory of a process: its own, and pages of mapped files, which it shares and the kernel may drop."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


class Unequal(SystemExit):
    """A gate that does not hold: ends a bench that has nothing else to measure."""


def gate(holds: bool, what: str) -> None:
    """Equality before speed: where it does not hold there is no figure."""
    if not holds:
        raise Unequal(f"gate: {what}: does not hold; no figure")


def version_of(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def facts() -> dict:
    """Machine, versions and commit of a figure."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    versions = {package: version_of(package) for package in _PACKAGES}
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit + (" with changes" if changed else ""),
        "cpu": model.split(":", 1)[1].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "options": [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]],  # no machine's paths
    }


def keep(out: Path | None, question: str, result: dict) -> str:
    """A result as JSON, kept where --out says."""
    short = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    text = json.dumps({"question": question, **short}, indent=1)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    return text


def write(out: Path | None, question: str, result: dict) -> None:
    """Print a result, and keep it where --out says."""
    print(keep(out, question, result))
