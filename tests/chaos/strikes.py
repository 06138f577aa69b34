"""What may befall a training: kills, signals, disks and ranks that stop; and damage while it is down."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from workers.launched import Start

LOOKS_S = 0.01
FILES = ("model.safetensors", "optimizer.safetensors", "backbone.safetensors", "state.json")
# what ends a process that does not listen; not those that stop one, or that its system takes for itself
DEADLY = [
    signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGALRM, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS,
    signal.SIGILL, signal.SIGFPE, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGTRAP, signal.SIGSYS,
]  # fmt: skip
FROZEN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* reads below $CHAOS_IMAGES do not end once $CHAOS_FREEZE is there */
static void freeze(int handle) {
    char link[64], path[4096] = "";
    const char *images = getenv("CHAOS_IMAGES"), *flag = getenv("CHAOS_FREEZE");
    if (!images || !flag || access(flag, F_OK)) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    if (readlink(link, path, sizeof path - 1) > 0 && !strncmp(path, images, strlen(images))) for (;;) pause();
}
ssize_t pread64(int handle, void *into, size_t bytes, off_t from) {
    freeze(handle);
    if (lseek(handle, from, SEEK_SET) < 0) return -1;
    return read(handle, into, bytes);
}
ssize_t pread(int handle, void *into, size_t bytes, off_t from) { return pread64(handle, into, bytes, from); }
"""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 48 MB at a new folder. Needs the right to mount."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def holders(output: str) -> list[int]:
    """Processes whose standard output is this file: all of a start."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/fd/1") == output:
                found.append(int(pid))
        except OSError:
            continue
    return found


class Running:
    """A start that runs, or ran."""

    def __init__(self, start: Start, process: BaseProcess, run: Path, small: Path, chance: random.Random):
        Path(start.output).touch()  # it may be struck before it does so itself
        self.start, self.run, self.small, self.chance = start, run, small, chance
        self._process, self._began = process, time.monotonic()
        self.hung = self.was_training = False
        self.seconds = 0.0
        self.complaints: list[str] = []
        self._notes: list[dict] = []
        self._read = 0

    @property
    def launcher(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def over(self) -> bool:
        return self._process.exitcode is not None

    @property
    def code(self) -> int | None:
        return self._process.exitcode

    @property
    def status(self) -> dict:
        try:
            status = json.loads((self.run / "STATUS.json").read_text())
            return status if isinstance(status, dict) else {}
        except (OSError, ValueError):
            return {}

    def notes(self) -> list[dict]:
        """What its ranks have noted so far."""
        try:
            with open(self.start.notes, "rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return []
        self._read += len(new)
        self._notes += [line for line in map(json.loads, new.splitlines()) if line["start"] == self.start.number]
        return self._notes

    def steps(self) -> list[int]:
        """Begun by any rank."""
        return [note["step"] for note in self.notes() if "step" in note]

    def ranks(self) -> dict[int, int]:
        """Processes of the ranks that have begun."""
        return {note["rank"]: note["pid"] for note in self.notes() if "pid" in note}

    def said(self) -> str:
        """The last line of ours."""
        lines = [
            line for line in Path(self.start.output).read_text(errors="replace").splitlines() if "fastrot: " in line
        ]
        return lines[-1][lines[-1].index("fastrot: ") :][:300] if lines else ""

    def wait(self, happened: Callable[[], object], limit: float) -> bool:
        """Look until it has happened, the start is over or `limit` seconds have passed; whether it has happened."""
        looks = int(limit / LOOKS_S)  # looks, not seconds: all may have been stopped together for a while
        while not (true := happened()) and not self.over and looks > 0:
            time.sleep(LOOKS_S)
            looks -= 1
        return bool(true)

    def send(self, number: int, *pids: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def join(self, limit: float) -> None:
        self.wait(lambda: False, limit)
        self.hung = not self.over
        self.seconds = time.monotonic() - self._began
        if self.hung:
            self.send(signal.SIGKILL, *holders(self.start.output))
            self._process.join()

    def orphans(self, limit: float) -> list[int]:
        """Who is left `limit` seconds later, and ends now."""
        looks = int(limit / LOOKS_S)
        while (left := holders(self.start.output)) and looks > 0:
            time.sleep(LOOKS_S)
            looks -= 1
        self.send(signal.SIGKILL, *left)
        return left


class Strike:
    """Does nothing; what befalls a start, for others to say.

    graceful        it asks for a stop, which a run that trains makes with a checkpoint.
    stops_writing   while it lasts checkpoints cannot be written.
    leaves_holes    nor can lines of metrics.
    """

    graceful = stops_writing = leaves_holes = False

    def settings(self, chance: random.Random, root: Path) -> dict:
        """More of the start's."""
        return {}

    def strikes(self, running: Running, step: int | None, delay: float) -> dict:
        """Wait until a rank has begun `step`, if one is given, and `delay` seconds more; then strike. What was struck,
        empty where the start was over by then."""
        running.wait(lambda: step is None or max(running.steps(), default=-1) >= step, 60)
        running.wait(lambda: False, delay)
        running.was_training = len({note["rank"] for note in running.notes() if "step" in note}) == running.start.ranks
        if running.over:
            return {}
        words = self.strike(running)
        return {"struck": words} if words else {}

    def strike(self, running: Running) -> str:
        return ""

    def undo(self, running: Running) -> None:
        return


class Signal(Strike):
    """numbers: of one of these signals; whom: launcher, rank, all; terminal: those that Ctrl-C there would reach."""

    def __init__(self, whom: str, *numbers: int, graceful: bool = False):
        self._whom, self._numbers, self.graceful = whom, numbers, graceful

    def strike(self, running: Running) -> str:
        number = running.chance.choice(self._numbers)
        ranks = running.ranks()
        if self._whom == "rank" and ranks:
            rank = running.chance.choice(sorted(ranks))
            running.send(number, ranks[rank])
            return f"{signal.Signals(number).name} to rank {rank}"
        whom = self._whom if self._whom in ("all", "terminal") else "launcher"
        if whom == "all":
            running.send(number, running.launcher, *holders(running.start.output))
        elif whom == "terminal":
            with suppress(ProcessLookupError):
                os.killpg(running.launcher, number)
        else:
            running.send(number, running.launcher)
        return f"{signal.Signals(number).name} to {whom}"


class InsideWrite(Strike):
    """kill -9 of rank 0 by its own writer, at any thing that it asks of the file system in its first checkpoints."""

    def settings(self, chance: random.Random, root: Path) -> dict:
        return {"dies_at": chance.randrange(1, 100)}

    def strikes(self, running: Running, step: int | None, delay: float) -> dict:
        running.wait(lambda: False, 60)
        return {"struck": f"SIGKILL at {running.start.dies_at} of a write"} if running.code != 0 else {}


class Stalled(Strike):
    """SIGSTOP of a rank: others wait for run.timeout, then say who it is. Alone, it goes on when it may."""

    def settings(self, chance: random.Random, root: Path) -> dict:
        return {"words": ["run.timeout=2"]}

    def strike(self, running: Running) -> str:
        ranks = running.ranks()
        if not running.was_training or not ranks:
            return ""
        rank = running.chance.choice(sorted(ranks))
        running.send(signal.SIGSTOP, ranks[rank])
        if running.start.ranks == 1:
            running.wait(lambda: False, 0.3)
        else:
            heard = running.wait(lambda: "run.timeout" in running.said(), 30)
            if not heard and not running.over and running.status.get("state") == "running":
                running.complaints.append("nobody said that a rank is stopped")
        if running.start.ranks == 1 or running.chance.random() < 0.8:
            running.send(signal.SIGCONT, ranks[rank])  # else its launcher kills it, after half a minute
        return f"SIGSTOP of rank {rank}"


class Frozen(Strike):
    """Reads of images do not end any more."""

    def settings(self, chance: random.Random, root: Path) -> dict:
        flag = root / "freeze"
        environment = {"CHAOS_IMAGES": str(root), "CHAOS_FREEZE": str(flag)}
        return {"words": ["data.timeout=3", "data.prefetch=1"], "environment": environment}

    def strike(self, running: Running) -> str:
        Path(running.start.environment["CHAOS_FREEZE"]).touch()
        return "storage froze"

    def undo(self, running: Running) -> None:
        Path(running.start.environment["CHAOS_FREEZE"]).unlink(missing_ok=True)


class NoDisk(Strike):
    """For a while, or until the run has ended, nothing can be written."""

    stops_writing = leaves_holes = True

    def strike(self, running: Running) -> str:
        if not running.was_training:
            return ""
        words = self.away(running)
        if running.chance.random() < 0.5:
            running.wait(lambda: False, 0.5)
            self.undo(running)
            words += ", for a while"
        return words

    def away(self, running: Running) -> str:
        raise NotImplementedError


class Full(NoDisk):
    def away(self, running: Running) -> str:
        assert os.path.ismount(running.small), "no disk of all may fill"
        disk = os.statvfs(running.small)
        room = running.chance.randrange(0, 600_000)
        with suppress(OSError), (running.small / "filler").open("wb", buffering=0) as file:  # the run writes beside it
            file.write(bytes(max(0, disk.f_bavail * disk.f_frsize - room)))
        return f"a disk with {room:,} bytes of room"

    def undo(self, running: Running) -> None:
        (running.small / "filler").unlink(missing_ok=True)


class ReadOnly(NoDisk):
    def away(self, running: Running) -> str:
        subprocess.run(["mount", "--bind", running.run, running.run], check=True)
        remount = ["mount", "-o", "remount,bind,ro", running.run]
        for _ in range(200):  # it is refused while a file is open for writing
            if not (last := subprocess.run(remount, capture_output=True, text=True)).returncode:
                return "the run's folder read-only"
        raise OSError(last.stderr)

    def undo(self, running: Running) -> None:
        subprocess.run(["umount", "--lazy", running.run], capture_output=True)


class Gone(NoDisk):
    def away(self, running: Running) -> str:
        running.run.rename(running.run.with_name("away"))
        return "the run's folder gone"

    def undo(self, running: Running) -> None:
        if (away := running.run.with_name("away")).exists():
            away.rename(running.run)


STRIKES: dict[str, Strike] = {
    "none": Strike(),
    "kill -9 of a rank": Signal("rank", signal.SIGKILL),
    "kill -9 of all": Signal("all", signal.SIGKILL),
    "kill -9 of the launcher": Signal("launcher", signal.SIGKILL),
    "kill -9 inside a write": InsideWrite(),
    "stop asked of the launcher": Signal("launcher", signal.SIGTERM, signal.SIGINT, graceful=True),
    "stop asked of a rank": Signal("rank", signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, graceful=True),
    "Ctrl-C": Signal("terminal", signal.SIGINT, graceful=True),
    "any other signal to a rank": Signal("rank", *DEADLY),
    "any other signal to the launcher": Signal("launcher", signal.SIGUSR1, *DEADLY),
    "rank stalls": Stalled(),
    "storage freezes": Frozen(),
    "disk full": Full(),
    "folder read-only": ReadOnly(),
    "folder gone": Gone(),
}
ALWAYS = {name: 3.0 for name in list(STRIKES)[1:10]}  # where nothing may be mounted or preloaded too


def sound(run: Path) -> list[Path]:
    """The checkpoints that are whole, oldest first, judged without our code."""
    return [folder for folder in sorted((run / "checkpoints").glob("step-*")) if _is_sound(folder)]


def _is_sound(folder: Path) -> bool:
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        data = {name: (folder / name).read_bytes() for name in FILES}
        return all(
            files[name] == {"sha256": hashlib.sha256(data[name]).hexdigest(), "bytes": len(data[name])}
            for name in FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damage(run: Path, chance: random.Random) -> str:
    """Break one thing that a disk or a careless hand may break, so that a sound checkpoint is left; what it was."""
    root, whole = run / "checkpoints", sound(run)
    if not whole:
        return ""
    kinds = ["half a line of metrics", "best is []", "half a STATUS.json", "latest is gone", "half a checkpoint"]
    if len(whole) > 1 and chance.random() < 0.75:
        kinds = ["bit", "cut", "gone", "empty manifest"]
    kind, newest = chance.choice(kinds), whole[-1]
    name = chance.choice(sorted(path.name for path in newest.iterdir()))
    match kind:
        case "half a line of metrics":
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3, "los')
        case "best is []":
            (root / "best").write_text("[]")
        case "half a STATUS.json":
            (run / "STATUS.json").write_text('{"state": "run')
        case "latest is gone":
            (root / "latest").unlink(missing_ok=True)
        case "half a checkpoint":
            (root / ".tmp-7-step-00000099").mkdir(exist_ok=True)
        case "bit":
            data = bytearray((newest / name).read_bytes())
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            (newest / name).write_bytes(data)
        case "cut":
            os.truncate(newest / name, (newest / name).stat().st_size // 2)
        case "gone":
            (newest / name).unlink()
        case "empty manifest":
            (newest / "manifest.json").write_text('{"files": {}}')
    return f"{kind}: {newest.name} {name}" if kind in ("bit", "cut", "gone", "empty manifest") else kind
