"""This machine: its cores, where caches lie, the versions a result depends on."""

import os
import platform
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def cache_folder() -> Path:
    """Where caches lie: $FASTROT_CACHE, else the user's XDG cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTROT_CACHE") or Path(home) / "fastrot")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


_PACKAGES = (
    "fastrot",
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "nvidia-dali-cuda130",
    "numpy",
    "pillow",
    "safetensors",
)


def environment(ranks_line: str) -> dict:
    """What a result depends on: versions, machine, command."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "ranks": ranks_line,
        "versions": versions,
    }
