"""One training as the file that a cluster's system takes. A system is a function and a line of SYSTEMS."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml

from fastrot.errors import UserError

_PORT = 29_500  # a node of its own for each job: nobody else asks for it
_INSTALL = "pip install '.[all]'"  # the folder that travels is a checkout
_GRACE_S = 300  # before a time limit, to write a checkpoint
_RESTARTS = 3  # after errors, which a mistake in a config is too; a lost machine does not count


@dataclass(frozen=True)
class Start:
    """What is started. name: small letters, digits and -, a letter first, two to 40; nodes: host names, or as many empty ones; gpus: of each, 0 = one rank on its CPU; gpu: their
    kind or ""; hours: the system's limit, None = its own; words: what follows
    `fastrot train`; image: a container's or ""."""

    name: str
    nodes: tuple[str, ...]
    gpus: int
    gpu: str
    hours: float | None
    words: tuple[str, ...]
    image: str

    @property
    def ranks(self) -> int:
        return len(self.nodes) * max(1, self.gpus)


class System(NamedTuple):
    """render: Start -> the file's text, raises UserError; submit: what takes the file."""

    render: Callable[[Start], str]
    submit: str


def _slurm(start: Start) -> str:
    """A job that is told by SIGUSR1 before its limit and by SIGTERM when it is preempted, and queued again after both."""
    asked = [f"job-name={start.name}", f"nodes={len(start.nodes)}", f"ntasks-per-node={max(1, start.gpus)}"]
    if start.gpus:
        asked.append(f"gpus-per-node={start.gpu and start.gpu + ':'}{start.gpus}")
    if start.hours is not None:
        asked.append(f"time={max(1, round(60 * start.hours))}")  # 0 would be none
    asked += ["exclusive", f"signal=USR1@{_GRACE_S}", "requeue", "open-mode=append", f"output={start.name}-%j.log"]
    lines = ["#!/bin/bash", *(f"#SBATCH --{one}" for one in asked), ""]
    step = "srun --kill-on-bad-exit=0 --wait=60 --cpu-bind=none"  # a rank that leaves first ends no other's last words
    if start.image.endswith(".sif"):
        step += f" apptainer exec {'--nv ' if start.gpus else ''}{shlex.quote(start.image)}"
    elif start.image:
        step += (
            f' --container-image={shlex.quote(start.image)} --container-mounts="$PWD:$PWD" --container-workdir="$PWD"'
        )
    return "\n".join(
        [
            *lines,
            "trap : TERM USR1  # they are the ranks' to answer",
            f"{step} fastrot train {shlex.join(start.words)}",
            "code=$?",
            "# 75: stopped as asked, with a checkpoint",
            'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )


def _torchrun(start: Start, nodes: str, node: str, first: str) -> str:
    """A shell's line for each node, whose variables say how many nodes there are, which it is and where the first is."""
    options = f"--nnodes={nodes} --node-rank={node} --nproc-per-node={max(1, start.gpus)} --master-addr={first}"
    return f"torchrun {options} --master-port={_PORT} -m fastrot.train {shlex.join(start.words)}"


def _k8s(start: Start) -> str:
    """A TrainJob of Kubeflow Trainer v2 in its runtime `torch-distributed`, which gives torchrun its nodes and ranks."""
    if not start.image:
        raise UserError("--to k8s: name the container, as in --image registry/fastrot:1")
    trainer: dict[str, Any] = {
        "image": start.image,
        "command": ["torchrun", "-m", "fastrot.train", *start.words],
        "numNodes": len(start.nodes),
        "numProcPerNode": max(1, start.gpus),
    }
    spec: dict[str, Any] = {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer}
    if start.gpus:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": start.gpus}}
    if start.hours is not None:
        spec["activeDeadlineSeconds"] = max(1, round(3600 * start.hours))
    return _yaml(
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": start.name},
            "spec": spec,
        }
    )


def _skypilot(start: Start) -> str:
    if start.gpus and not start.gpu:
        raise UserError("--to skypilot: name the GPU too, as in --gpus H100:8")
    resources: dict[str, Any] = {"job_recovery": {"max_restarts_on_errors": _RESTARTS}}
    if start.gpus:
        resources["accelerators"] = f"{start.gpu}:{start.gpus}"
    if start.image:
        resources["image_id"] = f"docker:{start.image}"
    if start.hours is not None:  # it has no limit of its own
        start = replace(start, words=(f"run.max_hours={start.hours:g}", *start.words))
    of_node = ("$SKYPILOT_NUM_NODES", "$SKYPILOT_NODE_RANK", '"$(echo "$SKYPILOT_NODE_IPS" | head -n1)"')
    task = {"name": start.name, "num_nodes": len(start.nodes), "resources": resources, "workdir": "."}
    if not start.image:
        task["setup"] = _INSTALL
    return _yaml(task | {"run": _torchrun(start, *of_node)})


def _dstack(start: Start) -> str:
    command = _torchrun(start, "$DSTACK_NODES_NUM", "$DSTACK_NODE_RANK", "$DSTACK_MASTER_NODE_IP")
    task: dict[str, Any] = {"type": "task", "name": start.name, "nodes": len(start.nodes)}
    task |= {"image": start.image} if start.image else {"python": "3.12", "files": ["."]}
    task["commands"] = [command] if start.image else [_INSTALL, command]
    if start.gpus:
        task["resources"] = {"gpu": f"{start.gpu and start.gpu + ':'}{start.gpus}"}
    task["retry"] = {"on_events": ["no-capacity", "interruption"], "duration": "7d"}
    if start.hours is not None:
        task["max_duration"] = f"{max(1, round(60 * start.hours))}m"
    return _yaml(task)


def _hostfile(start: Start) -> str:
    """DeepSpeed's own, with the command that reads it."""
    if not all(start.nodes):
        raise UserError("--to hostfile: name the hosts, as in --nodes gpu1,gpu2")
    lines = [f"# deepspeed --hostfile THIS_FILE --module fastrot.train {shlex.join(start.words)}"]
    return "\n".join([*lines, *(f"{node} slots={max(1, start.gpus)}" for node in start.nodes), ""])


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, width=1000, allow_unicode=True)


SYSTEMS = {
    "slurm": System(_slurm, "sbatch"),
    "k8s": System(_k8s, "kubectl create -f"),
    "skypilot": System(_skypilot, "sky jobs launch"),
    "dstack": System(_dstack, "dstack apply -f"),
    "hostfile": System(_hostfile, "deepspeed --hostfile"),
}
