"""`fastrot profile` on drawn images: what it prints, a planted bound, and every refusal's one line."""

import json
import statistics
import threading
import time

import pytest

from fastrot.data.storage import FileStorage
from fastrot.runs import profile as profiles
from fastrot.runs import subject as profiles_subject
from fastrot.runs.subject import Training

pytestmark = pytest.mark.usefixtures("narrow")
SMALL = [
    "profile",
    "model.arch=resnet18",
    "engine.kind=plain",
    "data.crop=16",
    "optim.images_per_step=6",
    "--seconds",
    "1",
]
PATH = {"cold", "warm", "decode", "resample", "hand-over"}


def mean_bytes(folder) -> float:
    return statistics.fmean(path.stat().st_size for path in folder.rglob("*.jpg"))


def test_every_stage_is_timed_the_bound_said_and_nothing_written(fastrot, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "trace.json"
    done = fastrot(*SMALL, f"data.train={images}", "--trace", trace, "--html", tmp_path / "page.html", "--json")
    found = done.json
    assert set(found["stages"]) == {*PATH, "data", "step", "both"}
    assert all(len(one["paces"]) == 5 and min(one["paces"]) > 0 for one in found["stages"].values())
    assert found["says"].startswith("bound by ") and "bound by" in done.err
    assert found["verdict"]["bound_pace"] <= found["verdict"]["next_pace"]
    assert found["stages"]["warm"]["more"] == {"bytes": mean_bytes(images), "opens": 1}
    step = found["parts_of_a_step"]["step"]
    assert step["forward_share"] + step["backward_share"] == pytest.approx(step["compute_share"])
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert names >= {"wait", "rotate", "compute", "update"}
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json", "page.html"}
    groups = {one["name"]: one for one in found["roofline"]["groups"]}
    assert set(groups) == {"stem", "layer1", "layer2", "layer3", "layer4", "head", "views", "update"}
    spent = sum(one["seconds"] for name, one in groups.items() if name not in ("views", "update"))
    assert 0 < spent < 2 * step["step_s"]  # of other steps
    page = (tmp_path / "page.html").read_text()
    assert found["says"][1:].replace("'", "&#39;") in page and "http" not in page
    assert page.count("<svg") == 2 and all(f">{name}</td>" in page for name in (*groups, "compute"))


@pytest.mark.slow
def test_slow_storage_is_named(fastrot, images, monkeypatch):
    """Each read takes as long as forty steps."""
    start = FileStorage.start

    def slow(storage, rows):
        finish = start(storage, rows)
        return lambda: (time.sleep(0.5), finish())[1]

    monkeypatch.setattr(FileStorage, "start", slow)
    monkeypatch.setattr(profiles, "_cures", lambda *_: [])
    found = fastrot(*SMALL, f"data.train={images}", "--json").json
    assert (found["verdict"]["bound"], found["verdict"]["stage"]) in {("data", "cold"), ("data", "warm")}
    assert "bound by reading from" in found["says"]


@pytest.mark.slow
def test_a_setting_is_tried_and_its_prediction_judged(fastrot, images, monkeypatch):
    cure = profiles.Cure("engine.precision=fp32", (0.5, 1.0, 2.0))
    monkeypatch.setattr(profiles, "_cures", lambda *_: [cure])
    done = fastrot(*SMALL, f"data.train={images}", "--try", "--json")
    low, middle, high = done.json["cures"][0]["achieved"]
    assert 0 < low <= middle <= high
    assert "as predicted" in done.err or "the prediction failed" in done.err


@pytest.mark.parametrize(
    "words, learns",
    [
        (["linear.pool=gap", "rotation.views=one"], True),
        (["finetune.head_rate=2", "rotation.views=one"], True),
        (["--task", "features", "linear.pool=gap"], False),
    ],
)
def test_what_the_config_or_task_names_is_profiled(fastrot, images, monkeypatch, words, learns):
    monkeypatch.setattr(profiles, "_cures", lambda *_: [])
    found = fastrot(*SMALL, "--seconds", "0.2", f"data.train={images}", *words, "--json").json
    assert set(found["stages"]) == {*PATH, "data", "step", "both"}
    assert ("backward_share" in found["parts_of_a_step"]["step"]) == learns


@pytest.mark.parametrize(
    "words, line",
    [
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--seconds", "-3"], "--seconds -3: must be above 0"),
        (["--seconds", "inf"], "--seconds inf: must be above 0"),
        (["--trace", "{tmp}/none/t.json"], "none is no folder"),
        (["--trace", "{tmp}"], "cannot be written"),
        (["--html", "{tmp}/none/p.html"], "none is no folder"),
        (["--html", "{tmp}"], "cannot be written"),
        (["data.train=/no/such"], "/no/such: no such folder"),
        (["engine.cuda_graphs=true"], "engine.cuda_graphs needs a CUDA device"),
        (["data.decode_on=gpu"], "there is no CUDA device here"),
        (["--task", "linear", "rotation.views=all"], "rotation.views must be one"),
        (["--task", "train", "linear.pool=gap"], "fastrot train does not read the section linear"),
    ],
)
def test_what_cannot_be_profiled_is_one_line(fastrot, images, tmp_path, words, line):
    done = fastrot(*SMALL, f"data.train={images}", *(word.format(tmp=tmp_path) for word in words))
    assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0]


def test_ctrl_c_is_one_line_and_leaves_no_thread_and_no_file(fastrot, images, tmp_path, monkeypatch):
    """Once the loader's threads run, in the middle of training."""
    timed = Training.both

    def stopped(self, *arguments):
        monkeypatch.setattr(profiles_subject, "run_laps", interrupt)
        timed(self, *arguments)

    def interrupt(job, steps, *_):
        next(next(steps).micro_steps)
        assert any(thread.name == "loader" for thread in threading.enumerate())
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Training, "both", stopped)
    before = set(threading.enumerate())
    done = fastrot(*SMALL, "--seconds", "0.2", f"data.train={images}", "--trace", tmp_path / "t.json")
    assert done.code == 130 and done.errors == ["fastrot: stopped by Ctrl-C"]
    assert list(tmp_path.iterdir()) == []
    assert [one for one in set(threading.enumerate()) - before if one.name.startswith(("loader", "read"))] == []
