"""What a run would be: the plan before anything large is made, its memory against what torch allocates, what fits."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from conftest import write_folder
from fastrot import distributed, machine
from fastrot.config import load
from fastrot.data.build import open_manifest
from fastrot.distributed import Ranks
from fastrot.errors import Fault, UserError
from fastrot.models.recompute import recompute_blocks
from fastrot.models.resnet import build_model
from fastrot.profiling.memory import peak_of_step
from fastrot.runs import build, memory
from fastrot.runs.arithmetic import arithmetic
from fastrot.runs.memory import GIB, Memory, admit, running_out_is_a_fault

SMALL = ["model.arch=resnet18", "engine.kind=plain", "data.crop=16", "optim.images_per_step=6", "optim.lr=0.05",
         "optim.epochs=3", "optim.warmup_epochs=0", "run.tensorboard=false"]  # fmt: skip


def allocated(model: nn.Module, views: int, side: int, autocast: bool) -> int:
    """Bytes that torch's own allocator holds at the height of a step beside the weights, as its profiler saw them."""
    x = torch.zeros(views, 3, side, side).to(memory_format=torch.channels_last)
    x = x.bfloat16() if autocast else x
    model.to(memory_format=torch.channels_last)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x)
        F.cross_entropy(logits.float(), torch.zeros(views, dtype=torch.long)).backward()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak + x.nbytes


@pytest.mark.parametrize(
    "change, autocast, side",
    [
        (lambda model: model, False, 64),
        (recompute_blocks, False, 64),
        (lambda model: model, True, 64),
    ],
    ids=["fp32", "recompute", "bf16"],
)
def test_the_estimate_is_what_torch_allocates_within_a_tenth(change, autocast, side):
    """And never above it: the kernels' own workspaces are missing."""
    model, views = change(build_model("resnet18", 4, 0)), 32
    estimated = peak_of_step(model, views, 3, side, torch.bfloat16 if autocast else torch.float32)
    if autocast:
        estimated += 2 * sum(p.numel() for p in model.parameters())  # what autocast casts
    assert 0.9 < estimated / allocated(model, views, side, autocast) <= 1.0


def test_only_the_heads_of_a_frozen_backbone_keep_maps():
    model = build_model("resnet18", 4, 0)
    whole = peak_of_step(model, 8, 3, 64, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    assert peak_of_step(model, 8, 3, 64, torch.float32) < whole / 4
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters()), "the model itself stays"


@pytest.fixture
def job(images, tmp_path, monkeypatch):
    """A function: the job of these settings, where so many bytes are left."""
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path))
    ranks = distributed.start()

    def make(left: int, *words: str) -> build.Job:
        monkeypatch.setattr(machine, "memory_left", lambda: left)
        config = load(None, [*SMALL, f"data.train={images}", *words])[0]
        manifest = open_manifest(str(images), config, ranks, "data.train")
        return build.Job(config, ranks, manifest, None, None, None, lambda line: None)

    yield make
    distributed.end()


@pytest.mark.slow
def test_what_is_proposed_fits_and_twice_as_much_would_not(job):
    words = ("data.crop=96", "optim.images_per_step=64")
    need = job(2**40, *words).memory
    assert need.enough and need.fits == 64
    for left in (need.needed // 2, need.needed // 3):
        short = job(left, *words).memory
        assert not short.enough and 2 <= short.fits < 64
        fewer = job(left, *words, f"engine.images_per_micro_step={short.fits}")
        assert fewer.memory.enough, fewer.memory.says()
        assert fewer.memory.norm == short.fits_norm == fewer.numbers.norm_views
        more = job(left, *words, f"engine.images_per_micro_step={2 * short.fits + 2}").memory
        assert more.needed > memory._ROOM * left, "half of what would fit is too few"
    assert job(need.state, *words).memory.fits is None


def test_nothing_large_is_made_and_no_flag_set_before_it_is_asked_for(job, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("too early")

    flags = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for name in ("make_engine", "make_loader"):
        monkeypatch.setattr(build, name, refuse)
    monkeypatch.setattr(build.roofline, "measure_rates", refuse)
    made = job(2**40, "engine.precision=tf32")
    assert made.memory.needed > 0
    made.close()
    assert flags == (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())


def test_cudnn_may_measure_every_algorithm_it_has(monkeypatch):
    """torch lets it measure the first ten; 0 is no limit."""
    cudnn = SimpleNamespace(benchmark=None, benchmark_limit=10, allow_tf32=None)
    monkeypatch.setattr("torch.backends.cudnn", cudnn)
    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda on: None)
    build.set_torch_flags(load(None, [])[0])
    assert cudnn.benchmark and cudnn.benchmark_limit == 0


NEED = Memory(2 * GIB, 40 * GIB, GIB, "cpu", 20 * GIB, 0, 20 * GIB, 128, 224, 512, 48, 168)


def test_a_run_that_the_host_would_kill_is_refused_with_what_fits():
    words = (
        "a rank's 128 images of 224 at once need about 43.0 GiB of host memory, and 20.0 GiB are left: "
        r"engine.images_per_micro_step=48 would fit \(batch norm then sees 168 views, not 512\)"
    )
    with pytest.raises(UserError, match=f"^{words}$"):
        admit(NEED, print)
    with pytest.raises(UserError, match="not even 2 images at once would fit; lower data.crop"):
        admit(replace(NEED, fits=None), print)
    admit(replace(NEED, left=43 * GIB), print)


def test_on_a_gpu_it_is_a_line_but_for_the_host():
    said = []
    admit(replace(NEED, device="cuda"), said.append)
    (line,) = said
    assert "need about 43.0 GiB of GPU memory" in line and line.endswith("trying it all the same")
    with pytest.raises(UserError, match="1.0 GiB of the host's, and 0.5 are left"):
        admit(replace(NEED, device="cuda", on_host=GIB, host_left=GIB // 2), said.append)


@pytest.mark.parametrize(
    "device, words, on_device, on_host",
    [
        ("cpu", [], 6, 0),
        ("cuda", [], 6, 0),
        ("cuda", ["data.decode_on=cpu"], 4, 2),
        ("cuda", ["data.decode=turbo"], 4, 2),
    ],
)
def test_decoded_batches_wait_on_the_device_but_for_those_at_a_decoder_of_the_cpu(
    monkeypatch, device, words, on_device, on_host
):
    """Three ahead, one that the loader holds, and two at the decoder."""
    monkeypatch.setattr(memory, "_left", lambda ranks: (2**40, 2**40))
    monkeypatch.setattr(memory, "settings_of", lambda *_: SimpleNamespace(prefetch=3))
    ranks = Ranks(0, 1, 0, 1, torch.device(device))
    config = load(None, [*SMALL, *words])[0]
    found = memory.estimate(config, arithmetic(config, 1, 100), ranks, build_model("resnet18", 4, 0), torch.float32)
    batch = 6 * 16 * 16 * 3
    assert (found.ahead, found.on_host) == (on_device * batch, on_host * batch)
    assert found.needed == found.state + found.maps + found.ahead


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And many words."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError("no memory for a batch"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_runs_out_is_a_fault_of_one_line(error):
    with pytest.raises(Fault) as raised, running_out_is_a_fault(replace(NEED, fits=128)):
        raise error
    line = str(raised.value)
    assert "out of memory: a rank's 128 images of 224" in line and "images_per_micro_step=64 or less" in line
    assert "\n" not in line


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError, dist.DistBackendError, NotImplementedError])
def test_another_error_is_not_a_lack_of_memory(kind):
    """A lost peer's by NCCL, or an illegal access, stay what they are."""
    with pytest.raises(kind, match="another"), running_out_is_a_fault(NEED):
        raise kind("another")


def test_the_plan_comes_first_and_no_step_is_run_where_it_would_not_fit(images, fastrot, monkeypatch):
    monkeypatch.setattr(machine, "memory_left", lambda: 120 * 2**20)
    monkeypatch.setattr(build, "make_engine", None)  # it would fail
    done = fastrot("train", *SMALL, f"data.train={images}", "data.crop=64", "--dry-run", "--json")
    assert done.json["memory_estimate_gib"] > done.json["memory_left_gib"] == pytest.approx(120 / 1024)
    assert "expected_hours" not in done.json
    order = [
        done.err.index(words) for words in ("optim.images_per_step", "memory of a rank", "too little", "no step is")
    ]
    assert order == sorted(order)


def test_training_refuses_what_the_host_would_kill(images, tmp_path, fastrot, monkeypatch):
    monkeypatch.setattr(machine, "memory_left", lambda: 120 * 2**20)
    done = fastrot("train", *SMALL, f"data.train={images}", f"run.out={tmp_path / 'r'}", "data.crop=64")
    assert done.code == 2 and len(done.errors) == 1
    assert "need about 0." in done.errors[0] and "would fit" in done.errors[0]


def test_what_is_compiled_is_said_before_it_is(job):
    from fastrot.runs.arithmetic import deviations

    config = load(None, ["engine.compile=true", "data.crop_by_epoch={0: 160, 3: 192}"])[0]
    (line,) = deviations(config, Ranks(0, 1, 0, 1, torch.device("cpu")))
    assert line.startswith("engine.compile: the network is compiled in the first step of each of 3 crop sizes")


def test_memory_left_knows_both_versions_of_control_groups(tmp_path):
    def group(folder: Path, names: tuple[str, str, str], most: str, used: int, files: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (most, used, f"anon 5\n{names_of_files(names)} {files}"), strict=True):
            (folder / name).write_text(f"{value}\n")

    def names_of_files(names: tuple[str, str, str]) -> str:
        return "inactive_file" if names is two else "total_inactive_file"

    two = ("memory.max", "memory.current", "memory.stat")
    one = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    group(tmp_path / "a/b", two, "max", 10, 0)
    group(tmp_path / "a", two, "1000", 300, 100)
    group(tmp_path / "memory/c", one, "500", 450, 25)
    group(tmp_path / "memory", one, str(2**63 - 4096), 450, 25)
    assert machine._left_in_groups("0::/a/b\n", tmp_path) == [800]
    assert min(machine._left_in_groups("4:memory:/c\n1:name=systemd:/\n", tmp_path)) == 75
    assert machine._left_in_groups("0::/not/seen/here\n", tmp_path) == []
    assert 0 < machine.memory_left() < 2**50


def test_a_dry_run_of_fine_tuning_says_its_plan(tmp_path, fastrot):
    pytest.importorskip("fastrot.runs.finetune")
    from fastrot.runs.dry_run import dry_run
    from fastrot.runs.finetune import FinetuneJob
    from fastrot.runs.transfer import start

    source = write_folder(tmp_path / "d", classes=2, per_class=6)
    config, sources = load(None, [*SMALL, f"data.train={source}", "rotation.views=one"])
    ranks = distributed.start()
    try:
        begin = start("finetune", None, 0, config, ranks)
        result = dry_run(begin.config, sources, ranks, None, lambda *parts: FinetuneJob(begin, *parts))
    finally:
        distributed.end()
    assert result["views_per_step"] == 6 and result["expected_hours"] > 0 and "mfu" not in result
    assert arithmetic(config, 1, 12).steps == result["steps"]
