"""Every launcher that can run here starts the same training: two ranks, and the same losses and weights bit for bit."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slurm
from conftest import ROOT, launched, metrics

pytestmark = pytest.mark.slow
NARROW = "tests/workers/narrow_train.py"
WORDS = [
    "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.lr=0.05", "optim.epochs=20",
    "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=100", "run.tensorboard=false", "engine.kind=plain",
]  # fmt: skip
STEPS = 40


def words(images: Path, run: Path) -> list[str]:
    return [*WORDS, f"data.train={images}", f"run.out={run}"]


def learnt(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


def same(run: Path, other: Path) -> bool:
    ours, theirs = (load_file(one / f"checkpoints/step-{STEPS:08d}/model.safetensors") for one in (run, other))
    equal = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return learnt(run) == learnt(other) and len(learnt(run)) == STEPS and equal


@pytest.fixture(scope="module")
def two(images, made_once):
    """Two ranks of torchrun's."""

    def run(folder):
        code, output = launched("torchrun", 2, *words(images, folder / "run"), script=NARROW)
        assert code == 0, output

    return made_once("two of torchrun", run) / "run"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A folder for the PATH in which `fastrot train` has a small network."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "fastrot").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {ROOT / NARROW} "$@"\n')
    (folder / "fastrot").chmod(0o755)
    return folder


def environment(command: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{command}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        **more,
    }


@pytest.mark.parametrize("mpi", ["mpirun.openmpi", "mpiexec.hydra"])
def test_mpi(images, two, command, tmp_path, mpi):
    if not shutil.which(mpi):
        pytest.skip(f"{mpi} is not installed")
    more = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    start = [mpi, *(["--oversubscribe"] if "open" in mpi else []), "-n", "2", "fastrot", "train"]
    done = subprocess.run(
        [*start, *words(images, tmp_path / "r")],
        env=environment(command, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(tmp_path / "r", two)


@pytest.fixture(scope="module")
def cluster():
    if why := slurm.missing():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm.cluster(Path(folder)) as variables:
        yield variables


def test_srun(images, two, command, cluster, tmp_path):
    step = ["srun", "--nodes=2", "--ntasks=2", "fastrot", "train", *words(images, tmp_path / "r")]
    done = subprocess.run(
        step, env=environment(command, SLURM_CONF=cluster["SLURM_CONF"]), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(tmp_path / "r", two)


def _asked(cluster: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=cluster, capture_output=True, text=True).stdout.strip()


def _until(done, says, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, says()
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["USR1", "TERM", "requeue"])
def test_a_slurm_job_that_is_preempted_and_queued_again_ends_as_the_undisturbed_run(
    images, two, command, cluster, tmp_path, how, fastrot
):
    """By a signal to its ranks, after which the script queues it again; or as preemption by requeue does it."""
    run, job = tmp_path / "r", tmp_path / "job"
    rendered = fastrot("launch", "--to", "slurm", "--nodes", "2", "--gpus", "0", "--out", job, *words(images, run))
    assert rendered.code == 0, rendered.err
    there = environment(command, SLURM_CONF=cluster["SLURM_CONF"], MASTER_ADDR="127.0.0.1")
    assert subprocess.run(["sbatch", "--test-only", job], env=there, cwd=tmp_path, capture_output=True).returncode == 0
    number = subprocess.run(
        ["sbatch", "--parsable", job], env=there, cwd=tmp_path, capture_output=True, text=True
    ).stdout.strip()

    def said() -> str:
        return "\n".join(
            [_asked(there, "scontrol", "show", "job", number), *(log.read_text() for log in tmp_path.glob("*.log"))]
        )

    _until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2, said)
    subprocess.run(
        ["scontrol", "requeue", number] if how == "requeue" else ["scancel", f"--signal={how}", number], env=there
    )
    # out of the old start's way, whose end would else be taken for the new one's
    _until(lambda: _asked(there, "squeue", "-h", "-j", number, "-o", "%t") == "PD", said)
    _until(lambda: _asked(there, "sinfo", "-h", "-o", "%T").split() == ["idle"], said)
    before = json.loads((run / "STATUS.json").read_text())
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], env=there)  # not two minutes later
    _until(lambda: json.loads((run / "STATUS.json").read_text())["state"] == "done", said)
    if how != "requeue":
        assert (before["state"], before["stopped"]) == ("stopped", f"SIG{how}") and before["steps"] < STEPS
        assert "resumed from step-" in said()
    assert same(run, two)
