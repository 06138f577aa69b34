"""Who holds a training up, and where: planted, and against the rule spelt out."""

import json
import os
import socket
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import metrics
from fastrot import config as configs
from fastrot.profiling.clock import SPANS
from fastrot.profiling.pace import SLOW_STEP, Pace, Report, Slow, bound, in_words, seen, slow_step, straggler
from fastrot.runs.log import RunLog
from fastrot.tasks.rotation import RotationTask
from workers import paces
from workers.ranks import as_ranks

NOTHING = Slow(-1, 0.0, dict.fromkeys(SPANS, 0.0))
times = st.floats(1e-4, 1e3)


def spans(**some: float) -> dict[str, float]:
    return dict.fromkeys(SPANS, 0.0) | some


def line(slow: Slow = NOTHING, **some: float) -> Report:
    return Report(spans(**some), slow)


@given(st.lists(st.lists(times, min_size=1, max_size=60), min_size=1, max_size=6))
def test_the_slow_step_of_a_line_is_the_slowest_above_three_medians_of_the_last_hundred(lines):
    pace, before = Pace(), []
    for totals in lines:
        got = pace.report([spans(compute=total) for total in totals], len(before))
        before += totals
        median = np.median(before[-100:])
        numbers = np.arange(len(before) - len(totals), len(before))
        judged = [(before[at], -at) for at in numbers if at >= 10]
        slowest, at = max(judged, default=(0.0, 0))
        if slowest > SLOW_STEP * median:
            assert (got.slow.step, got.slow.times) == (-at, pytest.approx(slowest / median))
        else:
            assert got.slow == NOTHING
        assert got.mean["compute"] == pytest.approx(np.mean(totals))


@given(st.lists(times, min_size=len(SPANS), max_size=len(SPANS)), st.integers(-1, 10**9))
def test_a_report_is_the_same_once_gathered(values, step):
    one = Report(dict(zip(SPANS, values, strict=True)), Slow(step, 4.0, dict(zip(SPANS, values[::-1], strict=True))))
    assert Report.of(one.numbers()) == one


@pytest.mark.parametrize(
    "reports, what",
    [
        ([line(wait=0.05, compute=0.8, update=0.1)], "step"),
        ([line(wait=0.2, compute=0.8)], "data"),
        ([line(compute=0.4, host=0.6)], "host"),
        ([line(compute=0.4, communicate=0.6)], "communication"),
        # rank 1 waits for its data, rank 0 for rank 1
        ([line(compute=0.4, communicate=0.6), line(wait=0.6, compute=0.4)], "data"),
        ([line(compute=0.4, communicate=0.6), line(host=0.6, compute=0.4)], "host"),
    ],
)
def test_the_bound_is_what_the_rank_that_all_wait_for_does(reports, what):
    assert bound(reports) == what


def test_a_straggler_is_one_rank_far_from_the_others_and_waiting_for_it_is_no_work():
    usual, others = line(compute=1.0, communicate=1.0), ("a", "a", "b")
    assert straggler([usual, usual, usual], others) is None
    assert straggler([usual, usual, line(compute=1.1, communicate=0.9)], others) is None
    found = straggler([usual, usual, line(compute=1.2, wait=0.8)], others)
    assert (found.rank, found.host, found.times, found.stage) == (2, "b", pytest.approx(2.0), "wait")


def test_a_step_that_the_network_held_up_is_no_ranks():
    slow = Slow(40, 5.0, spans(compute=1.0, communicate=4.0))
    found = slow_step([line(slow, compute=1.0), line(slow, compute=1.0)], ("a", "b"))
    assert (found.rank, found.stage, found.step, found.seconds) == (None, "communicate", 40, 5.0)
    assert in_words(seen([line(slow, compute=1.0)] * 2, ())) == [
        "step 41 took 5 s, 5.0 times the median: communication"
    ]


def test_a_straggler_is_said_once_until_it_changes(tmp_path, capfd):
    log = RunLog(tmp_path)
    log.begin(range(9), configs.load(None, ["run.loggers=[]"])[0], "accuracy")
    usual = {"loss": 1.0, "lr": 0.1, "views_per_s": 1.0, "wait_share": 0.0, "eta_s": 1.0, "epoch": 0.0, "bound": "step"}
    slow = {"rank": 1, "host": "b", "times": 1.5, "stage": "compute"}
    for step, one in enumerate([slow, slow, slow | {"rank": 0}, None, slow]):
        log.write(usual | {"step": step} | ({"straggler": one} if one else {}))
    said = [line for line in capfd.readouterr().err.splitlines() if "straggler" in line]
    assert said[0] == "straggler: on rank 1 of b takes 1.5 times the median's work: forward and backward"
    assert len(said) == 3 and len([line for line in metrics(tmp_path) if "straggler" in line]) == 4


WORDS = [
    "train", "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.epochs=8", "optim.warmup_epochs=0",
    "engine.kind=plain", "run.max_steps=16", "run.log_every=16",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_a_planted_slow_rank_and_step_are_named(images, tmp_path):
    said = as_ranks(2, paces.train, [*WORDS, f"data.train={images}", f"run.out={tmp_path}"])
    (found,) = metrics(tmp_path)
    host = socket.gethostname()
    slow = {"rank": 0, "host": host, "times": 7.0, "stage": "copy", "step": paces.SLOW, "seconds": 21.0}
    assert found["slow_step"] == slow
    assert found["straggler"] == {"rank": 1, "host": host, "times": pytest.approx(3 / 2.25), "stage": "rotate"}
    assert found["bound"] == "step" and found["communicate_share"] == pytest.approx(15 * 2 / (15 * 3 + 21))
    assert f"step 16 took 21 s, 7.0 times the median: copying to the device on rank 0 of {host}" in said
    assert f"straggler: on rank 1 of {host} takes 1.3 times the median's work: making the views" in said
    assert "wait 0.0%  bound by step" in said
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"wait_share" in events and b"bound" in events


def slow_views(words: list[str]) -> int:
    views = RotationTask.views
    RotationTask.views = lambda *a: (time.sleep(0.1 if os.environ["RANK"] == "1" else 0), views(*a))[1]
    from fastrot.cli import main

    return main(words)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("norms", ["true", "false"])
def test_a_rank_that_is_slow_is_named_however_the_others_wait(images, tmp_path, norms):
    words = [*WORDS, f"model.sync_batchnorm={norms}", f"data.train={images}", f"run.out={tmp_path}", "--json"]
    as_ranks(2, slow_views, words)
    (found,) = metrics(tmp_path)
    assert (found["straggler"]["rank"], found["straggler"]["stage"]) == (1, "rotate"), json.dumps(found)
