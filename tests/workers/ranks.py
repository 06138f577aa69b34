"""Ranks without a launcher: forked from a process of theirs that has imported torch and DeepSpeed once."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, free_port
from workers import narrow

_TIME_OUT_S = 400
_CONTEXT = multiprocessing.get_context("forkserver")
_USED = [  # by a training; a rank would import each anew
    "deepspeed",
    "torch._dynamo.repro.after_aot",
    "torch.utils.tensorboard",
    "workers.steps",
    "fastrot.commands.train",
    "fastrot.data.decode.turbo",
    "fastrot.engine.deepspeed",
    "fastrot.engine.plain",
    "fastrot.runs.run",
    "fastrot.runs.finetune",
]
_CONTEXT.set_forkserver_preload(_USED)


def as_ranks(world: int, work: Callable, *arguments, killed_when: Callable[[], bool] | None = None) -> str:
    """Run work(*arguments), a function of a module, on `world` ranks of gloo; what they said. None may fail.

    killed_when: then each gets a SIGKILL.
    """
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))  # what is preloaded
    with tempfile.TemporaryDirectory() as folder:
        logs, port = [Path(folder) / str(rank) for rank in range(world)], free_port()
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, world, port, log, narrow.is_on(), work, arguments))
            for rank, log in enumerate(logs)
        ]
        try:
            for process in processes:
                process.start()
            while killed_when and not killed_when() and all(process.is_alive() for process in processes):
                time.sleep(0.02)
            for process in processes:
                process.kill() if killed_when else None
                process.join(_TIME_OUT_S)
        finally:
            os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
            for process in processes:
                if process.is_alive():
                    process.kill()
        said = "".join(log.read_text() for log in logs)
    assert [process.exitcode for process in processes] == [-9 if killed_when else 0] * world, said[-3000:]
    return said


def _rank(rank: int, world: int, port: str, log: Path, small: bool, work: Callable, arguments: tuple) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1), os.dup2(handle, 2)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")
    if small:
        narrow.turn_on()
    code = work(*arguments)
    os._exit(code or 0)  # as the commands do: a library's thread may outlive the interpreter
