"""The roofline's counts against published ones and by hand, and its rule."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastrot.models.fused_conv import fuse_convs
from fastrot.models.fused_norm import fuse_norms
from fastrot.models.resnet import build_model
from fastrot.profiling import roofline
from fastrot.profiling.roofline import Rates, Row, Work, measure_rates, step_rows


# Multiply-adds of one view at 224, as torchvision's model pages give them for 1,000 classes.
@pytest.mark.parametrize(
    "arch, giga, width", [("resnet18", 1.814, 512), ("resnet34", 3.664, 512), ("resnet50", 4.089, 2048)]
)
def test_the_forward_pass_counts_what_torchvision_publishes(arch, giga, width):
    rows = step_rows(lambda: build_model(arch, 4, 0), 2, 1, 224, torch.bfloat16)
    forward = sum(row.flops for row in rows if not row.backward and row.layer != "update")
    backward = sum(row.flops for row in rows if row.backward)
    stem = sum(row.flops for row in rows if row.layer == "conv1" and not row.backward)
    assert forward / 2 / 2 == pytest.approx(giga * 1e9 - 996 * width, rel=1e-3)
    assert backward == 2 * forward - stem  # nothing asks for the gradient of the views


def test_bytes_are_each_operation_s_arguments_and_results():
    class Tiny(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))

    rows = step_rows(Tiny, 5, 2, 4, torch.float32)
    views, maps, filters, matrix = 5 * 3 * 16, 5 * 8 * 16, 8 * 27, 8 * 16 * 4
    by = {(row.layer, row.operation): row for row in rows}
    assert by["views", "rotate_views"].bytes == 2 * 3 * 16 + 4 * views
    assert by["0", "convolution"].bytes == 4 * (views + filters + maps)
    assert by["0", "convolution"].flops == 2 * 5 * 16 * filters
    assert by["1", "relu"].bytes == 4 * 2 * maps
    assert by["3", "addmm"].flops == 2 * 5 * matrix
    assert by["update", "sgd"].bytes == 4 * 5 * (filters + matrix + 4)


def test_fused_norms_move_fewer_bytes_and_compute_the_same():
    plain, fused = (
        step_rows(build, 8, 2, 64, torch.bfloat16)
        for build in (
            lambda: build_model("resnet50", 4, 0),
            lambda: fuse_norms(build_model("resnet50", 4, 0), over_ranks=None),
        )
    )
    assert sum(row.flops for row in fused) == sum(row.flops for row in plain)
    moved = [sum(row.bytes for row in rows if row.operation != "convolution") for rows in (plain, fused)]
    assert moved[1] < moved[0]  # though torch's norm counts as one operation, whose passes cannot be seen
    count = Counter()
    for row in (*plain, *fused):
        count[row.operation] += row.bytes
    norms, blocks = count["native_batch_norm"] / 2, count["add_"] / 3  # what the maps of all norms, of all blocks hold
    stem = 8 * 64 * 32 * 32 * 2
    others, windows = norms - stem, stem / 4  # the stem's is the pool's: besides, a byte for the place of two
    for operation, bytes_ in (
        ("norm_moments", norms),
        ("norm_apply", 2 * others + blocks),
        ("norm_gradient_sums", 2 * others + blocks + 2 * windows),
        ("norm_gradients", 3 * others + 2 * blocks),
        ("pool_forward", stem + 2.5 * windows),
        ("pool_gradient", 2 * stem + 1.5 * windows),
    ):
        assert count[f"fastrot::{operation}"] == pytest.approx(bytes_, rel=0.03), operation


def test_norms_in_convolutions_move_fewer_bytes_still_and_compute_the_same():
    """Beside fused norms: no pass for the moments but the stem's and bn2's, bn2's result neither written nor read, its
    gradients' sums without a pass, and none to add the gradients of a block's input."""
    fused, ours = (
        step_rows(lambda f=fuse: f(build_model("resnet50", 4, 0), over_ranks=None), 32, 8, 224, torch.bfloat16)
        for fuse in (fuse_norms, fuse_convs)
    )
    assert sum(row.flops for row in ours) == sum(row.flops for row in fused)
    before, after = Counter(), Counter()
    for count, rows in ((before, fused), (after, ours)):
        for row in rows:
            count[row.operation] += row.bytes
    stem = 32 * 64 * 112 * 112 * 2
    # 3, 4, 6 and 3 blocks, each layer's narrow maps half those of the layer before
    bn2 = 32 * 64 * 56 * 56 * 2 * (3 + 4 / 2 + 6 / 4 + 3 / 8)
    for operation, left in (
        ("moments", stem + bn2),
        ("apply", before["fastrot::norm_apply"] - 2 * bn2),
        ("gradient_sums", before["fastrot::norm_gradient_sums"] - 2 * bn2),
        ("gradients", before["fastrot::norm_gradients"]),
    ):
        assert after[f"fastrot::norm_{operation}"] == pytest.approx(left, rel=0.03), operation
    assert after["add"] < 0.01 * before["add"] and after.total() < before.total()


def test_each_operation_is_bound_by_the_slower_of_the_two():
    rows = [Row("a", "mm", False, flops=100, bytes=10), Row("b", "relu", False, flops=0, bytes=50)]
    assert Rates(flops=10, bytes=10).seconds(rows) == 10 + 5
    assert Rates(flops=1000, bytes=10).seconds(rows) == 1 + 5
    work = Rates(flops=10, bytes=10).work(rows)
    assert work + work == Work(flops=200, bytes=120, matmul_s=20, least_s=30)
    assert work.reached(30) == {"mfu": 1 / 3, "roof_fraction": 1 / 2}
    assert Work().reached(30) == {}, "nothing counted"


@pytest.mark.parametrize("run_s", [0.36e-3, 0.14])
def test_a_gpus_rates_are_its_own_once_its_clocks_are_up(monkeypatch, run_s):
    """On a card that begins at a third of its speed, and whose host takes 20 us to see an end."""

    class Card:
        now = 0.0

        def work(self):
            self.now += run_s * (3 if self.now < 0.2 else 1)

        def synchronize(self, device):
            self.now += 20e-6

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = card.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    card = Card()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", card.synchronize)
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: card.now))
    assert roofline._least_seconds(card.work, torch.device("cuda")) == pytest.approx(run_s)
    assert card.now < 2


def test_rates_are_measured_on_the_device_at_hand():
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert rates.flops > 1e8 and rates.bytes > 1e7
