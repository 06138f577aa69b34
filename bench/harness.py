"""What benches share: the machine, alternating rounds, median and spread, a JSON file of results."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str) -> dict:
    """Processor, cores, load, versions and commit: what a figure depends on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": {package: version(package) for package in packages},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def gate(holds: bool, what: str) -> None:
    """Equality before speed: where it does not hold there is no figure."""
    if not holds:
        raise SystemExit(f"gate: {what}: does not hold; no figure")


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """Seconds on the clock, seconds of processor time, and the result."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - cpu, result


def alternate(rounds: int, **ways: Callable[[], object]) -> dict[str, dict]:
    """Each way once a round, in turn: {name: median, least and most seconds}."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            seconds[name].append(timed(work)[0])
    return {
        name: {"median_s": statistics.median(s), "least_s": min(s), "most_s": max(s)} for name, s in seconds.items()
    }


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
