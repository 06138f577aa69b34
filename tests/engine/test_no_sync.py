"""A step that does not log never makes the host wait for the device."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrot.data.loader import MicroBatch
from fastrot.models.resnet import build_model
from fastrot.profiling.clock import Clock
from fastrot.runs import run as running
from fastrot.runs.log import RunLog
from fastrot.tasks.finetune import FinetuneTask
from fastrot.tasks.linear import LinearTask

pytestmark = pytest.mark.usefixtures("narrow")

STEPS = 4
SMALL = [
    "model.arch=resnet18", "data.crop=32", "optim.images_per_step=6", "optim.epochs=3", "optim.warmup_epochs=1",
    f"run.max_steps={STEPS}", f"run.log_every={STEPS}", "run.tensorboard=false",
]  # fmt: skip
# What asks the device for a number: a value itself, or the size of a result.
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
# On the CPU these are free and reach no operation, so they are counted where they are called.
ASKING_METHODS = ("cpu", "numpy", "tolist", "item", "__array__")


class Asked(TorchDispatchMode):
    """What this thread asked tensors for, by step."""

    def __init__(self):
        super().__init__()
        self.steps = [[]]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in ASKING or by_mask:
            self.steps[-1].append(name)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def watch(self):
        thread = threading.get_ident()

        def watched(name, method):
            def call(tensor, *arguments, **options):
                if threading.get_ident() == thread:
                    self.steps[-1].append(name)
                return method(tensor, *arguments, **options)

            return call

        methods = {name: watched(name, getattr(torch.Tensor, name)) for name in ASKING_METHODS}
        with self, mock.patch.multiple(torch.Tensor, **methods):
            yield


ASKS = {
    "bool": bool,
    "float": float,
    "int": int,
    "item": torch.Tensor.item,
    "nonzero": torch.nonzero,
    "mask": lambda t: t[t > 0],
    "unique": torch.unique,
    "equal": lambda t: torch.equal(t, t + 1),
    "cpu": lambda t: t.cpu(),
    "numpy": lambda t: t.numpy(),
    "tolist": lambda t: t.tolist(),
}


@pytest.mark.parametrize("ask", ASKS)
def test_the_watch_sees_every_way_to_ask(ask):
    asked, one = Asked(), torch.ones(1)
    with asked.watch():
        one * 2 + one.sum()
        assert asked.steps == [[]]
        ASKS[ask](one)
    assert asked.steps != [[]]


@pytest.mark.parametrize("engine", [
    ["engine.kind=plain", "engine.precision=bf16", "optim.clip=1.0", "engine.images_per_micro_step=3"],
    ["engine.kind=plain", "optim.name=lars", "rotation.views=one", "rotation.shuffle_labels=true"],
    ["engine.kind=deepspeed", "optim.clip=1.0"],
    ["engine.kind=plain", "engine.norm=fused", "engine.stem_channels=4"],
    pytest.param(["engine.kind=plain", "engine.norm=fused_chain", "model.arch=resnet50"], marks=pytest.mark.slow),
])  # fmt: skip
def test_no_step_asks_a_tensor_for_its_value_before_a_line_is_due(fastrot, images, tmp_path, monkeypatch, engine):
    asked = Asked()

    def watched(*arguments):
        with asked.watch():
            return run(*arguments)

    run, tick = running.run, RunLog.tick
    if "engine.kind=deepspeed" in engine:
        from deepspeed.accelerator import get_accelerator

        monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: asked.steps[-1].append("synchronize"))
    monkeypatch.setattr(running, "run", watched)
    monkeypatch.setattr(RunLog, "tick", lambda log: (asked.steps.append([]), tick(log)))
    words = [*SMALL, *engine, f"data.train={images}", f"run.out={tmp_path / 'run'}", "--json"]
    assert fastrot("train", *words).json["steps"] == STEPS
    assert len(asked.steps) == STEPS + 1
    assert asked.steps[:STEPS] == [[]] * STEPS
    assert asked.steps[STEPS]  # the line itself must ask


def backbone():
    network = build_model("resnet18", 1, 0).eval()
    network.fc = torch.nn.Identity()
    return network


TASKS = {
    "linear": lambda cpu: LinearTask(backbone(), ("avg",), "adaptive", 32, 3, (124,) * 3, (58,) * 3, cpu, 0, 0.4, 0.1),
    "finetune": lambda cpu: FinetuneTask(backbone(), 3, (124,) * 3, (58,) * 3, torch.float32, cpu),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_waits_for_no_copy_to_the_device(monkeypatch, name):
    """Copies of arrays are queued; those of lists, which cannot be, are made by the first step."""
    task, copies = TASKS[name](torch.device("cpu")), []
    model = task.build_model("resnet18", 0)
    labels = np.arange(3)
    pixels = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    sample = SimpleNamespace(rows=labels, epochs=np.zeros(3, np.int64))
    flips, turns = torch.zeros(3, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)
    batch = MicroBatch(pixels, flips, turns, sample, labels, 3)
    task.loss(model, task.views(batch), batch)

    def to(tensor, *words, **options):
        if isinstance(words[0], torch.device):
            copies.append(options.get("non_blocking", False))
        return plain_to(tensor, *words, **options)

    def of_a_list(*words, **options):
        raise AssertionError("a list is copied")

    plain_to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "new_tensor", of_a_list)
    monkeypatch.setattr(torch, "tensor", of_a_list)
    task.loss(model, task.views(batch), batch)
    assert copies and all(copies)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "deepspeed"])
def test_no_step_waits_for_the_gpu_before_a_line_is_due(fastrot, images, tmp_path, monkeypatch, kind):
    """From the second step on: the first compiles, and measures backends."""
    if kind == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

    def strictly(method, mode):
        def wrapped(*arguments):
            torch.cuda.set_sync_debug_mode(mode)
            return method(*arguments)

        return wrapped

    monkeypatch.setattr(RunLog, "tick", strictly(RunLog.tick, "error"))
    monkeypatch.setattr(Clock, "read", strictly(Clock.read, "default"))
    words = [*SMALL, f"engine.kind={kind}", f"data.train={images}", f"run.out={tmp_path / 'run'}", "--json"]
    try:
        assert fastrot("train", *words).json["steps"] == STEPS
    finally:
        torch.cuda.set_sync_debug_mode("default")
