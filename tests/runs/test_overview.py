"""fastrot runs: a table of what lies in a folder, and two runs on one page."""

import json
import os
import re
import socket

import pytest

from fastrot.config import load, to_yaml
from fastrot.runs.overview import differences


def write_run(folder, words=(), state="done", lines=3, held_out=(0.25, 0.5), **status):
    """A run's folder as training leaves it, without its checkpoints' files."""
    (folder / "checkpoints").mkdir(parents=True)
    config = load(None, ["data.train=/data", "optim.epochs=3", "optim.warmup_epochs=0", f"run.out={folder}", *words])[0]
    (folder / "config.yaml").write_text(to_yaml(config))
    said = {"state": state, "time": "2026-11-30T02:10:00+0000", "host": "elsewhere", "pid": 1}
    (folder / "STATUS.json").write_text(json.dumps(said | status))
    (folder / "environment.json").write_text(json.dumps({"host": "a", "versions": {"torch": folder.name}}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(lines):
            at = {"step": step, "epoch": (step + 1) / 2}
            line = at | {
                "loss": 1.5 - 0.1 * step,
                "accuracy": 0.2 + 0.1 * step,
                "views_per_s": 100.0,
                "wait_share": 0.0,
            }
            file.write(json.dumps(line) + "\n")
            if step < len(held_out):
                file.write(json.dumps(at | {"held_out_loss": 1.2, "held_out_accuracy": held_out[step]}) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    """A finished run; one of another rate whose process is gone, a folder deeper; one of another task that has just begun."""
    root = tmp_path / "runs"
    write_run(root / "base", steps=3, views_per_s=111.0)
    gone = {"host": socket.gethostname(), "pid": 2**22 + 1, "of": 9, "time": "2026-11-30T03:10:00+0000"}
    write_run(root / "tried" / "fast", ["optim.lr=0.4"], "running", held_out=(0.75, 0.5), **gone)
    words = ["linear.jitter=0", "rotation.views=one"]
    write_run(root / "head", words, "running", lines=0, step=0, of=4, time="2026-11-30T04:10:00+0000")
    (root / "no run").mkdir()
    return root


def test_the_table_says_how_each_run_stands_and_where_they_differ(runs, fastrot):
    found = fastrot("runs", runs, "--json").json["runs"]
    assert [(one["name"], one["state"], one["step"], one["of"]) for one in found] == [
        ("base", "done", 3, 3), ("tried/fast", "killed", 3, 9), ("head", "running", 0, 4),
    ]  # fmt: skip
    base, fast, head = found
    assert (base["held_out"], base["best"], base["views_per_s"]) == ({"loss": 1.2, "accuracy": 0.5}, 0.5, 111.0)
    assert (fast["held_out"]["accuracy"], fast["best"], fast["views_per_s"]) == (0.5, 0.75, 100.0)
    assert (head["held_out"], head["best"], head["views_per_s"]) == ({}, None, None)
    assert [one["learns"] for one in found] == ["train", "train", "linear"]
    assert base["config"] == {"rotation.views": "all", "linear.jitter": 0.4, "optim.lr": 0.2}
    said = fastrot("runs", runs).out
    row = next(line for line in said.splitlines() if "fast" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[:7] == [
        "tried/fast", "killed", "3 of 9", "1.50", "accuracy 50.0%, best 75.0%", "100", "2026-11-30 03:10",
    ]  # fmt: skip
    assert cells[7].startswith("rotation.views=all") and "optim.lr=0.4" in said and "run.out" not in said


def test_a_run_whose_process_lives_is_running(runs, fastrot):
    status = {"state": "running", "pid": os.getpid(), "host": socket.gethostname()}
    (runs / "base" / "STATUS.json").write_text(json.dumps(status))
    with (runs / "base" / ".lock").open("w"):
        assert fastrot("runs", runs / "base", "--json").json["runs"][0]["state"] == "running"
    assert fastrot("runs", runs / "base", "--json").json["runs"][0]["state"] == "killed"


def test_a_config_of_no_sense_is_said_in_its_row(runs, fastrot):
    (runs / "head" / "config.yaml").write_text("optim: {lrr: 1}")
    (runs / "head" / "metrics.jsonl").write_text('{"step": 0, "ep')
    said = fastrot("runs", runs, "--json")
    assert said.code == 0 and "unknown key optim.lrr" in said.out


def test_two_runs_on_one_page(runs, tmp_path, fastrot):
    page = tmp_path / "page.html"
    words = ["runs", runs, "--compare", "base", runs / "tried" / "fast", "--html", page]
    found = fastrot(*words, "--json").json
    assert found["config"] == {"optim.lr": [0.2, 0.4]} and found["made_by"] == {"torch": ["base", "fast"]}
    text = page.read_text()
    assert re.findall(r"<figcaption>(.+?), over", text) == [
        "Training loss: mean", "Training accuracy: %", "Held-out loss: mean", "Held-out accuracy: %", "Pace: views/s",
        "Time waiting for data: %",
    ]  # fmt: skip
    assert "<td>0.2</td><td>0.4</td>" in text and 'class="line random"' in text and "src=" not in text
    assert "base: 1.5 at 0.5, 1.3 at 1.5" in text, "a chart's description for who cannot see it"
    assert "how they differ" in fastrot(*words).out


def test_long_logs_are_drawn_by_means_and_ranges(tmp_path):
    from fastrot.report.compared import charts_of
    from fastrot.runs.overview import overview

    one = overview(write_run(tmp_path / "a", lines=400, held_out=()), "a")
    chart = charts_of(one, one)[0]
    line = chart.lines[0]
    losses = [1.5 - 0.1 * step for step in range(400)]
    assert len(line.points) == len(line.band) == 134
    assert line.points[0] == (pytest.approx(1.0), pytest.approx(sum(losses[:3]) / 3))
    assert line.band[0] == (pytest.approx(losses[2]), pytest.approx(losses[0]))


@pytest.mark.parametrize(
    "words, says",
    [
        (["{root}/nowhere"], "nowhere: no such folder"),
        (["{root}/no run"], "no run: holds no run"),
        (["{root}", "--compare", "base"], "--compare base: expected two runs"),
        (["{root}", "--compare", "base", "head", "tried/fast"], "--compare base head tried/fast: expected two runs"),
        (["{root}", "--compare", "base", "none"], "--compare none: no run's folder, nor a run's name in"),
        (["{root}", "--html", "x.html"], "--html x.html: is a page of two runs"),
        (["{root}", "--compare", "base", "head", "--html", "{root}/no/such/x.html"], "x.html: cannot be written"),
    ],
)
def test_wrong_words_are_one_line(runs, fastrot, words, says):
    done = fastrot("runs", *(word.format(root=runs) for word in words))
    assert done.code == 2 and len(done.errors) == 1 and says in done.errors[0]


def test_keys_that_one_lacks_differ():
    assert differences([{"a": 1, "b": 2, "run.out": 1}, {"a": 1, "c": 3, "run.out": 2}]) == {
        "b": [2, None],
        "c": [None, 3],
    }
