"""Two hosts on this machine: a network namespace, a name, a /tmp and a disk at /srv each. For root."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT

_NAMES = ("fastrot-a", "fastrot-b")
_WIRE = "fastrot0"


def missing() -> str:
    """Why there can be none here, or nothing."""
    if os.geteuid() or not shutil.which("ip") or not Path("/srv").is_dir():
        return "two hosts apart want root, ip and /srv"
    able = all(_ok(*words) for words in (("unshare", "-m", "-u", "true"), ("ip", "netns", "add", "fastrot-c")))
    _ok("ip", "netns", "del", "fastrot-c")
    return "" if able else "namespaces are not allowed here"


def _ok(*words: str) -> bool:
    return subprocess.run(words, capture_output=True).returncode == 0


@contextmanager
def joined() -> Iterator[None]:
    """The hosts' networks, with a wire between them: 10.77.0.1 and 10.77.0.2."""
    first, second = _NAMES
    try:
        for words in (
            f"netns add {first}", f"netns add {second}",
            f"-n {first} link add {_WIRE} type veth peer name {_WIRE} netns {second}",
            *(f"-n {name} addr add 10.77.0.{at}/24 dev {_WIRE}" for at, name in enumerate(_NAMES, 1)),
            *(f"-n {name} link set {device} up" for name in _NAMES for device in ("lo", _WIRE)),
        ):  # fmt: skip
            subprocess.run(["ip", *words.split()], check=True)
        yield
    finally:
        for name in _NAMES:
            _ok("ip", "netns", "del", name)


def train(disks: list[Path], words: list[str]) -> list[subprocess.CompletedProcess]:
    """A rank on each host, whose /srv is its disk; to the end."""
    started = []
    for rank, (disk, name) in enumerate(zip(disks, _NAMES, strict=True)):
        inside = f'mount --bind "{disk}" /srv && mount -t tmpfs none /tmp && hostname {name} && cd /srv && exec "$@"'
        variables = {
            "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": _WIRE, "HOME": "/srv/home", "FASTROT_CACHE": "/srv/cache",
            "OMP_NUM_THREADS": 1, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        }  # fmt: skip
        command = ["ip", "netns", "exec", name, "unshare", "-m", "-u", "sh", "-c", inside, "sh", sys.executable,
                   str(ROOT / "tests/workers/narrow_train.py"), *words]  # fmt: skip
        environment = os.environ | {key: str(value) for key, value in variables.items()}
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [subprocess.CompletedProcess([], p.returncode, out) for p, out in zip(started, outputs, strict=True)]
