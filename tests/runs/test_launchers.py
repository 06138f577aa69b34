"""Every launcher that can run here starts the same training: two ranks, and the same losses and weights bit for bit."""

import os
import shutil
import subprocess
import sys
import tempfile
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
