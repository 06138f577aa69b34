"""Checkpoints: whole or not there, verified, thinned out; the newest sound one is found."""

import errno
import json
import os
import stat

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastrot.errors import Diverged, Fault, UserError
from fastrot.files import remove
from fastrot.runs import checkpoint

SAID: list[str] = []


@pytest.fixture(autouse=True)
def said():
    SAID.clear()


def saver(run, keep=2):
    (run / "checkpoints").mkdir(exist_ok=True)
    return checkpoint.Saver(run, keep, SAID.append)


def save(made, step, value=0.0, accuracy=None):
    model = {
        "conv1.weight": torch.full((2, 3, 3, 3), value).to(memory_format=torch.channels_last),
        "fc.weight": torch.ones(4, 2),
    }
    state = checkpoint.State(step, step * 8, {}, {})
    made.save(model, {"momentum_buffer/fc.weight": torch.zeros(4, 2)}, state, accuracy)
    made.finish()


def names(run):
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def test_what_is_saved_is_loaded(tmp_path):
    save(saver(tmp_path), 3, 0.5)
    folder = checkpoint.find("auto", tmp_path, SAID.append)
    found = checkpoint.load(folder)
    assert folder.name == "step-00000003" == (tmp_path / "checkpoints/latest").read_text().strip()
    assert torch.equal(found.model["conv1.weight"], torch.full((2, 3, 3, 3), 0.5))
    assert found.state.position == 24
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_the_best(tmp_path, value):
    made = saver(tmp_path)
    save(made, 1, accuracy=value)
    assert made.best is None and not (tmp_path / "checkpoints/best").exists()
    save(made, 2, accuracy=0.5)
    save(made, 3, accuracy=value)
    assert json.loads((tmp_path / "checkpoints/best").read_text()) == {"name": "step-00000002", "accuracy": 0.5}


def test_a_damaged_best_is_said_once(tmp_path):
    save(saver(tmp_path), 1, accuracy=0.5)
    (tmp_path / "checkpoints/best").write_text("[]")
    again = saver(tmp_path)
    for step in (2, 3):
        save(again, step)
    assert len(SAID) == 1 and "best is damaged" in SAID[0]


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
    for time in (1, 2, 3):
        (tmp_path / "checkpoints/step-00000002/state.json").write_text("{}")
        assert checkpoint.find("auto", tmp_path, SAID.append).name == "step-00000001"
        assert "step-00000002" in names(tmp_path), "nothing moves before a start is admitted"
        checkpoint.make_way(tmp_path, 1)
        assert names(tmp_path) == ["step-00000001"]
        assert len(list((tmp_path / "checkpoints").glob("damaged-step-00000002*"))) == time
        save(made, 2)


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


@pytest.mark.parametrize("content", ['{"files": []}', '{"files": {}}', '{"files": {"state.json": 1}}', "[" * 100_000])
def test_a_manifest_that_names_no_sound_files_is_damage(tmp_path, content):
    save(saver(tmp_path), 1)
    save(saver(tmp_path), 2)
    (tmp_path / "checkpoints/step-00000002/manifest.json").write_text(content)
    assert checkpoint.find("auto", tmp_path, SAID.append).name == "step-00000001"
    assert "step-00000002 is damaged" in SAID[0]


def test_a_manifest_without_the_model_is_damage(tmp_path):
    save(saver(tmp_path), 1)
    path = tmp_path / "checkpoints/step-00000001/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["model.safetensors"]
    path.write_text(json.dumps(manifest))
    assert checkpoint.verify(path.parent) == "manifest.json lacks model.safetensors"


def test_a_file_with_a_checkpoints_name_is_damage_and_makes_way(tmp_path):
    made = saver(tmp_path)
    save(made, 1)
    (tmp_path / "checkpoints/step-00000009").write_text("x")
    assert checkpoint.find("auto", tmp_path, SAID.append).name == "step-00000001"
    assert "step-00000009 is damaged" in SAID[0]
    checkpoint.make_way(tmp_path, 1)
    save(made, 9)
    assert checkpoint.find("auto", tmp_path, SAID.append).name == "step-00000009"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["files", "accuracy", "name", "step", "state.json", "sha256", "bytes"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=anything, where=st.sampled_from(["best", "step-00000001/manifest.json", "step-00000001/state.json"]))
def test_any_json_where_state_is_read_is_damage_at_most(tmp_path, content, where):
    remove(tmp_path / "checkpoints")
    save(saver(tmp_path), 1, accuracy=0.5)
    (tmp_path / "checkpoints" / where).write_text(json.dumps(content))
    saver(tmp_path)
    if where != "best":
        assert checkpoint.verify(tmp_path / "checkpoints/step-00000001")
        with pytest.raises(UserError, match="none of 1 checkpoints is sound"):
            checkpoint.find("auto", tmp_path, SAID.append)
    save(saver(tmp_path), 2, accuracy=0.75)
    assert json.loads((tmp_path / "checkpoints/best").read_text())["accuracy"] >= 0.5


def test_the_umask_decides_the_modes(tmp_path):
    before = os.umask(0o027)
    try:
        save(saver(tmp_path), 1)
    finally:
        os.umask(before)
    files = list((tmp_path / "checkpoints/step-00000001").iterdir())
    assert len(files) == 5 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(which, value):
    sound = {"w": torch.ones(3), "count": torch.tensor(3), "empty": torch.ones(0)}
    checkpoint.refuse_poisoned(sound, {}, 4)
    tensors = [sound, {"momentum_buffer/w": torch.ones(3)}]
    tensors[which] = {**tensors[which], "bad": torch.tensor([0.0, value])}
    with pytest.raises(Diverged, match="not finite after 4 steps"):
        checkpoint.refuse_poisoned(*tensors, 4)


def test_a_failed_write_leaves_nothing_behind_and_a_kills_leftovers_go_at_the_next_start(tmp_path, monkeypatch):
    made = saver(tmp_path)
    save(made, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        save(made, 2)
    assert "No space left" in SAID[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    (tmp_path / "checkpoints/.tmp-step-00000002").mkdir()
    checkpoint.make_way(tmp_path, 1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


def full_disk(tensors, path):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_branch_begins_elsewhere_and_then_goes_on_from_its_own(tmp_path):
    begun, branch = tmp_path / "begun", tmp_path / "branch"
    for run, steps in ((begun, (1, 2)), (branch, ())):
        run.mkdir()
        for step in steps:
            save(saver(run), step)
    first = begun / "checkpoints/step-00000001"
    assert checkpoint.find(str(first), branch, SAID.append) == first
    save(saver(branch), 2)
    for words in (str(first), str(begun), "auto"):
        assert checkpoint.find(words, branch, SAID.append) == branch / "checkpoints/step-00000002"
    with pytest.raises(UserError, match="holds step-00000002, which is newer"):
        checkpoint.find(str(first), begun, SAID.append)
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.find(str(tmp_path / "none"), branch, SAID.append)
