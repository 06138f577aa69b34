"""bench/step.py loses no figure to an arm that fails."""

import json
import sys
import weakref
from argparse import Namespace

import pytest
import torch

from conftest import ROOT
from fastrot import distributed


@pytest.fixture
def step(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    import step

    return step


@pytest.fixture
def ranks():
    yield distributed.start()
    distributed.end()


def test_an_arm_that_fails_is_missing_with_its_reason_and_the_others_are_kept(step, ranks, tmp_path, monkeypatch):
    """One runs out of memory, one learns another thing; after each arm base alone is in memory."""
    made, alive, kept = [], [], []
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
