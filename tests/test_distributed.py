"""Ranks that are lost: who it was, in a line, and whose word stands in STATUS.json."""

import os
import signal
import socket
import subprocess
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastrot import distributed
from fastrot.distributed import Peer, Ranks, lost_peer_is_a_fault
from fastrot.errors import Fault, LostPeer
from fastrot.runs.log import RunLog, read_status, write_status
from fastrot.runs.run import _record_failure
from fastrot.watch import Process

# as torch 2.11 words them
RESET = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:3809: Connection reset by peer"
)
SLOW = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"


@pytest.fixture
def peer():
    """(ranks of this process and a second, which is not yet ours to train with; the second)."""
    child = subprocess.Popen(["sleep", "1000"])
    here = socket.gethostname()
    both = tuple(Peer(here, Process.of(pid)) for pid in (os.getpid(), child.pid))
    yield Ranks(0, 2, 0, 2, torch.device("cpu"), both), child
    child.kill()
    child.wait()


def said(ranks: Ranks, error: RuntimeError) -> str:
    with pytest.raises(LostPeer) as raised, lost_peer_is_a_fault(ranks):
        raise error
    assert "\n" not in str(raised.value) and raised.value.exit_code == 3
    return str(raised.value)


def test_a_killed_rank_is_named_though_nobody_has_asked_for_its_end(peer):
    ranks, child = peer
    child.kill()
    assert said(ranks, RuntimeError(RESET)) == (
        f"rank 1 (process {child.pid}) is gone; start again: a run goes on from its last checkpoint"
    )


def test_a_stopped_rank_is_named(peer):
    ranks, child = peer
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert said(ranks, RuntimeError(SLOW)).startswith(
        f"rank 1 (process {child.pid}) is stopped and did not answer for run.timeout; "
    )


def test_of_a_rank_elsewhere_it_says_what_torch_does(peer, monkeypatch):
    ranks, _ = peer
    monkeypatch.setattr(distributed, "_SEEN_DEAD_S", 0)
    assert said(ranks, RuntimeError(SLOW)).startswith(
        "a rank does not answer within run.timeout (Timed out waiting 3000ms"
    )
    elsewhere = replace(ranks, peers=(ranks.peers[0], ranks.peers[1]._replace(host="there")))
    assert said(elsewhere, RuntimeError(RESET)).startswith(
        "a rank on another machine is gone (Read error [127.0.0.1]:3809: Connection reset by peer); "
    )
    assert "NCCL" in said(elsewhere, dist.DistBackendError("NCCL error: remote process exited"))


def test_another_error_stays_what_it_is(peer):
    with pytest.raises(RuntimeError, match="shapes"), lost_peer_is_a_fault(peer[0]):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(Fault, match="^data$"), lost_peer_is_a_fault(peer[0]):
        raise Fault("data")


def test_another_process_of_the_same_number_is_not_the_one_that_was():
    mine = Process.of(os.getpid())
    assert mine.lives and not mine.stopped
    assert not replace(mine, started="1").lives


def test_a_wait_ends_after_the_limit(tmp_path):
    """Two ranks in one process; the second never comes."""
    store = dist.FileStore(str(tmp_path / "store"), 2)
    groups = []

    def join(rank: int) -> None:
        groups.append(dist.ProcessGroupGloo(dist.PrefixStore("x", store), rank, 2, timedelta(seconds=30)))

    second = threading.Thread(target=join, args=(1,))
    second.start()
    join(0)
    second.join()
    first = next(group for group in groups if group.rank() == 0)
    first._set_default_timeout(timedelta(seconds=0.2))
    alone = Ranks(0, 2, 0, 2, torch.device("cpu"))
    with pytest.raises(LostPeer, match="does not answer within run.timeout"), lost_peer_is_a_fault(alone):
        first.allreduce([torch.ones(3)]).wait()


def test_training_limits_the_wait_and_starting_does_not(monkeypatch):
    limits = []
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda limit: limits.append(limit.total_seconds()))
    distributed.limit_waits(7)
    assert limits == [7] and distributed._WAIT_S >= 24 * 3600


def test_who_failed_by_itself_has_the_last_word(tmp_path):
    ranks, log = Ranks(0, 2, 0, 2, torch.device("cpu")), RunLog(tmp_path)
    _record_failure(LostPeer("rank 1 is gone"), tmp_path, ranks, True, log)
    assert read_status(tmp_path)["reason"] == "LostPeer: rank 1 is gone"
    write_status(tmp_path, "failed", rank=1, reason="Fault: no batch")
    _record_failure(LostPeer("rank 1 is gone"), tmp_path, ranks, True, log)
    assert read_status(tmp_path)["reason"] == "Fault: no batch"
    _record_failure(Fault("rank 0 too"), tmp_path, ranks, True, log)
    assert read_status(tmp_path)["reason"] == "Fault: rank 0 too"
