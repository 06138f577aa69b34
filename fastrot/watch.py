"""Processes beside and above this one: a killed launcher leaves no orphans, a lost rank is seen."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import parent_process
from pathlib import Path

from fastrot.errors import Fault

_LAUNCHERS = {"mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "hydra_pmi_proxy"}  # that are no Python
_GRACE_S = 20  # for a training to stop with a checkpoint: less than launchers leave


def _stat(pid: int) -> list[str]:
    """/proc's line on a process from its state on: state, parent, ..., start time at 19. Empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except (OSError, IndexError):
        return []


@dataclass(frozen=True)
class Process:
    """A process of this machine; its start time tells it from a later one of the same number."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(pid, (_stat(pid) or [""] * 20)[19])

    @property
    def lives(self) -> bool:
        """Also where it is stopped; not as a zombie that nobody has asked for its end."""
        stat = _stat(self.pid)
        return bool(stat) and stat[19] == self.started and stat[0] not in "ZX"

    @property
    def stopped(self) -> bool:
        return self.lives and _stat(self.pid)[:1] in (["T"], ["t"])


def _launchers_above() -> list[Process]:
    """The launchers above us: the unbroken line of Python processes and of MPI's."""
    line: list[Process] = []
    pid = os.getppid()
    while pid > 1:
        try:
            name = Path(f"/proc/{pid}/comm").read_text()
            cmdline = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            break
        if (
            b"python" not in os.path.basename(cmdline)
            and "python" not in name
            and name.strip().partition(".")[0] not in _LAUNCHERS
        ):
            break
        line.append(Process.of(pid))
        pid = int((_stat(pid) or ["", "0"])[1])
    return line


@cache
def die_with_launcher() -> None:
    """Ask this process to stop when a launcher above it is gone, and end it where it has not after a while: a killed
    launcher leaves no orphans, and a training its checkpoint. As early as may be: who is gone by now is not missed."""
    watched = _launchers_above()

    def wait() -> None:
        while all(process.lives for process in watched):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)

    if watched:
        _end_after(wait)


def die_with_parent() -> None:
    """End this worker of a pool when the process that made it is gone: it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None, "a worker has one"
    _end_after(parent.join)


def _end_after(wait: Callable[[], None]) -> None:
    def watch() -> None:
        wait()
        os._exit(Fault.exit_code)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
