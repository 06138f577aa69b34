"""What started this process, and what it says of ranks: an environment -> (rank, world, local rank, address)."""

import re
import zlib
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from fastrot.errors import UserError

_PORTS = range(10_000, 30_000)  # below those that Linux gives to connections
_SHELLS = 0xFFFFFFF0  # Slurm's numbers of steps that are a shell: batch, interactive
# rank, ranks, rank on its node, ranks there; who starts within another stands first
_NAMES = {
    "mpirun": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "PALS": ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
}  # fmt: skip
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_DEEPSPEED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")  # it leaves LOCAL_WORLD_SIZE as it finds it
_INNER = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # torchrun's and deepspeed's marks: their ranks are none of the outer's
# what is the same for all ranks of a start, and not for the next start on the same hosts
_STARTS = {"mpirun": ("PMIX_NAMESPACE",), "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID")}
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class Place(NamedTuple):
    """A process among those that were started with it. by: the launcher. address: of rank 0's host; port: there."""

    by: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int


def settle(environ: MutableMapping[str, str]) -> Place | None:
    """The place that a launcher gives, from then on in the variables of torch and DeepSpeed; None for a process alone.

    Raises UserError where the variables contradict themselves or one another.
    """
    place = find(environ)
    if place is not None:
        values = (place.rank, place.world, place.local_rank, place.local_world)
        environ.update(zip(_TORCH, map(str, values), strict=True))
        environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    return place


def find(environ: Mapping[str, str]) -> Place | None:
    """As `settle`; changes nothing."""
    outer = _outer(environ)
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return outer
    place = _place("its launcher", _DEEPSPEED if "LOCAL_SIZE" in environ else _TORCH, environ)
    if outer and not any(mark in environ for mark in _INNER) and _at_odds(place, outer):
        raise UserError(
            f"RANK {place.rank} of {place.world}, but {outer.by} says rank {outer.rank} of {outer.world}; unset RANK and "
            f"WORLD_SIZE, or leave {outer.by}"
        )
    return None if place.world == 1 and "MASTER_PORT" not in environ else place


def _at_odds(place: Place, outer: Place) -> bool:
    """Whether two launchers count otherwise; one within the other counts at least as many ranks."""
    return place.world < outer.world or (place.world == outer.world and place.rank != outer.rank)


def alone_in_job(environ: Mapping[str, str]) -> str:
    """What a process without ranks should know: that it is in a Slurm job. Empty elsewhere."""
    job = environ.get("SLURM_JOB_ID")
    return f"one process in Slurm job {job}; `srun fastrot ...` starts one for each task" if job else ""


def _outer(environ: Mapping[str, str]) -> Place | None:
    """Of MPI or Slurm, where several ranks were started."""
    for by, names in _NAMES.items():
        if names[0] not in environ or names[2] not in environ:
            continue
        if by == "srun" and (names[1] not in environ or _number(environ, "SLURM_STEP_ID", 0) >= _SHELLS):
            return None  # a shell's variables
        place = _place(by, names, environ)
        return place if place.world > 1 else None
    if "PMI_RANK" in environ or "PMIX_RANK" in environ:
        raise UserError("PMI_RANK or PMIX_RANK is set without a rank on the node; start by srun, mpirun or torchrun")
    return None


def _place(by: str, names: tuple[str, str, str, str], environ: Mapping[str, str]) -> Place:
    rank, world = _number(environ, names[0], 0), _number(environ, names[1], 1)
    local_rank = _number(environ, names[2], 0)
    told = _slurm_local_world(environ) if by == "srun" else _number(environ, names[3], 0)
    local_world = told or world
    if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
        raise UserError(
            f"{by} says rank {rank} of {world}, {local_rank} of {local_world} on its node ({names[0]}, {names[1]}, "
            f"{names[2]}); unset what is not of this start"
        )
    address = _address(by, world == told or world == 1, environ)
    return Place(by, rank, world, local_rank, local_world, address, _port(by, environ))


def _address(by: str, one_host: bool, environ: Mapping[str, str]) -> str:
    """Where rank 0 is. Raises UserError where nothing tells."""
    if address := environ.get("MASTER_ADDR"):
        return address
    if one_host:
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST" if by == "srun" else "SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError(f"{by} does not say on which host rank 0 is; set MASTER_ADDR to it, and MASTER_PORT")
    return first_host(nodes)


def first_host(nodes: str) -> str:
    """ "gpu[07-09,12]-ib,login" -> "gpu07-ib": the first of a Slurm list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _slurm_local_world(environ: Mapping[str, str]) -> int:
    """Tasks on this node, of "2(x3),1" for each node in turn."""
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(times or 1))
    ]
    node = _number(environ, "SLURM_NODEID", 0)
    return counts[node] if 0 <= node < len(counts) else 0


def _port(by: str, environ: Mapping[str, str]) -> int:
    """MASTER_PORT, else one that two starts on a host do not share, unless by a chance of one in 20,000."""
    if "MASTER_PORT" in environ:
        return _number(environ, "MASTER_PORT", 0)
    start = "/".join(environ.get(name, "") for name in _STARTS.get(by, _JOBS))
    return _PORTS[zlib.crc32(start.encode()) % len(_PORTS)]


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environ.get(name) or default)
    except ValueError:
        raise UserError(f"{name} is {environ[name]!r}, not a number; unset it, or start by a launcher") from None
