"""A training as each system's file: what the file says is held against the system's own rules, as far as they are here."""

import re
import shlex
import subprocess

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastrot import config as configs
from fastrot.clusters import SYSTEMS, Start

TO = {
    "slurm": ["--nodes", "2", "--gpus", "8"],
    "k8s": ["--nodes", "2", "--gpus", "8", "--image", "registry/fastrot:1"],
    "skypilot": ["--nodes", "2", "--gpus", "H100:8"],
    "dstack": ["--nodes", "2", "--gpus", "H100:8"],
    "hostfile": ["--nodes", "gpu1,gpu2", "--gpus", "8"],
}
SET = [
    "data.train=/a b/$x'{000..9}.tar",
    "optim.lr=0.05",
    "data.crop_by_epoch={3: 96}",
    "data.val=",
    "run.out=runs/My Run",
]


def words_of(system: str, text: str) -> list[str]:
    """The overrides that a rendered file gives to the command, as a shell there would."""
    if system == "k8s":
        command = yaml.safe_load(text)["spec"]["trainer"]["command"]
    else:
        line = next(line for line in _lines(system, text) if re.search(r"fastrot[. ]train ", line))
        command = shlex.split(line)
    return command[max(at for at, word in enumerate(command) if word in ("train", "fastrot.train")) + 1 :]


def _lines(system: str, text: str) -> list[str]:
    if system == "skypilot":
        return yaml.safe_load(text)["run"].splitlines()
    return yaml.safe_load(text)["commands"] if system == "dstack" else text.splitlines()


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_command_in_a_file_is_the_config_that_was_asked_for(fastrot, system):
    done = fastrot("launch", "--to", system, *TO[system], "--config", "configs/in1k.yaml", *SET)
    assert done.code == 0, done.err
    wanted, _ = configs.load("configs/in1k.yaml", SET)
    assert configs.load(None, words_of(system, done.out), "train")[0] == wanted


@given(st.text(), st.floats(1e-9, 9, allow_subnormal=False))
def test_overrides_read_back_as_they_were(text, rate):
    config = configs.from_values(None, {"data.train": text, "optim.lr": rate})
    sources = dict.fromkeys(configs.known_keys(), "default") | {"data.train": "f", "optim.lr": "f"}
    assert configs.load(None, list(configs.as_overrides(config, sources)))[0] == config


@pytest.mark.parametrize(
    "system, words, says",
    [
        ("slum", [], "--to slum: no such system; choose slurm, k8s, skypilot, dstack, hostfile"),
        ("slurm", ["--nodes", "0"], "--nodes 0: expected a number of 1 or more"),
        ("slurm", ["--nodes", "a b"], "--nodes a b: expected a number"),
        ("slurm", ["--gpus", "-1"], "--gpus -1: expected a number, or a kind"),
        ("slurm", ["--gpus", "many"], "--gpus many: expected a number, or a kind"),
        ("slurm", ["--hours", "0"], "--hours 0.0: expected hours above 0"),
        ("slurm", ["--hours", "nan"], "--hours nan: expected hours above 0"),
        ("slurm", ["data.train="], "data.train is not set"),
        ("slurm", ["optim.lr=-1"], "optim.lr is -1"),
        ("slurm", ["detect.model=c4"], "fastrot train does not read the section detect"),
        ("slurm", ["--nodes", "200"], "leaves some of 1600 ranks without an image"),
        ("slurm", ["--config", "/no/such"], "--config /no/such: No such file"),
        ("slurm", ["--out", "/no/such/file"], "--out /no/such/file: cannot be written"),
        ("k8s", ["--image", ""], "--to k8s: name the container"),
        ("skypilot", ["--gpus", "8"], "--to skypilot: name the GPU too"),
        ("hostfile", ["--nodes", "2"], "--to hostfile: name the hosts"),
    ],
)
def test_what_cannot_be_launched_is_refused_in_a_line(fastrot, system, words, says):
    done = fastrot("launch", "--to", system, *TO.get(system, TO["slurm"]), "data.train=/d", *words)
    assert done.code == 2 and len(done.errors) == 1 and says in done.errors[0]


def test_it_is_written_where_it_is_wanted(fastrot, tmp_path):
    out = tmp_path / "job"
    done = fastrot("launch", "--to", "slurm", *TO["slurm"], "data.train=/d", "--out", out, "--json")
    assert done.json["ranks"] == 16 and done.json["text"] == out.read_text() and f"sbatch {out}" in done.err


def start(**more) -> Start:
    return Start(
        **(
            {"name": "r", "nodes": ("", ""), "gpus": 8, "gpu": "", "hours": None, "words": ("a=b c",), "image": ""}
            | more
        )
    )


def rendered(system: str, **more) -> str:
    return SYSTEMS[system].render(start(**more))


@pytest.mark.parametrize("image", ["", "x.sif", "reg/f:1"])
def test_a_slurm_job_is_sound_shell_and_asks_for_what_was_said(image):
    text = rendered("slurm", gpu="h100", hours=1.5, image=image)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"], asked["time"]) == (
        "2",
        "8",
        "h100:8",
        "90",
    )
    assert asked["signal"] == "USR1@300" and "requeue" in asked
    assert text.index("#SBATCH") < text.index("srun") and "gpus-per-node" not in rendered("slurm", gpus=0)
    assert ("--container-image=reg/f:1" in text) == (image == "reg/f:1")
    assert ("apptainer exec --nv x.sif fastrot" in text) == (image == "x.sif")


@pytest.mark.parametrize("code, queued", [(0, False), (2, False), (3, False), (75, True)])
def test_a_slurm_job_is_queued_again_after_a_stop_alone(tmp_path, code, queued):
    """With an srun that ends so, and an scontrol that notes what it is asked."""
    for name, does in (("srun", f"exit {code}"), ("scontrol", f"echo $* > {tmp_path}/asked")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash"], input=rendered("slurm"), text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    )
    assert done.returncode == code
    assert (tmp_path / "asked").exists() == queued and (not queued or (tmp_path / "asked").read_text() == "requeue 7\n")


def test_a_hostfile_is_deepspeeds(tmp_path):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    path = tmp_path / "hosts"
    path.write_text(rendered("hostfile", nodes=("gpu1", "gpu2")))
    assert dict(runner.fetch_hostfile(str(path))) == {"gpu1": 8, "gpu2": 8}
