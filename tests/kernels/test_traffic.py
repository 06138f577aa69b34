"""The table of what a step moves: as the script says it, and as torch's own operations count it."""

import sys
from collections import Counter

import pytest
import torch
from torchvision.models import resnet50

from conftest import ROOT
from fastrot.models.fused_conv import FUSED
from fastrot.profiling.roofline import step_rows


@pytest.fixture(scope="module")
def traffic():
    sys.path.insert(0, str(ROOT / "kernels"))
    import traffic

    sys.path.pop(0)
    return traffic


def test_the_readmes_table_is_the_scripts(traffic):
    assert traffic.text() in traffic.README.read_text(), "python kernels/traffic.py --write"


@pytest.mark.parametrize("arm", ["torch", "fused", "fused_conv", "fused_chain"])
def test_it_is_what_torch_counts_in_the_network(traffic, arm):
    """FLOPs and bytes that another view adds to a traced step, every argument and result of an operation once; to that
    come the passes that cuDNN and torch's norm make a second time."""

    def network():
        model = resnet50(num_classes=traffic.CLASSES)
        return model if arm == "torch" else FUSED[arm](model, None)

    moved, flops = Counter(), 0.0
    for views, sign in ((4, -1), (8, 1)):
        for row in step_rows(network, views, views // 4, traffic.SIDE, torch.bfloat16):
            moved[row.operation] += sign * row.bytes / 4
            flops += sign * row.flops / 4
    stem = traffic.BF16 * 64 * 112**2
    if arm == "torch":
        normed = moved["native_batch_norm"] / 2
        again = 3 * normed + normed - stem  # one pass forward, two backward; gradients, read by two products
    elif arm == "fused":
        again = moved["fastrot::norm_moments"] - stem
    else:  # the 3 x 3s' two gradients are two operations, the first of which is given a map that it does not read
        again = -traffic.BF16 * sum(block.mid for block in traffic.blocks())
    ours = [kernel for kernel in traffic.kernels(arm) if kernel.layer != "weights"]
    assert sum(kernel.flops for kernel in ours) == pytest.approx(flops, rel=1e-4)
    # a pool's argument that its backward pass does not read, rows that a shortcut of stride 2 passes over
    assert sum(kernel.bytes for kernel in ours) == pytest.approx(sum(moved.values()) + again, rel=0.02)


def test_the_largest_maps_are_read_and_written_eight_times_by_the_last_norms_backward_pass(traffic):
    """88 MB of a view: by hand, over the sixteen blocks."""
    passes = [k.bytes for k in traffic.kernels("fused_conv") if k.what in ("bn3: sums", "bn3: gradients")]
    values = 3 * 256 * 56**2 + 4 * 512 * 28**2 + 6 * 1024 * 14**2 + 3 * 2048 * 7**2
    assert sum(passes) == 8 * 2 * values and round(sum(passes) / 1e6) == 88


def test_what_chained_blocks_save_of_the_largest_maps(traffic):
    """By hand: of a block's result, its read by conv1; backward, 3 maps for bn3's sums, 2 more for its residual's
    gradient, and the read of bn3's gradient by a product, less what the joined product reads more. Of a shortcut's
    norm, its result, 2, its sums, 1, and the read of its gradient."""
    of = {arm: sum(k.bytes for k in traffic.kernels(arm)) for arm in ("fused_conv", "fused_chain")}
    every = 3 * 256 * 56**2 + 4 * 512 * 28**2 + 6 * 1024 * 14**2 + 3 * 2048 * 7**2
    strided = 256 * 56**2 + 512 * 28**2 + 1024 * 14**2  # inputs of blocks with a shortcut of stride 2
    shortcuts = strided + 2048 * 7**2  # maps that have one
    handed = every - 2048 * 7**2
    backward = (3 + 2 + 1) * handed - (handed - strided) - (1 - 2 / 4) * strided
    saved = handed + backward - 2 / 16 * handed + (2 + 1 + 1) * shortcuts
    assert of["fused_conv"] - of["fused_chain"] == pytest.approx(2 * saved, rel=1e-3)
    assert round((of["fused_conv"] - of["fused_chain"]) / 1e6) == 77


def test_a_kernel_takes_as_long_as_its_bytes_or_its_products(traffic):
    rates = traffic.Rates(1000, 100, 50)
    assert traffic.Kernel("", "", 2e6, 1e8).seconds(rates) == 2e-6
    assert traffic.Kernel("", "", 1e6, 4e8).seconds(rates) == 4e-6
    assert traffic.Kernel("", "", 1e6, 4e8, ours=True).seconds(rates) == 8e-6
