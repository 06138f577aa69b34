"""Slurm on this machine as a cluster of two nodes, a core each, for the time of a test."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDS = ("munged", "slurmctld", "slurmd", "sbatch")

CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
SlurmUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be none here, or nothing."""
    lacking = [name for name in NEEDS if not shutil.which(name)]
    if lacking:
        return f"Slurm is not installed ({', '.join(lacking)})"
    return "" if os.geteuid() == 0 else "slurmd wants root"


@contextmanager
def cluster(root: Path) -> Iterator[dict[str, str]]:
    """The variables that its commands need. root: an empty folder with a short name, for a socket."""
    ports = [socket.socket() for _ in range(3)]
    for port in ports:
        port.bind(("127.0.0.1", 0))
    numbers = dict(zip(("controller", "first", "second"), (port.getsockname()[1] for port in ports), strict=True))
    for port in ports:
        port.close()
    host = socket.gethostname().partition(".")[0]
    (root / "slurm.conf").write_text(CONF.format(host=host, root=root, **numbers))
    (root / "key").write_bytes(secrets.token_bytes(1024))
    (root / "key").chmod(0o600)
    for name in ("state", f"spool.{host}", f"spool.{host}-2"):
        (root / name).mkdir()
    environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
    files = [f"--{what}={root}/{name}" for what, name in
             (("socket", "munge.sock"), ("key-file", "key"), ("pid-file", "munged.pid"), ("log-file", "munged.log"),
              ("seed-file", "seed"))]  # fmt: skip
    commands = [["munged", "--foreground", "--force", *files], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host],
                ["slurmd", "-D", "-N", f"{host}-2"]]  # fmt: skip
    daemons = []
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
            )
            if command[0] == "munged":
                _until(lambda: (root / "munge.sock").exists())
        _until(lambda: _said(environment, "sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"])
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root", "--full", "--signal=KILL"], env=environment, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def _said(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _until(done, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "Slurm does not start"
        time.sleep(0.1)
