"""What the system allows a process: files, threads, cores, memory, shared memory."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from fastrot import machine
from fastrot.config import Config
from fastrot.distributed import Ranks
from fastrot.selfcheck.doctor import BROKEN, FINE, LOW, SLOW, Check

GIB = 2**30
_FILES = 4096  # shards, libraries, threads' handles, and a socket for each peer
_THREADS = 4096
_SHARED = GIB  # NCCL and gloo want tens of MiB a rank of it
_MEMORY = 4 * GIB  # of a rank


def open_files(config: Config, ranks: Ranks) -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    says = f"{_count(soft)} a process" + ("" if soft == hard else f", {_count(hard)} at most")
    if _below(soft, _FILES):
        yield Check("open files", LOW, says, f"ulimit -n {65536 if not _below(hard, 65536) else hard}")
    else:
        yield Check("open files", FINE, says)


def threads(config: Config, ranks: Ranks) -> Iterator[Check]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    in_group = machine.threads_by_groups()
    least = min([limit for limit in (soft, in_group) if limit is not None and limit >= 0], default=-1)
    if _below(least, _THREADS):
        yield Check("threads", LOW, f"{least:,} a user or container", "ulimit -u 65536; docker run --pids-limit=-1")
    else:
        yield Check("threads", FINE, f"{_count(least)} a user or container")


def cores(config: Config, ranks: Ranks) -> Iterator[Check]:
    mine, all_of, quota = machine.cores(), os.cpu_count() or 1, machine.cores_by_quota()
    local, share = ranks.local_world, ranks.cores
    says = f"{mine} of {all_of} for {local} rank{'s' if local > 1 else ''}: {machine.processor()}"
    yield Check("cores", FINE, says)
    if quota is not None and quota < mine:
        why = f"the container gets the time of {quota:g} cores, and sees {mine}: threads wait for one another"
        yield Check(
            "cores' time",
            SLOW,
            why,
            f"taskset -c 0-{max(1, round(quota)) - 1}, or data.threads={max(1, round(quota / local))}",
        )
    decoding = config.data.threads
    if decoding and decoding > 2 * share:
        yield Check(
            "data.threads", SLOW, f"{decoding} for a rank's {share} cores", f"data.threads={share}, or fastrot tune"
        )
    computing = os.environ.get("OMP_NUM_THREADS", "")
    if computing.isdigit() and int(computing) > share:
        why = f"{computing} threads for a rank's {share} cores"
        yield Check("OMP_NUM_THREADS", SLOW, why, f"export OMP_NUM_THREADS={share}")


def memory(config: Config, ranks: Ranks) -> Iterator[Check]:
    left, local = machine.memory_left(), ranks.local_world
    says = f"{left / GIB:.1f} GiB left for {local} rank{'s' if local > 1 else ''}, by the kernel and the control groups"
    if left < _MEMORY * local:
        yield Check("memory", LOW, says, "fewer ranks, engine.recompute=true, or a larger --memory of the container")
    else:
        yield Check("memory", FINE, says)


def shared_memory(config: Config, ranks: Ranks) -> Iterator[Check]:
    cure = "docker run --ipc=host, or --shm-size=8g; mount -o remount,size=8g /dev/shm"
    try:
        place = os.statvfs("/dev/shm")
    except OSError as error:
        yield Check("shared memory", BROKEN, f"/dev/shm: {error.strerror}", cure)
        return
    free = place.f_bavail * place.f_frsize
    yield Check(
        "shared memory",
        LOW if free < _SHARED else FINE,
        f"{free / GIB:.1f} GiB of /dev/shm are free",
        cure if free < _SHARED else "",
    )


def locked_memory(config: Config, ranks: Ranks) -> Iterator[Check]:
    """What InfiniBand's cards read of the host's memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and soft != resource.RLIM_INFINITY:
        yield Check("locked memory", LOW, f"{soft / GIB:.2f} GiB, and there is InfiniBand", "ulimit -l unlimited")


def _below(limit: int, wanted: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < wanted


def _count(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else f"{limit:,}"


LOOKS = (open_files, threads, cores, memory, shared_memory, locked_memory)
