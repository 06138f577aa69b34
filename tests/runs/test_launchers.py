"""Every launcher that can run here starts the same training: two ranks, and the same losses and weights bit for bit."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slurm
from conftest import ROOT, free_port, launched, metrics

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


AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def start_of(mpi: str) -> list[str]:
    return [mpi, *(["--oversubscribe"] if "open" in mpi else []), "-n", "2", "fastrot", "train"]


@pytest.mark.parametrize("mpi", ["mpirun.openmpi", "mpiexec.hydra"])
def test_mpi(images, two, command, tmp_path, mpi):
    if not shutil.which(mpi):
        pytest.skip(f"{mpi} is not installed")
    done = subprocess.run(
        [*start_of(mpi), *words(images, tmp_path / "r")],
        env=environment(command, **AS_ROOT),
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


def test_a_batch_script_that_forgets_srun_is_one_process_and_says_so(images, command, cluster, tmp_path):
    there = environment(command, SLURM_CONF=cluster["SLURM_CONF"])
    line = shlex.join(["fastrot", "train", *words(images, tmp_path / "r"), "run.max_steps=1"])
    step = ["sbatch", "--wait", "--nodes=2", "--ntasks=2", f"--output={tmp_path / 'log'}", f"--wrap={line}"]
    assert subprocess.run(step, env=there, cwd=tmp_path, capture_output=True).returncode == 0
    said = (tmp_path / "log").read_text()
    assert len(re.findall(r"one process in Slurm job \d+; `srun fastrot ...` starts one for each task", said)) == 1
    assert json.loads((tmp_path / "r/environment.json").read_text())["ranks"] == "1 on cpu"


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
    _until(lambda: not _asked(there, "pgrep", "-f", rf"slurmstepd: \[{number}\."), said)
    before = json.loads((run / "STATUS.json").read_text())
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], env=there)  # not two minutes later
    _until(
        lambda: json.loads((run / "STATUS.json").read_text())["state"] == "done" or "JobState=FAILED" in said(), said
    )
    assert json.loads((run / "STATUS.json").read_text())["state"] == "done", said()
    if how != "requeue":
        assert (before["state"], before["stopped"]) == ("stopped", f"SIG{how}") and before["steps"] < STEPS
        assert "resumed from step-" in said()
    assert same(run, two)


def stopped_by(run: Path) -> str:
    status = json.loads((run / "STATUS.json").read_text()) if (run / "STATUS.json").exists() else {}
    return status.get("stopped", "")


def alive(run: Path) -> str:
    return subprocess.run(["pgrep", "-f", f"run.out={run}"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("mpi", ["mpirun.openmpi", "mpiexec.hydra"])
def test_mpi_that_is_killed_leaves_no_orphan(images, command, tmp_path, mpi):
    if not shutil.which(mpi):
        pytest.skip(f"{mpi} is not installed")
    run = tmp_path / "r"
    more = ["optim.epochs=100000", "run.checkpoint_every=100000"]
    launcher = subprocess.Popen([*start_of(mpi), *words(images, run), *more], env=environment(command, **AS_ROOT))
    try:
        _until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2, lambda: "it does not begin")
    finally:
        launcher.kill()
        launcher.wait()
    _until(lambda: not alive(run), lambda: alive(run), 60)
    if mpi == "mpirun.openmpi":  # Hydra's proxy kills at once
        assert stopped_by(run) == "SIGTERM"


def test_torchrun_that_loses_a_node_goes_on_with_the_same_batch(images, two, tmp_path):
    """Two agents as two nodes; the second and its rank are killed."""
    run, endpoint = tmp_path / "r", f"127.0.0.1:{free_port()}"
    agent = ["torchrun", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=x",
             f"--rdzv-endpoint={endpoint}", "--rdzv-conf=last_call_timeout=5", NARROW, *words(images, run),
             "run.checkpoint_every=2"]  # fmt: skip
    there = {"cwd": ROOT, "env": environment(Path("/none")), "start_new_session": True, "text": True}
    first = subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **there)
    second = subprocess.Popen(agent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **there)
    try:
        _until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 4, lambda: "it does not begin")
    finally:
        os.killpg(second.pid, signal.SIGKILL)
        second.wait()
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 0, said
    assert "resumed from step-" in said and json.loads((run / "environment.json").read_text())["ranks"].startswith("1 ")
    ours, theirs = metrics(run), metrics(two)
    assert [(line["step"], line["epoch"], line["lr"]) for line in ours] == [
        (line["step"], line["epoch"], line["lr"]) for line in theirs
    ]
    # one rank adds in another order than two, which a training this short and fast makes more of at every step
    assert [line["loss"] for line in ours[:15]] == pytest.approx([line["loss"] for line in theirs[:15]], rel=1e-3)


def test_deepspeed_with_a_hostfile(images, two, fastrot, tmp_path):
    """Two hosts that pdsh reaches, by an ssh that stays here."""
    if not shutil.which("pdsh"):
        pytest.skip("pdsh is not installed")
    rendered = fastrot("launch", "--to", "hostfile", "--nodes", "a,b", "--gpus", "1", "--out", tmp_path / "hosts",
                       *words(images, tmp_path / "r"))  # fmt: skip
    assert rendered.code == 0, rendered.err
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    start = ["deepspeed", "--hostfile", tmp_path / "hosts", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    done = subprocess.run(
        [*start, NARROW, *words(images, tmp_path / "r")],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(tmp_path / "r", two)


SSH = """#!/bin/sh
while :; do
  case "$1" in -[lopi]) shift 2 ;; -*) shift ;; *) break ;; esac
done
shift
exec sh -c "$*"
"""
