"""Environments that launchers leave, as they do it: who a process is, and what cannot be."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrot import distributed
from fastrot.distributed import Peer, Ranks
from fastrot.errors import UserError
from fastrot.launcher import alone_in_job, find, first_host, settle

# as the real ones print them, of task 3 of 5 on the second of two hosts
SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_NODELIST": "gpu[07-08]",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "5"}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "3", "PMIX_NAMESPACE": "prterun-host-123@1",
    "MASTER_ADDR": "10.0.0.7",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5",
    "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5",
    "CROSS_RANK": "1", "CROSS_SIZE": "2",
}  # fmt: skip
NODE_OF_TWO = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


@pytest.mark.parametrize(
    "environ, place",
    [
        ({}, None),
        (SRUN, ("srun", 3, 5, 0, 2, "gpu07")),
        ({**SRUN, "MASTER_ADDR": "h"}, ("srun", 3, 5, 0, 2, "h")),
        (BATCH, None),  # the script of sbatch
        ({**SRUN, "SLURM_STEP_ID": "4294967290"}, None),  # salloc's shell
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        (OMPI, ("mpirun", 3, 5, 0, 2, "10.0.0.7")),
        ({**NODE_OF_TWO, **OMPI}, ("mpirun", 3, 5, 0, 2, "10.0.0.7")),  # mpirun starts its daemons by srun
        (HYDRA, ("mpiexec", 1, 2, 1, 2, "127.0.0.1")),
        ({**NODE_OF_TWO, **HYDRA}, ("mpiexec", 1, 2, 1, 2, "127.0.0.1")),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "5"}, ("srun", 3, 5, 0, 2, "gpu07")),  # srun --mpi=pmi2
        ({**SRUN, "PMIX_RANK": "3"}, ("srun", 3, 5, 0, 2, "gpu07")),
        (TORCHRUN, ("its launcher", 3, 4, 1, 2, "a")),
        ({**NODE_OF_TWO, **TORCHRUN}, ("its launcher", 3, 4, 1, 2, "a")),  # srun starts a torchrun on each node
        ({**SRUN, **TORCHRUN}, ("its launcher", 3, 4, 1, 2, "a")),  # which has lost a node
        ({**DEEPSPEED, "LOCAL_WORLD_SIZE": "1"}, ("its launcher", 3, 4, 1, 2, "a")),  # left by the process that started it
        ({**SRUN, **DEEPSPEED}, ("its launcher", 3, 4, 1, 2, "a")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"},
         ("its launcher", 1, 2, 1, 2, "127.0.0.1")),
    ],
)  # fmt: skip
def test_a_launcher_says_who_a_process_is(environ, place):
    found = find(environ)
    assert (found and found[:6]) == place
    if found:
        there = dict(environ)
        assert settle(there) == found
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
        assert tuple(there[name] for name in names) == tuple(map(str, found[1:]))
        assert settle(there)[1:] == found[1:], "what is settled stays"


@pytest.mark.parametrize(
    "environ, says",
    [
        ({**TORCHRUN, "RANK": "4"}, "its launcher says rank 4 of 4, 1 of 2 on its node (RANK, WORLD_SIZE, LOCAL_RANK)"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "rank 3 of 4, 2 of 2"),
        ({**SRUN, "SLURM_PROCID": "5"}, "srun says rank 5 of 5"),
        ({**OMPI, "OMPI_COMM_WORLD_SIZE": "0"}, "mpirun says rank 3 of 0"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', not a number"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "MASTER_PORT is 'x', not a number"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "5"}, "RANK 0 of 1, but srun says rank 3 of 5; unset"),
        ({**OMPI, "RANK": "0", "WORLD_SIZE": "5"}, "RANK 0 of 5, but mpirun says rank 3 of 5; unset"),
        ({"PMIX_RANK": "0"}, "PMI_RANK or PMIX_RANK is set without"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "does not say on which host rank 0 is; set MASTER_ADDR"),
        ({name: value for name, value in OMPI.items() if name != "MASTER_ADDR"}, "mpirun does not say on which host"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(environ, says):
    with pytest.raises(UserError) as raised:
        find(environ)
    assert says in str(raised.value) and "\n" not in str(raised.value)


NAMES = sorted({*SRUN, *OMPI, *HYDRA, *TORCHRUN, *DEEPSPEED, "PMI_LOCAL_RANK"} - {"MASTER_ADDR", "MASTER_PORT"})


@given(
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["", "0", "1", "2", "3", "-1", "2(x2)", "gpu[1-2]", "x"]))
)
def test_whatever_is_set_a_place_makes_sense(environ):
    try:
        place = find(environ)
    except UserError as error:
        assert "\n" not in str(error)
        return
    if place:
        assert 0 <= place.rank < place.world and 0 <= place.local_rank < place.local_world <= place.world
        assert place.address and 10_000 <= place.port < 30_000


@given(st.integers(1, 4).flatmap(lambda nodes: st.lists(st.integers(1, 3), min_size=nodes, max_size=nodes)))
def test_slurms_tasks_are_each_once_and_meet_at_one_place(per_node):
    """Ranks as Slurm numbers them by default: in blocks."""
    world, places = sum(per_node), []
    for node, tasks in enumerate(per_node):
        for local in range(tasks):
            environ = {
                **SRUN, "SLURM_PROCID": str(len(places)), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_NODEID": str(node),
                "SLURM_LOCALID": str(local), "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, per_node)),
            }  # fmt: skip
            place = find(environ)
            places.append(place and (place.rank, place.local_rank, place.local_world, place.address, place.port))
    if world > 1:
        assert [p[0] for p in places] == list(range(world))
        assert [p[1:3] for p in places] == [(local, tasks) for tasks in per_node for local in range(tasks)]
        assert len({p[3:] for p in places}) == 1


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu3", "gpu3"), ("gpu3,gpu1", "gpu3"), ("gpu[07-09,12]-ib,login", "gpu07-ib"), ("r[1-2]n[03,5]", "r1n03"),
     ("10.0.0.1", "10.0.0.1"), ("a-[2,4-9]", "a-2")],
)  # fmt: skip
def test_the_first_of_slurms_hosts(nodes, first):
    assert first_host(nodes) == first


def test_two_jobs_on_a_host_have_ports_of_their_own():
    ports = {find({**SRUN, "SLURM_JOB_ID": str(job)}).port for job in range(1000, 1100)}
    assert len(ports) > 95
    assert find({**OMPI, "PMIX_NAMESPACE": "other"}).port != find(OMPI).port
    one, other = ({**OMPI, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": step} for step in ("0", "1"))
    assert find(one).port == find(other).port, "mpirun's daemons have steps of their own"


def test_a_shell_in_a_job_is_one_process_and_says_so(monkeypatch, capfd):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in BATCH.items():
        monkeypatch.setenv(name, value)
    ranks = distributed.start()
    distributed.end()
    assert ranks.world == 1 and "RANK" not in os.environ
    assert capfd.readouterr().err.count("one process in Slurm job 77; `srun fastrot ...` starts one for each task") == 1
    assert alone_in_job({}) == ""


def test_a_command_says_a_contradiction_in_a_line(fastrot, monkeypatch):
    for name, value in {**SRUN, "SLURM_PROCID": "9", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = fastrot("config")
    assert done.code == 2 and len(done.errors) == 1 and "unset" in done.errors[0]


@pytest.mark.parametrize(
    "seen, local_rank, in_step, gpu", [(8, 3, True, 3), (8, 3, False, 3), (1, 3, True, 0), (1, 3, False, None), (2, 3, True, None)]
)  # fmt: skip
def test_a_rank_takes_the_gpu_of_its_number_or_the_one_that_slurm_shows_it(monkeypatch, seen, local_rank, in_step, gpu):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("SLURM_STEP_ID", "0") if in_step else monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    if gpu is None:
        with pytest.raises(
            UserError, match=f"^rank 5: no GPU {local_rank} here, only {seen}; start at most one rank a GPU$"
        ):
            distributed._gpu(5, local_rank)
    else:
        assert distributed._gpu(5, local_rank) == gpu


@pytest.mark.parametrize(
    "cpus, cores",
    [
        ([range(8), range(8)], [4, 4]),
        ([range(4), range(4, 8)], [4, 4]),  # as srun and mpirun bind them
        ([range(8), range(8), range(8)], [2, 2, 2]),
        ([range(1), range(1)], [1, 1]),
        ([range(8), range(6, 8)], [7, 1]),
    ],
)
def test_ranks_share_the_cores_that_they_may_use_and_no_others(cpus, cores):
    peers = [Peer("h", None, "here", frozenset(one)) for one in cpus] + [Peer("h", None, "there", frozenset(range(8)))]
    ranks = [Ranks(rank, len(peers), rank, len(cpus), torch.device("cpu"), tuple(peers)) for rank in range(len(cpus))]
    assert [one.cores for one in ranks] == cores
