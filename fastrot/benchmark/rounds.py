"""Rounds in random order, each in a fresh process, and the bundle of evidence that they leave.

`python -m fastrot.benchmark.rounds` is such a process: a request on standard input, the answer its last line.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastrot import distributed, terminal
from fastrot.benchmark.compare import by_arm, interval
from fastrot.benchmark.parts import PARTS, Place, Unequal
from fastrot.config import Config, flat, from_values
from fastrot.data.build import open_manifest
from fastrot.data.index import in_cache
from fastrot.data.manifest import Manifest
from fastrot.errors import Fault, UserError
from fastrot.runs.build import set_torch_flags
from fastrot.selfcheck.run import environment

FORMAT = 1
_PATIENCE_S = 300  # beyond its timing, for a round to set up


@dataclass(frozen=True)
class Request:
    """values: of the config, dotted. part, arm: of PARTS. seconds: of timing; None asks for the gate."""

    values: dict[str, Any]
    part: str
    arm: str
    seconds: float | None


def bench(
    config: Config,
    chosen: list[str],
    rounds: int,
    seconds: float,
    seed: int = 0,
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """The bundle: every round of every arm of the chosen parts, and what it was measured with.

    seconds  of timing a round.    seed: of the rounds' order.    keep(bundle)  gets what there is after each round, so
    that an end before the last one loses none; `left` in it is the number of rounds that are to come.
    An arm whose gate does not hold, or that cannot run here, has no figure: it is in `missing`, with the reason.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("bench measures one process; start it without a launcher (bench/step.py runs under one)")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    manifest = Manifest.load(in_cache(str(config.data.train), config.data.max_pixels, "data.train"))
    values = {key: value for key, value in flat(config).items() if value is not None}
    arms = [(part, arm) for part in chosen for arm in PARTS[part].arms(config, device.type)]
    asked = [Request(values, part, arm, None) for part, arm in arms]
    gates: dict[str, str] = {}
    missing: dict[str, str] = {}
    for request in terminal.track(asked, len(asked), "gates"):
        answer = _asked(request)
        where = missing if "missing" in answer else gates
        where[_name(request)] = answer.get("missing") or answer["gate"]
    order = [Request(values, part, arm, seconds) for part, arm in arms if f"{part}: {arm}" in gates] * rounds
    random.Random(seed).shuffle(order)
    kept: list[dict[str, Any]] = []
    here = environment(device.type == "cuda")
    about = {
        "format": FORMAT,
        "environment": here | {"command": [Path(here["command"][0]).name, *here["command"][1:]]},
        "config": values,
        "inputs": {"images": len(manifest), "content": manifest.content},
        "seed": seed,
        "gates": gates,
        "missing": missing,
    }

    def bundle(left: int) -> dict[str, Any]:
        return about | {"figures": figures(kept), "rounds": kept, "left": left}

    for done, request in enumerate(terminal.track(order, len(order), "rounds"), 1):
        answer = {} if _name(request) in missing else _asked(request)
        if "missing" in answer:
            missing[_name(request)] = f"passed its gate, then failed: {answer['missing']}"
            kept[:] = [one for one in kept if (one["part"], one["arm"]) != (request.part, request.arm)]
        elif answer:
            kept.append({"part": request.part, "arm": request.arm} | answer)
        if keep:
            keep(bundle(len(order) - done))
    return bundle(0)


def figures(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each arm, the median over its rounds of their laps' medians, and its 95% interval."""
    return {
        name: {"unit": PARTS[name.partition(":")[0]].unit, "median": median(paces), "interval": interval(paces)}
        for name, paces in sorted(by_arm(rounds).items())
    }


def _name(request: Request) -> str:
    return f"{request.part}: {request.arm}"


def _asked(request: Request) -> dict[str, Any]:
    """The answer of a fresh process."""
    limit = _PATIENCE_S + 4 * (request.seconds or 0)
    words = [sys.executable, "-m", "fastrot.benchmark.rounds"]
    try:
        done = subprocess.run(words, input=json.dumps(asdict(request)), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"missing": f"gave nothing for {limit:.0f} s"}
    with suppress(ValueError, IndexError):
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    last = (done.stderr.strip() or f"ended with code {done.returncode}").splitlines()[-1]
    return {"missing": last}


def clocks() -> dict[str, Any]:
    """MHz of the processor's cores, and the GPU's as nvidia-smi says them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found: dict[str, Any] = {"cpu_mhz": [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def answer(request: Request) -> dict[str, Any]:
    """What a round or a gate found, in this process."""
    config = from_values(None, request.values)
    set_torch_flags(config)
    with terminal.speaking(False):
        ranks = distributed.start()
        manifest = open_manifest(str(config.data.train), config, ranks, "data.train")
        place = Place(config, ranks, manifest, request.seconds or 0.0)
        arm = PARTS[request.part].arms(config, ranks.device.type)[request.arm]
        try:
            if request.seconds is None:
                return {"gate": arm.gate(place)}
            before = clocks()
            return {"laps": arm.laps(place), "clocks": [before, clocks()], "at": time.time()}
        except (UserError, Unequal, Fault) as error:
            return {"missing": str(error)}
        finally:
            distributed.end()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shown(bundle: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, the figure in words)."""
    for name, one in bundle["figures"].items():
        low, high = one["interval"]
        yield name, f"{_short(one['median'])} {one['unit']} ({_short(low)} to {_short(high)})"
    for name, why in bundle["missing"].items():
        yield name, f"no figure: {why}"


if __name__ == "__main__":
    print(json.dumps(answer(Request(**json.load(sys.stdin)))), flush=True)
