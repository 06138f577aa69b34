"""Norms whose ranks read one another's memory compute what they do by messages; CUDA's part played on the host."""

import copy
from types import SimpleNamespace

import pytest
import torch

from fastrot import config as configs
from fastrot import distributed
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.models.fused_conv import fuse_convs
from fastrot.models.in_node import InNode
from fastrot.models.over_ranks import Group, neighbours
from fastrot.models.sync_batchnorm import synchronise_batchnorm
from fastrot.runs.arithmetic import refuse_symmetric_memory
from fastrot.runs.build import Job
from workers import shared_memory
from workers.ranks import as_ranks
from workers.steps import bottlenecks


def steps_by_messages_and_by_memory(out):
    """Two steps of three uneven ranks: everything, by kind, as this rank has it."""
    ranks, steps = distributed.start(), {}
    group = neighbours(1, 60)
    with shared_memory.played():
        groups = {"messages": group, "memory": InNode.of(group, ranks.device, 60)}
    for kind, synchronise in {"torch": synchronise_batchnorm, "fused_conv": fuse_convs}.items():
        for way, over_ranks in groups.items():
            model = synchronise(bottlenecks(), over_ranks)
            for step in range(2):
                generator = torch.Generator().manual_seed(10 * step + ranks.rank)
                model(torch.randn(3 + ranks.rank, 3, 9, 9, generator=generator)).square().sum().backward()
            gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
            steps[kind, way] = copy.deepcopy(gradients | dict(model.named_buffers()))
    torch.save(steps, out.with_suffix(f".{ranks.rank}"))
    distributed.end()


@pytest.mark.slow  # an option that is off until a device has shown it
def test_norms_that_read_memory_compute_what_they_do_by_messages(tmp_path):
    as_ranks(3, steps_by_messages_and_by_memory, tmp_path / "steps")
    for rank in range(3):
        steps = torch.load(tmp_path / f"steps.{rank}")
        for kind in ("torch", "fused_conv"):
            want, got = steps[kind, "messages"], steps[kind, "memory"]
            assert want.keys() == got.keys()
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class _Stretch:
    """A rank's handle of two ranks' memory. passed: what the others do between a barrier and this rank's reading."""

    def __init__(self, rank, memory, passed):
        self.rank, self._memory, self._passed = rank, memory, passed

    def get_buffer(self, rank, sizes, dtype):
        return self._memory[rank][: sizes.numel()].view(sizes)

    def barrier(self, timeout_ms):
        self._passed()


def test_a_rank_that_runs_ahead_spoils_no_message():
    """Rank 1 finds each message of rank 0's, though rank 0 has written the next one by then."""
    memory, numbers = torch.zeros(2, 2, 4), iter(range(100))

    def said_by_rank_0():
        ahead.gathering(torch.tensor([float(next(numbers))]))

    ahead, late = InNode("", 2), InNode("", 2)
    for rank, here in enumerate((ahead, late)):
        here._timeout_ms, here._shared = 0, [_Stretch(rank, stretch, said_by_rank_0) for stretch in memory]
    said_by_rank_0()
    assert [late.gathering(torch.tensor([-1.0]))().tolist() for _ in range(6)] == [[[n], [-1.0]] for n in range(6)]


@pytest.mark.parametrize(
    "words, world, device, line",
    [
        ([], 2, "cpu", "needs CUDA devices"),
        ([], 16, "cuda", "over 16 ranks, not all of which are on one node of 8"),
        (["engine.compile=true"], 8, "cuda", "a compiler does not see what ranks read"),
    ],
)
def test_what_cannot_read_memory_is_one_line(words, world, device, line):
    config, _ = configs.load(None, ["engine.symmetric_memory=true", *words])
    with pytest.raises(UserError, match=line):
        refuse_symmetric_memory(config, Ranks(0, world, 0, min(world, 8), torch.device(device)))


def test_one_rank_and_groups_within_a_node_are_not_refused():
    config, _ = configs.load(
        None, ["engine.symmetric_memory=true", "model.norm_views=512", "optim.images_per_step=1024"]
    )
    refuse_symmetric_memory(config, Ranks(0, 16, 0, 8, torch.device("cuda")))
    refuse_symmetric_memory(config, Ranks(0, 1, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize("on", [False, True])
def test_a_run_reads_memory_where_it_is_asked_to(monkeypatch, on):
    config, _ = configs.load(None, [f"engine.symmetric_memory={str(on).lower()}", "run.timeout=60"])
    group = Group("all", 2)
    monkeypatch.setattr("fastrot.runs.build.neighbours", lambda groups, timeout_s: group if groups == 1 else None)
    monkeypatch.setattr(InNode, "of", lambda *words: words)
    job = SimpleNamespace(config=config, numbers=SimpleNamespace(norm_groups=1), ranks=SimpleNamespace(device="cuda:0"))
    assert Job._norm_group(job) == ((group, "cuda:0", 60.0) if on else group)
    job.numbers.norm_groups = 2  # each rank by itself
    assert Job._norm_group(job) is None


def test_gpus_that_share_no_memory_are_one_line(monkeypatch):
    def none(*_, **__):
        raise RuntimeError("CUDASymmetricMemory: no peer access\nat line 3")

    monkeypatch.setattr("torch.distributed._symmetric_memory.empty", none)
    with pytest.raises(UserError, match=r"share no memory \(CUDASymmetricMemory: no peer access\); set it to false"):
        InNode.of(Group("", 2), torch.device("cuda"), 60)
