"""Contestants of a bench: a process each under a watchdog, frozen while another has the machine."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "torchvision.transforms.v2", "numpy", "PIL.Image"])
_TICK = os.sysconf("SC_CLK_TCK")
_WARM_BATCHES = 8  # untimed at the start of a round: what was made ahead is gone, and the pace is steady


class Lost(Exception):
    """A contestant failed, died or hung; says which."""


@dataclass(frozen=True)
class Lap:
    """One timed round. cpu_s: user and system, all processes; peak_mib: resident, summed over processes."""

    images: int
    wall_s: float
    cpu_s: float
    peak_mib: float


class Contestant:
    """`make(*args)` -> iterator of batches, in a process group of its own. Raises Lost from every call."""

    def __init__(self, make: Callable[..., Iterator], *args, patience_s: float = 60):
        self._patience_s = patience_s
        self._pipe, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()
        self._answer(patience_s)
        self._signal(signal.SIGSTOP)

    def lap(self, seconds: float, most_images: int | None = None) -> Lap:
        """Images of about `seconds`, fewer where `most_images` come first."""
        self._signal(signal.SIGCONT)
        self._pipe.send((seconds, most_images))
        lap = self._answer(seconds + self._patience_s)
        self._signal(signal.SIGSTOP)
        return lap

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join()

    def _answer(self, patience_s: float):
        try:
            if not self._pipe.poll(patience_s):
                raise Lost(f"gave nothing for {patience_s:g} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            answer = Lost(f"died (exit code {self._process.exitcode})")
        except Lost as hung:
            answer = hung
        if isinstance(answer, Lost):
            self.close()
            raise answer
        return answer

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def call(function: Callable, *args, patience_s: float = 60):
    """function(*args) in a process of its own. Raises Lost."""
    contestant = Contestant(_once, function, args, patience_s=patience_s)
    contestant._signal(signal.SIGCONT)
    contestant._pipe.send(None)
    try:
        return contestant._answer(patience_s)
    finally:
        contestant.close()


def _once(function, args):
    yield function(*args)


def _serve(pipe, make, args) -> None:
    os.setsid()
    import torch

    torch.set_num_threads(1)  # who wants threads makes them
    try:
        batches = make(*args)
        if make is _once:
            pipe.send("ready")
            pipe.recv()
            pipe.send(next(batches))
            return
        next(batches)
        pipe.send("ready")
        while True:
            pipe.send(_lap(batches, *pipe.recv()))
    except EOFError:  # the bench is gone
        os.killpg(0, signal.SIGKILL)
    except Exception as error:  # told to the bench, which lists it
        pipe.send(Lost(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))


def _lap(batches: Iterator, seconds: float, most_images: int | None) -> Lap:
    for _ in range(_WARM_BATCHES):
        next(batches)
    cpu, images, start = _group_cpu_s(), 0, time.perf_counter()
    while (wall := time.perf_counter() - start) < seconds and (most_images is None or images < most_images):
        images += len(next(batches))
    return Lap(images, wall, _group_cpu_s() - cpu, _group_peak_mib())


def _group() -> list[Path]:
    """/proc folders of this process and its descendants."""
    group, found = os.getpgrp(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rsplit(") ", 1)[1].split()[2]) == group:
                found.append(folder)
    return found


def _group_cpu_s() -> float:
    """User and system seconds, those of ended children included."""
    ticks = 0
    for folder in _group():
        with contextlib.suppress(OSError):
            ticks += sum(map(int, (folder / "stat").read_text().rsplit(") ", 1)[1].split()[11:15]))
    return ticks / _TICK


def _group_peak_mib() -> float:
    peak = 0
    for folder in _group():
        with contextlib.suppress(OSError):
            lines = (folder / "status").read_text().splitlines()
            peak += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return peak / 1024
