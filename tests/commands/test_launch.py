"""A training as each system's file: what the file says is held against the system's own rules, as far as they are here."""

import os
import re
import shlex
import subprocess
import sys
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from conftest import ROOT
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


@given(st.text())
def test_a_job_has_a_name_that_every_system_takes(name):
    from fastrot.commands.launch import name_of

    assert re.fullmatch("[a-z][a-z0-9-]{1,38}[a-z0-9]|[a-z][a-z0-9]", name_of(name))


def start(**more) -> Start:
    return Start(
        **(
            {
                "name": "fastrot-r",
                "nodes": ("", ""),
                "gpus": 8,
                "gpu": "",
                "hours": None,
                "words": ("a=b c",),
                "image": "",
            }
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


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


DNS = Annotated[str, Field(pattern="^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]  # RFC 1123's, as Kubernetes wants


class TrainJob(Strict):
    """TrainerV1alpha1TrainJob of kubeflow_trainer_api 2.3.0, what of it is written here."""

    class Spec(Strict):
        class Trainer(Strict):
            class Resources(Strict):
                limits: dict[Literal["nvidia.com/gpu"], StrictInt]

            image: str
            command: list[str]
            numNodes: StrictInt
            numProcPerNode: StrictInt
            resourcesPerNode: Resources | None = None

        runtimeRef: dict[Literal["name"], Literal["torch-distributed"]]
        trainer: Trainer
        activeDeadlineSeconds: Annotated[StrictInt, Field(gt=0)] | None = None

    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: dict[Literal["name"], DNS]
    spec: Spec


class Sky(Strict):
    """get_task_schema() and get_resources_schema() of skypilot 0.14.1's sky/utils/schemas.py, what of it is written here."""

    class Resources(Strict):
        class Recovery(Strict):
            max_restarts_on_errors: Annotated[StrictInt, Field(ge=0)]

        job_recovery: Recovery
        accelerators: str | None = None
        image_id: str | None = None

    name: str
    num_nodes: StrictInt
    resources: Resources
    workdir: str
    setup: str | None = None
    run: str


class Dstack(Strict):
    """TaskConfiguration of dstack 0.22.5's core/models/configurations.py, what of it is written here."""

    class Retry(Strict):
        on_events: list[Literal["no-capacity", "interruption", "error"]]
        duration: Annotated[str, Field(pattern=r"^\d+[smhdw]$")]

    type: Literal["task"]
    name: Annotated[str, Field(pattern="^[a-z][a-z0-9-]{1,40}$")]
    nodes: Annotated[StrictInt, Field(ge=1)]
    image: str | None = None
    python: Literal["3.10", "3.11", "3.12", "3.13"] | None = None
    files: list[str] = []
    commands: list[str]
    resources: dict[Literal["gpu"], Annotated[str, Field(pattern=r"^([\w-]+:)?\d+$")]] | None = None
    retry: Retry
    max_duration: Annotated[str, Field(pattern=r"^\d+m$")] | None = None


FORMS = {"k8s": TrainJob, "skypilot": Sky, "dstack": Dstack}
WAYS = [{"gpus": 0, "image": "reg/f:1"}, {"gpu": "H100", "hours": 1.5, "image": "reg/f:1"}, {"gpu": "H100"}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("system", FORMS)
def test_a_file_has_the_form_that_its_system_reads(system, way):
    if system != "k8s" or "image" in way:
        FORMS[system](**yaml.safe_load(rendered(system, **way)))


@pytest.mark.slow
@pytest.mark.parametrize("system, module", [("k8s", "kubeflow_trainer_api"), ("skypilot", "sky"), ("dstack", "dstack")])
def test_a_file_is_read_by_the_systems_own_package(system, module, tmp_path):
    """FASTROT_TEST_SYSTEMS names a Python where they are installed: their dependencies are not ours."""
    python = os.environ.get("FASTROT_TEST_SYSTEMS", sys.executable)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    if subprocess.run(
        [python, "-c", f"import {module}"], env=environment, cwd=tmp_path, capture_output=True
    ).returncode:
        pytest.skip(f"{module} is not installed")
    for way in WAYS:
        if system == "k8s" and "image" not in way:
            continue
        (tmp_path / "file").write_text(rendered(system, **way))
        done = subprocess.run(
            [python, "-c", READS[system]], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


READS = {
    "k8s": """
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob as Job
tree = yaml.safe_load(open("file"))
assert Job.from_dict(tree).to_dict() == tree, "a key that it does not know"
""",
    "skypilot": """
import jsonschema, yaml
from sky.utils import schemas
tree = yaml.safe_load(open("file"))
jsonschema.validate(tree, schemas.get_task_schema())
jsonschema.validate(tree["resources"], schemas.get_resources_schema())
""",
    "dstack": """
import yaml
from dstack._internal.core.models.configurations import parse_run_configuration
parse_run_configuration(yaml.safe_load(open("file")))
""",
}


@pytest.mark.parametrize("system", ["skypilot", "dstack"])
def test_the_shells_line_starts_the_ranks_of_its_node(system, tmp_path):
    """With a torchrun that notes its words, and the variables of the second of two nodes."""
    (tmp_path / "torchrun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\n')
    (tmp_path / "torchrun").chmod(0o755)
    variables = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "DSTACK_NODES_NUM": "2", "DSTACK_NODE_RANK": "1", "DSTACK_MASTER_NODE_IP": "10.0.0.7",
    }  # fmt: skip
    line = _lines(system, rendered(system, gpu="H100", image="i"))[-1]
    subprocess.run(["bash", "-ec", line], env={"PATH": f"{tmp_path}:/usr/bin:/bin", **variables}, check=True)
    assert (tmp_path / "asked").read_text().splitlines() == [
        "--nnodes=2", "--node-rank=1", "--nproc-per-node=8", "--master-addr=10.0.0.7", "--master-port=29500", "-m",
        "fastrot.train", "a=b c",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["Dockerfile", "fastrot.def"])
def test_a_container_is_made_of_what_is_here_and_what_make_setup_installs(name):
    text = (ROOT / "docs" / name).read_text()
    makefile = (ROOT / "Makefile").read_text()
    packages = re.findall(r"--no-install-recommends (g\+\+[\w+ -]*\w)", text)
    assert packages == re.findall(r"--no-install-recommends (g\+\+[\w+ -]*\w)", makefile)
    if name == "Dockerfile":
        copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    else:
        copied = re.findall(r"^    (\S+) /opt/fastrot/$", text, re.MULTILINE)
    assert sorted(copied) == ["LICENSE", "NOTICE", "README.md", "fastrot", "kernels", "requirements.txt", "setup.py"]
    assert all((ROOT / path).exists() for path in copied)
    assert "--require-hashes -r requirements.txt" in text


def test_a_hostfile_is_deepspeeds(tmp_path):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    path = tmp_path / "hosts"
    path.write_text(rendered("hostfile", nodes=("gpu1", "gpu2")))
    assert dict(runner.fetch_hostfile(str(path))) == {"gpu1": 8, "gpu2": 8}
