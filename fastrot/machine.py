"""This machine: its cores and memory, where caches lie, the versions a result depends on."""

import hashlib
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_SMALL_CROP = 64  # pixels
_MOUNTED = Path("/sys/fs/cgroup")


def cache_folder() -> Path:
    """Where caches lie: $FASTROT_CACHE, else the user's XDG cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTROT_CACHE") or Path(home) / "fastrot")


def compiled_folder(name: str) -> Path:
    """Where what is compiled on this machine lies: hosts that share a cache, but not a processor, a C library or a
    torch, share no file. torch compiles for the processor at hand."""
    import torch  # seconds, which those who ask for the cache alone need not pay

    try:
        cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        cpu = []
    flags = [line for line in cpu if line.startswith(("flags", "Features", "model name"))]
    made_for = (platform.machine(), flags, os.confstr("CS_GNU_LIBC_VERSION"), sys.version, torch.__version__)
    return cache_folder() / name / hashlib.sha256(repr(made_for).encode()).hexdigest()[:16]


def set_caches() -> None:
    """What torch, Triton and Inductor compile goes to our cache, unless their own variables name another place."""
    for name, folder in (
        ("TORCH_EXTENSIONS_DIR", "torch_extensions"),
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
    ):
        os.environ.setdefault(name, str(compiled_folder(folder)))


def booted() -> str:
    """What no other machine is called by, nor this one after its next start; its name where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """Its model's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def precision(crop: int) -> tuple[str, str]:
    """What `engine.precision: auto` is on this machine for crops of a side, and why.

    A processor's bf16 units pay at 224 pixels (2.6 times fp32 there), not at 64 (1.1) or 32 (0.7): bench/results.
    """
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} has units for it"
        return "fp32", f"{name} has no bf16 units"
    flags = Path("/proc/cpuinfo").read_text().split()
    if not {"amx_bf16", "avx512_bf16"} & set(flags):
        return "fp32", "this processor has no bf16 units"
    if crop <= _SMALL_CROP:
        return "fp32", f"crops of {crop} pixels do not fill a processor's bf16 units"
    return "bf16", "this processor has units for it"


def memory_left() -> int:
    """Bytes of host memory that this process could still take: by the kernel, and by its control groups' limits."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    left = sum(1024 * int(meminfo[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    return min([left, *_left_in_groups(_own_groups(), _MOUNTED)])


def _groups(groups: str, mounted: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups that /proc/self/cgroup's text names for a controller, and of those above them; whether
    they are of version 1."""
    for line in groups.splitlines():
        _, controllers, inner = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = mounted / controller if controllers else mounted
        folder = root / inner.lstrip("/")
        for group in (folder, *folder.parents):
            yield group, bool(controllers)
            if group == root:
                break


def _left_in_groups(groups: str, mounted: Path) -> list[int]:
    """Of each group with a limit, version 2 and 1: what is free or holds files that can be read again."""
    left = []
    for group, first_version in _groups(groups, mounted, "memory"):
        limit, usage, files = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if first_version
            else ("memory.max", "memory.current", "inactive_file")
        )
        try:
            most, used = ((group / name).read_text().strip() for name in (limit, usage))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:  # the root of version 2; or a container that does not show what is above
            continue
        if most != "max":
            left.append(int(most) - int(used) + int(stat.get(files, 0)))
    return left


def cores_by_quota(groups: str | None = None, mounted: Path = _MOUNTED) -> float | None:
    """As many cores' time as the control groups give this process at most; None where they do not limit it."""
    quotas = []
    for group, first_version in _groups(groups or _own_groups(), mounted, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first_version else ("cpu.max",)
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
        except OSError:
            continue
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def threads_by_groups(groups: str | None = None, mounted: Path = _MOUNTED) -> int | None:
    """Most threads that the control groups allow; None where they do not limit them."""
    limits = []
    for group, _ in _groups(groups or _own_groups(), mounted, "pids"):
        try:
            limits.append((group / "pids.max").read_text().strip())
        except OSError:
            continue
    return min((int(limit) for limit in limits if limit != "max"), default=None)


def _own_groups() -> str:
    return Path("/proc/self/cgroup").read_text()


_PACKAGES = (
    "fastrot",
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "nvidia-dali-cuda130",
    "ffcv",
    "numpy",
    "pillow",
    "safetensors",
)


def environment(ranks_line: str) -> dict[str, Any]:
    """What a result depends on: versions, machine, command."""
    import torch

    versions: dict[str, str | None] = {}
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
