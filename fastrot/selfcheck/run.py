"""Runs the parts one after another, each in a fresh process within its time, and keeps each as it ends."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastrot import files, machine, terminal
from fastrot.errors import UserError
from fastrot.selfcheck import report
from fastrot.selfcheck.parts import Part, command
from fastrot.selfcheck.place import CHECKOUT, Found

_GRACE_S = 10  # from the request to end to the kill: launchers end their ranks
_TAIL = 4000  # letters of the output kept in the JSON beside the whole in its own file
_LEAST_S = 5  # of the budget, to start a part at all

Start = Callable[[Part, bool, Path, Path, float, Path], list[str]]


@dataclass(frozen=True)
class Outcome:
    """A part as it ended. status: passed, failed or skipped. opens: the file of the bundle with its whole output."""

    part: str
    says: str
    status: str
    started: str
    seconds: float
    limit_s: float
    command: list[str]
    figures: list[tuple[str, str]]
    failures: list[str]
    skipped: list[str]
    raw: dict[str, Any]
    output: str
    opens: str


def run(
    parts: Sequence[Part], gpu: bool, bundle: Path, budget: float | None = None, start: Start = command
) -> list[Outcome]:
    """Run the parts in their order and write the bundle, anew after each part: what is there when a machine is lost is
    whole. Parts that the budget (seconds) does not reach are skipped. Raises UserError where it cannot be written."""
    refuse_bare_package()
    prepare(bundle)
    files.write_text(bundle / "environment.json", json.dumps(environment(gpu), indent=1))
    say, began, outcomes = terminal.console().print, time.monotonic(), []
    most = sum(part.gpu_s if gpu else part.cpu_s for part in parts)
    most = most if budget is None else min(most, budget)
    say(f"{len(parts)} parts, at most {terminal.duration(most)}; the evidence is kept in {bundle}", soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="fastrot-selfcheck-") as work:
        for number, part in enumerate(parts, 1):
            limit = part.gpu_s if gpu else part.cpu_s
            left = limit if budget is None else min(limit, budget - (time.monotonic() - began))
            say(
                f"{number} of {len(parts)}, {part.name}: {part.says} At most {terminal.duration(max(0, left))}",
                soft_wrap=True,
            )
            outcome = _unreached(part, limit) if left < _LEAST_S else _run(part, gpu, bundle, Path(work), left, start)
            files.write_text(bundle / f"{part.name}.json", json.dumps(asdict(outcome), indent=1))
            outcomes.append(outcome)
            report.write(bundle)
            for line in (f"{outcome.status} in {terminal.duration(outcome.seconds)}", *outcome.failures):
                say(f"    {line}", soft_wrap=True, markup=False)
    return outcomes


def refuse_bare_package() -> None:
    """Raise UserError where the package stands alone: parts call the tests and benches of the checkout."""
    missing = [name for name in ("bench", "tests", "configs") if not (CHECKOUT / name).is_dir()]
    if missing:
        raise UserError(f"selfcheck: {CHECKOUT} holds no {', '.join(missing)}; run it in a clone of the repository")


def prepare(bundle: Path) -> None:
    """Make the folder and see that it can be written. Raises UserError."""
    try:
        bundle.mkdir(parents=True, exist_ok=True)
        files.write_text(bundle / "environment.json", "{}")
    except OSError as error:
        raise UserError(f"--out {bundle}: cannot be written ({error.strerror}); name another folder") from None


def _run(part: Part, gpu: bool, bundle: Path, work: Path, limit: float, start: Start) -> Outcome:
    """A part in a process of its own, ended with all that it started when its time is over."""
    log, out = bundle / f"{part.name}.txt", work / f"{part.name}.found"
    words = start(part, gpu, bundle, work, limit, out)
    started, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
    path = f"{CHECKOUT}:{CHECKOUT / 'kernels'}"
    with log.open("w") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        ended = None
        try:
            code = process.wait(limit)
            ended = f"ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            ended = f"was stopped at its limit of {terminal.duration(limit)}"
        finally:
            _end(process)
    found, unread = _found(out, ended)
    failures = [*([ended] if ended else []), *unread, *found.failures]
    status = "failed" if failures else "passed" if found.figures else "skipped"
    return Outcome(
        part.name, part.says, status, started, round(time.monotonic() - clock, 1), limit, words, found.figures,
        failures, found.skipped, found.raw, log.read_text(errors="replace")[-_TAIL:], log.name,
    )  # fmt: skip


def _found(out: Path, ended: str | None) -> tuple[Found, list[str]]:
    """What a part wrote, and why it cannot be read."""
    try:
        return files.read_json(out, Found), []
    except OSError:
        return Found(), [] if ended else ["wrote no result"]
    except files.Damaged as error:
        return Found(), [f"its result cannot be read ({error})"]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and its group: asked, then killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _unreached(part: Part, limit: float) -> Outcome:
    why = ["the budget was spent before it"]
    return Outcome(part.name, part.says, "skipped", "", 0.0, limit, [], [], [], why, {}, "", "")


def said(*words: str) -> str | None:
    """What a program prints; None where there is none, or it does not end."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, cwd=CHECKOUT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def environment(gpu: bool) -> dict[str, Any]:
    """Machine, versions, driver and commit; of a rehearsal no GPU."""
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,pcie.link.gen.max"
    known = machine.environment("1")
    return known | {
        "gpus": known["gpus"] if gpu else [],
        "memory_left_gib": round(machine.memory_left() / 2**30, 1),
        "commit": said("git", "rev-parse", "HEAD"),
        "changed": said("git", "status", "--porcelain", "-uno"),
        "nvidia_smi": said("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        "topology": said("nvidia-smi", "topo", "-m"),
    }
