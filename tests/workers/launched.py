"""A training under a real launcher whose processes are forked from one that has imported all: a start then costs what
the training itself does. Each rank notes on which images it trains."""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from unittest import mock

from conftest import ROOT, free_port
from workers import narrow, old_bugs

SCRIPT = str(ROOT / "fastrot" / "train.py")
# of Python's audit events those that a checkpoint's writer comes by
_WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}


@dataclass(frozen=True)
class Start:
    """One start of a run.

    notes   a file that gets a line for each rank that begins, and for each step that it begins.
    dies_at the writer of checkpoints is killed at the so many-th thing that it asks of the file system; 0: never.
    bug     an old bug to bring back, by its name in old_bugs.
    """

    number: int
    launcher: str
    ranks: int
    words: list[str]
    output: str
    notes: str
    dies_at: int = 0
    bug: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def run(start: Start) -> None:
    """Be the launcher of a start, or with plain python the training itself; never returns."""
    os.setsid()
    output = os.open(start.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(start.environment, OMP_NUM_THREADS="1")
    _prepare(start)
    if start.launcher == "python":
        _end_with(lambda: _train([SCRIPT, *start.words]))
    mock.patch("subprocess.Popen", _Forked).start()
    _end_with(lambda: _launch(start))


def _launch(start: Start) -> None:
    if start.launcher == "torchrun":
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
        from torch.distributed.run import main

        subprocess_handler.Popen = _Forked
        main(["--standalone", "--nproc_per_node", str(start.ranks), SCRIPT, *start.words])
    else:
        from deepspeed.launcher import launch, runner

        # it looks after its ranks once a second
        launch.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10), strftime=time.strftime)
        runner.main(
            ["--num_accelerators", str(start.ranks), "--master_port", free_port(), SCRIPT, *start.words]
        )  # fmt: skip


class _Forked(subprocess.Popen):
    """subprocess.Popen of `python -u [-m module | script] words`, forked instead of executed; all else as ever."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        if args[0] != sys.executable:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
        *_, new_session, _ = more
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            _become([word for word in args[1:] if word != "-u"], env, new_session)


def _become(words: list[str], environment: dict[str, str], new_session: bool) -> None:
    os.closerange(3, 1024)  # as Popen does: a rank shall not hold its launcher's sockets
    _NOTES.open()
    if new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        _end_with(importlib.import_module(words[1]).main)
    else:
        _end_with(lambda: _train(words))


def _train(words: list[str]) -> None:
    sys.argv = words
    _NOTES.write(os.environ.get("RANK", "0"), {"pid": os.getpid()})
    runpy.run_path(words[0], run_name="__main__")


def _end_with(work) -> None:
    """As an interpreter ends, without the time that it takes."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Notes:
    """A line for each thing noted; whole or not there, since a single write is."""

    start: Start

    def open(self) -> None:
        self._handle = os.open(self.start.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, rank: str, what: dict) -> None:
        os.write(self._handle, json.dumps({"start": self.start.number, "rank": int(rank), **what}).encode() + b"\n")


_NOTES = _Notes()


def _prepare(start: Start) -> None:
    """What all processes of a start share, before any is forked."""
    from fastrot import files
    from fastrot.data.loader import Loader
    from fastrot.profiling import roofline
    from fastrot.runs import memory

    narrow.turn_on()
    _NOTES.start = start
    _NOTES.open()
    # a network that is traced and a device that is timed before the first step take longer than a small run; and a kill
    # loses nothing that the kernel holds
    roofline.measure_rates = lambda *_: roofline.Rates(1e12, 1e11)
    roofline.step_rows = lambda *_: []
    memory.peak_of_step = lambda *_: 2**20
    files.fsync = lambda path: path.stat()
    train = Loader.train

    def noted(loader, *words) -> Iterator:
        for batch in train(loader, *words):
            yield replace(batch, micro_steps=_noted(batch))

    Loader.train = noted
    if start.dies_at:
        _die_at(start.dies_at)
    if start.bug:
        old_bugs.BUGS[start.bug]()


def _noted(batch) -> Iterator:
    for micro in batch.micro_steps:
        sample = micro.sample
        ids = {"rows": sample.rows.tolist(), "epochs": sample.epochs.tolist()}
        _NOTES.write(os.environ["RANK"], {"step": batch.step, "position": batch.position, **ids})
        yield micro


def _die_at(count: int) -> None:
    left = [count]

    def asked(event: str, _: object) -> None:
        if event in _WRITES and threading.current_thread().name == "checkpoint":
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(asked)
