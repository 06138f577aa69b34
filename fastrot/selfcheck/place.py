"""Where a part of the selfcheck works, what it finds, and how it calls the benches and trainings that it judges."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
_LEAVE_S = 5  # of a part's time, to write what it found


@dataclass
class Found:
    """What a part found.

    figures   (what, the figure in words), for the page.
    failures  what is wrong, a line each: one of them and the part has failed.
    skipped   what was not done here, and why.
    raw       whatever was measured, as JSON.
    A part fills it as it goes: where it is stopped, what it has found is kept.
    """

    figures: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """gpu: whether the parts run on a GPU, or rehearse on the CPU. bundle: the evidence's folder. work: scratch that
    parts share. until: on the monotonic clock, which processes share."""

    gpu: bool
    bundle: Path
    work: Path
    until: float

    @property
    def left(self) -> float:
        """Seconds that a part may still give to what it calls."""
        return max(1.0, self.until - time.monotonic() - _LEAVE_S)

    def call(self, words: Sequence[object], hide_gpu: bool = False, most: float = 1.0) -> str | None:
        """Run a program to its end, its output on ours; why it failed, or None. Where no time is left it is not begun.

        most: the share of that time that it may take; of what hangs, the rest is left to others.
        """
        if self.until - time.monotonic() < _LEAVE_S:
            return f"{_name(words)} was not begun: no time was left"
        environment = os.environ | {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'kernels'}"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {}
        print("$", *words, flush=True)
        limit = most * self.left
        try:
            code = subprocess.run(list(map(str, words)), cwd=CHECKOUT, env=environment, timeout=limit).returncode
        except subprocess.TimeoutExpired as stopped:
            return f"{_name(words)} was stopped after {stopped.timeout:.0f} s"
        return f"{_name(words)} ended with code {code}" if code else None

    def bench(
        self, found: Found, script: str, *words: object, before: Sequence[object] = (sys.executable,)
    ) -> dict[str, Any]:
        """A script of bench/: its result, what there is of it where it was stopped."""
        out = self.work / f"{script}-{len(list(self.work.iterdir()))}.json"
        if failure := self.call([*before, f"bench/{script}.py", *words, "--out", out]):
            found.failures.append(failure)
        result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        return result

    def train(
        self, name: str, *words: object, hide_gpu: bool = False, ranks: int = 1, most: float = 0.5
    ) -> tuple[list[dict[str, Any]], str | None]:
        """`fastrot train` into work/name: the lines of metrics.jsonl, and why it failed or None.

        On the CPU the host plays CUDA graphs and symmetric memory.
        """
        out = self.work / name
        module = "fastrot.cli" if self.gpu else "fastrot.selfcheck.stand_in"
        before = launcher(ranks) if ranks > 1 else [sys.executable]
        failure = self.call(
            [*before, "-m", module, "train", *words, f"run.out={out}", "run.loggers=[]"], hide_gpu, most
        )
        lines = out / "metrics.jsonl"
        return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else [], failure

    def earlier(self, part: str) -> dict[str, Any]:
        """What another part measured; empty where it has not run."""
        file = self.bundle / f"{part}.json"
        raw: dict[str, Any] = json.loads(file.read_text())["raw"] if file.exists() else {}
        return raw


def launcher(ranks: int) -> list[str]:
    """What starts a script, or -m a module, once a rank."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def _name(words: Sequence[object]) -> str:
    """The program of a command: the script, or what follows the last -m."""
    texts = list(map(str, words))
    if script := next((text for text in texts if text.endswith(".py")), None):
        return script
    module = len(texts) - texts[::-1].index("-m") if "-m" in texts else 0
    return " ".join(["fastrot" if texts[module].startswith("fastrot.") else texts[module], *texts[module + 1 :][:1]])
