"""A run that is asked to stop: by which signal, by the clock, on one rank of several; and what goes on from it."""

import json
import os
import signal
import subprocess
import time

import pytest
from safetensors.torch import load_file

from conftest import after, launch, metrics
from fastrot.distributed import Ranks
from fastrot.runs import stop
from workers.ranks import as_ranks
from workers.stops import heard_at

NARROW = "tests/workers/narrow_train.py"
pytestmark = pytest.mark.usefixtures("narrow")

WORDS = [
    "model.arch=resnet18", "data.crop=16", "optim.images_per_step=3", "optim.lr=0.05", "optim.epochs=3",
    "optim.warmup_epochs=0", "run.log_every=2", "run.checkpoint_every=100", "run.tensorboard=false", "engine.kind=plain",
    "run.max_steps=7",
]  # fmt: skip


@pytest.fixture
def begin(images, tmp_path, fastrot):
    return lambda name, *words: fastrot("train", *WORDS, f"data.train={images}", f"run.out={tmp_path / name}", *words)


def weights(folder):
    return load_file(folder / "checkpoints/step-00000007/model.safetensors")


@pytest.mark.parametrize(
    "number,code,says",
    [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGUSR1, 75, "SIGUSR1"), (signal.SIGINT, 130, "Ctrl-C")],
)
def test_a_signal_stops_with_a_checkpoint_that_goes_on_to_the_same_end(
    begin, tmp_path, monkeypatch, number, code, says
):
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), number))
        done = begin("r")
    assert done.code == code
    assert done.errors == [f"fastrot: stopped by {says}; step-00000004 stands, and --resume auto goes on from it"]
    status = json.loads((tmp_path / "r/STATUS.json").read_text())
    assert (status["state"], status["stopped"], status["steps"]) == ("stopped", says, 4)
    assert not (tmp_path / "r/backbone.safetensors").exists()
    assert begin("r").code == begin("whole").code == 0
    resumed, whole = weights(tmp_path / "r"), weights(tmp_path / "whole")
    assert all(resumed[name].equal(whole[name]) for name in whole)
    assert metrics(tmp_path / "r")[-1]["loss"] == metrics(tmp_path / "whole")[-1]["loss"]


def test_hours_that_are_over_stop_it(begin, tmp_path):
    done = begin("r", "run.max_hours=1e-9")
    assert done.code == 75 and "stopped by run.max_hours; step-00000001 stands" in done.err
    assert json.loads((tmp_path / "r/STATUS.json").read_text())["state"] == "stopped"


def test_a_stop_at_the_last_step_is_an_end(begin, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        after(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        done = begin("r")
    assert done.code == 0 and json.loads((tmp_path / "r/STATUS.json").read_text())["state"] == "done"


def test_a_second_ctrl_c_does_not_wait_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with stop.Stop(Ranks(0, 1, 0, 1, None), None) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.heard() == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            asked.heard()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_every_rank_hears_it_at_the_same_step(tmp_path):
    """One rank of three is asked, the third a step later and for a stronger reason."""
    as_ranks(3, heard_at, str(tmp_path))
    heard = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert heard[0] == heard[1] == heard[2]
    assert heard[0][:6] == ["", "", "", "", "SIGUSR1", "SIGTERM"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_that_is_asked_stops_its_ranks_together(images, tmp_path, launcher, number):
    """The launcher alone is asked, as a scheduler does; it leaves its ranks 30 s."""
    run = tmp_path / "r"
    words = [*WORDS[:-1], f"data.train={images}", f"run.out={run}", "run.max_steps=100000", "optim.epochs=100000"]
    process = launch(launcher, 2, *words, script=NARROW)
    until = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    status = json.loads((run / "STATUS.json").read_text())
    assert status["state"] == "stopped", output
    assert (run / f"checkpoints/step-{status['steps']:08d}/manifest.json").exists()
    said = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True).stdout
    assert not said, "a rank lives on"
