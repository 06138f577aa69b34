"""Benches lose no figure to an arm that fails, and are fair to the others."""

import importlib
import json
import sys
import weakref
from argparse import Namespace

import pytest
import torch

from conftest import ROOT
from fastrot import distributed


@pytest.fixture
def bench(monkeypatch):
    """A function that imports a bench."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    return importlib.import_module


@pytest.fixture
def ranks():
    yield distributed.start()
    distributed.end()


def test_an_arm_that_fails_is_missing_with_its_reason_and_the_others_are_kept(
    bench, ranks, tmp_path, monkeypatch, narrow
):
    """One runs out of memory, one learns another thing; after each arm base alone is in memory."""
    step, made, alive, kept = bench("step"), [], [], []
    make, learn, let_go = step.Step.__init__, step.Step.learnt, step.let_go

    def makes(self, *arguments, **switches):
        make(self, *arguments, **switches)
        made.append(weakref.ref(self))
        self.other = switches["optimizer"] == "unfused"
        if switches["stem_channels"] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def learns(self, steps):
        losses, norm = learn(self, steps)
        return losses, norm * (2 if self.other else 1)

    def lets_go(device):
        let_go(device)
        alive.append(sum(one() is not None for one in made))

    def keeps(result):
        step.harness.keep(tmp_path / "out.json", "?", result)
        kept.append(json.loads((tmp_path / "out.json").read_text()))

    monkeypatch.setattr(step.Step, "__init__", makes)
    monkeypatch.setattr(step.Step, "learnt", learns)
    monkeypatch.setattr(step, "let_go", lets_go)
    only = ["base", "stem_channels=4", "SGD unfused", "half the images"]
    arguments = Namespace(arch="resnet18", images=2, side=32, rounds=1, lap=1, only=only, data=None)
    result = step.race(arguments, ranks, step.harness.clock, keeps)
    assert list(result["switches"]) == ["base", "half the images"] and list(result["plain"]) == ["plain PyTorch"]
    assert result["missing"]["stem_channels=4"] == "OutOfMemoryError: CUDA out of memory."
    assert "SGD unfused: the first gradient's norm" in result["missing"]["SGD unfused"]
    assert alive == [1] * 4
    assert [len(each["switches"]) + len(each["plain"]) + len(each["missing"]) for each in kept] == [2, 3, 4, 5]
    assert {"times_base", "times_plain"} <= result["switches"]["base"].keys()
    assert {"times_base", "base_step"} <= result["switches"]["half the images"].keys()


@pytest.fixture
def rotated(bench, tmp_path, monkeypatch):
    """A function that measures the views of two small sides: the result."""
    rotate, out = bench("rotate"), tmp_path / "out.json"

    def measured(*words) -> dict:
        words = ["--device", "cpu", "--sides", "6", "9", "--mib", "1", "--rounds", "1", "--out", str(out), *words]
        monkeypatch.setattr(sys, "argv", ["rotate.py", *words])
        rotate.main()
        return json.loads(out.read_text())

    return measured


def test_views_are_measured_beside_dalis(rotated):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    result = rotated()
    assert not result["missing"]
    assert all("DALI fp16" in side["versions"] for side in result["sides"].values())


def test_views_are_measured_without_dali_too_and_each_side_is_compiled_by_itself(rotated, monkeypatch, capsys):
    asked = []
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(torch.compiler, "reset", lambda: asked.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda work, dynamic: (asked.append(dynamic), work)[1])
    result = rotated("--compile")
    assert "nvidia.dali" in result["missing"]["DALI fp16"] and "no DALI: " in capsys.readouterr().out
    assert asked == ["reset", False, False] * 2
    assert all("usual torch, compiled" in side["versions"] for side in result["sides"].values())
