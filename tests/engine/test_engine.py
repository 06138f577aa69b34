"""Engines on two uneven ranks against plain single-process torch on the whole batch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastrot.engine import StepSettings
from fastrot.engine.buckets import Buckets
from fastrot.engine.deepspeed import merged, settings_to_json
from fastrot.errors import UserError
from fastrot.models.recompute import recompute_blocks
from fastrot.models.resnet import build_model
from workers.ranks import as_ranks
from workers.steps import IMAGES, STEPS, batch, bottlenecks, network, work

EXACT = [
    "plain-fp32-0-sgd",
    "deepspeed-fp32-0-sgd",
    "deepspeed-fp32-1-sgd",
    "plain-fp32-0-sgd-clip",
    "deepspeed-fp32-0-sgd-clip",
    "deepspeed-fp32-1-sgd-clip",
    "plain-fp32-0-sgd-micro",
    "deepspeed-fp32-0-sgd-micro",
    "deepspeed-fp32-1-sgd-micro",
    "plain-fp32-0-sgd-fused",
    "deepspeed-fp32-0-sgd-fused",
    "plain-fp32-0-sgd-bottlenecks",
    "deepspeed-fp32-0-sgd-bottlenecks",
    "plain-fp32-0-sgd-graphed",
    "deepspeed-fp32-0-sgd-graphed",
    "plain-fp32-0-sgd-bottlenecks-graphed",
    "plain-fp32-0-sgd-bottlenecks-chained",
    "deepspeed-fp32-0-sgd-bottlenecks-chained-graphed",
    "deepspeed-fp32-0-sgd-micro-graphed",
]
GROUPED = [
    "plain-fp32-0-sgd-grouped",
    "plain-fp32-0-sgd-bottlenecks-grouped",
    "deepspeed-fp32-0-sgd-bottlenecks-graphed-grouped",
]
BUCKETS = [
    "plain-fp32-0-sgd-small",
    "plain-fp32-0-sgd-whole",
    "plain-fp32-0-sgd-micro-small",
    "plain-fp32-0-sgd-micro-whole",
    "deepspeed-fp32-0-sgd-small",
    "deepspeed-fp32-0-sgd-whole",
    "deepspeed-fp32-0-sgd-micro-small",
    "deepspeed-fp32-0-sgd-micro-whole",
    "deepspeed-fp32-1-sgd-micro-small",
    "deepspeed-fp32-1-sgd-micro-whole",
    "plain-fp32-0-sgd-fused-small",
    "plain-fp32-0-sgd-compiled-small",
    "plain-fp32-0-sgd-compiled-whole",
    "deepspeed-fp32-0-sgd-compiled-small",
    "plain-fp16-0-sgd-small",
    "plain-fp16-0-sgd-whole",
]
LARS = ["plain-fp32-0-lars", "deepspeed-fp32-0-lars"]
LOW = [
    "plain-bf16-0-sgd",
    "deepspeed-bf16-0-sgd",
    "deepspeed-bf16-1-sgd",
    "plain-fp16-0-sgd",
    "deepspeed-fp16-0-sgd",
    "plain-fp16-0-sgd-graphed",
    "deepspeed-fp16-0-sgd-graphed",
]


@pytest.fixture(scope="module")
def results(made_once):
    modes = [*EXACT, *BUCKETS, *LARS, *LOW]
    folder = made_once("steps", lambda folder: as_ranks(2, work, folder / "results.pt", modes))
    return torch.load(folder / "results.pt", weights_only=True)


def oracle(clip: float | None, model: nn.Module):
    """One process, torch's own batch norm and SGD, the mean loss of the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        images, target = batch(step)
        loss = nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
        losses.append(loss.item() * IMAGES)
    momenta = {f"momentum_buffer/{n}": optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    return losses, norms, model.state_dict(), momenta


@pytest.mark.parametrize("mode", [*EXACT, *(mode for mode in BUCKETS if "fp32" in mode)])
def test_two_uneven_ranks_are_one_process_on_the_whole_batch(results, mode):
    losses, norms, weights, momenta = oracle(
        0.3 if "clip" in mode else None, bottlenecks() if "bottlenecks" in mode else network("micro" in mode)
    )
    got = results[mode]["whole"]
    torch.testing.assert_close(got["losses"], losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["norms"], norms, rtol=1e-3, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in momenta.items():
        torch.testing.assert_close(got["momenta"][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_no_shared_memory_outlives_the_ranks(results):
    assert not results["left in memory"]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Of four ranks in two groups."""
    out = tmp_path_factory.mktemp("steps") / "grouped.pt"
    as_ranks(4, work, out, GROUPED)
    return torch.load(out, weights_only=True)


def oracle_of_groups(model: nn.Module):
    """One process: each group's images through torch's own batch norm, with running statistics of its own, and the
    gradient of the whole batch's mean loss; then the mean of the statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False)
    losses = []
    for step in range(STEPS):
        images, target = batch(step)
        optimizer.zero_grad()
        before, after, total = copy.deepcopy(dict(model.named_buffers())), [], 0.0
        for mine in (slice(0, 3), slice(3, 7)):
            model.load_state_dict(before, strict=False)
            loss = nn.functional.cross_entropy(model(images[mine]), target[mine], reduction="sum") / IMAGES
            loss.backward()
            total += loss.item() * IMAGES
            after.append(copy.deepcopy(dict(model.named_buffers())))
        model.load_state_dict({name: (after[0][name] + after[1][name]) / 2 for name in before}, strict=False)
        optimizer.step()
        losses.append(total)
    return losses, model.state_dict()


@pytest.mark.parametrize("mode", GROUPED)
def test_four_ranks_in_two_groups_are_two_large_norms_and_every_rank_has_their_mean(grouped, mode):
    losses, weights = oracle_of_groups(bottlenecks() if "bottlenecks" in mode else network())
    whole, resumed = grouped[mode]["whole"], grouped[mode]["resumed"]
    torch.testing.assert_close(whole["losses"], losses, rtol=1e-4, atol=1e-5)
    for name, value in weights.items():
        got = whole["weights"][name]
        torch.testing.assert_close(got, value.to(got.dtype), rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(got, resumed["weights"][name]), name
    assert whole["alike"] and resumed["alike"] and resumed["losses"] == whole["losses"][2:]


@pytest.mark.parametrize("mode", [mode.removesuffix("-whole") for mode in BUCKETS if mode.endswith("-whole")])
def test_buckets_average_to_the_bit_what_one_piece_does(results, mode):
    small, whole = (results[f"{mode}-{size}"]["whole"] for size in ("small", "whole"))
    assert small["losses"] == whole["losses"] and small["norms"] == whole["norms"]
    for part in ("weights", "momenta"):
        for name, value in whole[part].items():
            assert torch.equal(small[part][name], value), name


def test_every_gradient_is_averaged_once_a_step(results):
    """However many micro-steps it has."""
    gradients = sum(p.numel() for p in network(micro=True).parameters())
    for mode in BUCKETS:
        if "-0-" in mode and "micro" in mode:
            assert results[mode]["whole"]["reduced"] == [gradients] * STEPS, mode


@pytest.fixture
def sent(monkeypatch):
    """Sizes of what goes to a second rank that is like the first."""
    sizes = []

    def all_reduce(flat, async_op):
        sizes.append(flat.numel())
        flat *= 2
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    return sizes


def test_a_bucket_is_on_its_way_before_the_first_layers_gradient_is_there(sent):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
    parameters = list(model.parameters())
    buckets = Buckets(parameters, 64 / 2**20, 2)
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert not sent  # not the step's last
    model.zero_grad()
    want = torch.autograd.grad(model(x).sum(), parameters)
    buckets.expect()
    before_first = []
    parameters[0].register_hook(lambda _: before_first.extend(sent))
    model(x).sum().backward()
    assert before_first == [21] and sent == [21, 16]
    buckets.finish()
    assert sent == [21, 16]
    for parameter, gradient in zip(parameters, want, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_blocks_that_are_computed_again_give_each_gradient_once(sent):
    model = recompute_blocks(build_model("resnet18", 4, 0))
    parameters = list(model.parameters())
    buckets = Buckets(parameters, 4.0, 2)
    buckets.expect()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    want = [p.grad.clone() for p in parameters]
    assert len(sent) > 4 and sum(sent) == sum(p.numel() for p in parameters)
    buckets.finish()
    for parameter, gradient in zip(parameters, want, strict=True):
        assert torch.equal(parameter.grad, gradient) and parameter.grad.stride() == parameter.stride()


def test_deepspeeds_lars_is_plain_torchs(results):
    plain, deep = (results[mode]["whole"] for mode in LARS)
    torch.testing.assert_close(deep["losses"], plain["losses"], rtol=1e-5, atol=1e-6)
    assert plain["losses"] != results["plain-fp32-0-sgd"]["whole"]["losses"]


@pytest.mark.parametrize("mode", LOW)
def test_low_precision_stays_near_fp32_and_keeps_fp32_weights(results, mode):
    got = results[mode]["whole"]
    want = results["plain-fp32-0-sgd"]["whole"]["losses"]
    assert all(value.dtype == torch.float32 for name, value in got["weights"].items() if "num_batches" not in name)
    torch.testing.assert_close(got["losses"], want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", [*EXACT, *BUCKETS, *LARS, *LOW])
def test_resumed_from_the_middle_is_equal_bit_for_bit(results, mode):
    whole, resumed = results[mode]["whole"], results[mode]["resumed"]
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["norms"] == whole["norms"][2:]
    for part in ("weights", "momenta"):
        assert whole[part].keys() == resumed[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), name


@pytest.mark.parametrize(
    "zero, mib, given", [(0, 25.0, None), (1, 0.0, None), (1, 25.0, 25 * 2**20 // 4), (1, 1e-9, 1)]
)
def test_zero_1_reads_the_buckets_size_in_elements(zero, mib, given):
    json = settings_to_json(StepSettings(zero=zero, bucket_mb=mib), 2)
    assert json["zero_optimization"].get("reduce_bucket_size") == given


def test_a_deepspeed_config_may_add_but_not_contradict(tmp_path):
    ours = settings_to_json(StepSettings("bf16", 0, 1.0), 2)
    batch_keys = {"train_batch_size": 128, "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 64}
    file = tmp_path / "ds.json"
    file.write_text(
        '{"train_batch_size": 128, "gradient_accumulation_steps": "auto", "wall_clock_breakdown": true,'
        ' "zero_optimization": {"stage": 0, "reduce_bucket_size": 1000}, "gradient_clipping": 1.0}'
    )
    out = merged(ours, str(file), batch_keys, 1.0)
    assert out["wall_clock_breakdown"] is True
    assert out["zero_optimization"] == {"stage": 0, "reduce_bucket_size": 1000}
    assert out["train_batch_size"] == 2  # ours: constant, whatever the slices
    file.write_text(
        '{"train_batch_size": 64, "zero_optimization": {"stage": 2}, "fp16": {"enabled": true},'
        ' "optimizer": {"type": "Adam"}, "gradient_clipping": 5}'
    )
    with pytest.raises(UserError) as error:
        merged(ours, str(file), batch_keys, 1.0)
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    for words in (
        "train_batch_size is 64, the YAML makes it 128",
        "zero_optimization.stage is 2",
        "fp16 is set in the YAML",
        "optimizer is set in the YAML",
        "gradient_clipping is 5, the YAML makes it 1.0",
    ):
        assert any(words in line for line in lines), words
    for text in ("[1]", "{"):
        file.write_text(text)
        with pytest.raises(UserError, match="--deepspeed_config"):
            merged(ours, str(file), batch_keys, None)
