"""Processes of tests, forked from one that has imported torch and DeepSpeed once; and ranks without a launcher."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import ROOT, TRACES, free_port
from workers import narrow

_TIME_OUT_S = 400
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["workers.preloaded"])  # all of a test process's forks share it


def forked(work: Callable, *arguments) -> BaseProcess:
    """A process that runs work(*arguments), a function of a module."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))  # what is preloaded
    try:
        process = _CONTEXT.Process(target=work, args=arguments)
        process.start()
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    return process


def as_ranks(world: int, work: Callable, *arguments, killed_when: Callable[[], bool] | None = None) -> str:
    """Run work(*arguments), a function of a module, on `world` ranks of gloo; what they said. None may fail.

    killed_when: then each gets a SIGKILL.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs, port = [Path(folder) / str(rank) for rank in range(world)], free_port()
        processes: list[BaseProcess] = []
        try:
            for rank, log in enumerate(logs):
                processes.append(
                    forked(_rank, rank, world, port, log, narrow.is_on(), os.environ[TRACES], work, arguments)
                )
            while killed_when and not killed_when() and all(process.is_alive() for process in processes):
                time.sleep(0.02)
            for process in processes:
                process.kill() if killed_when else None
                process.join(_TIME_OUT_S)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        said = "".join(log.read_text() for log in logs)
    assert [process.exitcode for process in processes] == [-9 if killed_when else 0] * world, said[-3000:]
    return said


def _rank(
    rank: int, world: int, port: str, log: Path, small: bool, traces: str, work: Callable, arguments: tuple
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1), os.dup2(handle, 2)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")
    if small:
        narrow.turn_on()
    import_module("workers.traced").turn_on(Path(traces))
    code = work(*arguments)
    os._exit(code or 0)  # as the commands do: a library's thread may outlive the interpreter
