"""A run on a bad day: full disks, folders that go, starts that are refused, losses that are no numbers, Ctrl-C."""

import errno
import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from conftest import after, metrics, write_folder
from fastrot import distributed
from fastrot.errors import Fault
from fastrot.runs import checkpoint
from fastrot.runs.build import Job
from fastrot.tasks.rotation import RotationTask

pytestmark = pytest.mark.usefixtures("narrow")

WORDS = [
    "model.arch=resnet18", "data.crop=16", "optim.images_per_step=3", "optim.lr=0.05", "optim.epochs=3",
    "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=2", "run.tensorboard=false", "engine.kind=plain",
]  # fmt: skip


@pytest.fixture
def begin(images, tmp_path, fastrot):
    def call(*words):
        return fastrot("train", *WORDS, f"data.train={images}", f"run.out={tmp_path / 'r'}", *words)

    return call


def status(folder):
    return json.loads((folder / "STATUS.json").read_text())


def everything(folder) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("STATUS.json", ".lock")}


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_ends_the_run_after_three_checkpoints_and_the_last_good_one_stands(
    begin, tmp_path, monkeypatch, number
):
    """Or one that is read-only by now."""
    run = tmp_path / "r"
    assert begin("run.max_steps=2").code == 0
    sound = everything(run / "checkpoints/step-00000002")

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "save_file", full)
    done = begin("run.checkpoint_every=1", "run.max_steps=8")
    assert done.code == 3 and "Traceback" not in done.err
    assert done.err.count("could not be written (") == 3
    assert len(done.errors) == 1 and "last 3 checkpoints could not be written; step-00000002 stands" in done.errors[0]
    assert status(run)["state"] == "failed" and "last 3 checkpoints" in status(run)["reason"]
    assert everything(run / "checkpoints/step-00000002") == sound
    assert not list(run.rglob(".tmp*"))


def test_a_run_folder_that_goes_is_said_and_not_made_anew(begin, tmp_path, monkeypatch):
    run = tmp_path / "r"
    after(monkeypatch, 3, lambda: run.rename(tmp_path / "elsewhere"))
    done = begin("run.checkpoint_every=1", "run.max_steps=8")
    assert done.code == 3 and "Traceback" not in done.err
    assert "cannot be written (No such file or directory); training goes on" in done.err
    assert len(done.errors) == 1 and "could not be written; there is no checkpoint" in done.errors[0]
    assert not run.exists()


def test_a_run_folder_made_read_only_keeps_what_it_holds(begin, tmp_path, monkeypatch):
    run, before = tmp_path / "r", {}
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")

    def read_only():
        subprocess.run(["mount", "--bind", run, run], check=True)
        remount = ["mount", "-o", "remount,bind,ro", run]
        for _ in range(1000):  # refused while a file is open for writing
            if not (last := subprocess.run(remount, capture_output=True, text=True)).returncode:
                break
        assert not last.returncode, last.stderr
        before.update(everything(run))

    assert begin("run.max_steps=2").code == 0
    after(monkeypatch, 1, read_only)
    try:
        done = begin("run.checkpoint_every=1", "run.max_steps=8")
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)
    assert done.code == 3 and "Traceback" not in done.err
    assert "cannot be written (Read-only file system); training goes on" in done.err
    assert done.err.count("could not be written (") == 3
    assert len(done.errors) == 1 and "last 3 checkpoints could not be written; step-0000000" in done.errors[0]
    assert everything(run) == before and not list(run.rglob(".tmp*"))


def test_a_full_disk_at_the_start_is_one_line(begin, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        done = begin()
    assert done.code == 2 and len(done.errors) == 1 and "No space left on device" in done.errors[0]


def test_a_refused_start_changes_nothing_but_a_field_of_the_status(begin, tmp_path):
    run = tmp_path / "r"
    assert begin("run.max_steps=2").code == 0
    (run / "checkpoints/.tmp-step-00000004").mkdir()
    before, stood = everything(run), status(run)
    other = write_folder(tmp_path / "other", classes=2, per_class=7)
    for words in ([f"data.train={other}"], ["model.arch=resnet34"], ["--resume", "never"], ["optim.images_per_step=4"]):
        assert begin(*words).code == 2
        assert everything(run) == before
        now = status(run)
        assert now.pop("refused")["reason"].startswith("UserError: ") and now == stood
    assert begin("run.max_steps=4").code == 0
    assert "refused" not in status(run) and not list(run.rglob(".tmp*"))


def test_a_damaged_status_is_no_traceback(begin, tmp_path):
    run = tmp_path / "r"
    assert begin("run.max_steps=2").code == 0
    (run / "STATUS.json").write_text("[]")
    done = begin("model.arch=resnet34")
    assert done.code == 2 and len(done.errors) == 1 and status(run)["state"] == "failed"


def spoilt(monkeypatch, steps):
    """The loss of these steps, counted by calls, is no number; nothing else changes."""
    loss, calls = RotationTask.loss, []

    def spoil(task, *words):
        value, sums = loss(task, *words)
        calls.append(1)
        if len(calls) - 1 in steps:
            sums = sums.clone()
            sums[0] = float("nan")
        return value, sums

    monkeypatch.setattr(RotationTask, "loss", spoil)


def test_bad_steps_in_a_row_end_the_run_with_the_checkpoint_before_them(begin, tmp_path, monkeypatch):
    spoilt(monkeypatch, range(4, 99))
    done = begin("engine.max_bad_steps=3", "optim.epochs=9")
    assert done.code == 3 and len(done.errors) == 1
    assert "not finite in 3 steps in a row, up to step 6; step-00000004 stands" in done.errors[0]
    assert [p.name for p in sorted((tmp_path / "r/checkpoints").glob("step-*"))] == ["step-00000002", "step-00000004"]
    assert [line["loss"] is None for line in metrics(tmp_path / "r")] == [False] * 4 + [True] * 3
    assert status(tmp_path / "r")["state"] == "failed"


def test_fewer_bad_steps_end_no_run(begin, monkeypatch):
    spoilt(monkeypatch, (2, 3, 5, 6))
    assert begin("engine.max_bad_steps=3", "run.max_steps=8").code == 0


def test_steps_that_fp16_skips_are_not_bad_ones(begin, tmp_path):
    """At a loss scale that overflows every gradient."""
    words = ["data.crop=32", "engine.precision=fp16", "engine.loss_scale=1e30", "engine.max_bad_steps=1"]
    assert begin(*words, "run.max_steps=3").code == 0
    lines = metrics(tmp_path / "r")
    assert [line["grad_norm"] for line in lines] == [None] * 3 and all(line["loss"] > 0 for line in lines)


def test_a_held_out_figure_that_is_no_number_is_said_and_never_the_best(begin, images, tmp_path, monkeypatch):
    sound, calls = Job.evaluate, []

    def evaluate(job):
        calls.append(1)
        return sound(job) | ({"held_out_accuracy": float("nan")} if len(calls) != 2 else {})

    monkeypatch.setattr(Job, "evaluate", evaluate)
    run = tmp_path / "r"
    done = begin(f"data.val={images}", "run.max_steps=12")
    assert done.code == 0 and len(calls) == 3
    assert done.err.count("held-out accuracy is nan") == 2 and "after 4 steps; it cannot be the best" in done.err
    assert json.loads((run / "checkpoints/best").read_text())["name"] == "step-00000008"
    assert "NaN" not in (run / "STATUS.json").read_text() and status(run)["state"] == "done"


def test_poisoned_weights_are_never_the_last_checkpoint(begin, tmp_path):
    done = begin("optim.lr=1e38", "run.checkpoint_every=1")
    assert done.code == 3 and len(done.errors) == 1 and "lower optim.lr" in done.errors[0]
    for path in (tmp_path / "r/checkpoints").glob("step-*/*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(path).values())


def test_ctrl_c_promises_what_there_is(begin, monkeypatch):
    with monkeypatch.context() as patch:
        after(patch, 1, stop)
        done = begin()
    assert done.code == 130 and done.errors == ["fastrot: stopped by Ctrl-C; there is no checkpoint yet"]
    with monkeypatch.context() as patch:
        after(patch, 3, stop)
        done = begin()
    assert done.code == 130
    assert done.errors == ["fastrot: stopped by Ctrl-C; step-00000002 stands, and --resume auto goes on from it"]
    assert "2 in " in (ended := begin("run.max_steps=4")).err and "; 4 in all" in ended.err


def test_whatever_rank_0_meets_reaches_every_rank(monkeypatch):
    sent = []
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", lambda one, src: sent.append(list(one)))

    def broken():
        raise OSError(errno.EIO, "no good")

    first = distributed.Ranks(0, 2, 0, 2, torch.device("cpu"))
    with pytest.raises(OSError, match="no good"):
        distributed.on_first(first, broken)
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", lambda one, src: one.__setitem__(slice(2), sent[0]))
    with pytest.raises(Fault, match="rank 0: OSError: .*no good"):
        distributed.on_first(distributed.Ranks(1, 2, 1, 2, torch.device("cpu")), broken)
