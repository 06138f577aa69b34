"""`fastrot profile` on drawn images: what it prints, a planted bound, and every refusal's one line."""

import json
import time

import pytest

from fastrot.data.storage import FileStorage
from fastrot.runs import profile as profiles

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


def test_every_stage_is_timed_the_bound_said_and_nothing_written(fastrot, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "trace.json"
    done = fastrot(*SMALL, f"data.train={images}", "--trace", trace, "--json")
    found = done.json
    assert set(found["stages"]) == {"cold", "warm", "decode", "data", "step", "both"}
    assert all(len(one["paces"]) == 5 and min(one["paces"]) > 0 for one in found["stages"].values())
    assert found["says"].startswith("bound by ") and "bound by" in done.err
    assert found["verdict"]["bound_pace"] <= found["verdict"]["next_pace"]
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} >= {"X"}
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_slow_storage_is_named(fastrot, images, monkeypatch):
    """Each read takes as long as forty steps."""
    start = FileStorage.start

    def slow(storage, rows):
        finish = start(storage, rows)
        return lambda: (time.sleep(0.3), finish())[1]

    monkeypatch.setattr(FileStorage, "start", slow)
    monkeypatch.setattr(profiles, "_cures", lambda *_: [])
    found = fastrot(*SMALL, f"data.train={images}", "--json").json
    assert (found["verdict"]["bound"], found["verdict"]["stage"]) in {("data", "cold"), ("data", "warm")}
    assert "bound by reading from" in found["says"]


def test_a_setting_is_tried_and_its_prediction_judged(fastrot, images, monkeypatch):
    cure = profiles.Cure("engine.precision=fp32", (0.5, 1.0, 2.0))
    monkeypatch.setattr(profiles, "_cures", lambda *_: [cure])
    done = fastrot(*SMALL, f"data.train={images}", "--try", "--json")
    low, middle, high = done.json["cures"][0]["achieved"]
    assert 0 < low <= middle <= high
    assert "as predicted" in done.err or "the prediction failed" in done.err


@pytest.mark.parametrize(
    "words, line",
    [
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--trace", "{tmp}/none/t.json"], "none is no folder"),
        (["data.train=/no/such"], "/no/such: no such folder"),
        (["engine.cuda_graphs=true"], "engine.cuda_graphs needs a CUDA device"),
    ],
)
def test_what_cannot_be_profiled_is_one_line(fastrot, images, tmp_path, words, line):
    done = fastrot(*SMALL, f"data.train={images}", *(word.format(tmp=tmp_path) for word in words))
    assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0]
