"""Checkpoints: whole or not there, verified, thinned out; the newest sound one is found."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastrot.errors import Fault, UserError
from fastrot.runs import checkpoint

SAID: list[str] = []


@pytest.fixture(autouse=True)
def said():
    SAID.clear()


def saver(run, keep=2):
    return checkpoint.Saver(run, keep, SAID.append)


def save(made, step, value=0.0, accuracy=None):
    model = {
        "conv1.weight": torch.full((2, 3, 3, 3), value).to(memory_format=torch.channels_last),
        "fc.weight": torch.ones(4, 2),
    }
    made.save(
        step,
        model,
        {"momentum_buffer/fc.weight": torch.zeros(4, 2)},
        {"step": step, "position": step * 8, "scalars": {}, "defining": {}},
        accuracy,
    )
    made.finish()


def names(run):
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def test_what_is_saved_is_loaded(tmp_path):
    save(saver(tmp_path), 3, 0.5)
    folder = checkpoint.find("auto", tmp_path, SAID.append)
    found = checkpoint.load(folder)
    assert folder.name == "step-00000003" == (tmp_path / "checkpoints/latest").read_text().strip()
    assert torch.equal(found.model["conv1.weight"], torch.full((2, 3, 3, 3), 0.5))
    assert found.state["position"] == 24
    assert set(load_file(folder / "backbone.safetensors")) == {"conv1.weight"}


def test_the_last_few_and_the_best_are_kept(tmp_path):
    made = saver(tmp_path, keep=2)
    for step, accuracy in ((1, 0.3), (2, 0.9), (3, 0.5), (4, None), (5, 0.6)):
        save(made, step, accuracy=accuracy)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    again = saver(tmp_path, keep=2)  # a resumed run knows the best
    save(again, 6, accuracy=0.7)
    assert json.loads((tmp_path / "checkpoints/best").read_text()) == {"name": "step-00000002", "accuracy": 0.9}


def test_of_equally_good_checkpoints_the_first_stays_the_best(tmp_path):
    made = saver(tmp_path, keep=1)
    for step in (1, 2, 3):
        save(made, step, accuracy=0.5)
    assert json.loads((tmp_path / "checkpoints/best").read_text()) == {"name": "step-00000001", "accuracy": 0.5}
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").write_bytes(b"x" * (f / "model.safetensors").stat().st_size),
        lambda f: (f / "optimizer.safetensors").unlink(),
        lambda f: (f / "state.json").write_text("{}"),
        lambda f: (f / "manifest.json").unlink(),
        lambda f: (f / "manifest.json").write_text("{"),
        lambda f: (f / "manifest.json").write_text("[]"),
    ],
)
def test_a_damaged_newest_is_told_and_the_one_before_taken(tmp_path, damage):
    made = saver(tmp_path)
    save(made, 1)
    save(made, 2)
    damage(tmp_path / "checkpoints/step-00000002")
    assert checkpoint.find("auto", tmp_path, SAID.append).name == "step-00000001"
    assert len(SAID) == 1 and "step-00000002 is damaged" in SAID[0]


def test_a_damaged_newest_makes_way_for_the_one_written_anew(tmp_path):
    made = saver(tmp_path)
    for step in (1, 2):
        save(made, step)
    (tmp_path / "checkpoints/step-00000002/state.json").write_text("{}")
    checkpoint.find("auto", tmp_path, SAID.append)
    assert names(tmp_path) == ["step-00000001"]
    assert (tmp_path / "checkpoints/damaged-step-00000002").exists()


def test_a_half_written_checkpoint_is_never_taken(tmp_path):
    save(saver(tmp_path), 1)
    (tmp_path / "checkpoints/.tmp-step-00000002").mkdir()
    (tmp_path / "checkpoints/step-00000003").mkdir()  # as if the rename were not atomic
    assert checkpoint.find("auto", tmp_path, SAID.append).name == "step-00000001"


def test_resume_words(tmp_path):
    assert checkpoint.find("auto", tmp_path, SAID.append) is None
    assert checkpoint.find("never", tmp_path, SAID.append) is None
    save(saver(tmp_path), 7)
    folder = tmp_path / "checkpoints/step-00000007"
    assert checkpoint.find(str(tmp_path), tmp_path / "other", SAID.append) == folder
    assert checkpoint.find(str(folder), tmp_path / "other", SAID.append) == folder
    with pytest.raises(UserError, match="holds a run at step-00000007"):
        checkpoint.find("never", tmp_path, SAID.append)
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.find(str(tmp_path / "none"), tmp_path, SAID.append)
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match="not a sound checkpoint: state.json"):
        checkpoint.find(str(folder), tmp_path / "other", SAID.append)
    with pytest.raises(UserError, match="none of 1 checkpoints is sound"):
        checkpoint.find("auto", tmp_path, SAID.append)


def test_a_checkpoint_that_cannot_be_written_is_told_and_three_end_the_run(tmp_path):
    save(saver(tmp_path), 1)
    made = saver(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    for step in (2, 3, 4):
        save(made, step)
    assert len(SAID) == 3 and all("training goes on" in line for line in SAID)
    with pytest.raises(Fault, match="last 3 checkpoints"):
        save(made, 5)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    assert checkpoint.find("auto", tmp_path, SAID.append).name == "step-00000001"


def test_differences_are_told_old_to_new_and_allowed_by_name(tmp_path):
    saved, now = (
        {"model.arch": "resnet18", "optim.lr": 0.1, "run.seed": 0},
        {"model.arch": "resnet50", "optim.lr": 0.2, "run.seed": 0},
    )
    with pytest.raises(UserError) as error:
        checkpoint.refuse_differences(saved, now, [], ("model.arch",), tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and "model.arch was 'resnet18', is 'resnet50'" in lines[0]
    assert "--resume-anyway" not in lines[0] and "--resume-anyway optim.lr" in lines[1]
    checkpoint.refuse_differences(saved, now, ["model.arch", "optim.lr"], (), tmp_path)
