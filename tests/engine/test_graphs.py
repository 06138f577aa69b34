"""Steps replayed from graphs are the steps themselves: CUDA's part played on the host, and on a GPU by CUDA."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import metrics
from fastrot import config as configs
from fastrot import distributed
from fastrot.data.loader import MicroBatch
from fastrot.distributed import Ranks
from fastrot.engine import StepSettings, make_engine
from fastrot.engine.graphs import WARM_UPS, Graphed
from fastrot.engine.optimizers import build_optimizer
from fastrot.engine.plain import PlainEngine
from fastrot.errors import UserError
from fastrot.runs.arithmetic import deviations, refuse_graphs, uses_graphs
from fastrot.runs.dry_run import _Last
from fastrot.tasks.rotation import RotationTask
from workers.graphs import OnTheHost

STEPS = WARM_UPS + 4


@pytest.fixture
def ranks(monkeypatch):
    """One, and on the host where there is a GPU, too."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    yield distributed.start()
    distributed.end()


def train(ranks, graphed: bool):
    """Two micro-steps of unlike size a step. (sums of each, weights, capture, addresses of the gradients)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    optimizer = build_optimizer(
        "sgd", model, lr=0.05, momentum=0.9, nesterov=False, weight_decay=1e-3, decay_norms=True, trust=0.1
    )
    engine = PlainEngine(model, optimizer, StepSettings(clip=1.0, cuda_graphs=graphed), ranks)
    task = RotationTask((124, 116, 104), (58, 57, 57), torch.float32, ranks.device)

    def learn(views, batch):
        loss, sums = task.loss(engine.module, views, batch)
        engine.backward(loss, batch.views_of_step)
        return sums

    capture = OnTheHost()
    learn = Graphed(learn, ranks.device, capture) if graphed else learn
    generator, taken, places = torch.Generator().manual_seed(1), [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        for n in (3, 2):
            pixels = torch.randint(0, 256, (n, 8, 8, 3), dtype=torch.uint8, generator=generator)
            turns = torch.randint(0, 4, (n, 4), dtype=torch.uint8, generator=generator)
            batch = MicroBatch(pixels, torch.zeros(n, dtype=torch.uint8), turns, None, None, 20)
            taken.append(learn(task.views(batch), batch).clone())
        places.append([p.grad.data_ptr() for p in model.parameters()])
        engine.step()
    return torch.stack(taken), model.state_dict(), capture, places


def test_replayed_steps_learn_what_steps_learn(ranks):
    """Each call is a step: none is run to warm up, none twice; every shape has its graph; gradients stay in place."""
    sums, weights, *_ = train(ranks, graphed=False)
    got, ours, capture, places = train(ranks, graphed=True)
    assert torch.equal(got, sums)
    assert all(torch.equal(ours[name], value) for name, value in weights.items())
    assert capture.captured == 2 and capture.beside_runs == 2 * WARM_UPS
    assert all(place == places[0] for place in places)


def test_later_shapes_take_no_memory_but_the_graphs(monkeypatch):
    """CUDA's allocator played on the host: where each run's forward and backward pass would allocate. A pool takes
    what its own thread asks for, a capture what its stream does; autograd runs on threads of its own, or on none."""
    places, ran, said = ["outside"], [], []

    @contextmanager
    def taking(place):
        places.append(place)
        yield
        places.pop()

    stream, pool = SimpleNamespace(wait_stream=lambda other: None), SimpleNamespace(id=(0, 7))
    for name, stand_in in {
        "Stream": lambda device: stream,
        "current_stream": lambda: stream,
        "stream": lambda one: taking(places[-1]),
        "MemPool": lambda: pool,
        "use_mem_pool": lambda one, device: taking(("pool", one.id)),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph, pool, **_: taking(("capture", pool)),
        "empty_cache": lambda: said.append("emptied"),
        "memory._set_allocator_settings": said.append,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", stand_in)

    def learn(views, batch):
        by_threads = torch._C._is_multithreading_enabled() and places[-1][0] == "pool"
        ran.append((len(views), places[-1], "outside" if by_threads else places[-1]))
        return views

    graphed = Graphed(learn, torch.device("cuda", 0))
    for n in (4, 8):
        for _ in range(WARM_UPS + 2):
            pixels, turns = torch.zeros(1), torch.zeros(n, 4, dtype=torch.uint8)
            graphed(torch.zeros(n), MicroBatch(pixels, pixels, turns, None, None, 20))
    outside, pooled, captured = "outside", ("pool", pool.id), ("capture", pool.id)
    assert ran == [
        *[(4, outside, outside)] * WARM_UPS,
        (4, captured, captured),
        *[(8, pooled, pooled)] * WARM_UPS,
        (8, captured, captured),
    ]
    assert said == ["expandable_segments:True", *["emptied"] * WARM_UPS]


@pytest.mark.parametrize("fixed, then", [(512.0, 512.0), (None, 2.0**15)])
def test_a_graph_finds_the_loss_scale_where_it_was_captured(ranks, fixed, then):
    """An overflow skips the update, and halves the scale but where it is fixed."""
    model, places = nn.Linear(2, 1), set()
    settings = StepSettings("fp16", cuda_graphs=True, loss_scale=fixed)
    engine = make_engine("plain", model, torch.optim.SGD(model.parameters(), 0.1), settings, ranks, {})
    moved = []
    for factor in (1.0, 1e38, 1.0):
        before = model.weight.detach().clone()
        engine.backward(factor * model(torch.ones(1, 2)).sum(), 1)
        engine.step()
        places.add(engine._scaler()._scale.data_ptr())
        moved.append(torch.allclose(before - model.weight, torch.tensor(0.1)))
    assert moved == [True, False, True] and len(places) == 1 and engine._scaler().get_scale() == then


@pytest.mark.parametrize(
    "graphs",
    [
        ["engine.cuda_graphs=true"],
        ["engine.compile=reduce-overhead"],
        ["engine.compile=max-autotune"],
    ],
)
def test_several_ranks_that_synchronise_their_norms_are_refused(graphs):
    config, _ = configs.load(None, graphs)
    two = Ranks(0, 2, 0, 2, torch.device("cuda"))
    with pytest.raises(UserError, match=r"over 2 ranks would capture batch norm's communication"):
        refuse_graphs(config, two, 1)
    refuse_graphs(configs.load(None, [*graphs, "model.sync_batchnorm=false"])[0], two, 1)
    if "cuda_graphs" in graphs[0]:
        refuse_graphs(configs.load(None, ["engine.cuda_graphs=collectives"])[0], two, 1)
    refuse_graphs(config, Ranks(0, 1, 0, 1, torch.device("cuda")), 1)
    with pytest.raises(UserError, match=r"needs a CUDA device, and there is none"):
        refuse_graphs(config, Ranks(0, 1, 0, 1, torch.device("cpu")), 1)


@pytest.mark.parametrize(
    "more, world, device, graphs",
    [
        ([], 1, "cuda", True),
        ([], 1, "cpu", False),
        ([], 2, "cuda", False),
        (["model.sync_batchnorm=false"], 2, "cuda", True),
        (["engine.zero=1"], 1, "cuda", False),
        (["engine.precision=fp16"], 1, "cuda", False),
        (["engine.compile=reduce-overhead"], 1, "cuda", False),
        (["rotation.shuffle_labels=true"], 1, "cuda", False),
    ],
)
def test_auto_replays_where_it_can_and_is_never_refused(more, world, device, graphs):
    config, _ = configs.load(None, ["engine.cuda_graphs=auto", *more])
    ranks = Ranks(0, world, 0, world, torch.device(device))
    assert uses_graphs(config, ranks) is graphs
    if "engine.compile" not in "".join(more):
        refuse_graphs(config, ranks, 2)
    assert ("auto: off" in "".join(deviations(config, ranks))) is (world > 1 and not more)


def test_the_network_is_compiled_in_the_mode_asked_for(narrow, fastrot, images, tmp_path, monkeypatch):
    """And for more shapes than dynamo's 8: three crops of two slices and two held-out batches reach them."""
    compiled, dynamo = [], torch._dynamo.config
    monkeypatch.setattr(
        nn.Module, "compile", lambda _, **options: compiled.append((options["mode"], dynamo.recompile_limit))
    )
    with dynamo.patch(recompile_limit=dynamo.recompile_limit):  # monkeypatch would hide it ever after
        words = [
            "model.arch=resnet18",
            "data.crop=32",
            "optim.images_per_step=4",
            "engine.kind=plain",
            f"data.train={images}",
        ]
        for mode in ("true", "max-autotune-no-cudagraphs", "false"):
            assert fastrot("train", *words, f"run.out={tmp_path}", f"engine.compile={mode}", "--dry-run").code == 0
        assert compiled == [("default", 64), ("max-autotune-no-cudagraphs", 64)]
        done = fastrot("train", *words, f"run.out={tmp_path}", "engine.compile=reduce-overhead", "--dry-run")
        assert done.code == 2 and "engine.compile reduce-overhead needs a CUDA device" in done.errors[0]


def test_the_compilers_graphs_refuse_micro_steps_and_ours_take_them():
    one = Ranks(0, 1, 0, 1, torch.device("cuda"))
    with pytest.raises(UserError, match="engine.compile reduce-overhead keeps gradients .* the next of 2 micro-steps"):
        refuse_graphs(configs.load(None, ["engine.compile=reduce-overhead"])[0], one, 2)
    refuse_graphs(configs.load(None, ["engine.compile=max-autotune-no-cudagraphs"])[0], one, 2)
    refuse_graphs(configs.load(None, ["engine.cuda_graphs=true"])[0], one, 2)


def test_a_dry_run_on_graphs_times_replays_alone(narrow, fastrot, images, tmp_path, monkeypatch):
    """Of both shapes of a step's micro-steps."""
    capture, said = OnTheHost(), []
    monkeypatch.setattr("fastrot.runs.build.refuse_graphs", lambda *_: None)
    monkeypatch.setattr("fastrot.engine.graphs.Capture", lambda device: capture)
    write = _Last.write
    monkeypatch.setattr(
        _Last, "write", lambda log, values: (said.append((capture.captured, capture.beside_runs)), write(log, values))
    )
    done = fastrot(
        "train", "model.arch=resnet18", "data.crop=32", "optim.images_per_step=7", "engine.images_per_micro_step=4",
        "engine.kind=plain", "engine.cuda_graphs=true", f"data.train={images}", f"run.out={tmp_path}", "--dry-run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert said == [(2, 2 * WARM_UPS)] * 2


@pytest.mark.gpu
def test_a_second_shape_takes_hardly_more_of_the_gpu():
    """By what torch has reserved, after a batch and after one that is an image larger."""
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.Sequential(nn.Conv2d(4, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()).to(device)

    def learn(views, batch):
        loss = model(views).square().mean()
        loss.backward()
        return loss.detach()

    graphed, reserved = Graphed(learn, device), []
    for n in (32, 33):
        for _ in range(WARM_UPS + 2):
            views, turns = (
                torch.rand(n, 4, 224, 224, device=device),
                torch.zeros(n, 4, dtype=torch.uint8, device=device),
            )
            graphed(views, MicroBatch(turns, turns, turns, None, None, n))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(device))
    assert reserved[1] < 1.25 * reserved[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "norm, arch",
    [("torch", "resnet18"), ("fused", "resnet18"), ("fused_conv", "resnet50"), ("fused_chain", "resnet50")],
)
@pytest.mark.parametrize("more", [[], ["engine.images_per_micro_step=4"], ["data.crop_by_epoch={0: 32, 8: 48}"]])
def test_a_run_on_graphs_is_the_run(fastrot, images, tmp_path, more, norm, arch):
    """Losses, evaluated accuracies and gradient norms of ten epochs; micro-steps and crops of several sizes."""
    words = [
        "train", f"model.arch={arch}", "data.crop=64", "optim.images_per_step=7", "optim.epochs=12", "optim.lr=0.01",
        "optim.warmup_epochs=1", "run.log_every=1", "run.tensorboard=false", "engine.kind=plain",
        "engine.deterministic=true", f"engine.norm={norm}", f"data.train={images}", f"data.val={images}", *more,
    ]  # fmt: skip
    runs = []
    for graphs in ("false", "true"):
        out = tmp_path / graphs
        assert fastrot(*words, f"run.out={out}", f"engine.cuda_graphs={graphs}").code == 0
        runs.append([{k: v for k, v in line.items() if "loss" in k or k == "grad_norm"} for line in metrics(out)])
    assert len(runs[0]) > 12
    for want, got in zip(*runs, strict=True):
        assert got == pytest.approx(want, rel=1e-3)
